"""Every parameter of a model, from its config: name, shape, logical axes and component, as the model makes them.

`tests/test_plan_params.py` holds this list against the leaves of the real model, name by name.
"""

from collections.abc import Iterator
from functools import cache
from math import prod
from typing import NamedTuple

from moe_jax.axes import WIDTHS, Rules, is_matrix
from moe_jax.schema import GATED, LatentConfig, MeshConfig, ModelConfig, MoEConfig

COMPONENTS = {  # component -> what it is called in tables
    "embed": "embedding",
    "encoder_embed": "the encoder's embedding",
    "pos": "learned positions",
    "lm_head": "head",
    "head_bias": "its bias",
    "attn": "attention",
    "attn_bias": "attention's biases",
    "cross_attn": "attention to the encoder",
    "cross_attn_bias": "biases of that",
    "rel_bias": "relative positions",
    "sinks": "attention's sinks",
    "qk_norm": "norms of queries and keys",
    "mla_norm": "norms of latents",
    "dense_ffn": "dense feed-forward",
    "dense_ffn_bias": "its biases",
    "experts": "experts",
    "expert_bias": "experts' biases",
    "shared_experts": "shared experts",
    "shared_expert_bias": "their biases",
    "router": "routers",
    "router_bias": "routers' biases",
    "norms": "norms",
}
ADDED = ("norms", "sinks", "qk_norm", "mla_norm", "rel_bias")
ADDED += (
    "attn_bias",
    "cross_attn_bias",
    "dense_ffn_bias",
    "expert_bias",
    "shared_expert_bias",
    "router_bias",
    "head_bias",
)
"""Components that multiply no matrix."""
LOOKED_UP = ("embed", "encoder_embed", "pos")  # of which a token reads rows
EXPERTS = ("experts", "expert_bias")  # of which a token touches K in E
KEYS_AND_VALUES = tuple(f".cross_attention.{part}_{of}" for part in "wb" for of in ("key", "value"))


class Leaf(NamedTuple):
    """One array of parameters."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # the logical axis of each dimension
    component: str

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def block(self) -> str:
        """The layer of a period that it belongs to, as `stacks.0.blocks.1`."""
        stack, _, rest = self.name.partition(".blocks.")
        return f"{stack}.blocks.{rest.partition('.')[0]}"

    @property
    def of_input(self) -> bool:
        """Whether only the encoder's tokens pass it, so that decoding does not."""
        return self.name.startswith("encoder.") or self.name.endswith(KEYS_AND_VALUES)

    @property
    def is_matrix(self) -> bool:
        """Whether Muon takes it."""
        return is_matrix(self.axes)

    @property
    def width(self) -> int:
        """Size of the dimension that is the model's width, or a latent's, of a matrix."""
        return next(n for n, a in zip(self.shape, self.axes, strict=True) if a in WIDTHS)

    def layout(self, rules: Rules) -> tuple[str, ...]:
        """The mesh axes that split it."""
        return tuple(axis for name in self.axes for axis in getattr(rules, name))

    def shard(self, rules: Rules, mesh: MeshConfig) -> int:
        """Elements that one device holds."""
        return self.size // mesh.over(self.layout(rules))


def expert_width(m: ModelConfig) -> int:
    """Hidden width F of an expert."""
    assert m.moe is not None
    return m.moe.d_ff or m.d_ff


Part = tuple[str, tuple[int, ...], tuple[str, ...], str]  # what a Leaf holds
Runs = list[tuple[tuple[str, ...], int]]  # kinds of the layers of a period, and its repeats


def feed_forward(m: ModelConfig, hidden: int, name: str, component: str, biases: str) -> Iterator[Part]:
    """A dense feed-forward layer."""
    width = m.d_model
    for matrix in ("gate", "up") if m.ffn in GATED else ("up",):
        yield f"{name}.w_{matrix}", (width, hidden), ("embed", "mlp"), component
        if m.biased("ffn"):
            yield f"{name}.b_{matrix}", (hidden,), ("mlp",), biases
    yield f"{name}.w_down", (hidden, width), ("mlp", "embed"), component
    if m.biased("ffn"):
        yield f"{name}.b_down", (width,), ("bias",), biases


