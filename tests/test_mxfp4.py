"""MXFP4, as GPT-OSS is published: every code and scale by the table of the OCP specification and by transformers, on
every mesh, and what is refused."""

import json

import damage
import jax
import ml_dtypes
import numpy as np
import published
import pytest
from damage import change, cut_in_two, rewrite, truncated
from published import GOLDEN, needs_torch
from test_convert import compare, ours, read, tensors

from moe_jax import config
from moe_jax.convert import load, mxfp4
from moe_jax.convert.families import family_of, model_keys
from moe_jax.convert.names import NameMap
from moe_jax.convert.tensors import Stored
from moe_jax.refused import Refused
from moe_jax.train.state import Model

pytestmark = pytest.mark.usefixtures("inside")

D, F = 64, 96  # blocks of 32 along both, and halves of F end inside of one
LAYER = "model.layers.1.mlp.experts."
UNCONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
E2M1 = {  # OCP MX v1.0, section 5.3.3: sign, exponent of bias 1, fraction; an exponent of 0 is subnormal
    s * 8 + e * 2 + m: (-1) ** s * (m / 2 if e == 0 else 2.0 ** (e - 1) * (1 + m / 2))
    for s in (0, 1)
    for e in range(4)
    for m in (0, 1)
}


def by_hand(blocks, scales):
    """float64 [E, D, F] of blocks [E, F, D/32, 16] and scales [E, F, D/32], number by number."""
    low, high = (np.vectorize(E2M1.get, otypes=[float])(half) for half in (blocks & 15, blocks >> 4))
    numbers = np.stack([low, high], -1).reshape(*scales.shape, 32) * 2.0 ** (scales.astype(float) - 127)[..., None]
    return numbers.reshape(*scales.shape[:2], -1).transpose(0, 2, 1)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder like the published one, in two layers, and what its tensors stand for."""
    folder = tmp_path_factory.mktemp("packed") / "source"
    folder.mkdir()
    about = json.loads((GOLDEN / "gpt_oss" / "config.json").read_text()) | {"hidden_size": D, "intermediate_size": F}
    about["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": UNCONVERTED}
    (folder / "config.json").write_text(json.dumps(about))
    model = Model.of(config.from_dict({"model": model_keys(about), "data": {"length": 8}}))
    draw, stored, means = np.random.default_rng(0), {}, {}
    for name, shape in NameMap(model, family_of(about)[1].names(model.cfg.model)).tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            E, rows, columns = shape
            blocks = draw.integers(0, 256, (E, columns, rows // 32, 16), np.uint8)
            scales = draw.integers(119, 123, (E, columns, rows // 32), np.uint8)
            stored |= {name + "_blocks": blocks, name + "_scales": scales}
            means[name] = by_hand(blocks, scales)
        else:
            stored[name] = draw.normal(0, 0.3, shape).astype(ml_dtypes.bfloat16)
            means[name] = stored[name].astype(np.float32)
    from safetensors.numpy import save_file

    save_file(stored, folder / "model.safetensors")
    return folder, means


@pytest.fixture
def folder(packed, tmp_path):
    """A copy, to damage."""
    (tmp_path / "source").mkdir()
    for path in packed[0].iterdir():
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "source"


def every_code(file):
    """Each byte under each scale that float32 has room for: two `Stored` of [1, 253, 16, 16] and [1, 253, 16]."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (1, 253, 16, 16))
    scales = np.broadcast_to(np.arange(253, dtype=np.uint8)[:, None], (1, 253, 16))
    file.write_bytes(blocks.tobytes() + scales.tobytes())
    return Stored(file, "U8", blocks.shape, 0), Stored(file, "U8", scales.shape, blocks.size)


def test_every_code_and_scale(tmp_path):
    """By the specification, and by the types of ml_dtypes; all exact, also below the normal numbers of float32."""
    found = mxfp4.Packed("w", *every_code(tmp_path / "file"))
    got = found.view()
    assert got.dtype == np.float32 and got.shape == found.shape == (1, 16 * 32, 253)
    blocks, scales = found.blocks.view(), found.scales.view()
    assert (got == by_hand(blocks, scales)).all()
    halves = np.stack([blocks & 15, blocks >> 4], -1).reshape(1, 253, 16, 32)
    numbers, factors = halves.view(ml_dtypes.float4_e2m1fn), scales.view(ml_dtypes.float8_e8m0fnu)
    product = numbers.astype(np.float64) * factors.astype(np.float64)[..., None]
    assert (got == product.reshape(1, 253, -1).transpose(0, 2, 1)).all()
    assert (got == got.astype(ml_dtypes.bfloat16).astype(np.float32)).all(), "an export in bfloat16 loses nothing"


