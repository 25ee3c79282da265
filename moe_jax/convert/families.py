"""The families: each is one row of `FAMILIES`, from a config.json to our keys and back, and a name map.

The fields are those of transformers' configuration classes (version 5.23), with their defaults.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig, Problem, Refused
from moe_jax.convert.common import (
    ATTENTION,
    FACTORS,
    HEADS,
    LAYER,
    MLP,
    OUTSIDE,
    TURNS,
    Family,
    Tree,
    attention_bias,
    base_fields,
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
from moe_jax.convert.others import OTHERS
from moe_jax.convert.switch import SWITCH

MOST_NEXT = 8  # layers that predict further tokens; V3 has one
LATENT_EPS = 1e-6  # of the norms inside latent attention, whatever rms_norm_eps is


def family_of(config: dict[str, Any]) -> tuple[str, Family]:
    """The row of a config.json.

    Raises:
        Refused: another model_type.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise Refused(Problem("config.json: model_type", f"is {kind!r:.80}", f"convert one of {known}"))
    return kind, FAMILIES[kind]


def model_keys(config: dict[str, Any]) -> Tree:
    """The table `model` for a config.json.

    Raises:
        Refused: every field that is missing or cannot be kept.
    """
    fields = Fields(config)
    tree = family_of(config)[1].keys(fields)
    fields.done()
    return tree


# Mixtral (Jiang et al. 2024)


def mixtral_keys(f: Fields) -> Tree:
    """Softmax over the chosen logits; every layer is MoE."""
    f.off(["router_jitter_noise"], "it multiplies the experts' input too, which is not done here")
    f.off(["attention_bias"])
    moe = experts(f) | {"router": {"kind": "topk_softmax"}}
    return decoder(f, eps=1e-5) | grouped(f, kv_heads=8) | windows(f) | {"moe": moe}


