"""Config files: how they extend one another, which of them a refusal names, and files that cannot be read."""

import pytest
from test_config import refusal

from moe_jax.config import MoEConfig, load


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text, "utf-8")
    return lambda name: load(str(folder / f"{name}.toml"))


def test_extends(tmp_path):
    read = write(
        tmp_path,
        a='[train]\nsteps = 1\nseed = 1\n[train.optimizer]\nclip = 1.0\n[rules]\nvocab = ["fsdp", "tensor"]',
        b='extends = "a"\n[train]\nseed = 2\n[rules]\nvocab = ["data"]',
        c='extends = "b.toml"\nname = "sea"\n[train.optimizer]\nb1 = 0.5',
        d='extends = "tiny_switch"\n[train]\nsteps = 20',
        e='extends = "tiny_switch"\n[train]\nsample = "unset"\n[model.moe]\ncapacity_factor = "unset"',
        f='extends = "tiny_switch"\n[model]\nmoe = "unset"',
        g='extends = "f"\n[model.moe]\nexperts = 4',
    )
    c = read("c")
    assert (c.name, c.train.steps, c.train.seed) == ("sea", 1, 2)
    assert (c.train.optimizer.clip, c.train.optimizer.b1) == (1.0, 0.5)
    assert c.rules.vocab == ("data",)  # arrays are taken over whole, tables are merged
    assert read("d").model == load("tiny_switch").model
    assert read("e") == load("tiny_switch", ["name=e", "train.sample=unset", "model.moe.capacity_factor=unset"])
    assert read("f").model.moe is None and read("g").model.moe == MoEConfig(experts=4)


def test_a_refusal_names_the_file(tmp_path, monkeypatch):
    """The one of the chain that sets the wrong key, from the current folder if it is below; else the override."""
    monkeypatch.chdir(tmp_path)
    read = write(
        tmp_path,
        base="[model]\nlayer = 2\n[train]\nsteps = 0",
        top='extends = "base"\n[model]\nnorm = "layers"\n[train]\nsteps = -1',
        lost='extends = "nowhere"',
        number="extends = 3",
    )
    text = refusal(read, "top")
    assert "model.layer: no such key (in base.toml)\n" in text
    assert "model.norm: is 'layers' (in top.toml)\n" in text
    assert "train.steps: is -1, which is not greater than or equal to 1\n" in text, "two files set it"
    assert "model.layer: no such key (in an override)\n" in refusal(load, "top.toml", ["model.layer=1"])
    assert f"nowhere: no such config (`extends` in {tmp_path / 'lost.toml'})\n" in refusal(read, "lost")
    assert "extends: is 3 (in number.toml)\n" in refusal(read, "number")


def test_extends_refused(tmp_path):
    deep = ".".join("a" * 3000) + " = 1"
    read = write(
        tmp_path,
        a='extends = "b"',
        b='extends = "c"',
        c='extends = "a"',
        me='extends = "me"',
        lost='extends = "tiny_swich"',
        deep=deep,
        deeper=f'extends = "deep"\n{deep}',
    )
    assert "extends itself (a.toml -> b.toml -> c.toml -> a.toml)" in refusal(read, "a")
    assert "extends itself (me.toml -> me.toml)" in refusal(read, "me")
    assert "did you mean 'tiny_switch'?" in refusal(read, "lost")
    assert "nested too deep" in refusal(read, "deeper")


@pytest.mark.parametrize(
    "content, words",
    [
        (bytes(range(256)), "not readable as TOML"),
        (b"\xff\xfe\x00", "not readable as TOML"),
        (b"\nsteps = ?", "line 2"),
        (b"[train]\nsteps = 1\nsteps = 2", "overwrite"),
        (b"train = 1\n[train]\nsteps = 1", "not readable as TOML"),
        (b"x = " + b"[" * 100_000, "recursion"),
        (b"[model]\nlayers = " + b"9" * 5000, "4300 digits"),
        (b"steps = 3", "did you mean 'train.steps'?"),
        (b"[[model]]\nlayers = 1", "a table of keys"),
    ],
)
def test_unreadable_files(tmp_path, content, words):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    assert words in refusal(load, str(path))


@pytest.mark.parametrize("name", ["tiny_swich", "", "nowhere/tiny.toml", ".", "a\0b", "x" * 5000, "../tests"])
def test_missing_files(name):
    text = refusal(load, name)
    assert "no such config" in text and "tiny_switch" in text
    assert ("did you mean 'tiny_switch'?" in text) == (name == "tiny_swich")


def test_a_folder_with_a_config(tmp_path):
    """The workdir of an import has its config.toml, which is what a command wants."""
    (tmp_path / "config.toml").write_text("name = 'x'")
    assert f"give {tmp_path / 'config.toml'}" in refusal(load, str(tmp_path))