@needs_torch
def test_every_code_by_transformers(tmp_path):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    found = mxfp4.Packed("w", *every_code(tmp_path / "file"))
    blocks, scales = (torch.tensor(x.view().copy()) for x in (found.blocks, found.scales))
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    assert (found.view() == want).all()


@needs_torch
def test_answers_of_transformers(packed):
    """Of the whole model, as transformers reads it in float32: so are the axes, and gate and up."""
    import torch
    import transformers

    how = transformers.Mxfp4Config(dequantize=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        packed[0], quantization_config=how, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    compare(ours(packed[0]), published.answers(model.eval()))


@pytest.mark.parametrize("overrides", [(), ("mesh.expert=4", "mesh.tensor=2"), ("mesh.fsdp=4", "mesh.expert=2")])
def test_what_comes_in_goes_out(overrides, packed, tmp_path, call):
    """On each mesh the numbers of the specification, and in bfloat16 without a word of MXFP4."""
    run, out = tmp_path / "run", tmp_path / "out"
    code, report, err = call("convert", "import", packed[0], run, "data.length=8", *overrides, "--json")
    assert code == 0 and not report["ignored"], err
    code, report, err = call("convert", "export", run, out, "--json")
    assert code == 0 and report["dtype"] == "bfloat16", err
    got = tensors(out)
    assert got.keys() == packed[1].keys()
    assert all(x.dtype == ml_dtypes.bfloat16 and (x.astype(float) == packed[1][n]).all() for n, x in got.items())
    about = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in about and about["dtype"] == "bfloat16"


def test_a_device_reads_its_part_alone(packed, monkeypatch):
    """Of four experts one, and of its 96 places of F the half; blocks that the edge cuts twice."""
    found, devices, _ = read(packed[0], "mesh.expert=4", "mesh.tensor=2")
    targets, seen, decoded = found.model.weight_targets(devices), [], mxfp4.Packed.decoded
    monkeypatch.setattr(mxfp4.Packed, "decoded", lambda p, *a: seen.append([x.shape for x in a]) or decoded(p, *a))
    # Layers are two stacks of one: each is asked for once for each of eight devices
    for name, want in (("w_gate", [(48, 2, 16), (48, 2)]), ("w_down", [(64, 2, 16), (64, 2)])):
        leaf = f"stacks.0.blocks.0.ffn.experts.{name}"
        target = targets.params["stacks"]["0"]["blocks"]["0"]["ffn"]["experts"][name]
        load.filled(found.source, found.names.parts[leaf], target, lambda n: None)
        assert seen == [want] * 8 * target.shape[0], (name, target.shape)
        seen.clear()


def test_some_modules_may_be_as_they_were(packed, folder):
    """Of one layer the experts are in bfloat16, as config.json says, and in two files."""
    means = {n: x for n, x in packed[1].items() if n.startswith(LAYER) and n.endswith("_proj")}

    def plain(stored):
        for name, mean in means.items():
            stored[name] = np.ascontiguousarray(mean, ml_dtypes.bfloat16)
            del stored[name + "_blocks"], stored[name + "_scales"]

    rewrite(folder, plain)
    about = {"quant_method": "mxfp4", "modules_to_not_convert": [*UNCONVERTED, "model.layers.1.mlp.experts"]}
    change(folder / "config.json", quantization_config=about)
    cut_in_two(folder)
    both = [read(f)[2] for f in (folder, packed[0])]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), *both))


NAME = LAYER + "down_proj"
SCALES, BLOCKS = NAME + "_scales", NAME + "_blocks"


def put(name, place, value):
    """An edit of a number of a tensor."""
    return lambda f: rewrite(f, lambda t: t[name].__setitem__(place, value))


def listed(*modules):
    about = {"quant_method": "mxfp4", "modules_to_not_convert": list(modules)}
    return lambda f: change(f / "config.json", quantization_config=about)


