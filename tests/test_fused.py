"""Attention by kernels: numbers against plain attention, programs for TPU and GPU that hold no scores, and who decides.

The kernels run here step by step (`interpret`), and are compiled for machines that are not here; none runs on one.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from machines import compilable

from moe_jax import config, kernels
from moe_jax.axes import Rules
from moe_jax.config import MeshConfig, Refused
from moe_jax.generate import Generator, Sampling
from moe_jax.hlo import Program
from moe_jax.inspect import report
from moe_jax.inspect.compile import compile_to_read
from moe_jax.inspect.show import lines
from moe_jax.layers import attention
from moe_jax.layers.attention import Attention, Context, Scoring, causal_attention, whole_attention
from moe_jax.layers.fused import How, fused_attention
from moe_jax.layers.latent import LatentAttention
from moe_jax.mesh import build_mesh
from moe_jax.pattern import QUERY_BLOCKS
from moe_jax.plan import memory
from moe_jax.plan.work import Step
from moe_jax.rules import spec
from moe_jax.topology import parse, topology_mesh
from moe_jax.train.state import Model
from moe_jax.train.step import lower_forward

SCALE = 0.3
CAUSAL = {"J": 2, "R": 2, "N": 16}
CASES = {
    "tpu, grouped": ("tpu", "causal", 256, 256, CAUSAL),
    "tpu, window, sinks, narrower values": ("tpu", "causal", 256, 256, {"J": 1, "R": 3, "N": 24, "V": 8, "window": 70}),
    "tpu, encoder": ("tpu", "both ways", 128, 128, {"J": 2, "R": 1, "N": 16}),
    "tpu, reading": ("tpu", "reading", 128, 256, {"J": 2, "R": 1, "N": 16}),
    "gpu, grouped": ("gpu", "causal", 128, 128, CAUSAL),
    "gpu, no power of two": ("gpu", "causal", 192, 192, {"J": 1, "R": 2, "N": 24}),
    "gpu, encoder": ("gpu", "both ways", 128, 128, {"J": 1, "R": 2, "N": 32}),
}


def made(L, M, kind, J, R, N, V=None, window=None):
    """Packed rows with padding, and a random cotangent."""
    rng = np.random.default_rng(0)
    shapes = [(2, J, R, L, N), (2, J, M, N), (2, J, M, V or N), (2, J, R, L, V or N)]
    q, k, v, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    segments = np.ones((2, L), np.int32)
    segments[0, L // 3 :], segments[0, -9:], segments[1, 50:] = 2, 0, 2
    seen = segments if kind != "reading" else np.sort(rng.integers(0, 2, (2, M)), axis=1).astype(np.int32)
    sinks = None if window is None else jnp.asarray(rng.normal(size=J * R), jnp.float32)
    return (q, k, v, sinks), g, jnp.asarray(segments), jnp.asarray(seen)


def with_gradients(attention, arrays, g):
    y, pull = jax.vjp(attention, *arrays)
    return y, *pull(g)


def plain(arrays, g, segments, seen, kind, window):
    """Outputs of tokens that are none count for nothing."""

    def attention(q, k, v, sinks):
        scoring = Scoring(SCALE, window, None, sinks)
        if kind == "causal":
            return causal_attention(q, k, v, segments, scoring)
        return whole_attention(q, k, v, segments, seen, scoring)

    return jax.jit(with_gradients, static_argnums=0)(attention, arrays, real(g, segments))


def real(a, segments):
    return jnp.where((segments > 0)[:, None, None, :, None], a, 0.0)


def by_kernel(platform, arrays, g, segments, seen, how, rules=None):
    def attention(q, k, v, sinks):
        return fused_attention(q, k, v, segments, seen, sinks, how, platform, rules)

    return jax.jit(with_gradients, static_argnums=0)(attention, arrays, real(g, segments))


def compare(ours, theirs, segments, kind):
    """Padding of an encoder comes out as 0 on both ways; in a causal row nobody reads it."""
    (y, *gradients), (want, *wanted) = ours, theirs
    if kind == "causal":
        y, want = real(y, segments), real(want, segments)
    for a, b in zip([y, *jax.tree.leaves(gradients)], [want, *jax.tree.leaves(wanted)], strict=True):
        assert float(jnp.abs(b).max()) > 0.1
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_computes_what_plain_attention_computes(name):
    """Outputs and all gradients, of packed rows with padding."""
    platform, kind, L, M, sizes = CASES[name]
    window = sizes.get("window")
    given = made(L, M, kind, **sizes)
    ours = by_kernel(platform, *given, How(kind, SCALE, window, interpret=True))
    compare(ours, plain(*given, kind, window), given[2], kind)


@pytest.mark.parametrize("J, R", [(2, 1), (1, 2)], ids=["heads of their own", "heads that share keys"])
def test_on_a_mesh_each_device_has_its_rows_and_heads(J, R):
    rules = Rules() if J > 1 else Rules(kv_heads=())
    given = made(128, 128, "causal", J, R, 16, window=50)
    want = plain(*given, "causal", 50)
    with jax.set_mesh(build_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
        ours = by_kernel("tpu", *given, How("causal", SCALE, 50, interpret=True), rules)
        groups, within = (("tensor",), ()) if J > 1 else ((), ("tensor",))
        assert tuple(ours[0].sharding.spec) == tuple(spec((("data",), groups, within)))[: 2 if groups else 3]
    compare(ours, want, given[2], "causal")


# Programs for machines that are not here

TPU, GPU = "v5e:2x2", "h100:1x4"
TARGETS = {TPU: "tpu_custom_call", GPU: "__gpu$xla.gpu.triton"}
PASSES = 3  # kernels of a layer: forward, and two for its gradient
SHARED = ["mesh.data=2", "mesh.tensor=2", "model.kv_heads=1", "rules.kv_heads=[]"]
CAN = {  # beside that, on TPU
    "window and sinks": ["mesh.tensor=4", "model.window=300", "model.sinks=true"],
    "latent": ["mesh.data=2", "mesh.tensor=2", "model.latent.key_value=64", "model.latent.rotary=16"],
}


def small(L, *overrides):
    sizes = ["model.d_model=64", "model.heads=4", "model.head_dim=96", "model.dtype=bfloat16", "model.d_ff=64"]
    sizes += ["model.layers=2", "model.vocab=512", "data.batch=8", "mesh.data=1", "train.sample=unset"]
    return config.load("tiny_dense", [*sizes, f"data.length={L}", f"model.max_length={L}", *overrides])


def compiled_layer(cfg, topology):
    """One attention layer and its gradients."""
    m, mesh, (B, L) = cfg.model, topology_mesh(cfg.mesh, parse(topology)), (cfg.data.batch, cfg.data.length)

    def made():
        if m.latent is not None:
            return LatentAttention(m, cfg.rules, nnx.Rngs(params=0))
        return Attention(m, cfg.rules, nnx.Rngs(params=0), window=m.window)

    def placed(shape, dtype, layout):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(layout)))

    graph, state = nnx.split(nnx.eval_shape(made))
    state = jax.tree.map(lambda a: placed(a.shape, a.dtype, ((),) * a.ndim), state)
    rows = placed((B, L), jnp.int32, (cfg.rules.batch, ()))
    x = placed((B, L, m.d_model), jnp.bfloat16, (cfg.rules.batch, (), ()))

    def both(state, x, g, positions, segments):
        context = Context(positions, segments, segments > 0, positions, None)
        y, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x, context)[0], state, x)
        return y, pull(g)

    with jax.set_mesh(mesh):
        lowered = jax.jit(both).lower(state, x, x, rows, rows)
    return compile_to_read(lowered, mesh)


def pairs(text, L):
    """Shapes with two dimensions of whole blocks of queries: scores, or a mask of them. No other widths are such."""
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\w\[([\d,]+)\]", text)}
    return {s for s in shapes if sum(n % (L // QUERY_BLOCKS) == 0 for n in s[-2:]) > 1}


def kernel_runs(text, topology):
    """The calls of a kernel, and how often each runs."""
    target = f'custom_call_target="{TARGETS[topology]}"'
    return list(Program(text).runs(lambda i: target in i.rest))


@pytest.mark.parametrize("name", compilable(TPU, GPU))
def test_memory_grows_with_the_length_and_not_with_its_square(name):
    """Of a layer forward and backward, on a mesh where each device calls the kernel for its own rows and heads, and
    holds no scores."""
    size = {}
    for L in (2048, 4096):
        found = compiled_layer(small(L, *SHARED), name)
        kinds = [run.instruction.type for run in kernel_runs(found.text, name)]
        assert len(kinds) == PASSES and not pairs(found.text, L)
        mine = f"bf16[4,2,{L}," if name == TPU else f"bf16[4,{L},2,"  # of 8 rows and 4 heads
        assert any(mine in kind for kind in kinds)
        size[L] = found.peak_bytes
    assert size[4096] < 2.2 * size[2048]


@pytest.mark.parametrize("name", compilable(TPU))
def test_plain_attention_holds_scores(name):
    """Else what is said of kernels would prove nothing."""
    text = compiled_layer(small(2048, *SHARED, "model.attention_kernel=xla"), name).text
    assert pairs(text, 2048) and not kernel_runs(text, name)


@pytest.mark.parametrize("name", compilable(TPU))
@pytest.mark.parametrize("what", CAN)
def test_a_layer_with_more_to_it_holds_the_kernel_and_no_scores(name, what):
    text = compiled_layer(small(2048, *CAN[what]), name).text
    assert len(kernel_runs(text, name)) == PASSES and not pairs(text, 2048)


@pytest.mark.parametrize("name", compilable(TPU))
def test_a_train_step_on_a_pipeline_holds_it_too(name, monkeypatch):
    """Layers in a loop, recomputed, mapped over stages: the kernels of a layer and its forward pass again. `inspect`
    reads the collectives beside them, and says that they are there."""
    cfg = small(512, "mesh.stage=2", "mesh.data=2", "train.microbatches=2", "model.remat=full")
    texts, ticks = [], 3

    def kept(*args):
        out = compile_to_read(*args)
        texts.append(out.text)
        return out

    monkeypatch.setattr(report, "compile_to_read", kept)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # of optax
        found = report.inspect(cfg, topology_mesh(cfg.mesh, parse(name)))
    assert sum(run.times for run in kernel_runs(texts[0], name)) == ticks * (PASSES + 1)
    assert found["attention"]["decoder"]["kernel"] == "fused" and found["collectives"]
    assert "  attention, decoder: fused: " in "\n".join(lines(found))


# Who decides


def test_programs_for_cpu_are_as_without_the_key():
    """Letter by letter: nothing of a kernel is traced."""
    texts = []
    for kernel in ("auto", "xla"):
        cfg = small(512, "mesh.data=2", f"model.attention_kernel={kernel}")
        mesh = build_mesh(cfg.mesh, jax.devices()[:2])
        texts.append(lower_forward(Model.of(cfg), mesh).as_text())
    assert texts[0] == texts[1] and "custom_call" not in texts[0]


REASONS = [  # platform, keys, length, what is chosen, of which a report says
    ("cpu", [], 1024, "xla", "no kernel for cpu"),
    ("tpu", [], 1024, "fused", "for tpu"),
    ("gpu", [], 1024, "fused", "for gpu"),
    ("tpu", [], 384, "xla", "384 x 384 scores are few"),
    ("tpu", [], 1000, "xla", "1,000 and 1,000 tokens are no multiples of 128"),
    ("gpu", [], 1000, "xla", "no multiples of 64"),
    ("tpu", ["model.attention_kernel=xla"], 1024, "xla", "as set"),
    ("tpu", ["model.attention_kernel=fused"], 128, "fused", "as set"),
    ("tpu", ["model.positions=relative"], 1024, "xla", "a bias to every score"),
    ("tpu", ["mesh.context=2"], 1024, "xla", "splits rows"),
    ("tpu", ["model.head_dim=512"], 1024, "xla", "512 wide, and 1 to 256"),
    ("gpu", ["model.head_dim=256"], 1024, "xla", "256 wide, and 16 to 128"),
    ("gpu", ["model.head_dim=8"], 1024, "xla", "8 wide"),
    ("tpu", ["mesh.tensor=2", "model.heads=6", "model.kv_heads=2"], 1024, "fused", ""),
    ("tpu", ["mesh.tensor=6", "model.heads=6", "model.kv_heads=2"], 1024, "xla", "unequal parts"),
    ("tpu", ["model.window=99", "model.sinks=true"], 1024, "fused", ""),
    ("gpu", ["model.window=99"], 1024, "xla", "no windows, and this is one of 99"),
    ("gpu", ["model.sinks=true"], 1024, "xla", "no sinks"),
    ("tpu", ["model.latent.key_value=8", "model.latent.rotary=32"], 1024, "fused", ""),
    ("gpu", ["model.latent.key_value=8", "model.latent.rotary=32"], 1024, "xla", "not 128 and 96"),
]


@pytest.mark.parametrize("platform, keys, L, kernel, why", REASONS)
def test_a_report_says_what_was_chosen_and_why(platform, keys, L, kernel, why):
    cfg = small(L, *keys)
    (choice,) = kernels.choices(cfg, platform).values()
    assert choice.kernel == kernel and why in choice.reason
    assert (memory.probabilities(Step(cfg, platform)) == 0) == (kernel == "fused"), "the plan counts the scores"


def test_each_kind_of_layer_is_told():
    keys = ["model.window=64", "model.full_every=2"]
    assert {n: c.kernel for n, c in kernels.choices(small(1024, *keys), "gpu").items()} == {
        "decoder, window of 64": "xla",
        "decoder": "fused",
    }
    read = small(1024, "model.encoder.layers=2", "model.encoder.length=512")
    assert {n: c.kernel for n, c in kernels.choices(read, "gpu").items()} == {
        "decoder": "fused",
        "encoder": "fused",
        "decoder to encoder": "xla",
    }
    assert {c.kernel for c in kernels.choices(read, "tpu").values()} == {"fused"}


def test_fused_is_refused_where_no_kernel_can(call):
    """With the reason and the remedy, before anything is compiled or written; and by a layer on its own."""
    keys = ["model.attention_kernel=fused", "mesh.data=1"]
    for argv, why in (
        (["plan", "tiny_dense", *keys], "on cpu (decoder) there is no kernel for cpu"),
        (
            ["plan", "tiny_dense", *keys, "--topology", "v5e:1x1", "data.length=100"],
            "100 tokens are no multiples of 128",
        ),
        (["inspect", "tiny_dense", keys[0], "mesh.data=8"], "no kernel for cpu"),
    ):
        code, _, said = call(*argv)
        assert code == 2 and "model.attention_kernel: is 'fused', and " in said and why in said
        assert "remedy: set model.attention_kernel=auto" in said
    m = small(128, "model.attention_kernel=fused").model
    x, row = jnp.zeros((1, 128, 64)), jnp.ones((1, 128), jnp.int32)
    with pytest.raises(Refused, match="no kernel for cpu"):
        Attention(m, None, nnx.Rngs(params=0))(x, Context(row, row, row > 0, row, None))


def test_a_run_with_kernels_continues_prompts_of_any_length(monkeypatch):
    """On TPU, where 13 tokens are no tile: by the products of `xla`. Train's sample and a placed model go this way."""
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    texts = []
    for kernel in ("fused", "xla"):
        cfg = small(64, f"model.attention_kernel={kernel}", "model.head_dim=16")
        model, mesh = Model.of(cfg), build_mesh(cfg.mesh, jax.devices()[:1])
        generator = Generator(model, mesh, 512, 512, Sampling(temperature=0.0))
        texts.append(generator(model.create(mesh).weights, [np.arange(13)], 3).tokens)
    assert texts[0] == texts[1]


def test_plan_says_it(call):
    argv = ["plan", "tiny_dense", "mesh.data=1", "data.length=512", "--topology", "v5e:1x1"]
    _, found, _ = call(*argv, "--json")
    assert found["attention"]["decoder"]["kernel"] == "fused"
    assert "attention, decoder: fused: no scores are held" in call(*argv)[1]
