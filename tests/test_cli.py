"""The command line: what it prints, what it refuses without writing, and answers that do not depend on the mesh."""

import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from moe_jax import cli, config, mesh

ROOT = Path(__file__).parent.parent
ENV = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}

STEPS = 60
TINY = [  # its mesh is data=2 x expert=4; every test trains the same program, which is compiled once
    "tiny_switch",
    f"train.steps={STEPS}",
    "train.checkpoint_every=20",
    "train.keep=100",
    "train.log_every=1",
    "model.layers=2",
    "model.d_model=16",
    "model.d_ff=16",
    "model.heads=2",
    "model.max_length=64",
    "data.length=16",
    "data.batch=8",
    "train.eval_batches=1",
    "train.optimizer.warmup=2",
    "train.sample=",
    "train.tensorboard=false",
]

NOISE = re.compile(r"Traceback|Warning|warning|INFO|ERROR|^[WIE]\d{4} ", re.MULTILINE)


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    known = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(40)]
    return " ".join(rng.choices(known, k=count))


def write_text(folder: Path) -> Path:
    """About 20 kB of words."""
    path = folder / "text.txt"
    path.write_text(words(0, 4000))
    return path


def start(*argv: object, **options) -> subprocess.Popen:
    """A real `moe-jax` process."""
    command = [sys.executable, "-m", "moe_jax", *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **({"env": ENV} | pipes | options))


def finish(child: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    out, err = child.communicate(timeout=240)
    return child.returncode, out.decode(), err.decode()


def inside() -> Iterator[None]:
    """Run commands in this process: a mesh takes the first of the eight devices, and the allocator stays as it is."""
    build = mesh.build_mesh
    assert jax.device_count() == 8  # and JAX has started: the commands leave the number as it is
    promotion = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")  # optax needs both
    with pytest.MonkeyPatch.context() as m, promotion[0], promotion[1]:
        m.setattr(mesh, "build_mesh", lambda shape: build(shape, jax.devices()[: shape.size]))
        m.setattr(cli, "keep_memory", lambda: None)
        yield


def calls(capfd):
    """A command in this process: exit code, JSON or standard output, standard error."""

    def run(*argv: object):
        capfd.readouterr()
        code = cli.main([str(a) for a in argv])
        out, err = capfd.readouterr()
        return code, json.loads(out.splitlines()[-1]) if code == 0 and "--json" in argv else out, err

    return run


here = pytest.fixture(scope="module", autouse=True)(inside)
call = pytest.fixture(calls)


def listing(root: Path) -> dict[str, tuple]:
    """Everything below a folder: of files the content and the time of the last write."""
    paths = {str(p.relative_to(root)): p for p in root.rglob("*")}
    return {
        name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) if p.is_file() else ()
        for name, p in paths.items()
    }


