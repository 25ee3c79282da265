"""What the families share: decoder, positions, attention and feed-forward layers, from a config.json and back, and
their names.

The fields are those of transformers' configuration classes (version 5.23), with their defaults.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moe_jax.config import ModelConfig, Problem, Refused
from moe_jax.convert.fields import Fields
from moe_jax.convert.names import Part, Rule

Tree = dict[str, Any]
Kinds = dict[str, dict[str, str]]  # of rotary positions: their fields and our keys in `model.rope`
LAYER = "model.layers.{layer}."
TURNS = (r".*\.rotary_emb\.inv_freq",)  # tables of older files, which follow from the base

YARN = {
    "original_max_position_embeddings": "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
FACTORS = {
    "original_max_position_embeddings": "original_length",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
}
ROPE: Kinds = {
    "default": {},
    "linear": {"factor": "factor"},
    "yarn": {"factor": "factor"} | YARN,
    "longrope": {"factor": "factor", "attention_factor": "attention_factor"} | FACTORS,
}


class Family(NamedTuple):
    """How the weights of a family are stored."""

    keys: Callable[[Fields], Tree]  # the table `model`
    fields: Callable[[ModelConfig], dict[str, Any]]  # its inverse, without what transformers gives by itself
    names: Callable[[ModelConfig], Sequence[Rule]]
    ignored: Callable[[dict[str, Any]], Sequence[str]] = lambda config: TURNS  # patterns of names that nobody reads
    unread: Callable[[ModelConfig], dict[str, str]] = lambda m: {}  # such names that an export has; they are as another
    copies: Callable[[ModelConfig], dict[str, str]] = lambda m: {}  # further names of a tensor, which may be there


def decoder(f: Fields, eps: float, kinds: Kinds = ROPE) -> Tree:
    """Width, depth, norms, positions and feed-forward layers; `eps`: the family's default; `kinds`: its positions."""
    f.only("hidden_act", ["silu"], "the experts have a gate by SiLU")
    f.off(["mlp_bias"], "biases of feed-forward layers are converted in no such model")
    return {
        "vocab": f.count("vocab_size"),
        "layers": f.count("num_hidden_layers", most=4096),
        "d_model": f.count("hidden_size"),
        "d_ff": f.count("intermediate_size"),
        "heads": f.count("num_attention_heads"),
        **positions(f, kinds),
        "max_length": f.count("max_position_embeddings"),
        "norm": "rms",
        "norm_eps": f.number("rms_norm_eps", eps),
        "ffn": "swiglu",
        "tied_head": f.truth("tie_word_embeddings", False),
    }


def positions(f: Fields, kinds: Kinds) -> Tree:
    """Rotary positions, in the newer form (rope_parameters) or the older (rope_theta, rope_scaling)."""
    name, rope = f.table("rope_parameters", "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in list(kinds):
        f.no(name, f"has the rotary positions {kind!r:.40}", f"use a model of {', '.join(kinds)} ones")
        kind = "default"
    part = rope.get("partial_rotary_factor", f.config.get("partial_rotary_factor"))
    if part not in (None, 1, 1.0):
        f.no("partial_rotary_factor", f"is {part!r:.40}, and whole heads turn here", "use a model of those")
    for key in sorted(rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *kinds[kind]}):
        if rope[key] is not None:
            f.no(f"{name}.{key}", f"is {rope[key]!r:.80}, and {kind} positions have no such number", "take it out")
    theta = f.positive("rope_theta", rope.get("rope_theta", f.config.get("rope_theta")))
    scaled = {} if kind == "default" else {"rope": {"kind": kind, **rates(f, f.inner(name, rope), kind, kinds[kind])}}
    return {"positions": "rotary", "rope_theta": theta, **scaled}


def rates(f: Fields, rope: Fields, kind: str, names: dict[str, str]) -> Tree:
    """The numbers of linear positions, of YaRN and of LongRoPE. A scale of 0 is none."""
    if kind == "longrope":
        return factors(f, rope, names)
    out: Tree = {"factor": rope.number("factor")}
    if kind != "yarn":
        return out
    out |= {"original_length": original_length(f, rope), "truncate": rope.truth("truncate", True)}
    numbers = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
    return out | {name: rope.number(name) for name in numbers if rope.config.get(name) not in (None, 0)}


