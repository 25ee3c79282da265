"""Further families: Qwen2-MoE, OLMoE, GPT-OSS and Granite-MoE."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig, Problem, Refused
from moe_jax.convert.common import (
    HEADS,
    LAYER,
    MLP,
    OUTSIDE,
    Family,
    Tree,
    attention_bias,
    base_fields,
    best_of_softmax,
    decoder,
    experts,
    grouped,
    same,
    sparse,
    sparse_fields,
    swiglu,
    turned,
    window_fields,
    windows,
)
from moe_jax.convert.fields import Fields
from moe_jax.convert.names import Part, Rule, Take

# Qwen2-MoE (Qwen Team 2024)


def qwen2_keys(f: Fields) -> Tree:
    """Biases of queries, keys and values; one shared expert, times a sigmoid; windows in every second layer."""
    out = decoder(f, eps=1e-6) | grouped(f, kv_heads=16)
    out |= sparse(f, out["layers"])
    out["moe"] |= {"shared_experts": 1, "shared_d_ff": f.count("shared_expert_intermediate_size"), "shared_gate": True}
    used, layers = f.truth("use_sliding_window", False), out["layers"]
    least = f.count("max_window_layers", default=28, least=0)
    kinds = ["sliding_attention" if used and i % 2 == 0 and i < least else "full_attention" for i in range(layers)]
    biases = {"biases": "qkv"} if f.truth("qkv_bias", True) else {}
    return out | windows(f, used, f.listed("layer_types", layers) or kinds, absent=4096) | biases


def qwen2_fields(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `qwen2_keys`."""
    assert m.moe is not None
    if not m.moe.shared_gate:
        raise Refused(Problem("model.moe.shared_gate", "is false", "use a model with a shared expert that has a gate"))
    return (
        base_fields(m)
        | sparse_fields(m)
        | window_fields(m, several=True)
        | {
            "architectures": ["Qwen2MoeForCausalLM"],
            "use_sliding_window": m.window is not None,
            "shared_expert_intermediate_size": m.moe.shared_width(m.moe.d_ff or m.d_ff),
            "qkv_bias": m.biases == "qkv",
        }
    )


def qwen2_names(m: ModelConfig) -> Sequence[Rule]:
    shared = swiglu(LAYER + "mlp.shared_expert.", "ffn.shared.")
    return *OUTSIDE, *HEADS, *MLP, *shared, turned(LAYER + "mlp.shared_expert_gate.weight", "ffn.shared_gate")


# OLMoE (Muennighoff et al. 2024)


def olmoe_keys(f: Fields) -> Tree:
    """Norms of queries and keys over all heads of a token, which are clipped, as values are; softmax, and the best of
    it."""
    clip = {} if f.config.get("clip_qkv") is None else {"qkv_clip": f.number("clip_qkv")}
    more = clip | {"qk_norm": "all", "moe": experts(f) | best_of_softmax(f)}
    return decoder(f, eps=1e-5) | grouped(f) | attention_bias(f) | more