def mixture(m: ModelConfig, moe: MoEConfig) -> Iterator[Part]:
    """Router, experts and shared experts of an MoE layer."""
    D, E, F = m.d_model, moe.experts, expert_width(m)
    if moe.router.kind != "hash":
        width, axis = D, "router_embed"
        if moe.router.gate == "mlp":
            width, axis = moe.router.gate_width or D, "router_mlp"
            yield "ffn.gate_in", (D, width), ("router_embed", axis), "router"
        yield "ffn.router", (width, E), (axis, "router_experts"), "router"
        if moe.router.bias:
            yield "ffn.router_bias", (E,), ("router_experts",), "router_bias"
        if moe.router.kind == "noisy_topk":
            yield "ffn.noise", (D, E), ("router_embed", "router_experts"), "router"
    for matrix in ("gate", "up") if m.ffn in GATED else ("up",):
        yield f"ffn.experts.w_{matrix}", (E, D, F), ("experts", "expert_embed", "expert_mlp"), "experts"
        if m.biased("ffn"):
            yield f"ffn.experts.b_{matrix}", (E, F), ("experts", "expert_mlp"), "expert_bias"
    yield "ffn.experts.w_down", (E, F, D), ("experts", "expert_mlp", "expert_embed"), "experts"
    if m.biased("ffn"):
        yield "ffn.experts.b_down", (E, D), ("experts", "bias"), "expert_bias"
    if moe.shared_experts:
        yield from feed_forward(m, moe.shared_width(F), "ffn.shared", "shared_experts", "shared_expert_bias")
    if moe.shared_gate:  # a router of one output: whole everywhere, in float32
        yield "ffn.shared_gate", (D, 1), ("router_embed", "bias"), "router"


def norm(m: ModelConfig, name: str) -> Iterator[Part]:
    for part in ("scale", "bias") if m.norm == "layer" else ("scale",):
        yield f"{name}.{part}", (m.d_model,), ("norm",), "norms"


def attention(m: ModelConfig, name: str = "attention", component: str = "attn") -> Iterator[Part]:
    """Multi-head and grouped-query attention."""
    D, H, J, N = m.d_model, m.heads, m.resolved_kv_heads, m.resolved_head_dim
    for part, heads, axis in (("query", H, "heads"), ("key", J, "kv_heads"), ("value", J, "kv_heads")):
        yield f"{name}.w_{part}", (D, heads, N), ("embed", axis, "head"), component
        if m.biased("qkv"):
            yield f"{name}.b_{part}", (heads, N), (axis, "bias"), f"{component}_bias"
    yield f"{name}.w_out", (H, N, D), ("heads", "head", "embed"), component
    if m.biased("out"):
        yield f"{name}.b_out", (D,), ("bias",), f"{component}_bias"
    if m.sinks:
        yield f"{name}.sinks", (H,), ("heads",), "sinks"
    for part, heads in (("query", H), ("key", J)) if m.qk_norm else ():
        yield f"{name}.{part}_norm.scale", (heads * N if m.qk_norm == "all" else N,), ("norm",), "qk_norm"


def latent_attention(m: ModelConfig, latent: LatentConfig) -> Iterator[Part]:
    """Latent attention."""
    D, H, N, V, C = m.d_model, m.heads, m.resolved_head_dim, m.value_dim, latent.key_value
    source, width = "embed", D
    if latent.query:
        source, width = "latent_embed", latent.query
        yield "attention.w_query_down", (D, width), ("embed", "latent"), "attn"
        yield "attention.query_norm.scale", (width,), ("norm",), "mla_norm"
    yield "attention.w_query", (width, H, m.key_dim), (source, "heads", "head"), "attn"
    yield "attention.w_down", (D, C + latent.rotary), ("embed", "latent"), "attn"
    yield "attention.latent_norm.scale", (C,), ("norm",), "mla_norm"
    yield "attention.w_key", (C, H, N), ("latent_embed", "heads", "head"), "attn"
    yield "attention.w_value", (C, H, V), ("latent_embed", "heads", "head"), "attn"
    yield "attention.w_out", (H, V, D), ("heads", "head", "embed"), "attn"