def original_length(f: Fields, rope: Fields) -> int:
    """Tokens of the rows of the first training; outside of the table it counts before the one in there."""
    outside = f.maybe("original_max_position_embeddings")
    inside = rope.count("original_max_position_embeddings", default=f.count("max_position_embeddings"))
    return outside or inside


def factors(f: Fields, rope: Fields, names: dict[str, str]) -> Tree:
    """The numbers of LongRoPE. Unless the family has to give it, a factor on sine and cosine that is not there follows
    from how much longer rows may be, and that from both lengths where it is not there either."""
    length = original_length(f, rope)
    out: Tree = {"original_length": length, **{names[n]: rope.numbers(n) for n in ("short_factor", "long_factor")}}
    if "factor" in names and rope.config.get("attention_factor") is None:
        longer = f.count("max_position_embeddings") / length
        return out | {"factor": rope.number("factor", longer)}
    return out | {names[n]: rope.number(n) for n in names if n not in ("factor", *FACTORS)}


def rope_fields(m: ModelConfig, kinds: Kinds) -> dict[str, Any]:
    """The inverse of `positions`.

    Raises:
        Refused: a kind that the family has not.
    """
    kind = "default" if m.rope is None or m.rope.kind == "plain" else m.rope.kind
    if kind not in kinds:
        raise Refused(Problem("model.rope.kind", f"is {kind!r}", f"use a model of {', '.join(kinds)} positions"))
    numbers = {theirs: getattr(m.rope, ours) for theirs, ours in kinds[kind].items()}
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in numbers.items() if v is not None}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": m.rope_theta, **given}}


def grouped(f: Fields, kv_heads: int | None = None, head_dim: int | None = None) -> Tree:
    """Heads of grouped-query attention.

    Args:
        kv_heads, head_dim: what the family has where the field is absent; None: as many as queries, and their share of
            the width.
    """
    out = {"kv_heads": f.maybe("num_key_value_heads", absent=kv_heads) or f.count("num_attention_heads")}
    width = f.maybe("head_dim", absent=head_dim)
    return out if width is None else out | {"head_dim": width}


KINDS = ("full_attention", "sliding_attention")


def windows(f: Fields, used: bool = True, kinds: Sequence[str] = (), absent: int | None = None) -> Tree:
    """`window` and `full_every`.

    Args:
        absent: the family's window where the field is absent.
        kinds: of the layers, in a family that tells them apart; in others all have the window, if there is one.
    """
    width = f.maybe("sliding_window", absent=absent) if used else None
    full = [kind == "full_attention" for kind in kinds]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        f.no("layer_types", f"has {unknown[0]!r:.40}", f"use a model of {' and '.join(KINDS)}")
    elif width is None and not all(full):
        f.no("sliding_window", "is off, and layer_types has layers with a window", "mend one of them")
    if width is None or (kinds and all(full)):
        return {}
    if not any(full):
        return {"window": width}
    for every in range(2, len(full) + 1):
        if full == [(i + 1) % every == 0 for i in range(len(full))]:
            return {"window": width, "full_every": every}
    shown = ", ".join(str(i) for i, kind in enumerate(full) if kind)
    why = f"lets the layers {shown} of {len(full)} see all, which is no full_every"
    f.no("layer_types", why, "use a model where those come at equal distances")
    return {}


def window_fields(m: ModelConfig, several: bool = False) -> dict[str, Any]:
    """The inverse of `windows`; `several`: of a family with a list of its layers' kinds."""
    kinds = ["full_attention" if n is None else "sliding_attention" for n in m.windows]
    return {"sliding_window": m.window, **({"layer_types": kinds} if several else {})}


def attention_bias(f: Fields) -> Tree:
    """Biases of the four products of attention, where the family may have them."""
    return {"biases": "attention"} if f.truth("attention_bias", False) else {}


def pattern(f: Fields, kinds: Sequence[bool]) -> Tree:
    """`every` and `first_dense` of layers that are MoE or not; layers of another pattern are refused."""
    n = len(kinds)
    for every in range(1, n + 1):
        for first in range(n):
            if all(kind == (i >= first and (i - first + 1) % every == 0) for i, kind in enumerate(kinds)):
                return {"every": every, "first_dense": first}
    shown = ", ".join(str(i) for i, kind in enumerate(kinds) if not kind)
    why = f"makes the layers {shown} of {n} dense, which is no first_dense and every"
    f.no("mlp_only_layers", why, "use a model with dense layers first, or at equal distances")
    return {}


