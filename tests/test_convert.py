"""Published models: numbers equal to transformers', on every mesh, there and back bit for bit."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from commands import write_text
from published import CASES, FORGETFUL, GOLDEN, INPUTS, TOKENS, needs_torch

from moe_jax import config, mesh
from moe_jax.convert import load, save
from moe_jax.convert.families import family_of, model_keys
from moe_jax.convert.names import NameMap, Part, Piece, Take
from moe_jax.convert.tensors import read_header
from moe_jax.refused import Refused
from moe_jax.train.state import Model
from moe_jax.train.step import cross_entropy

pytestmark = pytest.mark.usefixtures("inside")

SPLIT = ("mesh.expert=4", "mesh.tensor=2")
PHI_BIASES = {"attention_bias": True, "lm_head_bias": True}


def read(folder, *overrides):
    """What was opened, the mesh and the weights of an import."""
    found = load.opened(folder, folder / "run", ["data.length=8", *overrides])
    devices = mesh.build_mesh(found.cfg.mesh)
    return found, devices, load.weights(found.source, found.names, found.model.weight_targets(devices), lambda n: None)


def ours(folder, *overrides):
    """The answers of `published.answers` from an import of the folder."""
    found, devices, weights = read(folder, *overrides)
    tokens = jnp.asarray(TOKENS, jnp.int32)
    before = {"inputs": jnp.asarray(INPUTS, jnp.int32)} if found.cfg.model.encoder else {}

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        out = found.model.module(params, weights.bias)(tokens, record=True, **before)
        return cross_entropy(out.logits[:, :-1], tokens[:, 1:]).mean(), out

    with jax.set_mesh(devices):
        (value, out), gradient = jax.jit(loss)(weights.params)
    norm = np.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(gradient)))
    full = found.cfg.model.moe.eval_capacity_factor is not None
    dropped = np.asarray(out.stats.routed) > np.asarray(out.stats.kept)
    assert dropped.any() == full, "nothing is dropped but where that is asked for"
    answer = {"logits": out.logits, "loss": value, "norm": norm}
    for part, record in (("", out.record), ("read_", out.input_record)):
        if record is not None:
            expert, gate = np.asarray(record.expert), np.asarray(record.gate)
            order = expert.argsort(-1)
            answer |= {part + "experts": np.take_along_axis(expert, order, -1)}
            answer |= {part + "gates": np.take_along_axis(gate, order, -1)}
    return {k: np.asarray(v) for k, v in answer.items()}


def compare(got, want):
    """As close as two libraries come in float32: the same experts for every token, and sums in another order."""
    assert set(got) == set(want.keys())
    limits = {"logits": 1e-4, "gates": 1e-5, "read_gates": 1e-5, "loss": 1e-4, "norm": 1e-4}
    for name in got:
        if name in limits:
            assert np.abs(got[name] - want[name]).max() <= limits[name] * np.abs(want[name]).max(), name
        else:
            assert (got[name] == want[name]).all(), name
    assert np.abs(got["logits"] - want["logits"]).max() < 1e-5 * np.abs(want["logits"]).max()


@pytest.mark.parametrize("family", CASES)
def test_answers_of_reference_files(family):
    """Without torch: the answers of transformers, as they were written down."""
    compare(ours(GOLDEN / family), np.load(GOLDEN / f"{family}.npz"))


@needs_torch
@pytest.mark.parametrize(("family", "number"), [c for c in published.cases() if c[1]])
def test_answers_of_transformers(family, number, tmp_path):
    model = published.build(family, number, tmp_path)
    drops = ["model.moe.eval_capacity_factor=1e-9"] if (family, number) in published.FULL else []
    compare(
        ours(tmp_path, *drops), published.answers(published.repaired(model) if (family, number) == FORGETFUL else model)
    )


@needs_torch
def test_the_long_factors_that_transformers_forgets(tmp_path):
    """In rows of more tokens than the first training had; where this fails, no model is to be repaired any more."""
    model = published.build(*FORGETFUL, tmp_path)
    factors = CASES["phimoe"][1]["rope_parameters"]
    assert factors["long_factor"] != factors["short_factor"]
    compare(ours(tmp_path, f"model.rope.long_factors={factors['short_factor']}"), published.answers(model))


def logits(found, devices, weights, prompt=None):
    """Of four rows [4, 12] in one call, or of a cache that takes so many tokens first and then one after another."""
    tokens, inputs = (jnp.asarray(np.concatenate([a, a[:, ::-1]]), jnp.int32) for a in (TOKENS, INPUTS))
    before = {"inputs": inputs} if found.cfg.model.encoder else {}

    def run(weights):
        module = found.model.module(*weights)
        if prompt is None:
            return module(tokens, **before).logits

        def step(cache, token):
            out = module(token[:, None], cache=cache)
            return out.cache, out.logits[:, 0]

        first = module(tokens[:, :prompt], cache=module.empty_cache(*tokens.shape), **before)
        _, rest = jax.lax.scan(step, first.cache, tokens[:, prompt:].T)
        return jnp.concatenate([first.logits, rest.swapaxes(0, 1)], 1)

    with jax.set_mesh(devices):
        return np.asarray(jax.jit(run)(weights))


@pytest.mark.parametrize("family", CASES)
def test_meshes(family):
    """Experts over four devices, matrices over two: each holds its part, together they hold what one does, and they
    say the same, also when they go on from a prompt."""
    alone = read(GOLDEN / family)
    found, devices, many = read(GOLDEN / family, *SPLIT)
    want = logits(*alone)
    for prompt in (None, 8):
        got = logits(found, devices, many, prompt)
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max(), prompt
    one = alone[2]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), one, many))
    leaves = {load.path_of(path): x for path, x in jax.tree_util.tree_flatten_with_path(many)[0]}
    experts = next(x for name, x in leaves.items() if name.endswith("experts.w_up"))
    n, E, D, F = experts.shape
    assert leaves.keys() == found.names.parts.keys()
    assert {s.data.shape for s in experts.addressable_shards} == {(n, E // 4, D, F // 2)}


def test_a_device_reads_its_part_alone(monkeypatch):
    """Bytes of experts that are looked at for one device of `expert=4, tensor=2`, of them all."""
    found, devices, _ = read(GOLDEN / "mixtral", *SPLIT)
    targets, seen = found.model.weight_targets(devices), []
    piece = load.Piece.read
    monkeypatch.setattr(load.Piece, "read", lambda *a: seen.append(piece(*a)) or seen[-1])
    target = targets.params["stacks"]["0"]["blocks"]["0"]["ffn"]["experts"]["w_down"]
    load.filled(found.source, found.names.parts["stacks.0.blocks.0.ffn.experts.w_down"], target, lambda n: None)
    assert sum(x.nbytes for x in seen) == 4 * np.prod(target.shape)  # each number once, over all devices
    assert {x.shape for x in seen} == {(6, 16)}  # half of an expert's 12 rows at a time


@needs_torch
@pytest.mark.parametrize(
    ("name", "fields", "total", "active", "count"),
    [
        ("MixtralConfig", {}, 46_702_792_704, 12_879_925_248, 3 + 32 * (2 + 4 + 1 + 8 * 3)),
        ("GptOssConfig", {}, 116_829_156_672, 5_711_982_912, 3 + 36 * (2 + 9 + 2 + 4)),
        ("Qwen2MoeConfig", {}, 14_315_784_192, 2_689_173_504, 3 + 24 * (2 + 7 + 1 + 60 * 3 + 4)),
        ("DeepseekV3Config", {}, 671_026_404_352, 37_552_282_624, 3 + 61 * 9 + 3 * 3 + 58 * (2 + 3 + 256 * 3)),
        ("PhimoeConfig", PHI_BIASES, 41_873_153_344, 6_640_999_744, 5 + 32 * (4 + 8 + 1 + 16 * 3)),
    ],
)
def test_published_sizes(name, fields, total, active, count):
    """transformers' defaults are the published models: their parameters to the unit, and their tensors. Phi-3.5-MoE has
    biases besides."""
    import transformers

    about = json.loads(getattr(transformers, name)(**fields).to_json_string(use_diff=False))
    model = Model.of(config.from_dict({"model": model_keys(about)}))
    assert model.count() == (total, active)
    assert len(NameMap(model, family_of(about)[1].names(model.cfg.model)).tensors) == count


@needs_torch
@pytest.mark.parametrize(("family", "number"), published.cases())
def test_config_json_there_and_back(family, number):
    """A config.json that is written from our keys says to transformers what the one did that they came from."""
    import transformers

    kind = getattr(transformers, f"{published.CLASSES[family]}Config")
    old = json.loads(kind(**CASES[family][number]).to_json_string(use_diff=False))
    m = config.from_dict({"model": model_keys(old), "data": {"length": 8}}).model
    assert save.foreign(m, family) is None
    new = json.loads(kind(**save.described(m, family)).to_json_string(use_diff=False))
    assert save.unlike(m, new) == {}
    assert old.get("rope_parameters", {}).items() <= new.get("rope_parameters", {}).items()
    assert old.get("layer_types") == new.get("layer_types")
    assert m.window is None or m.window == old["sliding_window"] == new["sliding_window"]


@needs_torch
@pytest.mark.parametrize(("family", "number"), published.cases())
def test_absent_fields_are_what_transformers_takes(family, number):
    """Each field of a config.json left out: the same keys as from the class's value for it, or a refusal."""
    import transformers

    kind = getattr(transformers, f"{published.CLASSES[family]}Config")
    fields = CASES[family][number] | {"model_type": family}
    if "num_hidden_layers" in fields:
        fields["rope_parameters"] = fields.get("rope_parameters", {"rope_type": "default", "rope_theta": 1e4})
    full = json.loads(kind(**fields).to_json_string(use_diff=False))
    compared = set()
    for name in full.keys() - {"model_type"}:
        left = {k: v for k, v in full.items() if k != name}
        try:
            got = model_keys(left)
        except Refused:
            continue
        assert got == model_keys(json.loads(kind(**left).to_json_string(use_diff=False))), name
        compared.add(name)
    own = {"hidden_act", "rms_norm_eps", "num_key_value_heads"}
    if family == "switch_transformers":
        own = {"dense_act_fn", "layer_norm_epsilon", "num_decoder_layers", "num_sparse_encoder_layers"}
        own |= {"expert_capacity", "router_jitter_noise", "relative_attention_max_distance", "dropout_rate"}
    assert own | {"tie_word_embeddings"} <= compared


