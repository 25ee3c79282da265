"""What follows an import: text, training, export; FP8; models that were trained here; the memory that it takes."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import published
import pytest
from commands import ENV, check_refusal, write_text
from published import GOLDEN
from test_convert import read, tensors
from theirs import require

from moe_jax import config
from moe_jax.checkpoint import Checkpoints, claim_workdir
from moe_jax.config import Config, RopeConfig
from moe_jax.convert import load, save
from moe_jax.convert.progress import Bar
from moe_jax.train.resume import checkpoint_info

pytestmark = pytest.mark.usefixtures("inside")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def test_a_workdir_is_that_of_a_run(tmp_path, text, call):
    """eval and generate open it, train goes on from it with a fresh optimizer, and what it learned is exported."""
    source, run = tmp_path / "source", tmp_path / "run"
    published.synthetic(source, {"vocab_size": 300})
    data = [f"data.path={text}", "data.length=16", "data.batch=8", "train.eval_batches=1", "train.tensorboard=false"]
    code, report, err = call("convert", "import", source, run, *data, "mesh.expert=4", "mesh.tensor=2", "--json")
    assert code == 0 and report["text"] and report["mesh"] == {"expert": 4, "tensor": 2}, err
    assert "importing: " in err and "moe-jax train " in err
    assert config.load(str(run / "config.toml")) == config.from_dict(Checkpoints(run / "checkpoints").info(0)["config"])
    code, before, err = call("eval", run, "--batches", 1, "--json")
    assert code == 0, err
    code, out, err = call("generate", run, "--prompt", "abc", "--tokens", 4, "mesh.expert=1", "mesh.tensor=1", "--json")
    assert code == 0 and out["text"].startswith("abc"), err
    steps = ["train.steps=2", "train.optimizer.learning_rate=1e-2"]
    code, out, err = call("train", run / "config.toml", "--workdir", run, *steps, "--json")
    assert code == 0 and out["step"] == 2, err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "eval_loss" in line)
    assert first["step"] == 0 and first["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    code, out, err = call("convert", "export", run, tmp_path / "out", "--json")
    assert code == 0 and out["step"] == 2 and out["dtype"] == "bfloat16", err
    old, new = tensors(source), tensors(tmp_path / "out")
    assert {n: (x.dtype, x.shape) for n, x in new.items()} == {n: (x.dtype, x.shape) for n, x in old.items()}
    assert sum(x.tobytes() != old[n].tobytes() for n, x in new.items()) > len(old) / 2


def test_the_first_training_sets_its_data(tmp_path, text, call):
    """Weights that were never trained take another text, batch and length; later they are a run like any other."""
    source, run = tmp_path / "source", tmp_path / "run"
    published.synthetic(source, {"vocab_size": 300})
    data = [f"data.path={text}", "data.length=16", "data.batch=8", "train.eval_batches=1", "train.tensorboard=false"]
    code, out, err = call("convert", "import", source, run, *data)
    assert code == 0, err
    words = f"trains on data.path={text}, data.batch=8, data.length=16, at train.optimizer.learning_rate=0.001"
    assert words in out + err
    check_refusal(*call("doctor", run), "doctor", "nothing was trained here yet", f"moe-jax trace {run} --file")
    for argv in (["eval", source], ["generate", source, "--prompt", "a"], ["trace", source, "--text", "a"]):
        check_refusal(*call(*argv), argv[0], f"moe-jax convert import {source} WORKDIR")
    check_refusal(*call("doctor", source), "doctor", f"moe-jax convert import {source} WORKDIR")
    other = tmp_path / "other.txt"
    other.write_text("abcdefg " * 200)
    train = ["train", run / "config.toml", "--workdir", run, "train.steps=1", "--json"]
    check_refusal(*call(*train, "model.moe.capacity_factor=1.25"), "train", "import again with it into another WORKDIR")
    elsewhere = ["train", run / "config.toml", "--workdir", tmp_path / "elsewhere", "train.steps=1", *data[2:]]
    code, _, err = call(*elsewhere, f"data.path={text}")
    assert code == 0 and f"begins with fresh weights; to go on from step 0 of {run}: --workdir {run}" in err
    code, _, err = call(*elsewhere, f"data.path={text}")
    assert code == 0 and "fresh weights" not in err, "it has checkpoints of its own"
    held = (run / "tokens" / "train.bin").read_bytes()
    short = [f"data.path={tmp_path / 'short.txt'}", "data.batch=4"]
    (tmp_path / "short.txt").write_text("abc")
    check_refusal(*call(*train, *short), "train", "data.path")
    assert (run / "tokens" / "train.bin").read_bytes() == held, "the text of the import stays"
    check_refusal(*call(*train, f"data.path={other}", "data.tokenizer=none.json"), "train", "data.tokenizer")
    new = [f"data.path={other}", "data.batch=4", "data.length=8"]
    code, before, err = call("eval", run, f"data.path={other}", "--json")
    code, out, err = call(*train, *new)
    assert code == 0 and out["step"] == 1, err
    assert f"data.path: {str(text)!r} -> {str(other)!r}" in err and "data.batch: 8 -> 4" in err
    assert set((run / "tokens" / "train.bin").read_bytes()) <= set(b"abcdefg \n\0\1"), "the new text alone"
    assert out["tokens_per_second"] * out["step_seconds_median"] == pytest.approx(4 * 8)
    code, after, err = call("eval", run, "--json")
    assert code == 0 and after["text"] == str(other), err
    assert out["first_eval_loss"] == pytest.approx(before["eval_loss"], rel=0.2), "from the published weights"
    later = ["train.steps=2", "data.batch=8"]
    check_refusal(*call(*train, *new, *later), "train", "data.batch: is 8, and that run began with 4")


def test_the_tokenizer_comes_along(tmp_path, text, call):
    """tokenizer.json is copied, is the run's, and goes out again."""
    from tokenizers import Tokenizer, models, processors

    source = tmp_path / "source"
    published.synthetic(source, {"vocab_size": 64})
    letters = "abcdefghijklmnopqrstuvwxyz \n.,"
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)} | {"</s>": 40, "<s>": 41}, []))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 41)])
    made.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"chat_template": "x{{ messages[0].content }}y"}')
    data = [f"data.path={text}", "data.length=8", "data.heldout=0.2"]
    code, report, err = call("convert", "import", source, tmp_path / "run", *data, "--json")
    assert code == 0 and report["text"], err
    assert report["tokenizer"] == str(tmp_path / "run" / "published" / "tokenizer.json")
    code, out, err = call("generate", tmp_path / "run", "--prompt", "abc", "--tokens", 2, "--json")
    assert code == 0 and out["text"].startswith("abc"), err
    assert config.load(str(tmp_path / "run" / "config.toml")).data.bos, "it puts <s> before a text"
    code, out, err = call("generate", tmp_path / "run", "--chat", "--prompt", "abc", "--tokens", 2, "--json")
    assert code == 0 and not out["text"].startswith("abc"), err
    assert call("convert", "export", tmp_path / "run", tmp_path / "out")[0] == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = [tmp_path / "moved", f"data.tokenizer={tmp_path / 'moved' / 'published' / 'tokenizer.json'}"]
    code, out, err = call("generate", *moved, "--prompt", "abc", "--tokens", 2, "--json")
    assert code == 0 and out["text"].startswith("abc"), err
    steps = ["train.steps=1", "train.eval_batches=1", "train.tensorboard=false", "data.bos=false"]
    code, out, err = call("train", moved[0] / "config.toml", "--workdir", *moved, *steps, "--quiet")
    assert code == 2 and "data.bos" in err and "data.tokenizer" not in err, err
    code, out, err = call("train", moved[0] / "config.toml", "--workdir", *moved, *steps[:3], "--quiet")
    assert code == 0, err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def in_blocks(folder, rows, columns, edit=lambda tensors: None):
    """The matrices of attention and experts in FP8 with a scale for each block, and what they stand for in float32."""
    from safetensors.numpy import load_file, save_file

    every, means = load_file(folder / "model.safetensors"), {}
    for name in [n for n in every if ".mlp.experts." in n or "_proj" in n]:
        w = every[name]
        grid = (-(-w.shape[0] // rows), -(-w.shape[1] // columns))
        scale = np.random.default_rng(len(means)).uniform(0.5, 2.0, grid).astype(np.float32)
        wide = np.kron(scale, np.ones((rows, columns), np.float32))[: w.shape[0], : w.shape[1]]
        every[name] = (w / wide).astype(ml_dtypes.float8_e4m3fn)
        every[name + "_scale_inv"] = scale
        means[name] = every[name].astype(np.float32) * wide
    edit(every)
    save_file(every, folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [rows, columns]}
    (folder / "config.json").write_text(json.dumps(about))
    return {n: means.get(n, x) for n, x in every.items() if not n.endswith("_scale_inv")}


def test_fp8_with_block_scales(tmp_path, call):
    """Each number times the scale of its block, also of blocks that the edge cuts; exported in other types."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "deepseek_v3", folder)
    want = in_blocks(folder, 8, 5)
    code, _, err = call(
        "convert", "import", folder, tmp_path / "run", "data.length=8", "mesh.expert=4", "mesh.tensor=2"
    )
    assert code == 0, err
    assert call("convert", "export", tmp_path / "run", tmp_path / "wide", "--dtype", "float32")[0] == 0
    got = tensors(tmp_path / "wide")
    assert got.keys() == want.keys() and all((got[n] == want[n]).all() for n in want)
    assert call("convert", "export", tmp_path / "run", tmp_path / "out")[0] == 0
    kinds = {n: x.dtype.name for n, x in tensors(tmp_path / "out").items()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "bfloat16" and kinds["model.norm.weight"] == "float32"
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in about and about["dtype"] == "bfloat16"


SCALED = "model.layers.1.self_attn.o_proj.weight"
UNSCALED = {
    "[2, 3] F32": lambda t: t.pop(SCALED + "_scale_inv"),
    "[2, 4] F32": lambda t: t.update({SCALED + "_scale_inv": np.ones((2, 4), np.float32)}),
    "which is [16, 20] F32": lambda t: t.update({SCALED: np.ones((16, 20), np.float32)}),
}


@pytest.mark.parametrize("needle", UNSCALED)
def test_scales_that_do_not_fit(needle, tmp_path, call):
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "deepseek_v3", folder)
    in_blocks(folder, 8, 8, UNSCALED[needle])
    check_refusal(*call("convert", "import", folder, tmp_path / "run"), "convert", SCALED, needle)


@pytest.mark.parametrize("family", published.CASES)
def test_a_model_that_was_trained_here(family, tmp_path, call):
    """Its config.json is written from its config: other fields than were imported, and the same model."""
    found, _, weights = read(GOLDEN / family)
    claim_workdir(tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(3, weights, checkpoint_info(found.cfg, load.NO_TEXT, 3))
    checkpoints.wait()
    code, report, err = call("convert", "export", tmp_path / "run", tmp_path / "out", "--json")
    assert code == 0 and (report["family"], report["step"]) == (family, 3), err
    got, want = tensors(tmp_path / "out"), tensors(GOLDEN / family)
    assert got.keys() == want.keys() and all((got[n] == want[n]).all() for n in want)
    require("torch", "transformers")
    published.loads(tmp_path / "out", family)


def test_a_model_of_no_family(tmp_path, call):
    """Every family says in what the model is another one."""
    cfg = Config(model=config.load("tiny_switch").model)
    claim_workdir(tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(0, {"params": {"w": jnp.ones(2)}}, checkpoint_info(cfg, load.NO_TEXT, 0))
    checkpoints.wait()
    out = tmp_path / "out"
    answer = call("convert", "export", tmp_path / "run", out, "--quiet")
    check_refusal(*answer, "convert", *(f"{family}: model." for family in published.CASES))
    check_refusal(*call("convert", "export", tmp_path / "run", out, "--family", "no"), "convert", "--family", "mixtral")


def test_overrides_that_make_another_model(tmp_path, call):
    """They import, and the config.json that came along would lie about them."""
    assert (
        call("convert", "import", GOLDEN / "mixtral", tmp_path / "run", "model.norm_eps=0.1", "data.length=8")[0] == 0
    )
    answer = call("convert", "export", tmp_path / "run", tmp_path / "out", "--quiet")
    check_refusal(*answer, "convert", "model.norm_eps is 0.1", "1e-06")
    found, _, _ = read(GOLDEN / "mixtral", "model.moe.capacity_factor=2.0", "model.dtype=bfloat16")
    assert found.cfg.model.moe.capacity_factor == 2.0


@pytest.mark.parametrize("name", ["\U0001f600 mix\x7f", 'a "quote"\\', os.fsdecode(b"\xff")])
def test_a_source_of_any_name(name, tmp_path):
    """config.toml is TOML, and says the name."""
    shutil.copytree(GOLDEN / "mixtral", tmp_path / name)
    load.run(tmp_path / name, tmp_path / "run", ["data.length=8"])
    assert config.load(str(tmp_path / "run" / "config.toml")).name == name.encode("utf-8", "replace").decode()


SAME = [
    ("mixtral", "moe.d_ff", 12),
    ("mixtral", "attention_scale", 0.5),  # 1 over the root of 4
    ("mixtral", "rope", RopeConfig()),
    ("mixtral", "moe.layers", (0, 1)),
    ("phimoe", "moe.router.margin", None),
    ("phimoe", "rope.long_attention_factor", None),  # as in short rows
    ("qwen2_moe", "moe.router.normalize", None),
    ("olmoe", "moe.router.normalize", None),
    ("deepseek_v3", "moe.router.normalize", None),
    ("deepseek_v3", "moe.router.group_score", "sum2"),
    ("deepseek_v2", "moe.router.normalize", None),
    ("deepseek_v2", "attention_scale", 10**-0.5),
    ("granitemoe", "logit_scale", 0.013),  # 1/(1/x) is another number
    ("granitemoe", "attention_scale", None),
]
OTHER = [
    ("mixtral", "attention_scale", 0.5 + 1e-9),
    ("mixtral", "rope", RopeConfig(fraction=0.5)),
    ("mixtral", "moe.layers", (1,)),
    ("mixtral", "qkv_clip", 0.8),
    ("olmoe", "head_dim", 6),
    ("deepseek_v3", "moe.router.normalize", "after"),
    ("deepseek_v3", "moe.router.group_score", "max"),
]


def replaced(tree, path, value):
    """A config with one key set."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(tree, **{name: replaced(getattr(tree, name), rest, value) if rest else value})


@pytest.mark.parametrize(("family", "key", "value"), SAME + OTHER)
def test_the_same_model_in_other_words(family, key, value):
    """A key at what it stands for when unset, or off by rounding, makes no model of another family."""
    m = load.opened(GOLDEN / family, GOLDEN / "run", ["data.length=8"]).cfg.model
    wrong = save.foreign(replaced(m, key, value), family)
    assert (wrong is None) == ((family, key, value) in SAME), wrong


class Screen(io.StringIO):
    """Standard error on a terminal, or not."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def test_progress(monkeypatch):
    """A bar on a terminal, a line every tenth elsewhere, nothing if asked for."""
    monkeypatch.setenv("TERM", "xterm")
    shown = {}
    for terminal, quiet in ((True, False), (False, False), (True, True)):
        screen = Screen(terminal)
        with Bar(10**9, "importing", quiet=quiet, stream=screen) as bar:
            for _ in range(1000):
                bar(10**6)
        shown[terminal, quiet] = screen.getvalue()
    assert "importing" in shown[True, False] and "1.0 GB" in shown[True, False]
    lines = shown[False, False].splitlines()
    assert lines[0] == "importing: 100.00 MB of 1.00 GB" and len(lines) == 10
    assert shown[True, True] == ""


NO_PROC = "NOT PROVED: the peak of a process is read from Linux's /proc. Remedy: test on Linux"
MEASURE = """
import sys, jax
from pathlib import Path
jax.config.update("jax_num_cpu_devices", 8)
jax.block_until_ready(jax.numpy.ones(3) + 1)
def memory(field):
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1])
before = memory("VmRSS")
from moe_jax.convert import load
from moe_jax.convert.progress import Bar
report = load.run(Path(sys.argv[1]), Path(sys.argv[2]), ["mesh.expert=4", "mesh.tensor=2", "data.length=8"])
print(memory("VmHWM") - before, report["shard_bytes"])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason=NO_PROC)
@pytest.mark.parametrize("layers", [5, pytest.param(48, marks=pytest.mark.sweep)], ids=["0.25 GB", "2 GB"])
def test_memory_of_an_import(layers, tmp_path):
    """A process of its own: at its peak less than 1.5 times the shards of 8 devices and the largest tensor."""
    wide = {"vocab_size": 200, "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": layers}
    total, largest = published.synthetic(tmp_path / "source", wide | {"num_local_experts": 8})
    argv = [sys.executable, "-c", MEASURE, tmp_path / "source", tmp_path / "run"]
    done = subprocess.run(argv, env=ENV | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    peak, shards = map(int, done.stdout.split())
    assert shards > 2 * total  # float32 of bfloat16, some of it on several devices
    assert peak < 1.5 * shards + largest
