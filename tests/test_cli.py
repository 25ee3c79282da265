"""The command line: what it prints, what fails, and answers that do not depend on the mesh."""

import errno
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from commands import ENV, NOISE, ROOT, STEPS, TINY, finish, listing, start, words

from moe_jax import cli, config

pytestmark = pytest.mark.usefixtures("inside")


# What the commands report


NUMBER = (int, float)
TRAIN_JSON = {
    "step": int,
    "finished": bool,
    "loss": float,
    "eval_loss": float,
    "first_eval_loss": float,
    "bigram_loss": float,
    "tokens_per_second": NUMBER,
    "step_seconds_median": NUMBER,
    "time_to_first_step_seconds": NUMBER,
    "compile_seconds": NUMBER,
    "peak_rss_bytes": int,
    "params_total": int,
    "params_active": int,
    "routed": int,
    "kept": int,
    "dropped": int,
    "load_max_over_mean": NUMBER,
    "mesh": dict,
    "workdir": str,
    "sample": str,
    "picture": str,
}


def check_report(report: dict, types: dict) -> None:
    for name, kind in types.items():
        assert isinstance(report[name], kind), (name, report[name])
        assert isinstance(report[name], bool) == (kind is bool), name
        assert not isinstance(report[name], float) or math.isfinite(report[name]), name
    assert report["routed"] == report["kept"] + report["dropped"]


def test_train_reports(trained):
    workdir, code, out, err = trained
    assert code == 0, err
    assert len(out.splitlines()) == 1, "standard output is one JSON object"
    report = json.loads(out)
    check_report(report, TRAIN_JSON)
    assert report["step"] == STEPS and report["finished"] and report["mesh"] == {"data": 2, "expert": 4}
    assert report["workdir"] == str(workdir) and report["devices"] == 8
    assert report["loss"] < report["first_eval_loss"] and report["eval_loss"] < report["first_eval_loss"]
    assert 0 < report["compile_seconds"] < report["time_to_first_step_seconds"]
    assert 0 < report["step_seconds_median"] < report["time_to_first_step_seconds"]
    assert report["tokens_per_second"] == pytest.approx(8 * 16 / report["step_seconds_median"])
    assert report["params_active"] < report["params_total"]
    assert report["routed"] == STEPS // 10 * 8 * 16, "one MoE layer, top-1, the last tenth of the steps"
    assert report["peak_rss_bytes"] > 50e6
    assert report["sample"].startswith("ab") and Path(report["picture"]).is_file()
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, STEPS + 1))
    assert all(r["routed"] == r["kept"] + r["dropped"] for r in rows)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["40", "60"]
    assert list((workdir / "tensorboard").glob("events*"))


def test_train_says_on_standard_error_what_it_does_and_nothing_else(trained):
    _, _, _, err = trained
    assert not NOISE.search(err), err
    known = (
        r"tiny_switch: |mesh data=2 x expert=4|dispatch |workdir |text |eval |compiled |60 steps; |step |picture |"
        r"attention, decoder: |held-out loss |alarm at step |    remedy: "
    )
    lines = err.partition("sample:\n")[0].splitlines()
    assert len(lines) > STEPS and all(re.match(known, line) for line in lines), err


EVAL_JSON = {"eval_loss": float, "eval_loss_at_capacity": float, "tokens": int, "routed": int, "kept": int}
EVAL_JSON |= {"dropped": int, "step": int, "bits_per_byte": float, "workdir": str}


def test_eval_is_the_same_on_another_mesh(trained, call):
    """A real process on expert=4 against this one on the mesh of the training."""
    workdir = trained[0]
    child = start("eval", workdir, "mesh.data=1", "mesh.expert=4", "--json")
    code, report, err = call("eval", workdir, "--json")
    assert code == 0 and not NOISE.search(err)
    other_code, out, other_err = finish(child)
    assert other_code == 0 and not NOISE.search(other_err), other_err
    assert len(out.splitlines()) == 1
    other = json.loads(out)
    for one in (report, other):
        check_report(one, EVAL_JSON)
        assert one["step"] == STEPS and one["dropped"] > 0, "the test needs drops"
        assert one["eval_loss"] != one["eval_loss_at_capacity"]
    floats = [k for k, v in report.items() if isinstance(v, float)]
    assert other == report | {k: pytest.approx(report[k], rel=1e-5) for k in floats}
    few = call("eval", workdir, "--batches", 1, "--json", "--quiet")
    assert few[1]["tokens"] < report["tokens"] and few[2] == ""


def test_eval_fits_the_batch_to_the_mesh(trained, call):
    """Batches of 8 over 6 token shards: of all the text, any batch gives the same. Results go to standard output."""
    code, out, err = call("eval", trained[0], "mesh.data=3", "mesh.expert=2", "--quiet")
    assert code == 0 and err == ""
    loss, capacity, tokens = out.splitlines()
    want = call("eval", trained[0], "--json")[1]
    numbers = [
        float(x)
        for x in re.fullmatch(r"held-out part of \S*text.txt: loss (.*) nats a token, (.*) bits a byte", loss).groups()
    ]
    assert numbers == pytest.approx([want["eval_loss"], want["bits_per_byte"]], abs=2e-4)
    assert f"{want['dropped']:,} of {want['routed']:,} choices dropped" in capacity
    assert tokens == f"{want['tokens']:,} tokens, step {STEPS}"


