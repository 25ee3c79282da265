"""Notebooks run from top to bottom, store clean outputs and agree with their sources.

A notebook is written as NAME.py (cells divided by `# %%`) beside its NAME.ipynb, which is made from it by
`python tests/test_notebooks.py build notebooks/NAME.py`. `... run notebooks/NAME.ipynb` runs it and stores nothing.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
PRIVATE = re.compile(r"/(home|Users|root|work|tmp|var|opt|usr)/|[A-Z]:\\\\|site-packages|dist-packages|https?://")
MOST_BYTES = 700_000


def execute(path: Path):
    """The notebook of a .py or .ipynb file, run in a fresh kernel of this interpreter, in its own folder."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(path)
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    return notebook


def build(path: Path) -> None:
    """Run the notebook of a .py file and store it with its outputs, without what only this machine knows."""
    import nbformat

    notebook = execute(path)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i:02d}", {}
        for output in cell.get("outputs", ()):
            output.pop("metadata", None) if output.output_type == "stream" else output.metadata.clear()
    nbformat.write(notebook, path.with_suffix(".ipynb"))


def stored(path: Path) -> list[dict]:
    return json.loads(path.read_text("utf-8"))["cells"]


def outputs(cells) -> list[dict]:
    return [output for cell in cells for output in cell.get("outputs", ())]


def texts(output: dict) -> str:
    """All that an output says; its pictures left out."""
    data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
    return json.dumps(output | {"data": data})


def check_clean(results: list[dict]) -> None:
    """No errors, no warnings, nothing of the machine."""
    for output in results:
        assert output["output_type"] != "error", output
        assert output.get("name") != "stderr", output["text"]
        assert not (found := PRIVATE.search(texts(output))), found


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_all_find_the_project_alike():
    """Each notebook has its own copy of what comes before anything is installed."""
    sources = [path.with_suffix(".py").read_text("utf-8") for path in NOTEBOOKS]
    assert len({s[s.index("def checkout()") : s.index("    importlib.invalidate_caches()")] for s in sources}) == 1


@each_notebook
def test_runs_from_top_to_bottom(path):
    # In a process of its own: the kernel's event loop and sockets are not this suite's to warn about.
    command = [sys.executable, __file__, "run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=path.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    fresh = json.loads(done.stdout)
    pictures = [sum("image/png" in o.get("data", {}) for o in outputs(cells)) for cells in (fresh, stored(path))]
    assert pictures[0] == pictures[1] > 0


@each_notebook
def test_stored_notebook_is_clean(path):
    text, cells = path.read_text("utf-8"), stored(path)
    check_clean(outputs(cells))
    assert len(text) < MOST_BYTES
    assert str(ROOT) not in text
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)), "not run from top to bottom"
    assert not any(cell["metadata"] for cell in cells), "execution times or other traces"
    sources = "\n".join("".join(cell["source"]) for cell in cells)
    assert not (found := PRIVATE.search(sources)), found


@each_notebook
def test_stored_notebook_agrees_with_its_source(path):
    command = [sys.executable, "-m", "jupytext", "--to", "ipynb", "--output", "-", str(path.with_suffix(".py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    written = [(c["cell_type"], "".join(c["source"])) for c in json.loads(done.stdout)["cells"]]
    assert written == [(c["cell_type"], "".join(c["source"])) for c in stored(path)], "build it again"


@each_notebook
@pytest.mark.parametrize("unpacked", [True, False])
def test_first_cell_installs_the_checkout_or_says_what_to_do(path, unpacked, tmp_path):
    folder = tmp_path / "project"
    if unpacked:  # as in Colab: the project in a folder below the current one
        (folder / "moe_jax").mkdir(parents=True)
        (folder / "moe_jax" / "__init__.py").touch()
        (folder / "pyproject.toml").touch()
    first = next("".join(cell["source"]) for cell in stored(path) if cell["cell_type"] == "code")
    stub = "import subprocess, sys\nsubprocess.run = lambda command, **kw: sys.exit(' '.join(command))\n"
    bare = [sys.executable, "-I", "-S", "-c", stub + first]  # an interpreter without packages
    done = subprocess.run(bare, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    wanted = f"-m pip install --quiet {folder}" if unpacked else "Clone or unpack the project"
    assert wanted in done.stderr


if __name__ == "__main__":
    verb, file = sys.argv[1:]
    if verb == "build":
        build(Path(file).resolve())
    else:
        cells = execute(Path(file).resolve()).cells
        check_clean(outputs(cells))
        print(json.dumps(cells))
