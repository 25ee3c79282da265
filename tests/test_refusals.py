"""What commands refuse: one message with the key and a remedy, exit code 2, and nothing written or lost."""

import os
import shutil
from pathlib import Path

import pytest
from commands import TINY, check_refusal, finish, listing, start

from moe_jax import cli

pytestmark = pytest.mark.usefixtures("inside")


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
        ["model.moe.overflow=error", "model.moe.capacity_factor=unset"],
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
            pytest.skip("NOT PROVED: nothing is read-only to root. Remedy: run the tests as another user")
        (place / "hollow").chmod(0o500)
        workdir = "hollow/run"
    else:
        if not Path("/proc/self").exists():
            pytest.skip("NOT PROVED: there is no /proc, where not even root creates folders. Remedy: test on Linux")
        workdir = "/proc/moe_jax/run"
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
        ["generate", "run", *EXPERT_CHOICE, "train.sample=unset", "--prompt", "a"],
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
        (["upcycle", "", "tiny_switch", "--workdir", "new"], "DENSE_DIR: is empty: name a folder"),
        (["upcycle", "dense", "tiny_switch", "--workdir", ""], "--workdir: is empty: name a folder"),
        (["convert"], "required: import|export\n"),
        (["convert", "import", "", "new"], "SRC: is empty: name a folder"),
        (["convert", "export", "run", ""], "DST: is empty: name a folder"),
        (["convert", "export", "run", "new", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
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