def test_eval_of_another_text(trained, call, tmp_path):
    """All of it; that of the run as a file gives what its windows give, and nothing is written."""
    from moe_jax.data import whole

    path, before = trained[0].parent / "text.txt", listing(trained[0])
    (tmp_path / "other.txt").write_text(words(1, 300))
    args = ["eval", trained[0], "mesh.data=1", "mesh.expert=1"]
    code, report, _ = call(*args, f"data.path={tmp_path / 'other.txt'}", "--json")
    assert code == 0 and report["text"] == str(tmp_path / "other.txt")
    corpus = whole(config.from_dict({"data": {"path": str(tmp_path / "other.txt"), "length": 16}}).data)
    assert len(corpus.heldout) == len(words(1, 300)) + 1 and 0 <= len(corpus.heldout) - report["tokens"] <= 16
    assert report["bits_per_byte"] == pytest.approx(
        report["eval_loss"] / math.log(2) * len(corpus.heldout) / len(words(1, 300))
    )
    same, copied = call(*args, "--json")[1], call(*args, f"data.path={path.parent}/./text.txt", "--json")[1]
    assert copied["eval_loss"] == pytest.approx(same["eval_loss"], abs=0.1) and copied["tokens"] > same["tokens"]
    assert listing(trained[0]) == before


def test_a_run_in_python(trained):
    """The README's block, word for word but for the folder."""
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)[-1]
    names = {"jax": jax, "jnp": jax.numpy}
    exec(block.replace('"runs/mine"', repr(str(trained[0]))), names)
    run, logits = names["run"], names["logits"]
    assert logits.shape == (8, len("The function "), 320) and run.step == STEPS
    probability = jax.nn.log_softmax(logits[0], -1)
    assert jax.numpy.isfinite(probability).all() and run.cfg.model.layers == 2


def test_train_without_json_prints_its_results(trained, place, call):
    """On standard output, whatever becomes of standard error; here of a run that is done."""
    shutil.copytree(trained[0], place / "run")
    text = f"data.path={trained[0].parent / 'text.txt'}"
    argv = ["train", *TINY, text, "train.sample=ab", "train.sample_tokens=4", "--workdir", "run", "--quiet"]
    code, out, err = call(*argv)
    report = json.loads(trained[2])
    assert code == 0 and err == ""
    loss = f"held-out loss {report['eval_loss']:.4f} nats a token, {report['eval_bits_per_byte']:.4f} bits a byte"
    assert out.startswith(f"{loss}, after step {STEPS}\nworkdir run\nsample:\nab")


GENERATE_JSON = {"text": str, "texts": list, "prefill_tokens_per_second": float, "decode_tokens_per_second": float}


def test_generate_is_the_same_on_any_mesh_and_every_time(trained, call):
    """Temperature 0: a real process with one device, and expert=2 in this one, twice."""
    workdir = trained[0]
    asked = ["--prompt", "ab c", "--tokens", 20, "--temperature", 0, "--json"]
    child = start("generate", workdir, "mesh.data=1", "mesh.expert=1", "--fake-devices", 1, *asked)
    calls = [call("generate", workdir, "mesh.data=1", "mesh.expert=2", *asked) for _ in range(2)]
    code, out, err = finish(child)
    assert code == 0 and not NOISE.search(err), err
    assert len(out.splitlines()) == 1, "standard output is one JSON object"
    report = json.loads(out)
    for name, kind in GENERATE_JSON.items():
        assert isinstance(report[name], kind), name
    assert report["text"].startswith("ab c") and len(report["text"]) > 10
    assert report["prefill_tokens_per_second"] > 0 and report["decode_tokens_per_second"] > 0
    assert [(code, r["text"]) for code, r, _ in calls] == [(0, report["text"])] * 2


def test_a_continuation_does_not_depend_on_what_shares_the_batch(trained, call):
    """Sampled, with prompts of unequal length to its side; without --json the texts go to standard output."""
    one = ["generate", trained[0], "mesh.data=1", "mesh.expert=1", "--tokens", 20, "--temperature", 0.8]
    code, alone, err = call(*one, "--prompt", "ab c", "--quiet")
    assert code == 0 and alone.startswith("ab c") and err == ""
    more = ["--prompt", "ab c", "--prompt", "a longer prompt than the first", "--prompt", "d"]
    together = call(*one, *more, "--json")[1]["texts"]
    assert together[0] + "\n" == alone and len(together) == 3
    assert call(*one, "--prompt", "ab c", "--quiet", "--seed", 1)[1] != alone


# Help


