"""Damages of a folder of published weights, and how an import has to refuse one."""

import json

import numpy as np
from commands import check_refusal, listing

INDEX = "model.safetensors.index.json"


def change(file, **fields):
    """Fields of a JSON file set; None takes one out."""
    found = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def rewrite(folder, edit):
    """The tensors of a folder written again after `edit(tensors)`, by the format's own library."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut_in_two(folder, edit=lambda chart: None):
    """The tensors in two files with an index, after `edit` of its entries."""
    from safetensors.numpy import load_file, save_file

    tensors, chart = load_file(folder / "model.safetensors"), {}
    names = sorted(tensors)
    for i, own in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in own}, folder / f"part-{i}.safetensors")
        chart |= dict.fromkeys(own, f"part-{i}.safetensors")
    (folder / "model.safetensors").unlink()
    edit(chart)
    (folder / INDEX).write_text(json.dumps({"weight_map": chart}))


def header(folder, edit):
    """The header of the file changed, and its length with it."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    found = json.loads(raw[8 : 8 + n])
    text = edit(found) or json.dumps(found)
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + raw[8 + n :])


def truncated(folder, less):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:less])


def usual(matrix, expert):
    """What may befall a folder of any family: edits, and words that a refusal has.

    Args:
        matrix: the name of a tensor [4, 16]. expert: of one of a single expert.
    """
    return {
        "a missing tensor": (lambda f: rewrite(f, lambda t: t.pop(matrix)), [matrix, "[4, 16]", "missing"]),
        "an extra tensor": (
            lambda f: rewrite(f, lambda t: t.update({"model.extra": np.ones((2, 3), np.float32)})),
            ["model.extra", "[2, 3] F32", "not of this model"],
        ),
        "a wrong shape": (
            lambda f: rewrite(f, lambda t: t.update({matrix: np.ones((4, 15), np.float32)})),
            [matrix, "[4, 15]", "[4, 16]"],
        ),
        "a cut file": (lambda f: truncated(f, -100), ["model.safetensors", "bytes", "ends at byte"]),
        "an expert that the index lacks": (lambda f: cut_in_two(f, lambda chart: chart.pop(expert)), [expert, INDEX]),
    }


def refused(spoil, needles, folder, tmp_path, call, *flags):
    """Exit code 2, what is wrong by its name, and no file made or changed."""
    spoil(folder)
    before = listing(tmp_path)
    check_refusal(*call("convert", "import", folder, tmp_path / "run", "data.length=8", *flags), "convert", *needles)
    assert listing(tmp_path) == before
