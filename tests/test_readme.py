"""The README's Python runs as it stands, in a process of its own, on 8 fake devices."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax import config

TEXT = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def test_the_python_blocks_run():
    """First without a mesh; then, as the text says, with rules and a mesh. It holds the expected shapes and shards."""
    first, second = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    lines = re.search(r"class Net.*?(?=\n\ny, aux)", first, re.S)[0].strip().splitlines()
    assert len([line for line in lines if line.strip()]) <= 10, "one MoE layer takes at most ten lines"
    sharded = first.replace("d_model=64, rngs=rngs", "d_model=64, rules=Rules(), rngs=rngs").split("\ny, aux")[0]
    program = "\n".join(
        [
            first,
            "assert y.shape == (8, 32, 64) and float(aux) > 0.009",
            "want, x = y, jnp.ones((8, 32, 16))",
            "from moe_jax import Rules",
            sharded,
            second,
            "assert jnp.abs(y - want).max() < 1e-5 * jnp.abs(want).max()",
            "assert net.moe.experts.w_up[...].addressable_shards[0].data.shape[0] == 2",
        ]
    )
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", re.findall(r"^moe-jax train (.*)$", TEXT, re.M))
def test_the_train_commands_are_accepted(command):
    words = re.sub(r"--workdir \S+", "", command).split()
    cfg = config.load(words[0], words[1:])
    assert cfg.name == words[0]


def test_the_configs_are_listed():
    for name in config.config_names():
        assert name == "tiny" or f"`{name}`" in TEXT, name


def test_the_files_it_names_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (Path(__file__).parent.parent / path).exists(), path