COMMANDS = [[], ["train"], ["eval"], ["generate"], ["upcycle"], ["convert", "import"], ["convert", "export"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c) or "top")
def test_help_needs_no_jax(command):
    code = (
        "import sys\nfrom moe_jax.cli import main\n"
        f"try: main({[*command, '--help']})\nexcept SystemExit as e: assert e.code == 0\n"
        "heavy = {'jax', 'numpy', 'flax', 'pydantic', 'orbax', 'rich', 'matplotlib'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=60)
    assert out.stderr == ""
    assert out.stdout.endswith("HEAVY []\n")
    assert f"usage: moe-jax {' '.join(command)}" in out.stdout
    options = {"train": "--workdir", "eval": "--batches", "generate": "--prompt", "upcycle": "--method --noise"}
    options |= {"convert import": "SRC WORKDIR --fake-devices", "convert export": "DST --dtype --shard-gb"}
    for word in options.get(" ".join(command), "").split():
        assert word in out.stdout


@pytest.mark.parametrize(
    "packages, devices, alone",
    [
        ([], [], False),
        (["libtpu"], [], True),
        (["jax_plugins/xla_cuda13", "jax_plugins/__pycache__"], [], True),
        (["libtpu", "jax_plugins/xla_cuda12"], ["nvidia0"], False),
        (["libtpu"], ["accel0"], False),
        (["libtpu", "jax_plugins/xla_rocm7"], [], False),  # whose device files are not known here
        (["jax_plugins/metal_plugin"], [], False),
    ],
)
def test_compilers_without_their_devices(tmp_path, packages, devices, alone):
    """Only then is JAX told to look for no accelerator."""
    for name in packages:
        (tmp_path / "packages" / name).mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    for name in devices:
        (tmp_path / "dev" / name).touch()
    assert cli.only_compilers([str(tmp_path / "packages")], tmp_path / "dev") == alone


def test_version(capfd):
    with pytest.raises(SystemExit) as e:
        cli.main(["--version"])
    assert e.value.code == 0 and re.match(r"moe-jax \d+\.\d+\.\d+, jax \d", capfd.readouterr().out)


# The cache of compiled programs


@pytest.mark.parametrize(
    "given, where",
    [
        ({"XDG_CACHE_HOME": "cache"}, "cache/moe_jax/jax/"),
        ({"HOME": "home"}, "home/.cache/moe_jax/jax/"),
        ({"XDG_CACHE_HOME": "cache", "JAX_COMPILATION_CACHE_DIR": "mine"}, "mine"),
        ({"XDG_CACHE_HOME": "cache", "JAX_ENABLE_COMPILATION_CACHE": "0"}, None),
        ({"XDG_CACHE_HOME": "file"}, None),
    ],
    ids=["XDG_CACHE_HOME", "home", "set already", "switched off", "no folder"],
)
def test_compiled_programs_are_kept(tmp_path, given, where):
    """A command names JAX a folder below the user's cache, unless it was told otherwise or can make none."""
    (tmp_path / "file").write_text("")
    env = {k: v for k, v in ENV.items() if not k.startswith("JAX_") and k != "XDG_CACHE_HOME"}
    code = "import os\nfrom moe_jax.cli import keep_programs\nkeep_programs()\n"
    code += "print(os.path.relpath(os.environ.get('JAX_COMPILATION_CACHE_DIR', 'unset')))"
    argv = [sys.executable, "-c", code]
    out = subprocess.run(argv, env=env | given, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    found = out.stdout.strip()
    assert found.startswith(where or "unset"), out.stderr
    assert (tmp_path / "cache").exists() == (where is not None and where.startswith("cache"))


# What fails


def test_a_token_without_a_slot_fails_where_it_must(place, call):
    more = ["model.moe.overflow=error", "model.moe.capacity_factor=0.1", "model.moe.min_capacity=1"]
    more += ["mesh.data=1", "mesh.expert=1"]
    code, out, err = call("train", *TINY, "data.path=text.txt", *more, "--workdir", "new", "--quiet", "--json")
    assert code == 1 and out == ""
    assert re.fullmatch(
        r"moe-jax train: failed\nstep 1: \d+ of 128 choices found no slot; raise model.moe.capacity_factor.*\n", err
    ), err


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"No space left on device\n    remedy: free space, .*"),
        (
            OSError(errno.EDQUOT, "Over quota", "run/a"),
            r"run/a: Over quota\n    remedy: free space, .* goes on .*",
        ),
        (OSError(errno.EIO, "Input/output error", "run/a"), r"run/a: Input/output error\n    remedy: check run/a, .*"),
        (OSError("the lines are down"), r"the lines are down\n    remedy: mend that, and run the same command again"),
    ],
    ids=str,
)
def test_what_the_system_would_not_do(call, monkeypatch, error, words):
    def run(args):
        raise error

    monkeypatch.setattr(cli, "run_train", run)
    code, out, err = call("train", "tiny_switch")
    assert code == 1 and out == ""
    assert re.fullmatch(rf"moe-jax train: failed\n{words}\n", err), err