def experts(f: Fields) -> Tree:
    """How many routed experts there are, by either name, and how many a token has."""
    return {"experts": f.experts("num_local_experts", "num_experts"), "top_k": f.count("num_experts_per_tok")}


def best_of_softmax(f: Fields) -> Tree:
    """A softmax over all experts, the best of it, divided by their sum if `norm_topk_prob`."""
    norm = "before" if f.truth("norm_topk_prob", False) else "none"
    return {"router": {"kind": "softmax_topk", "normalize": norm}}


def sparse(f: Fields, layers: int) -> Tree:
    """The experts of Qwen: softmax, the best of it, divided by their sum if `norm_topk_prob`; some layers dense."""
    step, dense = f.count("decoder_sparse_step", default=1), f.listed("mlp_only_layers")
    kinds = [(i + 1) % step == 0 and i not in dense for i in range(layers)]
    return {"moe": {**experts(f), "d_ff": f.count("moe_intermediate_size"), **pattern(f, kinds), **best_of_softmax(f)}}


def sparse_fields(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `sparse`."""
    assert m.moe is not None
    return {
        "num_experts": m.moe.experts,
        "moe_intermediate_size": m.moe.d_ff or m.d_ff,
        "mlp_only_layers": [i for i, kind in enumerate(m.layer_kinds) if kind == "dense"],
        "norm_topk_prob": m.moe.router.normalize == "before",
    }


def base_fields(m: ModelConfig, kinds: Kinds = ROPE) -> dict[str, Any]:
    """The inverse of `decoder` and `grouped`."""
    return {
        "vocab_size": m.vocab,
        "num_hidden_layers": m.layers,
        "hidden_size": m.d_model,
        "intermediate_size": m.d_ff,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.resolved_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": m.max_length,
        "rms_norm_eps": m.norm_eps,
        **rope_fields(m, kinds),
        "tie_word_embeddings": m.tied_head,
        "num_experts_per_tok": m.moe.top_k if m.moe else 0,
    }


def same(source: str, target: str, axes: str) -> Rule:
    return Rule(source, Part(target, f"{axes} -> {axes}"))


def turned(source: str, target: str) -> Rule:
    """A matrix [F, D], which a linear layer of torch stores, to our [D, F]."""
    return Rule(source, Part(target, "f d -> d f"))


OUTSIDE = (
    same("model.embed_tokens.weight", "embedding.table", "v d"),
    same("model.norm.weight", "final_norm.scale", "d"),
    turned("lm_head.weight", "embedding.head"),
    same(LAYER + "input_layernorm.weight", "attention_norm.scale", "d"),
    same(LAYER + "post_attention_layernorm.weight", "ffn_norm.scale", "d"),
)
ATTENTION = LAYER + "self_attn."
HEADS = (
    *(
        Rule(f"{ATTENTION}{letter}_proj.weight", Part(f"attention.w_{name}", "(h n) d -> d h n"))
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
    *(
        Rule(f"{ATTENTION}{letter}_proj.bias", Part(f"attention.b_{name}", "(h n) -> h n"))
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
    Rule(ATTENTION + "o_proj.weight", Part("attention.w_out", "d (h n) -> h n d")),
    same(ATTENTION + "o_proj.bias", "attention.b_out", "d"),
    same(ATTENTION + "q_norm.weight", "attention.query_norm.scale", "n"),
    same(ATTENTION + "k_norm.weight", "attention.key_norm.scale", "n"),
)
MATRICES = (("gate_proj", "w_gate"), ("up_proj", "w_up"), ("down_proj", "w_down"))


def swiglu(source: str, target: str, matrices: Sequence[tuple[str, str]] = MATRICES) -> tuple[Rule, ...]:
    """The three matrices of a feed-forward layer, or of each expert."""
    return tuple(turned(f"{source}{theirs}.weight", f"{target}{ours}") for theirs, ours in matrices)


MLP = (
    *swiglu(LAYER + "mlp.", "ffn."),
    turned(LAYER + "mlp.gate.weight", "ffn.router"),
    *swiglu(LAYER + "mlp.experts.{expert}.", "ffn.experts."),
)
