"""Switch Transformers (Fedus et al. 2022) in the form of T5: an encoder, and a decoder that reads it.

What transformers 5.23 computes, and what is done here:

- Scores are not scaled, and of tied embeddings the logits are times d_model^-0.5 (Raffel et al. 2020).
- Layer i of a stack has experts where i % step == 1, or all do where the step is 1, with step = layers //
  num_sparse_layers of that stack: of no sparse layers asked for it makes one. There are no experts with a gate.
- `expert_capacity` is a number of tokens: of each sequence those that come to an expert after so many pass it by, by
  the residual alone, padding counted among them (`router_ignore_padding_tokens` is read by nobody). Here an import is
  dropless, and equal as long as no expert is full. The number becomes `model.moe.min_capacity`: with
  `model.moe.eval_capacity_factor=1e-9`, which asks for less, the same tokens of a row without padding are dropped in
  evaluation. Generation stays dropless.
- The router computes in float32. Its jitter, the balance and the z-loss are of training: their numbers are kept, and
  losses are summed over layers here (Fedus et al. 2022, section 2.2), where transformers takes the mean of a stack.
- Where embeddings are not tied, encoder and decoder have one each and `shared.weight` is read by nobody: it is kept
  beside the weights, for the export.
"""

from collections.abc import Sequence
from typing import Any

from moe_jax.config import ModelConfig, Problem, Refused
from moe_jax.convert.common import Family, Tree, same, turned
from moe_jax.convert.fields import Fields
from moe_jax.convert.names import Part, Rule
from moe_jax.cost import capacity

ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
LENGTH = 512  # tokens of a row where n_positions does not say: positions by distance have no last one
TABLES = {"encoder": "encoder.embed_tokens.weight", "decoder": "decoder.embed_tokens.weight"}
SHARED, HEAD = "shared.weight", "lm_head.weight"


def switch_keys(f: Fields) -> Tree:
    """Both stacks, and how a decoder begins."""
    f.only("is_encoder_decoder", [True], "the decoder reads an encoder")
    f.only("router_dtype", ["float32"], "the router computes in that")
    activation = f.only("dense_act_fn", list(ACTIVATIONS), "feed-forward layers have two matrices")
    layers = f.count("num_layers", most=4096)
    decoder = f.count("num_decoder_layers", default=layers if "num_decoder_layers" in f.config else 12, most=4096)
    read = sparse_layers(layers, f.count("num_sparse_encoder_layers", default=3, least=0))
    written = sparse_layers(decoder, f.count("num_sparse_decoder_layers", default=3, least=0))
    tied, width, vocab = f.truth("tie_word_embeddings", True), f.count("d_model"), f.count("vocab_size")
    pattern, listed = placed(layers, read, decoder, written)
    own = {} if tied else {"vocab": vocab}
    moe = {
        "experts": f.experts("num_experts"),
        "top_k": 1,
        "min_capacity": f.count("expert_capacity", default=64),
        "balance_loss": f.amount("router_aux_loss_coef", 0.001),
        "z_loss": f.amount("router_z_loss_coef", 0.001),
        "router": {
            "kind": "switch",
            "bias": f.truth("router_bias", False),
            "jitter": f.amount("router_jitter_noise", 0.01),
        },
    }
    return {
        "vocab": vocab,
        "layers": decoder,
        "d_model": width,
        "d_ff": f.count("d_ff"),
        "heads": f.count("num_heads"),
        "head_dim": f.count("d_kv"),
        "positions": "relative",
        "distance_buckets": f.count("relative_attention_num_buckets", default=32),
        "distance_limit": f.count("relative_attention_max_distance", default=128),
        "max_length": f.count("n_positions", default=LENGTH),
        "attention_scale": 1.0,
        "norm": "rms",
        "norm_eps": f.number("layer_norm_epsilon", 1e-6),
        "ffn": ACTIVATIONS[activation] if activation in list(ACTIVATIONS) else "relu",
        "dropout": f.amount("dropout_rate", 0.1),
        "tied_head": tied,
        "logit_scale": width**-0.5 if tied else 1.0,
        "encoder": {"layers": layers, "start": first(f), **own, **listed},
        "moe": moe | pattern,
    }


def first(f: Fields) -> int:
    """The token that a decoder begins with: as transformers generates, and else T5's, its padding."""
    padding = f.count("pad_token_id", default=0, least=0)
    return f.count("decoder_start_token_id", default=f.count("bos_token_id", default=padding, least=0), least=0)


def sparse_layers(layers: int, asked: int) -> tuple[int, ...]:
    """The numbers of the MoE layers of a stack that was asked for so many."""
    step = layers // asked if asked else layers
    return tuple(i for i in range(layers) if step == 1 or (step and i % step == 1))


def placed(layers: int, read: tuple[int, ...], decoder: int, written: tuple[int, ...]) -> tuple[Tree, Tree]:
    """Keys of the tables `moe` and `encoder` for the numbers of the MoE layers: a period that both have, or lists."""
    for every in range(1, max(layers, decoder) + 1):
        if read == tuple(range(every - 1, layers, every)) and written == tuple(range(every - 1, decoder, every)):
            return {"every": every}, {}
    return {"layers": list(written)}, {"moe_layers": list(read)}


