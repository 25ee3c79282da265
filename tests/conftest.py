"""Eight fake CPU devices for every test, set before JAX starts; strict promotion; one compile cache."""

import os
import signal
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # read once: a command that a test runs here must not silence what others read
# Compiling is most of the test time: leave out costly passes of the code generator, none of the
# partitioner, and let older, simpler code of fused loops be made in one piece: half the compile time of a train step.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
)

import jax
import pytest
from commands import TINY, calls, finish, in_this_process, start, write_text
from theirs import require

# A shell lets its background jobs ignore Ctrl-C, and so would what tests start in order to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def golden():
    """Small routing cases with their answers, computed in float64 by brute force."""
    import json

    return json.loads((Path(__file__).parent / "golden" / "routing.json").read_text())


call = pytest.fixture(calls)


@pytest.fixture(scope="session")
def transformers():
    """The library, with torch; a test of the two asks for it."""
    require("torch", "transformers")
    import transformers

    return transformers


inside = pytest.fixture(scope="module")(in_this_process)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """The arguments of one run, but for its workdir."""
    text = write_text(tmp_path_factory.mktemp("text"))
    return ["train", *TINY, f"data.path={text}", "--json", "--workdir"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of a real process: workdir, exit code, standard output and standard error."""
    folder = tmp_path_factory.mktemp("trained")
    text, workdir = write_text(folder), folder / "run"
    sample = ["train.sample=ab", "train.sample_tokens=4", "train.tensorboard=true"]
    argv = ["train", *TINY, *sample, f"data.path={text}", "train.keep=2"]
    return workdir, *finish(start(*argv, "--workdir", workdir, "--json", cwd=folder))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with inputs of every wrong kind, which is the current one as well."""
    write_text(tmp_path)
    files = {
        "empty.txt": "",
        "blank.txt": " \n\n",
        "short.txt": "not enough",
        "no_field.jsonl": '{"body": "some text", "id": 1}\n',
        "not_text.jsonl": '{"text": 7}\n',
        "not_json.jsonl": '{"text": "fine"}\n{"text": \n',
        "tokenizer.json": '{"model": "none"}',
        "broken.toml": "[model\nlayers = 2\n",
        "itself.toml": 'extends = "itself"\n',
        "orphan.toml": 'extends = "tiny_swich"\n',
        "foreign/checkpoints/10/model.bin": "someone's weights",
        "newer/moe_jax.json": '{"format": 99}',
        "garbled/moe_jax.json": "{",
        "pictures/one.png": "",
        "empty_run/moe_jax.json": '{"format": 1}',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "binary.toml").write_bytes(b"name = '\xff'")
    (tmp_path / "hollow").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path
