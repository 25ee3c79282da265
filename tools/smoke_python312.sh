#!/usr/bin/env bash
# Python 3.12 gets other versions of jax and flax than 3.11. Where an interpreter is found: install the built wheel,
# train a few steps on 8 fake devices, evaluate and generate, with deprecation warnings of this package as errors.
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() {
  for p in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    if command -v "$p" >/dev/null 2>&1 && "$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
      echo "$p"
      return
    fi
  done
}

python=$(find_python)
if [ -z "$python" ]; then
  echo "smoke: no Python 3.12 on this machine, nothing run"
  exit 0
fi
venv=.venv-3.12
if [ ! -e "$venv/.ready" ] || [ pyproject.toml -nt "$venv/.ready" ]; then
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check .
  touch "$venv/.ready"
else
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall .
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
run() { (cd "$work" && "$OLDPWD/$venv/bin/python" -W error::DeprecationWarning:moe_jax -m moe_jax "$@"); }
run train tiny_switch --workdir run --quiet --json train.steps=3 train.eval_batches=1 train.sample= >"$work/train.json"
run eval run --quiet --json --batches 1 >"$work/eval.json"
run generate run --quiet --json --prompt "The " --tokens 8 >"$work/generate.json"
"$venv/bin/python" - "$work" <<'PY'
import importlib.metadata as m, json, pathlib, sys
train, evaluated, generated = (
    json.loads((pathlib.Path(sys.argv[1]) / f"{n}.json").read_text().splitlines()[-1]) for n in ("train", "eval", "generate")
)
assert train["step"] == 3 and train["eval_loss"] < train["first_eval_loss"], train
assert train["devices"] == 8 and train["routed"] == train["kept"] + train["dropped"], train
assert evaluated["tokens"] > 0 and generated["text"].startswith("The "), (evaluated, generated)
print(f"smoke: Python {sys.version.split()[0]}, jax {m.version('jax')}, flax {m.version('flax')}: trained, evaluated, generated")
PY