def asked(key: str, kinds: Sequence[str]) -> int:
    """The inverse of `sparse_layers`. Raises `Refused`."""
    wanted = tuple(i for i, kind in enumerate(kinds) if kind == "moe")
    for n in (len(wanted), *range(1, len(kinds) + 2)):
        if n and sparse_layers(len(kinds), n) == wanted:
            return n
    why = f"makes the layers {list(wanted)} of {len(kinds)} MoE, which is no num_sparse layers of this family"
    raise Refused(Problem(key, why, "use a model with experts in all layers, or in the second and at equal distances"))


def switch_fields(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `switch_keys`. A model that evaluates dropless gets a capacity that no row fills."""
    if m.encoder is None:
        raise Refused(Problem("model.encoder", "is unset", "use a model with an encoder"))
    assert m.moe is not None
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if m.ffn not in names:
        raise Refused(Problem("model.ffn", f"is {m.ffn!r}", f"use a model of {' or '.join(names)}"))
    start = {} if m.encoder.start is None else {"decoder_start_token_id": m.encoder.start}
    return start | {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": m.vocab,
        "num_layers": m.encoder.layers,
        "num_decoder_layers": m.layers,
        "num_sparse_encoder_layers": asked("model.encoder.moe_layers", m.encoder_kinds),
        "num_sparse_decoder_layers": asked("model.moe.layers", m.layer_kinds),
        "d_model": m.d_model,
        "d_ff": m.d_ff,
        "d_kv": m.resolved_head_dim,
        "num_heads": m.heads,
        "num_experts": m.moe.experts,
        "expert_capacity": capacity(m.moe, m.max_length, m.moe.eval_capacity_factor),
        "router_bias": m.moe.router.bias,
        "router_jitter_noise": m.moe.router.jitter,
        "router_aux_loss_coef": m.moe.balance_loss,
        "router_z_loss_coef": m.moe.z_loss,
        "relative_attention_num_buckets": m.distance_buckets,
        "relative_attention_max_distance": m.distance_limit,
        "n_positions": m.max_length,
        "layer_norm_epsilon": m.norm_eps,
        "dense_act_fn": names[m.ffn],
        "dropout_rate": m.dropout,
        "tie_word_embeddings": m.tied_head,
    }


def attention(source: str, target: str) -> tuple[Rule, ...]:
    """The four matrices."""
    ins = (("q", "query"), ("k", "key"), ("v", "value"))
    heads = (Rule(f"{source}{theirs}.weight", Part(f"{target}w_{ours}", "(h n) d -> d h n")) for theirs, ours in ins)
    return *heads, Rule(source + "o.weight", Part(target + "w_out", "d (h n) -> h n d"))


def stack(source: str, target: str, *, reads: bool) -> tuple[Rule, ...]:
    """The layers of an encoder or decoder and what they share; `reads`: the second of three sub-layers is attention to
    what an encoder read."""
    layer, last = source + "block.{layer}.layer.", 2 if reads else 1
    mlp, ffn = f"{layer}{last}.mlp.", target + "ffn."
    experts = mlp + "experts.expert_{expert}."
    across = attention(layer + "1.EncDecAttention.", target + "cross_attention.") if reads else ()
    norm = (same(layer + "1.layer_norm.weight", target + "cross_norm.scale", "d"),) if reads else ()
    return (
        same(source + "block.0.layer.0.SelfAttention.relative_attention_bias.weight", target + "relative", "b h"),
        same(source + "final_layer_norm.weight", target + "final_norm.scale", "d"),
        same(layer + "0.layer_norm.weight", target + "attention_norm.scale", "d"),
        *attention(layer + "0.SelfAttention.", target + "attention."),
        *norm,
        *across,
        same(f"{layer}{last}.layer_norm.weight", target + "ffn_norm.scale", "d"),
        turned(mlp + "wi.weight", ffn + "w_up"),
        turned(mlp + "wo.weight", ffn + "w_down"),
        turned(mlp + "router.classifier.weight", ffn + "router"),
        same(mlp + "router.classifier.bias", ffn + "router_bias", "e"),
        turned(experts + "wi.weight", ffn + "experts.w_up"),
        turned(experts + "wo.weight", ffn + "experts.w_down"),
    )


def switch_names(m: ModelConfig) -> Sequence[Rule]:
    """Both stacks, and one table of tied embeddings or three."""
    table = same(SHARED if m.tied_head else TABLES["decoder"], "embedding.table", "v d")
    more = same(TABLES["encoder"], "encoder.table", "v d"), turned(HEAD, "embedding.head")
    return table, *more, *stack("encoder.", "encoder.", reads=False), *stack("decoder.", "", reads=True)


def switch_unread(m: ModelConfig) -> dict[str, str]:
    """`shared.weight` of embeddings that are not tied."""
    return {} if m.tied_head else {SHARED: TABLES["decoder"]}


def switch_copies(m: ModelConfig) -> dict[str, str]:
    """The other names of a tied table, which older files may hold."""
    return dict.fromkeys((*TABLES.values(), HEAD), SHARED) if m.tied_head else {}


SWITCH = Family(switch_keys, switch_fields, switch_names, lambda config: (), switch_unread, switch_copies)
