"""The house: imports only go down, files and functions can be read, nothing half done is shipped."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moe_jax"
FILES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
OTHERS = sorted([*Path(__file__).parent.glob("*.py"), *(PACKAGE.parent / "tools").glob("*.py")])

FLOORS = [
    (
        "words",
        {
            "terminal",
            "schema",
            "refused",
            "checks",
            "checks_attention",
            "config",
            "files",
            "axes",
            "pattern",
            "conflicts",
            "workdir",
        },
    ),
    ("where things live", {"mesh", "topology", "rules", "sequence", "exchange", "collectives", "hlo"}),
    (
        "mathematics",
        {"routing", "capacity", "balance", "dispatch", "rows", "grouped", "cost", "placement", "specialise", "kernels"},
    ),
    ("layers", {"layers", "model", "pipeline", "cache"}),
]
MATHEMATICS = FLOORS[2][1]


def floor(module):
    """The floor of `routing` or `layers.moe`; programs and the public names live on top."""
    first = module.split(".")[0]
    return next((i for i, (_, names) in enumerate(FLOORS) if first in names), len(FLOORS))


def imports(source):
    """Every module that a source imports anywhere, functions included, by its full name."""
    out = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that a reader can find them"
            # `from moe_jax import balance` imports moe_jax.balance
            inner = node.module == "moe_jax"
            out |= {f"moe_jax.{alias.name}" for alias in node.names} if inner else {node.module}
    return out


def upward(module, source):
    """Imports of `module` that go up the house."""
    inside = {name.removeprefix("moe_jax.") for name in imports(source) if name.startswith("moe_jax.")}
    return sorted(name for name in inside if floor(name) > floor(module))


def worldly(source):
    """Imports of Flax or of the mesh."""
    roots = ("flax", "moe_jax.rules", "moe_jax.mesh")
    return sorted(name for name in imports(source) if any((name + ".").startswith(root + ".") for root in roots))


def undocumented(source):
    """Public functions and classes of a module of four lines or more, without a docstring."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = (n for n in ast.parse(source).body if isinstance(n, kinds) and not n.name.startswith("_"))
    long = (n for n in public if n.end_lineno - n.lineno + 1 >= 4)
    return [n.name for n in long if not ast.get_docstring(n)]


UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
# A path below the root of a file system; those of the system's own files are the same on every machine.
ABSOLUTE = re.compile(r"(?<=[\"'`\s(=])/(?!proc/|sys/|dev/)[a-z][\w.-]*/[\w.-]+|(?<=[\"'`\s(=])[A-Z]:\\\\")


def test_the_checks_see_what_they_look_for():
    source = (
        "def f():\n    from moe_jax.layers import moe\n    import flax.nnx\n    from moe_jax import mesh, balance\n"
    )
    assert imports(source) == {"moe_jax.layers", "flax.nnx", "moe_jax.mesh", "moe_jax.balance"}
    assert upward("routing", source) == ["layers"]
    assert upward("rules", source) == ["balance", "layers"]
    assert upward("layers.moe", source) == upward("train.loop", source) == []
    assert upward("model", "import moe_jax.train.step") == ["train.step"]
    assert worldly(source) == ["flax.nnx", "moe_jax.mesh"]
    assert undocumented(source) == ["f"]
    assert undocumented("def f():\n    '''Doc.'''\n    x = 1\n    return x\ndef g():\n    return 1\n") == []
    assert all(UNFINISHED.search(f"x = 1  # {word}: more") for word in ("TODO", "FIXME", "XXX", "HACK"))
    assert ABSOLUTE.search('open("/home/me/data.txt")') and not ABSOLUTE.search("a / b, and/or, docs/tutorial/x")


@pytest.mark.parametrize("module", FILES)
def test_imports_only_go_down(module):
    source = FILES[module].read_text("utf-8")
    assert not upward(module, source)
    if module.split(".")[0] in MATHEMATICS:
        assert not worldly(source), "the mathematics knows no Flax and no mesh"


def test_the_words_need_no_jax():
    """`--help`, a config and its errors answer before JAX has started."""
    for module in FLOORS[0][1]:
        assert not {name.split(".")[0] for name in imports(FILES[module].read_text("utf-8"))} & {"jax", "flax"}


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: p.name)
def test_tests_and_tools_can_be_read(path):
    source = path.read_text("utf-8")
    assert len(source.splitlines()) <= 600
    assert ast.get_docstring(ast.parse(source)), "a file says what it is for"


@pytest.mark.parametrize("module", FILES)
def test_files_can_be_read(module):
    source = FILES[module].read_text("utf-8")
    assert len(source.splitlines()) <= 600
    assert not undocumented(source)
    assert not source or ast.get_docstring(ast.parse(source)), "a module says what it is for"
    assert not UNFINISHED.findall(source)
    assert not ABSOLUTE.findall(source)
