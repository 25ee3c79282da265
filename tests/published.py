"""Small random models of transformers, one a case of each family, and what they answer.

`python tests/published.py` writes the first case of each family, or of those that are named, to tests/golden/published,
with its answers, so that it is also compared where torch and transformers are not installed.
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden" / "published"
TOKENS = np.random.default_rng(5).integers(0, 40, (2, 12))
INPUTS = np.random.default_rng(6).integers(0, 40, (2, 37))  # what an encoder reads

BASE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
}
MIXTRAL = BASE | {"intermediate_size": 12, "num_key_value_heads": 2, "num_local_experts": 4}
QWEN3 = BASE | {"intermediate_size": 24, "moe_intermediate_size": 12, "num_key_value_heads": 2, "num_experts": 8}
DEEPSEEK = BASE | {
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 6,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
QWEN2 = QWEN3 | {"num_experts_per_tok": 2, "shared_expert_intermediate_size": 20}
OLMOE = BASE | {"intermediate_size": 12, "num_key_value_heads": 2, "num_experts": 8}
OLMOE |= {"pad_token_id": None}  # torch gives the row of that token no gradient
GPT_OSS = MIXTRAL | {"head_dim": 8, "sliding_window": 5}
THIRD = ["sliding_attention", "sliding_attention", "full_attention"]
GRANITE = MIXTRAL | {
    "num_experts_per_tok": 2,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}
SWITCH = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 12,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_heads": 4,
    "num_experts": 4,
    "n_positions": 64,
    "decoder_start_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
FACTORS = {"short_factor": [1.1, 1.3], "long_factor": [2.0, 5.0], "original_max_position_embeddings": 12}
LONG = {"rope_type": "longrope", "rope_theta": 1e2, **FACTORS}  # rows of more than 12 tokens are long ones
LONG_NOW = LONG | {"original_max_position_embeddings": 11}  # so that those of `TOKENS` are
PHIMOE = MIXTRAL | {"num_experts_per_tok": 2, "router_jitter_noise": 0.2, "num_local_experts": 8}
SCALES = {"short_mscale": 1.2, "long_mscale": 1.4}
WINDOW = {"sliding_window": 5, "use_sliding_window": True}
LATENT_YARN = YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}
FAST = {"rope_theta": 10.0, "beta_fast": 2.0, "beta_slow": 0.5}  # bounds between pairs
CLASSES = {
    "mixtral": "Mixtral",
    "phimoe": "Phimoe",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "olmoe": "Olmoe",
    "gpt_oss": "GptOss",
    "granitemoe": "GraniteMoe",
    "granitemoeshared": "GraniteMoeShared",
    "switch_transformers": "SwitchTransformers",
}
HEADS = {"switch_transformers": "ForConditionalGeneration"}  # others: ForCausalLM
CASES = {
    "mixtral": [
        MIXTRAL | {"num_experts_per_tok": 2},
        MIXTRAL | {"num_experts_per_tok": 3, "tie_word_embeddings": True, "head_dim": 6, "rms_norm_eps": 1e-5},
        MIXTRAL | {"num_experts_per_tok": 4, "num_key_value_heads": 4, "num_hidden_layers": 1},
        MIXTRAL | {"num_experts_per_tok": 2, "rope_parameters": YARN, "sliding_window": 5, "head_dim": 8},
    ],
    "phimoe": [
        PHIMOE | {"rope_parameters": LONG | SCALES, "attention_bias": True, "lm_head_bias": True},
        PHIMOE | {"rope_parameters": LONG_NOW | SCALES, "num_hidden_layers": 3, "head_dim": 4, "rms_norm_eps": 1e-5},
        PHIMOE | {"tie_word_embeddings": True, "sliding_window": 5, "head_dim": 6, "router_jitter_noise": 0.01},
        PHIMOE | {"rope_parameters": LONG_NOW | SCALES | {"long_factor": [1.1, 1.3]}, "num_key_value_heads": 4},
    ],
    "qwen2_moe": [
        QWEN2 | {"mlp_only_layers": [0]},
        QWEN2 | {"norm_topk_prob": True, "qkv_bias": False, "tie_word_embeddings": True},
        QWEN2 | {"num_hidden_layers": 3, **WINDOW, "max_window_layers": 3, "shared_expert_intermediate_size": 12},
    ],
    "qwen3_moe": [
        QWEN3 | {"num_experts_per_tok": 3, "norm_topk_prob": True, "head_dim": 6, "mlp_only_layers": [0]},
        QWEN3 | {"num_experts_per_tok": 2, "norm_topk_prob": False, "head_dim": 4, "tie_word_embeddings": True},
        QWEN3 | {"num_experts_per_tok": 1, "norm_topk_prob": False, "head_dim": 4, "decoder_sparse_step": 2},
        QWEN3 | WINDOW | {"num_experts_per_tok": 2, "head_dim": 4, "rope_parameters": LONG_NOW, "attention_bias": True},
    ],
    "deepseek_v2": [
        DEEPSEEK | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
        DEEPSEEK | {"topk_method": "greedy", "q_lora_rank": None, "n_group": None, "topk_group": None},
        DEEPSEEK | {"topk_method": "greedy", "n_shared_experts": 2, "num_experts_per_tok": 2, "num_hidden_layers": 3},
        DEEPSEEK | {"topk_method": "greedy", "rope_parameters": LATENT_YARN},
    ],
    "deepseek_v3": [
        DEEPSEEK | {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
        DEEPSEEK | {"norm_topk_prob": False, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
        DEEPSEEK | {"n_shared_experts": 2, "num_experts_per_tok": 2, "topk_group": 1, "num_hidden_layers": 3},
        DEEPSEEK | {"rope_parameters": LATENT_YARN | FAST, "qk_rope_head_dim": 8},
    ],
    "olmoe": [
        OLMOE | {"num_experts_per_tok": 3, "clip_qkv": 0.8},
        OLMOE | {"num_experts_per_tok": 2, "norm_topk_prob": True, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        OLMOE | {"num_experts_per_tok": 8, "num_key_value_heads": 4, "attention_bias": True, "num_hidden_layers": 1},
    ],
    "gpt_oss": [
        GPT_OSS | {"num_experts_per_tok": 2, "rope_parameters": YARN | FAST | {"truncate": False}},
        GPT_OSS | {"num_experts_per_tok": 3, "layer_types": THIRD, "num_hidden_layers": 3, "rope_parameters": YARN},
        GPT_OSS | {"num_experts_per_tok": 4, "layer_types": ["full_attention"] * 2, "rope_parameters": LINEAR},
    ],
    "granitemoe": [
        GRANITE,
        GRANITE | {"tie_word_embeddings": True, "num_experts_per_tok": 4, "rms_norm_eps": 1e-5},
        GRANITE | {"attention_bias": True, "num_key_value_heads": 4, "logits_scaling": 7.0, "num_hidden_layers": 1},
    ],
    "granitemoeshared": [
        GRANITE | {"shared_intermediate_size": 20},
        GRANITE | {"shared_intermediate_size": 12, "tie_word_embeddings": True},
        GRANITE | {"shared_intermediate_size": 0, "rope_parameters": LONG | {"factor": 3.0}},
    ],
    "switch_transformers": [
        SWITCH | {"num_layers": 4, "num_sparse_encoder_layers": 2},
        SWITCH | {"tie_word_embeddings": False, "num_experts": 8, "num_decoder_layers": 5, "router_bias": True},
        SWITCH | {"num_layers": 6, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "d_kv": 4},
        SWITCH
        | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "dense_act_fn": "gelu_new"}
        | {"num_sparse_encoder_layers": 3, "layer_norm_epsilon": 1e-5},
        SWITCH | {"expert_capacity": 2, "num_experts": 3, "num_sparse_encoder_layers": 2},
    ],
}
FULL = [("switch_transformers", 4)]  # cases whose experts come to be full, and drop


FORGETFUL = ("phimoe", 1)  # has to be `repaired`
needs_torch = pytest.mark.usefixtures("transformers")  # one case of each family is compared with its file without


def cases():
    """`(family, number)` of each."""
    return [(family, i) for family, own in CASES.items() for i in range(len(own))]


def build(family, number, folder, dtype="float32"):
    """A random model of transformers, in `dtype`, saved in `folder`; every layer and every norm is another one."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    config = getattr(transformers, f"{CLASSES[family]}Config")(**CASES[family][number])
    kind = CLASSES[family] + HEADS.get(family, "ForCausalLM")
    model = getattr(transformers, kind)(config).eval()
    draw = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(p.shape, generator=draw)
            if "correction_bias" in name:
                p.copy_(0.2 * noise)
            elif p.ndim == 1 and "norm" in name:
                p.copy_(1 + 0.2 * noise)
            elif p.ndim == 1 and name.endswith(("bias", "sinks")):
                p.copy_(noise)
            elif p.ndim > 1:
                wide = 5 if family == "gpt_oss" and "gate_up" in name else 1  # so that some numbers reach the bounds
                long = any(word in name for word in ("embed_tokens", "shared.weight", "attention_bias"))
                p.copy_(noise if long else wide * noise / p.shape[-1] ** 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return model


def repaired(model):
    """A Phi-MoE that takes its long factors: transformers 5.23 asks for its rates without the length of the rows, which
    gives those of short rows, and multiplies with `long_mscale` all the same. Earlier versions gave the length."""
    rotary = model.model.rotary_emb
    if rotary.rope_type == "longrope":
        asked = rotary.rope_init_fn
        rotary.rope_init_fn = lambda config: asked(config, seq_len=TOKENS.shape[1])
    return model


def answers(model):
    """Logits [B, L, V], experts in order and their gates [layers, B, L, K], also `read_` those of an encoder, loss, and
    norm of the gradient."""
    import torch

    seen = {"read_": [], "": []}
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Router"):
            part = seen["read_" if name.startswith("encoder.") else ""]
            module.register_forward_hook(lambda module, _, out, part=part: part.append(chosen(module, *out)))
    tokens = torch.tensor(TOKENS)
    if model.config.is_encoder_decoder:
        after = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)  # no target after the last one
        out = model(torch.tensor(INPUTS), decoder_input_ids=tokens, labels=after)
    else:
        out = model(tokens, labels=tokens)
    out.loss.backward()
    square = sum(float((p.grad.double() ** 2).sum()) for p in model.parameters() if p.grad is not None)
    routes = {}
    for part, layers in seen.items():
        shape = INPUTS.shape if part else TOKENS.shape
        if layers:
            routes[part + "experts"] = np.stack([e.reshape(*shape, -1) for e, _ in layers]).astype(np.int32)
            routes[part + "gates"] = np.stack([g.reshape(*shape, -1) for _, g in layers])
    return routes | {
        "logits": out.logits.detach().numpy(),
        "loss": np.asarray(out.loss.item()),
        "norm": np.asarray(square**0.5),
    }