# What the commands report


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of a real process: workdir, exit code, standard output and standard error."""
    folder = tmp_path_factory.mktemp("trained")
    text, workdir = write_text(folder), folder / "run"
    sample = ["train.sample=ab", "train.sample_tokens=4", "train.tensorboard=true"]
    argv = ["train", *TINY, *sample, f"data.path={text}", "train.keep=2"]
    return workdir, *finish(start(*argv, "--workdir", workdir, "--json", cwd=folder))


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
        r"tiny_switch: |mesh data=2 x expert=4|workdir |text |eval |compiled |60 steps; |step |picture |held-out loss "
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
    assert loss.startswith(f"held-out text: loss {want['eval_loss']:.3f}") and " bits a byte" in loss
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


COMMANDS = [[], ["train"], ["eval"], ["generate"], ["upcycle"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0] if c else "top")
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
    assert f"usage: moe-jax {''.join(command)}" in out.stdout
    options = {"train": "--workdir", "eval": "--batches", "generate": "--prompt", "upcycle": "--method --noise"}
    for word in options.get("".join(command), "").split():
        assert word in out.stdout


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


# What is refused


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


def check_refusal(code: int, out: str, err: str, command: str, *needles: str) -> None:
    """Exit code 2, nothing on standard output, one message with every needle and a remedy."""
    assert code == 2, err
    assert out == "" and not NOISE.search(err), err
    assert err.startswith(f"moe-jax {command}: refused\n") and err.count("refused\n") == 1, err
    assert "remedy" in err and len(err) < 3000, err
    for needle in needles:
        assert needle in err, err


# id: overrides or other arguments after the tiny config, and what the message must say
REFUSED_TRAIN = {
    "misspelt key": (["model.moe.routr.kind=switch"], "model.moe.routr", "'router'"),
    "misspelt top key": (["modle.layers=2"], "modle", "'model'"),
    "misspelt value": (["model.moe.router.kind=swich"], "model.moe.router.kind", "switch"),
    "unknown mesh axis": (["mesh.pipe=2"], "mesh.pipe", "data"),
    "no value": (["train.steps"], "train.steps", "key.path=value"),
    "no key": (["=3"], "=3", "key.path=value"),
    "text for a number": (["train.steps=many"], "train.steps", "many"),
    "fraction for a number": (["train.steps=1.5"], "train.steps", "1.5"),
    "number for a switch": (["model.scan=1"], "model.scan"),
    "value for a table": (["model.moe=3"], "model.moe"),
    "table for a value": (["train.steps.more=3"], "train.steps"),
    "zero steps": (["train.steps=0"], "train.steps", "1"),
    "negative capacity": (["model.moe.capacity_factor=-1"], "model.moe.capacity_factor", "-1"),
    "infinite rate": (["train.optimizer.learning_rate=inf"], "train.optimizer.learning_rate"),
    "two problems": (["train.steps=0", "model.moe.top_k=-2"], "train.steps", "model.moe.top_k"),
    "top_k above experts": (
        ["model.moe.top_k=9", "model.moe.router.kind=softmax_topk"],
        "model.moe.top_k",
        "9 choices among 8 experts",
    ),
    "top_k of switch": (["model.moe.top_k=2"], "model.moe.top_k", "switch"),
    "more shards than experts": (["mesh.expert=16", "data.batch=32"], "mesh.expert", "8 experts", "16"),
    "indivisible batch": (["mesh.data=3"], "data.batch", "12"),
    "indivisible microbatches": (["train.microbatches=3"], "train.microbatches", "8"),
    "indivisible group": (["model.moe.group_size=7"], "model.moe.group_size", "data.length=16"),
    "indivisible heads": (["mesh.data=1", "mesh.expert=2", "mesh.tensor=4"], "heads", "tensor"),
    "heads of no width": (["model.heads=3"], "model.heads", "16"),
    "experts outside the tokens": (['rules.batch=["data"]'], "rules.experts", "rules.batch"),
    "unknown axis of a rule": (['rules.vocab=["model"]'], "rules.vocab", "'model'"),
    "sequence too long": (["data.length=128"], "data.length", "model.max_length=64"),
    "overflow without capacity": (
        ["model.moe.overflow=error", "model.moe.capacity_factor="],
        "model.moe.overflow",
        "drop",
    ),
    "fake devices": (["--fake-devices", "3"], "--fake-devices", "3 fake devices for a mesh of 8"),
    "negative fake devices": (["--fake-devices", "-4"], "--fake-devices: is -4", "give 1 or more"),
    "vocabulary too small": (["model.vocab=100"], "model.vocab", "257"),
    "no such text": (["data.path=texd.txt"], "data.path", "'texd.txt'", "'text.txt'"),
    "no such builtin": (["data.path=builtin:pros"], "data.path", "'builtin:prose'"),
    "empty text": (["data.path=empty.txt"], "data.path", "empty.txt"),
    "blank text": (["data.path=blank.txt"], "data.path", "blank.txt"),
    "short text": (["data.path=short.txt"], "data.path", "data.length=16"),
    "binary text": (["data.path=binary.txt"], "data.path", "UTF-8", "offset 128"),
    "folder without text": (["data.path=pictures"], "data.path", ".png"),
    "JSONL without the field": (["data.path=no_field.jsonl"], "data.field", "'body'"),
    "JSONL without text": (["data.path=not_text.jsonl"], "data.field", "is a number, not a string"),
    "broken JSONL": (["data.path=not_json.jsonl"], "data.path", "not_json.jsonl:2"),
    "no such tokenizer": (["data.tokenizer=byte"], "data.tokenizer", "'bytes'"),
    "bad tokenizer": (["data.tokenizer=tokenizer.json"], "data.tokenizer", "tokenizer.json"),
    "folder of someone else": (["--workdir", "foreign"], "--workdir", "foreign", "checkpoints"),
    "folder of a newer version": (["--workdir", "newer"], "--workdir", "format 99"),
    "garbled marker": (["--workdir", "garbled"], "--workdir", "moe_jax.json"),
    "workdir is a file": (["--workdir", "text.txt"], "--workdir", "is a file"),
    "workdir below a file": (["--workdir", "text.txt/run"], "--workdir", "is not a folder"),
    "workdir is not UTF-8": (["--workdir", "runs\udcff"], "--workdir", "UTF-8"),
    "data refused in an empty folder": (["data.path=empty.txt", "--workdir", "hollow"], "data.path"),
    "data refused in new folders": (["data.path=empty.txt", "--workdir", "a/b/c"], "data.path"),
    "data refused without --workdir": (["data.path=empty.txt", "--workdir", None], "data.path"),
}


@pytest.mark.parametrize("case", REFUSED_TRAIN)
def test_train_refuses(place, call, case):
    more, *needles = REFUSED_TRAIN[case]
    default = [] if "--workdir" in more else ["--workdir", "new"]
    more = more[:-2] if more[-1] is None else more
    before = listing(place)
    check_refusal(*call("train", *TINY, "data.path=text.txt", *more, *default), "train", *needles)
    assert listing(place) == before, "something was written or lost"


@pytest.mark.parametrize(
    "name, needles",
    [
        ("tiny_swich", ["tiny_swich", "'tiny_switch'"]),
        ("missing.toml", ["missing.toml", "tiny_switch"]),
        ("broken.toml", ["broken.toml", "line 1"]),
        ("binary.toml", ["binary.toml", "utf-8"]),
        ("itself.toml", ["itself.toml", "extends itself"]),
        ("orphan.toml", ["tiny_swich", "'tiny_switch'"]),
        ("", ["config", "tiny_switch"]),
    ],
)
def test_config_refused(place, call, name, needles):
    before = listing(place)
    check_refusal(*call("train", name, "--workdir", "new"), "train", *needles)
    assert listing(place) == before


@pytest.mark.parametrize("kind", ["read-only folder", "kernel's folder"])
def test_unwritable_workdir_refused(place, call, kind):
    if kind == "read-only folder":
        if os.geteuid() == 0:
            pytest.skip("nothing is read-only to root")
        (place / "hollow").chmod(0o500)
        workdir = "hollow/run"
    else:
        if not Path("/proc/self").exists():
            pytest.skip("no /proc here")
        workdir = "/proc/moe_jax/run"  # not even root creates folders there
    before = listing(place)
    check_refusal(*call("train", *TINY, "data.path=text.txt", "--workdir", workdir), "train", "--workdir", workdir)
    assert listing(place) == before


def flip(workdir: Path) -> None:
    """A bit in every hundredth byte of the largest file of the newest checkpoint, which is that of the arrays."""
    newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
    path = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[::100] = bytes(byte ^ 1 for byte in content[::100])
    path.write_bytes(content)


def rewrite(name: str):
    return lambda workdir: (workdir / name).write_text("{")


DAMAGE = {
    "": lambda workdir: None,
    "flipped bits": flip,
    "torn record": rewrite("checkpoints/60/complete.json"),
    "no checkpoints": lambda workdir: shutil.rmtree(workdir / "checkpoints"),
    "no tokens": lambda workdir: shutil.rmtree(workdir / "tokens"),
    "garbled tokens": rewrite("tokens/index.json"),
}

EXPERT_CHOICE = ["model.moe.router={kind = 'expert_choice', lookahead = true}", "model.moe.balance_loss=0"]

# id: damage of the run, command and arguments, and what the message must say
REFUSED_RUN = {
    "train, flipped bits": ("flipped bits", ["train"], "60", "damaged", "remove", "step 40"),
    "train, torn record": ("torn record", ["train"], "60", "damaged", "step 40"),
    "eval, flipped bits": ("flipped bits", ["eval", "run"], "60", "damaged", "remove"),
    "eval, no such folder": ("", ["eval", "missing"], "DIR: missing does not exist"),
    "eval, a file": ("", ["eval", "text.txt"], "DIR: ", "is not a folder"),
    "eval, no run": ("", ["eval", "foreign"], "DIR: ", "moe_jax.json"),
    "eval, newer version": ("", ["eval", "newer"], "DIR: ", "format 99"),
    "eval, no checkpoint yet": ("", ["eval", "empty_run"], "DIR: ", "no complete checkpoint"),
    "eval, no checkpoint any more": ("no checkpoints", ["eval", "run"], "DIR: ", "no complete checkpoint"),
    "eval, no tokens": ("no tokens", ["eval", "run"], "tokens", "no prepared corpus"),
    "eval, garbled tokens": ("garbled tokens", ["eval", "run"], "tokens", "damaged"),
    "eval, zero batches": ("", ["eval", "run", "--batches", "0"], "--batches", "1 or more"),
    "eval, mesh": (
        "",
        ["eval", "run", "mesh.data=3", "mesh.expert=2", "--batches", "1"],
        "data.batch: 8 sequences",
        "set it to a multiple of 6",
    ),
    "eval, mesh and batch": ("", ["eval", "run", "mesh.data=3", "mesh.expert=2", "data.batch=8"], "a multiple of 6"),
    "eval, no mesh": ("", ["eval", "run", "mesh=3"], "mesh: is 3"),
    "eval, another model": (
        "",
        ["eval", "run", "model.d_model=32"],
        "model.d_model=32: makes another model",
        "parameters differ",
        "take that override out\n",
    ),
    "eval, more layers": ("", ["eval", "run", "model.layers=3", "mesh.data=2"], "model.layers=3: makes another model"),
    "eval, another tokenizer": ("", ["eval", "run", "data.path=text.txt", "data.tokenizer=x"], "data.tokenizer"),
    "eval, no such text": ("", ["eval", "run", "data.path=texd.txt"], "data.path", "'text.txt'"),
    "eval, short text": ("", ["eval", "run", "data.path=short.txt"], "data.path", "has 11 tokens", "data.length=10"),
    "generate, another text": ("", ["generate", "run", "data.path=text.txt", "--prompt", "a"], "data.path"),
    "eval, misspelt key": ("", ["eval", "run", "mesh.exprt=2"], "mesh.exprt", "'expert'"),
    "eval, fake devices": ("", ["eval", "run", "--fake-devices", "4"], "--fake-devices", "8"),
    "generate, no run": ("", ["generate", "foreign", "--prompt", "a"], "DIR: ", "moe_jax.json"),
    "generate, flipped bits": ("flipped bits", ["generate", "run", "--prompt", "a"], "60", "damaged"),
    "generate, empty prompt": ("", ["generate", "run", "--prompt", ""], "--prompt", "empty"),
    "generate, one empty prompt": ("", ["generate", "run", "--prompt", "a", "--prompt", ""], "--prompt", "empty"),
    "generate, prompt is not UTF-8": ("", ["generate", "run", "--prompt", "\udcff"], "--prompt", "UTF-8"),
    "generate, prompt too long": (
        "",
        ["generate", "run", "--prompt", "a" * 70],
        "--prompt: the longest",
        "70",
        "at most 63",
    ),
    "generate, too many tokens": ("", ["generate", "run", "--prompt", "a", "--tokens", "64"], "--tokens", "most 63"),
    "generate, no tokens": ("", ["generate", "run", "--prompt", "a", "--tokens", "0"], "--tokens", "1 or more"),
    "generate, cold": ("", ["generate", "run", "--prompt", "a", "--temperature", "-1"], "--temperature", "0 or more"),
    "generate, hot": ("", ["generate", "run", "--prompt", "a", "--temperature", "inf"], "--temperature", "finite"),
    "generate, nan": ("", ["generate", "run", "--prompt", "a", "--temperature", "nan"], "--temperature", "nan"),
    "generate, top-k": ("", ["generate", "run", "--prompt", "a", "--top-k", "-1"], "--top-k", "0 or more"),
    "generate, negative seed": ("", ["generate", "run", "--prompt", "a", "--seed", "-1"], "--seed", "4294967295"),
    "generate, expert choice": (
        "",
        ["generate", "run", *EXPERT_CHOICE, "train.sample=", "--prompt", "a"],
        "model.moe.router.kind",
        "one token at a time",
    ),
    "generate, large seed": ("", ["generate", "run", "--prompt", "a", "--seed", str(2**64)], "--seed", "4294967295"),
}


@pytest.mark.parametrize("case", REFUSED_RUN)
def test_run_refused(trained, place, call, case):
    damage, argv, *needles = REFUSED_RUN[case]
    shutil.copytree(trained[0], place / "run")
    DAMAGE[damage](place / "run")
    if argv == ["train"]:
        text = f"data.path={trained[0].parent / 'text.txt'}"
        argv = ["train", *TINY, text, "train.steps=70", "--workdir", "run"]
    before = listing(place)
    check_refusal(*call(*argv), argv[0], *needles)
    assert listing(place) == before, "something was written or lost"


def test_refusals_of_a_real_process(trained, place):
    """The exit code that a shell sees, and no noise of a library: before JAX starts, and while it reads."""
    shutil.copytree(trained[0], place / "run")
    flip(place / "run")
    before = listing(place)
    commands = {
        "model.moe.routr": ["train", "tiny_switch", "model.moe.routr.kind=switch"],
        "damaged": ["eval", "run"],
        "empty": ["generate", trained[0], "--prompt", ""],
    }
    children = {needle: start(*argv) for needle, argv in commands.items()}
    for needle, child in children.items():
        check_refusal(*finish(child), commands[needle][0], needle)
    assert listing(place) == before


@pytest.mark.parametrize(
    "argv, needle",
    [
        ([], "COMMAND"),
        (["tarin", "tiny_switch"], "invalid choice: 'tarin' (choose from"),
        (["train"], "required: CONFIG\n"),
        (["train", "tiny_switch", "--wrokdir", "x"], "'--wrokdir'"),
        (["train", "tiny_switch", "--wrokdir=x"], "'--wrokdir=x'"),
        (["train", "tiny_switch", "--fake-devices", "two"], "--fake-devices: invalid int value: 'two'"),
        (["train", "tiny_switch", "--workdir"], "--workdir: expected one argument"),
        (["train", "tiny_switch", "--workdir", ""], "--workdir: is empty: name a folder"),
        (["train", "tiny_switch", "--workdir="], "--workdir: is empty: name a folder"),
        (["eval", ""], "DIR: is empty: name a folder"),
        (["generate", "", "--prompt", "a"], "DIR: is empty: name a folder"),
        (["eval"], "required: DIR\n"),
        (["eval", "run", "--json", "stray"], "'stray'"),
        (["generate", "run"], "--prompt"),
        (["generate", "run", "--prompt", "a", "--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_arguments_refused(place, capfd, argv, needle):
    before = listing(place)
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    out, err = capfd.readouterr()
    assert e.value.code == 2 and out == ""
    assert err.startswith("usage: moe-jax") and needle in err[err.rindex("\nmoe-jax") :], err
    assert listing(place) == before


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
