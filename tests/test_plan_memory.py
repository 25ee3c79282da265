"""Memory at the peak, against the compilers of TPU and GPU.

golden/peaks.json holds what the compilers said of golden/medium.toml, or of a config, with overrides; the slow test
asks them again.
The answer for one cell: `moe-jax plan tests/golden/medium.toml OVERRIDES --topology T --compile`.
"""

import json
from pathlib import Path

import pytest

from moe_jax import config
from moe_jax.pattern import query_blocks
from moe_jax.plan import memory as plan_memory
from moe_jax.plan.hardware import parse
from moe_jax.plan.memory import memory, tiled
from moe_jax.plan.work import Step

FOLDER = Path(__file__).parent / "golden"
CELLS = json.loads((FOLDER / "peaks.json").read_text())["cells"]
NAMES = [" ".join([c["topology"], c.get("config", ""), *c["overrides"]]) for c in CELLS]


def cell(c):
    return config.load(c.get("config", str(FOLDER / "medium.toml")), c["overrides"]), parse(c["topology"], 0)


def test_the_cells_are_many_and_various():
    chips = {c["topology"].partition(":")[0] for c in CELLS}
    assert len(CELLS) >= 12 and {"v5e", "v5p", "h100"} <= chips
    assert len({tuple(o for o in c["overrides"] if o.startswith("mesh.")) for c in CELLS}) >= 5


@pytest.mark.parametrize("c", CELLS, ids=NAMES)
def test_the_peak_is_that_of_the_compiler(c):
    cfg, cluster = cell(c)
    assert memory(Step(cfg, cluster.platform)).peak == pytest.approx(c["peak_bytes"], rel=0.10)


SMALL = [pytest.param(c, id=name) for c, name in zip(CELLS, NAMES, strict=True) if "config" not in c]


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize("c", SMALL)
def test_the_compiler_says_so_still(c):
    """All but those of large models, which compile for many minutes."""
    from moe_jax.plan.compiled import compiled

    cfg, cluster = cell(c)
    peak = compiled(cfg, cluster)["peak_bytes"]
    assert peak == pytest.approx(c["peak_bytes"], rel=0.05), "another version of the compiler?"
    assert memory(Step(cfg, cluster.platform)).peak == pytest.approx(peak, rel=0.10)


def peaks(*overrides, platform="tpu"):
    return memory(Step(config.load(str(FOLDER / "medium.toml"), overrides), platform))


def test_remat_trades_memory_for_work():
    saved = {r: peaks(f"model.remat={r}") for r in ("none", "dots", "exchange", "full")}
    assert saved["none"].peak > saved["dots"].peak > saved["full"].peak
    assert saved["exchange"].peak > saved["full"].peak
    T, D, rows = 256 * 128 // 8, 1024, 8 * 32 * 40
    assert saved["full"].kinds["activations"] == 8 * T * D * 2, "the input of each layer, bfloat16"
    assert saved["exchange"].kinds["dispatch"] == 8 * 2 * rows * D * 2, "both sides of each exchange"


def test_state_is_split_by_the_axes_of_its_parameters():
    one, fsdp = peaks("mesh.expert=1", "mesh.data=8"), peaks("mesh.expert=1", "mesh.fsdp=8")
    total = sum(x.size for x in Step(config.load(str(FOLDER / "medium.toml")), "tpu").leaves)
    assert one.kinds["parameters"] == 4 * total and one.kinds["optimizer"] == 8 * total
    norms = 17 * 1024 + 8 * 1024 * 8  # and routers, which no rule splits
    assert fsdp.kinds["parameters"] == 4 * ((total - norms) // 8 + norms)


def test_microbatches_shrink_activations_and_double_gradients():
    whole, parts = peaks(), peaks("train.microbatches=4")
    assert parts.kinds["logits"] * 4 == whole.kinds["logits"]
    assert parts.kinds["gradients"] > whole.kinds["gradients"]


def test_equal_layers_are_worked_out_once(monkeypatch):
    """So that a search over a thousand meshes of a deep model answers at once."""
    asked, saved = [], plan_memory.saved
    monkeypatch.setattr(plan_memory, "saved", lambda step, kind: asked.append(kind) or saved(step, kind))
    few, many = (peaks(f"model.layers={n}", "model.moe.every=2") for n in (4, 16))
    assert asked == ["dense", "moe"] * 2 and many.kinds["activations"] == 4 * few.kinds["activations"]


def test_query_blocks_cover_the_causal_half():
    for L in (64, 97, 512, 4096):
        blocks = query_blocks(L)
        assert [begin for begin, _ in blocks] == [0, *(end for _, end in blocks[:-1])] and blocks[-1][1] == L
        assert len(blocks) <= 8 and all(begin < end for begin, end in blocks)


@pytest.mark.parametrize(
    "shape,want", [((64, 64), 64 * 128), ((64, 192), 64 * 256), ((64, 256), 64 * 256), ((8, 1), 128 * 8)]
)
def test_tpu_tiles(shape, want):
    assert tiled(*shape, "tpu") == want and tiled(*shape, "gpu") == shape[0] * shape[1]


def test_the_cache_of_generation():
    """2 tensors x layers x J x N x b a place (131,072 bytes a token for Mixtral 8x7B)."""
    cfg = config.load("mixtral_8x7b", ["mesh.fsdp=1", "mesh.expert=1", "data.batch=1"])
    assert memory(Step(cfg, "gpu")).cache == 131_072 * 4096
