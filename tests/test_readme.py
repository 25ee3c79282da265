"""The README's Python runs as it stands, in a process of its own, on 8 fake devices."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax import config

TEXT = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)

# After the block of that number: what its results are.
CHECKS = {
    0: """
assert y.shape == (8, 32, 64) and float(aux) > 0.009
want = y
""",
    1: """
from moe_jax.collectives import read
assert jnp.abs(y - want).max() < 1e-5 * jnp.abs(want).max()
assert net.moe.experts.w_up[...].addressable_shards[0].data.shape[0] == 2
graph, numbers = nnx.split(net)
def f(numbers, x):
    y, aux = nnx.merge(graph, numbers)(x)
    return (y ** 2).sum() + aux
with jax.set_mesh(mesh):
    for program, count in ((f, 2), (jax.value_and_grad(f), 4)):
        found = read(jax.jit(program).lower(numbers, x).compile().as_text(), mesh)
        assert [c.axes for c in found if c.op == "all-to-all"] == [("expert",)] * count, found
""",
    2: """
assert losses[-1] < 0.9 * losses[0], losses
moments = optimizer.opt_state[0].mu["moe"]["experts"]["w_up"]
assert moments[...].sharding.is_equivalent_to(net.moe.experts.w_up[...].sharding, 3)
""",
    3: """
assert stats.tokens == 52 and 0 < dropped < stats.routed == stats.load.sum()
assert 52 <= stats.load.sum() <= 104 and (y[1, 20:] == 0).all()
""",
    4: """
moves = (layer.bias[...] / 1e-3).round()
assert (moves == jnp.sign(stats.load.mean() - stats.load)).all() and (moves != 0).any()
""",
}


def test_the_python_blocks_run():
    """One after the other, word for word. The last one needs a finished run, and `tests/test_cli.py` has one."""
    lines = re.search(r"class Net.*?(?=\n\n\nx = )", BLOCKS[0], re.S)[0].strip().splitlines()
    assert len([line for line in lines if line.strip()]) <= 10, "one MoE layer takes at most ten lines"
    assert len(BLOCKS) == len(CHECKS) + 1
    program = "\n".join(BLOCKS[i] + check for i, check in CHECKS.items())
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    env["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", re.findall(r"^moe-jax train (?!runs/)(.*)$", TEXT, re.M))
def test_the_train_commands_are_accepted(command):
    """But for a config that an import writes, which `tests/test_convert_run.py` trains with."""
    words = re.sub(r"--\S+ \S+|#.*", "", command).split()
    cfg = config.load(words[0], words[1:])
    assert cfg.name == words[0]


def test_the_configs_are_listed():
    for name in config.config_names():
        assert name == "tiny" or f"`{name}`" in TEXT, name


def test_the_files_it_names_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (Path(__file__).parent.parent / path).exists(), path