def mixtral_fields(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `mixtral_keys`."""
    assert m.moe is not None
    more = {"architectures": ["MixtralForCausalLM"], "head_dim": m.resolved_head_dim}
    return base_fields(m) | window_fields(m) | more | {"num_local_experts": m.moe.experts}


def mixtral_names(m: ModelConfig) -> Sequence[Rule]:
    """Experts are w1 (gate), w3 (up) and w2 (down)."""
    block = LAYER + "block_sparse_moe."
    experts = swiglu(block + "experts.{expert}.", "ffn.experts.", (("w1", "w_gate"), ("w3", "w_up"), ("w2", "w_down")))
    return *OUTSIDE, *HEADS, turned(block + "gate.weight", "ffn.router"), *experts


# Phi-MoE (Abdin et al. 2024, Phi-3; Liu et al. 2024, GRIN)

SCALES = {"short_mscale": "attention_factor", "long_mscale": "long_attention_factor"}
PHI_ROPE = {"default": {}, "longrope": FACTORS | SCALES}  # the scales are given, and follow from no factor


def phimoe_keys(f: Fields) -> Tree:
    """LayerNorms, and SparseMixer's two experts from the logits within twice `router_jitter_noise` of the best.

    `input_jitter_noise` is of training alone and not done here. In transformers 5.23 the model never takes its
    long_factor, but does take its long_mscale; LongRoPE is here as in its `modeling_rope_utils` and in Phi-3.
    """
    f.only("num_experts_per_tok", [2], "SparseMixer takes two")
    router = {"kind": "sparsemixer", "margin": 2 * f.number("router_jitter_noise", 0.01)}
    moe = {"experts": f.experts("num_local_experts", "num_experts"), "top_k": 2, "router": router}
    more = {"norm": "layer", "head_bias": f.truth("lm_head_bias", False), "moe": moe}
    return decoder(f, 1e-5, PHI_ROPE) | grouped(f, kv_heads=8) | windows(f) | attention_bias(f) | more


def phimoe_fields(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `phimoe_keys`."""
    assert m.moe is not None
    fields = base_fields(m, PHI_ROPE) | window_fields(m)
    if m.rope is not None and m.rope.kind == "longrope":
        fields["rope_parameters"] |= {"short_mscale": m.rope.turned, "long_mscale": m.rope.turned_long}
    return fields | {
        "architectures": ["PhimoeForCausalLM"],
        "head_dim": m.resolved_head_dim,
        "attention_bias": m.biases == "attention",
        "lm_head_bias": m.head_bias,
        "num_local_experts": m.moe.experts,
        "num_experts_per_tok": 2,
        "router_jitter_noise": (0.02 if m.moe.router.margin is None else m.moe.router.margin) / 2,
    }


def phimoe_names(m: ModelConfig) -> Sequence[Rule]:
    """Mixtral's, and biases of norms and head."""
    return (
        *mixtral_names(m),
        same("lm_head.bias", "embedding.head_bias", "v"),
        same("model.norm.bias", "final_norm.bias", "d"),
        same(LAYER + "input_layernorm.bias", "attention_norm.bias", "d"),
        same(LAYER + "post_attention_layernorm.bias", "ffn_norm.bias", "d"),
    )


# Qwen3-MoE (Qwen Team 2025)


def qwen3_keys(f: Fields) -> Tree:
    """Norms on queries and keys; a window in all layers or in none."""
    out = decoder(f, eps=1e-6) | grouped(f, kv_heads=4)
    out |= sparse(f, out["layers"])
    return out | windows(f, f.truth("use_sliding_window", False), absent=4096) | attention_bias(f) | {"qk_norm": True}


def qwen3_fields(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `qwen3_keys`."""
    return (
        base_fields(m)
        | sparse_fields(m)
        | window_fields(m)
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "head_dim": m.resolved_head_dim,
            "use_sliding_window": m.window is not None,
            "attention_bias": m.biases == "attention",
        }
    )


def qwen3_names(m: ModelConfig) -> Sequence[Rule]:
    return *OUTSIDE, *HEADS, *MLP


# DeepSeek-V2 and V3 (DeepSeek-AI 2024)


def deepseek_keys(f: Fields, dense: int, shared: int) -> Tree:
    """Latent attention, dense layers first, shared experts; `dense`, `shared`: how many where the field is absent."""
    out = decoder(f, eps=LATENT_EPS)
    f.off(["attention_bias"])
    if (eps := out["norm_eps"]) != LATENT_EPS:
        f.no(
            "rms_norm_eps", f"is {eps:g}, and the norms inside latent attention have {LATENT_EPS:g}", "use such models"
        )
    f.only("moe_layer_freq", [1], "every layer after the first dense ones is MoE")
    latent = {
        "key_value": f.count("kv_lora_rank"),
        "rotary": f.count("qk_rope_head_dim"),
        "value": f.count("v_head_dim"),
    }
    if (query := f.maybe("q_lora_rank", absent=1536)) is not None:
        latent["query"] = query
    moe = {
        "experts": f.experts("n_routed_experts", "num_local_experts"),
        "top_k": f.count("num_experts_per_tok"),
        "d_ff": f.count("moe_intermediate_size"),
        "first_dense": f.count("first_k_dense_replace", default=dense, least=0),
        "shared_experts": f.count("n_shared_experts", default=shared, least=0),
    }
    return out | {"head_dim": f.count("qk_nope_head_dim"), "latent": latent, "moe": moe}


def groups(f: Fields, n: int = 1, keep: int = 1) -> Tree:
    """The groups of experts that a token is limited to, none where it may use them all; `n`, `keep`: the defaults."""
    n, keep = f.count("n_group", default=n), f.count("topk_group", default=keep)
    return {} if n == keep else {"groups": n, "topk_groups": keep}


def deepseek_fields(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `deepseek_keys` and `groups`."""
    if m.latent is None:
        raise Refused(Problem("model.latent", "is unset", "use a model with latent attention"))
    assert m.moe is not None
    router = m.moe.router
    return base_fields(m) | {
        "q_lora_rank": m.latent.query,
        "kv_lora_rank": m.latent.key_value,
        "qk_rope_head_dim": m.latent.rotary,
        "qk_nope_head_dim": m.resolved_head_dim,
        "v_head_dim": m.value_dim,
        "n_routed_experts": m.moe.experts,
        "n_shared_experts": m.moe.shared_experts,
        "moe_intermediate_size": m.moe.d_ff or m.d_ff,
        "first_k_dense_replace": m.moe.first_dense,
        "routed_scaling_factor": router.scale,
        "n_group": router.groups,
        "topk_group": router.topk_groups or router.groups,
    }


def v3_keys(f: Fields) -> Tree:
    """Sigmoid scores with a selection bias, which is kept as it is."""
    f.only("scoring_func", ["sigmoid"], "V3 scores by sigmoids")
    f.only("topk_method", ["noaux_tc"], "V3 chooses with a bias")
    f.only("rope_interleave", [True, None], "the pairs that turn are neighbours in this family")
    out = deepseek_keys(f, dense=3, shared=1)
    scale, norm = f.number("routed_scaling_factor", 2.5), f.truth("norm_topk_prob", True)
    router = {"kind": "deepseek_v3", "scale": scale, "normalize": "before" if norm else "none"}
    out["moe"] |= {"bias_rate": 0.0, "router": router | groups(f, n=8, keep=4)}
    return out


def v3_fields(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `v3_keys`."""
    assert m.moe is not None
    more = {"architectures": ["DeepseekV3ForCausalLM"], "norm_topk_prob": m.moe.router.normalize != "none"}
    return deepseek_fields(m) | more | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True}


def v2_keys(f: Fields) -> Tree:
    """Softmax, the best of it within groups, times a scale and not divided by their sum."""
    f.only("scoring_func", ["softmax"], "V2 scores by a softmax")
    f.only("norm_topk_prob", [False, None], "transformers does not divide by the sum, and the paper's code does")
    method = f.only("topk_method", ["greedy", "group_limited_greedy"], "V2 knows these two")
    out = deepseek_keys(f, dense=0, shared=2)
    router = {"kind": "deepseek_v2", "scale": f.number("routed_scaling_factor", 1.0), "normalize": "none"}
    out["moe"] |= {"router": router | (groups(f) if method == "group_limited_greedy" else {})}
    return out


def v2_fields(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `v2_keys`."""
    assert m.moe is not None
    method = "greedy" if m.moe.router.topk_groups is None else "group_limited_greedy"
    return deepseek_fields(m) | {"architectures": ["DeepseekV2ForCausalLM"], "topk_method": method}


def paired(before: int, turning: int) -> np.ndarray:
    """Places of an axis that ends in pairs of neighbours that turn: ours are i and i + turning/2."""
    last = before + np.arange(turning).reshape(-1, 2).T.reshape(-1)
    return np.concatenate([np.arange(before), last])


def deepseek_names(m: ModelConfig) -> Sequence[Rule]:
    """Keys and values of all heads in one matrix; what turns stands in neighbouring pairs."""
    assert m.latent is not None
    N, V, C, P = m.resolved_head_dim, m.value_dim, m.latent.key_value, m.latent.rotary
    query = Part("attention.w_query", "(h n) d -> d h n", Take("n", paired(N, P), N + P))
    both = "(h n) c -> c h n"
    return (
        *OUTSIDE,
        Rule(ATTENTION + ("q_proj.weight" if m.latent.query is None else "q_b_proj.weight"), query),
        turned(ATTENTION + "q_a_proj.weight", "attention.w_query_down"),
        same(ATTENTION + "q_a_layernorm.weight", "attention.query_norm.scale", "d"),
        Rule(
            ATTENTION + "kv_a_proj_with_mqa.weight",
            Part("attention.w_down", "c d -> d c", Take("c", paired(C, P), C + P)),
        ),
        same(ATTENTION + "kv_a_layernorm.weight", "attention.latent_norm.scale", "c"),
        Rule(
            ATTENTION + "kv_b_proj.weight",
            Part("attention.w_key", both, Take("n", np.arange(N), N + V)),
            Part("attention.w_value", both, Take("n", N + np.arange(V), N + V)),
        ),
        Rule(ATTENTION + "o_proj.weight", Part("attention.w_out", "d (h n) -> h n d")),
        *MLP,
        *swiglu(LAYER + "mlp.shared_experts.", "ffn.shared."),
        same(LAYER + "mlp.gate.e_score_correction_bias", "ffn.bias", "e"),
    )


def v3_ignored(config: dict[str, Any]) -> Sequence[str]:
    """Layers that predict further tokens, which follow the others and which transformers does not read either."""
    first, more = config["num_hidden_layers"], config.get("num_nextn_predict_layers")
    more = min(more, MOST_NEXT) if isinstance(more, int) else 0
    return *TURNS, *(rf"model\.layers\.{first + i}\..*" for i in range(more))


FAMILIES: dict[str, Family] = {
    "mixtral": Family(mixtral_keys, mixtral_fields, mixtral_names),
    "phimoe": Family(phimoe_keys, phimoe_fields, phimoe_names),
    "qwen3_moe": Family(qwen3_keys, qwen3_fields, qwen3_names),
    "deepseek_v2": Family(v2_keys, v2_fields, deepseek_names),
    "deepseek_v3": Family(v3_keys, v3_fields, deepseek_names, v3_ignored),
    **OTHERS,
    "switch_transformers": SWITCH,
}