ABSENT = [
    ("mixtral", ["rms_norm_eps"], {"norm_eps": 1e-5}),
    ("mixtral", ["num_key_value_heads"], {"kv_heads": 8}),
    ("phimoe", ["router_jitter_noise", "num_experts_per_tok"], {"margin": 0.02, "top_k": 2}),
    ("gpt_oss", ["head_dim", "sliding_window"], {"head_dim": 64, "window": 128}),
    ("deepseek_v3", ["routed_scaling_factor", "n_group", "topk_group"], {"scale": 2.5, "groups": 8, "topk_groups": 4}),
    ("deepseek_v3", ["first_k_dense_replace", "n_shared_experts"], {"first_dense": 3, "shared_experts": 1}),
    ("deepseek_v2", ["q_lora_rank", "n_shared_experts"], {"query": 1536, "shared_experts": 2}),
]


@pytest.mark.parametrize(("family", "names", "want"), ABSENT)
def test_absent_fields(family, names, want):
    """Without transformers: the defaults of its classes that differ from family to family."""
    about = json.loads((GOLDEN / family / "config.json").read_text())
    keys = model_keys({k: v for k, v in about.items() if k not in names})
    moe = keys["moe"]
    flat = keys | moe | moe["router"] | keys.get("latent", {})
    assert {k: flat[k] for k in want} == want