def block(m: ModelConfig, kind: str, reads: bool = False) -> Iterator[Part]:
    """One layer; `reads`: it attends to the encoder too."""
    yield from attention(m) if m.latent is None else latent_attention(m, m.latent)
    yield from norm(m, "attention_norm")
    if reads:
        yield from attention(m, "cross_attention", "cross_attn")
        yield from norm(m, "cross_norm")
    yield from norm(m, "ffn_norm")
    if kind == "moe":
        assert m.moe is not None
        yield from mixture(m, m.moe)
    else:
        yield from feed_forward(m, m.d_ff, "ffn", "dense_ffn", "dense_ffn_bias")


def stack(m: ModelConfig, runs: Runs, prefix: str = "", reads: bool = False) -> Iterator[Leaf]:
    """The layers of a decoder or encoder, with what they share; equal ones lie along a leading dimension."""
    if m.final_norm:
        yield from (Leaf(*part) for part in norm(m, f"{prefix}final_norm"))
    if m.positions == "relative":
        yield Leaf(f"{prefix}relative", (m.distance_buckets, m.heads), ("bias", "heads"), "rel_bias")
    for i, (kinds, repeats) in enumerate(runs):
        for j, kind in enumerate(kinds):
            for name, shape, axes, component in block(m, kind, reads):
                full = f"{prefix}stacks.{i}.blocks.{j}.{name}"
                yield Leaf(full, (repeats, *shape), ("layers", *axes), component)


@cache
def leaves(m: ModelConfig) -> tuple[Leaf, ...]:
    """Every parameter of a model."""
    D, V = m.d_model, m.vocab
    out = [Leaf("embedding.table", (V, D), ("vocab", "embed"), "embed")]
    if m.positions == "learned":
        out.append(Leaf("embedding.positions", (m.max_length, D), ("position", "embed"), "pos"))
    if not m.tied_head:
        out.append(Leaf("embedding.head", (D, V), ("embed", "vocab"), "lm_head"))
    if m.head_bias:
        out.append(Leaf("embedding.head_bias", (V,), ("vocab",), "head_bias"))
    if m.encoder is not None:
        if m.encoder.vocab is not None:
            out.append(Leaf("encoder.table", (m.encoder.vocab, D), ("vocab", "embed"), "encoder_embed"))
        out += stack(m, m.encoder_runs, "encoder.")
    return (*out, *stack(m, m.runs, reads=m.encoder is not None))


class Count(NamedTuple):
    """Parameters of a model."""

    total: int
    active: int  # that one token touches: K of the E experts of each MoE layer
    components: dict[str, int]
    active_components: dict[str, int]
    active_of_input: int  # of the active ones, those that multiply tokens of an encoder alone
    bias: int  # selection biases, which no gradient moves: not among the parameters


@cache
def count(m: ModelConfig) -> Count:
    """Parameters in total and active, by component."""
    total: dict[str, int] = {}
    active: dict[str, int] = {}
    of_input = 0
    for leaf in leaves(m):
        share = leaf.size
        if m.moe is not None and leaf.component in EXPERTS:
            share = leaf.size * m.moe.top_k // m.moe.experts
        total[leaf.component] = total.get(leaf.component, 0) + leaf.size
        active[leaf.component] = active.get(leaf.component, 0) + share
        of_input += share if leaf.of_input and leaf.component not in (*ADDED, "encoder_embed") else 0
    biased = m.moe is not None and m.moe.bias_rate is not None
    bias = (m.layer_kinds + m.encoder_kinds).count("moe") * m.moe.experts if m.moe is not None and biased else 0
    named = {c: total[c] for c in COMPONENTS if c in total}
    return Count(sum(total.values()), sum(active.values()), named, {c: active[c] for c in named}, of_input, bias)