DAMAGE = {
    "no scales": (lambda f: rewrite(f, lambda t: t.pop(SCALES)), [BLOCKS, "[4, 64, 3, 16] U8", f"{SCALES} is missing"]),
    "no blocks": (lambda f: rewrite(f, lambda t: t.pop(BLOCKS)), [SCALES, "[4, 64, 3] U8", f"{BLOCKS} is missing"]),
    "neither": (lambda f: rewrite(f, lambda t: (t.pop(BLOCKS), t.pop(SCALES))), ["missing", f"{NAME} [4, 96, 64]"]),
    "scales of another shape": (
        lambda f: rewrite(f, lambda t: t.update({SCALES: np.zeros((4, 64, 2), np.uint8)})),
        [SCALES, "[4, 64, 2] U8", "[E, F, D/32]"],
    ),
    "scales as numbers": (
        lambda f: rewrite(f, lambda t: t.update({SCALES: np.ones((4, 64, 3), np.float32)})),
        [SCALES, "[4, 64, 3] F32", "should be U8"],
    ),
    "blocks of another size": (
        lambda f: rewrite(f, lambda t: t.update({BLOCKS: np.zeros((4, 64, 3, 8), np.uint8)})),
        [BLOCKS, "[4, 64, 3, 8] U8", "D/32, 16]"],
    ),
    "the axes of the model": (  # where they are not those of the file
        lambda f: rewrite(
            f, lambda t: t.update({BLOCKS: np.zeros((4, 96, 2, 16), np.uint8), SCALES: np.zeros((4, 96, 2), np.uint8)})
        ),
        [f"{NAME} is [4, 64, 96] and should be [4, 96, 64]"],
    ),
    "a scale of 255": (put(SCALES, (2, 3, 1), 255), [SCALES, "the scale 255", "NaN", "model.safetensors"]),
    "a scale of 254": (put(SCALES, (2, 3, 1), 254), [NAME, "a scale of 254, 2^127", "float32"]),
    "a cut file": (lambda f: truncated(f, -100), ["model.safetensors", "bytes", "ends at byte"]),
    "both forms": (
        lambda f: rewrite(f, lambda t: t.update({NAME: np.ones((4, 96, 64), np.float32)})),
        [f"{NAME} [4, 96, 64] F32", BLOCKS, "twice"],
    ),
    "bytes of nothing": (lambda f: rewrite(f, lambda t: t.update(more=np.zeros(3, np.uint8))), ["more is U8", "F32"]),
    "a pair that the model has not": (
        lambda f: rewrite(
            f, lambda t: t.update(x_blocks=np.zeros((1, 2, 3, 16), np.uint8), x_scales=np.zeros((1, 2, 3), np.uint8))
        ),
        ["not of this model: x [1, 96, 2] MXFP4"],
    ),
    "no word of MXFP4": (lambda f: change(f / "config.json", quantization_config=None), ["_blocks is U8", "MXFP4"]),
    "another family": (lambda f: change(f / "config.json", model_type="mixtral"), ["'mxfp4'", "'mixtral'", "bfloat16"]),
    "modules that are": (listed("model.layers.1.mlp.experts"), [f"{NAME} is stored", "1.mlp.experts'"]),
    "modules that are, by a star": (listed("lm_head", "model.layers.*.mlp"), ["MXFP4", "'model.layers.*.mlp'"]),
    "modules that are, by their end": (listed("experts.down_proj"), ["down_proj is stored in MXFP4"]),
    "modules of no list": (listed(3), ["modules_to_not_convert is [3]", "list"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name, folder, tmp_path, call):
    """Also where it is found while weights are read, after what else an import says."""
    damage.refused(*DAMAGE[name], folder, tmp_path, call, "--quiet")


def test_scales_that_fit(packed, folder):
    """The largest ones, and of a scale of 254 the small numbers: no refusal where float32 holds them."""
    put(SCALES, (2, 3, 1), 252)(folder)
    rewrite(folder, lambda t: (t[SCALES].__setitem__((1, 1, 1), 254), t[BLOCKS].__setitem__((1, 1, 1), 0xB3)))
    down = load.opened(folder, folder / "run").source.values(NAME)
    assert down[1, 32, 1] == 1.5 * 2.0**127 and down[1, 33, 1] == -1.5 * 2.0**127
    put(BLOCKS, (1, 1, 1), 0xC3)(folder)  # 2 and 1.5
    with pytest.raises(Refused, match=r"a scale of 254"):
        load.opened(folder, folder / "run").source.values(NAME)