def olmoe_fields(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `olmoe_keys`."""
    assert m.moe is not None
    return base_fields(m) | {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": m.biases == "attention",
        "clip_qkv": m.qkv_clip,
        "num_experts": m.moe.experts,
        "norm_topk_prob": m.moe.router.normalize == "before",
    }


def olmoe_names(m: ModelConfig) -> Sequence[Rule]:
    return *OUTSIDE, *HEADS, *MLP


# GPT-OSS (OpenAI 2025)


def gpt_oss_keys(f: Fields) -> Tree:
    """Sinks, windows in turn, biases everywhere, a bounded gate; the best logits, and a softmax over them."""
    f.only("attention_bias", [True], "experts have biases here only where attention has")
    f.only("swiglu_alpha", [1.702], "the gate has that number here")
    f.only("swiglu_limit", [7.0], "the gate has that bound here")
    if not f.table("rope_parameters", "rope_scaling")[1]:  # transformers then takes the YaRN of the published model
        f.no("rope_parameters", "is missing", "give the kind of positions and its numbers")
    out = decoder(f, eps=1e-5) | grouped(f, kv_heads=8, head_dim=64)
    turn = ["full_attention" if i % 2 else "sliding_attention" for i in range(out["layers"])]
    moe = experts(f) | {"router": {"kind": "topk_softmax", "bias": True}}
    kind = {"ffn": "clamped_swiglu", "biases": True, "sinks": True}
    return out | kind | windows(f, kinds=f.listed("layer_types", out["layers"]) or turn, absent=128) | {"moe": moe}


def gpt_oss_fields(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `gpt_oss_keys`."""
    assert m.moe is not None
    return (
        base_fields(m)
        | window_fields(m, several=True)
        | {
            "architectures": ["GptOssForCausalLM"],
            "head_dim": m.resolved_head_dim,
            "num_local_experts": m.moe.experts,
            "attention_bias": True,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        }
    )


def halves(source: str, target: str, turn: str, gate: np.ndarray, up: np.ndarray, name: str = "w") -> Rule:
    """Gate and up in one tensor, whose axis f they share."""
    parts = (("gate", gate), ("up", up))
    return Rule(source, *(Part(f"{target}{name}_{part}", turn, Take("f", at, 2 * len(at))) for part, at in parts))


def gpt_oss_names(m: ModelConfig) -> Sequence[Rule]:
    """Experts are stored as they multiply, [E, D, 2F] with columns of gate and up in turn."""
    assert m.moe is not None
    gate = 2 * np.arange(m.moe.d_ff or m.d_ff)
    source, target = LAYER + "mlp.experts.", "ffn.experts."
    return (
        *OUTSIDE,
        *HEADS,
        same(LAYER + "self_attn.sinks", "attention.sinks", "h"),
        turned(LAYER + "mlp.router.weight", "ffn.router"),
        same(LAYER + "mlp.router.bias", "ffn.router_bias", "e"),
        halves(source + "gate_up_proj", target, "e d f -> e d f", gate, gate + 1),
        halves(source + "gate_up_proj_bias", target, "e f -> e f", gate, gate + 1, "b"),
        same(source + "down_proj", target + "w_down", "e f d"),
        same(source + "down_proj_bias", target + "b_down", "e d"),
    )


# Granite-MoE (IBM 2024), also with a shared expert


def granite_keys(f: Fields) -> Tree:
    """Factors on embedding, scores, residual and logits; the best logits, and a softmax over them."""
    moe = experts(f) | {"router": {"kind": "topk_softmax"}}
    factors = {
        "embed_scale": f.number("embedding_multiplier", 1.0),
        "attention_scale": f.number("attention_multiplier", 1.0),
        "residual_scale": f.number("residual_multiplier", 1.0),
        "logit_scale": 1.0 / f.number("logits_scaling", 1.0),
    }
    return decoder(f, eps=1e-6) | grouped(f) | attention_bias(f) | factors | {"moe": moe}


def granite_fields(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `granite_keys`."""
    assert m.moe is not None
    return base_fields(m) | {
        "architectures": ["GraniteMoeForCausalLM"],
        "attention_bias": m.biases == "attention",
        "num_local_experts": m.moe.experts,
        "embedding_multiplier": m.embed_scale,
        "attention_multiplier": m.score_scale,
        "residual_multiplier": m.residual_scale,
        "logits_scaling": 1.0 / m.logit_scale,
    }


def granite_names(m: ModelConfig) -> Sequence[Rule]:
    """Gate and up of an expert are one matrix, the gate first; so they are in the shared expert."""
    assert m.moe is not None
    F = m.moe.d_ff or m.d_ff
    rows, shared = np.arange(F), np.arange(m.moe.shared_width(F))
    block, dense = LAYER + "block_sparse_moe.", LAYER + "shared_mlp."
    return (
        *OUTSIDE,
        *HEADS,
        turned(block + "router.layer.weight", "ffn.router"),
        halves(block + "input_linear.weight", "ffn.experts.", "e f d -> e d f", rows, F + rows),
        Rule(block + "output_linear.weight", Part("ffn.experts.w_down", "e d f -> e f d")),
        halves(dense + "input_linear.weight", "ffn.shared.", "f d -> d f", shared, len(shared) + shared),
        turned(dense + "output_linear.weight", "ffn.shared.w_down"),
    )


def granite_shared_keys(f: Fields) -> Tree:
    """Granite-MoE, and one shared expert."""
    out = granite_keys(f)
    if width := f.count("shared_intermediate_size", default=0, least=0):
        out["moe"] |= {"shared_experts": 1, "shared_d_ff": width}
    return out


def granite_shared_fields(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `granite_shared_keys`."""
    assert m.moe is not None
    width = m.moe.shared_width(m.moe.d_ff or m.d_ff)
    return granite_fields(m) | {"architectures": ["GraniteMoeSharedForCausalLM"], "shared_intermediate_size": width}


OTHERS: dict[str, Family] = {
    "qwen2_moe": Family(qwen2_keys, qwen2_fields, qwen2_names),
    "olmoe": Family(olmoe_keys, olmoe_fields, olmoe_names),
    "gpt_oss": Family(gpt_oss_keys, gpt_oss_fields, gpt_oss_names),
    "granitemoe": Family(granite_keys, granite_fields, granite_names),
    "granitemoeshared": Family(granite_shared_keys, granite_shared_fields, granite_names),
}