FIRST, LAST, EVEN = np.arange(3), 3 + np.arange(3), 2 * np.arange(3)
TURNS = [
    ("v d -> v d", None, {"v": 5, "d": 4}, lambda t: t),
    ("f d -> d f", None, {"f": 3, "d": 4}, lambda t: t.T),
    ("(h n) d -> d h n", None, {"h": 2, "n": 3, "d": 4}, lambda t: t.reshape(2, 3, 4).transpose(2, 0, 1)),
    ("d (h n) -> h n d", None, {"h": 2, "n": 3, "d": 4}, lambda t: t.reshape(4, 2, 3).transpose(1, 2, 0)),
    (
        "(h n) c -> c h n",
        Take("n", LAST, 6),
        {"h": 2, "n": 3, "c": 4},
        lambda t: t.reshape(2, 6, 4)[:, 3:].T.swapaxes(1, 2),
    ),
    ("e d f -> e d f", Take("f", EVEN, 6), {"e": 2, "d": 4, "f": 3}, lambda t: t[..., ::2]),
    ("e f d -> e d f", Take("f", FIRST, 6), {"e": 2, "d": 4, "f": 3}, lambda t: t[:, :3].transpose(0, 2, 1)),
]


@pytest.mark.parametrize(("turn", "take", "sizes", "plain"), TURNS)
def test_turns(turn, take, sizes, plain):
    """A tensor to a parameter, a part of it, and back, as NumPy does it: also fused and interleaved ones."""
    piece = Piece("a tensor", Part("a.parameter", turn, take), "a.parameter", (), sizes)
    tensor = np.random.default_rng(0).normal(size=piece.shape)
    want = plain(tensor)
    parts = [slice(1, n) for n in want.shape]
    assert (piece.read(tensor, [slice(0, n) for n in want.shape]) == want).all()
    assert (piece.read(tensor, parts) == want[tuple(parts)]).all()
    empty = np.zeros_like(tensor)
    piece.write(empty, want)
    assert (plain(empty) == want).all() and np.count_nonzero(empty) == want.size