def chosen(module, first, gate, last):
    """Experts in order, and their gates, of what a router returns; a full expert's gate is 0."""
    if hasattr(module, "classifier"):  # Switch: which experts with room, the largest share, logits
        expert, gate = last.argmax(-1, keepdim=True), gate * first.sum(-1, keepdim=True)
    else:
        expert = last
    order = expert.argsort(-1)
    return expert.gather(-1, order).numpy(), gate.gather(-1, order).detach().numpy()


def loads(folder, family):
    """transformers loads a folder, finds all that it looks for and no more, and gives the logits that were written down
    for the first case of the family."""
    import torch
    import transformers

    kind = transformers.AutoModelForSeq2SeqLM if family in HEADS else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    given = {"input_ids": torch.tensor(TOKENS)}
    if family in HEADS:
        given = {"input_ids": torch.tensor(INPUTS), "decoder_input_ids": torch.tensor(TOKENS)}
    with torch.no_grad():
        logits = model.eval()(**given).logits.numpy()
    want = np.load(GOLDEN / f"{family}.npz")["logits"]
    assert np.abs(logits - want).max() < 1e-6 * np.abs(want).max()


def synthetic(folder, fields):
    """A folder of numbers in [0, 2) in the names of a Mixtral; returns the bytes of all tensors and of the largest."""
    from moe_jax.config import Config, ModelConfig, from_dict
    from moe_jax.convert.families import FAMILIES, model_keys
    from moe_jax.convert.names import NameMap
    from moe_jax.convert.tensors import Writing, write
    from moe_jax.train.state import Model

    about = MIXTRAL | {"model_type": "mixtral", "rope_theta": 1e4, "num_experts_per_tok": 2} | fields
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about))
    m: ModelConfig = from_dict({"model": model_keys(about), "data": {"length": 8}}).model
    names = NameMap(Model.of(Config(model=m)), FAMILIES["mixtral"].names(m))
    wanted = [Writing(name, "BF16", shape) for name, shape in names.tensors.items()]
    draw = np.random.default_rng(0)

    def values():
        for t in wanted:
            bits = draw.integers(0, 2**14, t.shape, np.uint16)
            yield bits.view(ml_dtypes.bfloat16)

    write(folder / "model.safetensors", wanted, values())
    return sum(t.bytes for t in wanted), max(t.bytes for t in wanted)


def main(families):
    for family in families or CASES:
        folder = GOLDEN / family
        np.savez_compressed(folder.parent / f"{family}.npz", **answers(build(family, 0, folder)))
        (folder / "generation_config.json").unlink()
        print(family, json.loads((folder / "config.json").read_text())["model_type"], file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