def tensors(folder):
    """The tensors of a folder, read by the format's own library."""
    from safetensors import safe_open

    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as f:
            out |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return out


NORMS = ("model.norm.weight", "decoder.final_layer_norm.weight")


def recast(folder, to, kind):
    """A folder whose tensors are in another type, but for the first norm's; in files of two tensors with an index."""
    from safetensors.numpy import save_file

    every, chart = tensors(folder), {}
    to.mkdir()
    names = list(every)
    for i in range(0, len(names), 20):
        part = {n: every[n].astype(np.float32 if n in NORMS else kind) for n in names[i : i + 20]}
        save_file(part, to / f"model-{i}.safetensors", {"format": "pt"})
        chart |= dict.fromkeys(part, f"model-{i}.safetensors")
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": chart}))
    about = json.loads((folder / "config.json").read_text())
    older = {"torch_dtype": np.dtype(kind).name}
    if rope := about.pop("rope_parameters", None):  # the form of older files
        older |= {"rope_theta": rope.pop("rope_theta")}
        older |= {"rope_scaling": None if rope["rope_type"] == "default" else rope}
    del about["dtype"]
    (to / "config.json").write_text(json.dumps(about | older | {"eos_token_id": [2, 7], "unknown": {"a": 1}}))
    return to


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("family", CASES)
def test_there_and_back(family, tmp_path, text, call):
    """Import and export give every tensor back bit for bit, in its type, and config.json as it was."""
    import ml_dtypes

    half = dict.fromkeys(("mixtral", "gpt_oss", "switch_transformers"), ml_dtypes.bfloat16)
    kind = (half | {"qwen3_moe": np.float16}).get(family, np.float32)
    source = recast(GOLDEN / family, tmp_path / "source", kind)
    data = [f"data.path={text}", "data.length=8"]
    code, report, err = call("convert", "import", source, tmp_path / "run", *data, *SPLIT, "--json")
    assert code == 0, err
    want = tensors(source)
    assert report["tensors"] == len(want) and report["params_total"] >= sum(x.size for x in want.values()) - 64
    assert not report["text"]  # 40 ids are fewer than bytes
    code, report, err = call("convert", "export", tmp_path / "run", tmp_path / "out", "--shard-gb", "1e-5", "--json")
    assert code == 0 and report["files"] > 1, err
    got = tensors(tmp_path / "out")
    assert {n: (x.dtype, x.shape) for n, x in got.items()} == {n: (x.dtype, x.shape) for n, x in want.items()}
    assert all(got[n].tobytes() == want[n].tobytes() for n in want)
    about = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")]
    assert about[0] == about[1]
    assert all(len(read_header(f)) for f in (tmp_path / "out").glob("*.safetensors"))


@needs_torch
@pytest.mark.parametrize("family", CASES)
def test_transformers_load_an_export(family, tmp_path, call):
    call("convert", "import", GOLDEN / family, tmp_path / "run", "data.length=8")
    code, _, err = call("convert", "export", tmp_path / "run", tmp_path / "out", "--dtype", "float32", "--quiet")
    assert code == 0, err
    published.loads(tmp_path / "out", family)
