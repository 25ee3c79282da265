"""The work of one step: tokens, groups and slots of a device, and FLOPs."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from moe_jax import cost, kernels
from moe_jax.cost import matrices
from moe_jax.pattern import Schedule, seen_blocks
from moe_jax.plan.leaves import ADDED, LOOKED_UP, Count, Leaf, count, expert_width, leaves
from moe_jax.schema import Config

BYTES = {"float32": 4, "bfloat16": 2}


class Flops(NamedTuple):
    """FLOPs of one token, 2 a multiplication; causal attention counts half of the square."""

    train: int  # 6 a parameter that multiplies, and attention three times forward
    infer: int  # a token of a sequence of `length`, on average
    decode: int  # the last token of it, which sees all the others
    weights: int  # of `train`, by parameters
    attention: int  # of `train`, by scores and values


def flops_per_token(cfg: Config, parameters: Count) -> Flops:
    """Model FLOPs: of the matrices one token is multiplied with, and of attention (Chowdhery et al. 2022, appendix B,
    with the causal half, and of a window what it holds). Look-ups and norms multiply nothing; a tied table counts as
    the head.

    A token of a decoder comes with M/L of its encoder, where attention sees both ways, as from one to the other.
    """
    m, active, L, M = cfg.model, parameters.active_components, cfg.data.length, cfg.inputs
    idle = (*ADDED, *(c for c in LOOKED_UP if c != "embed" or not m.tied_head))
    inputs = 2 * parameters.active_of_input  # of a token of the encoder
    own = 2 * sum(n for c, n in active.items() if c not in idle) - inputs
    weights = own + inputs * M // L
    pair = 2 * m.heads * (m.key_dim + m.value_dim)  # scores and values of a token with another, in a layer
    reading, encoder = pair * m.layers * M, pair * len(m.encoder_kinds) * M * M // L
    areas = sum(L * L - max(0, L - (window or L)) ** 2 for window in m.windows)  # twice those of the layers' pairs
    square = pair * areas // (2 * L) + reading + encoder
    decode = own + pair * sum(min(L, window or L) for window in m.windows) + reading
    return Flops(3 * (weights + square), weights + square, decode, 3 * weights, 3 * square)


@dataclass(frozen=True)
class Step:
    """One optimizer step of a config on its mesh, as one device sees it."""

    cfg: Config
    platform: str  # cpu, gpu or tpu: `auto` dispatch depends on it
    both_ways: bool = False  # attention sees later tokens too

    @cached_property
    def encoder(self) -> "Step | None":
        """The layers of an encoder with their tokens, as those of a model of their own."""
        m = self.cfg.model
        if m.encoder is None:
            return None
        alone = replace(m, layers=m.encoder.layers, encoder=None)
        if m.moe is not None and m.encoder.moe_layers is not None:
            alone = replace(alone, moe=replace(m.moe, layers=m.encoder.moe_layers))
        cfg = replace(self.cfg, model=alone, data=replace(self.cfg.data, length=self.cfg.inputs))
        return Step(cfg, self.platform, both_ways=True)

    @property
    def alike(self) -> list[tuple["Step", str, int]]:
        """Layers of a kind that see as much: a step in which all layers see that, the kind, and how many there are."""
        m = self.cfg.model
        found = Counter(zip(m.layer_kinds, m.windows, strict=True))
        return [(self.seeing(window), kind, times) for (kind, window), times in found.items()]

    def seeing(self, window: int | None) -> "Step":
        """The step of a model whose layers all have this window."""
        m = self.cfg.model
        if m.full_every is None:
            return self
        return replace(self, cfg=replace(self.cfg, model=replace(m, window=window, full_every=None)))

    @property
    def stacks(self) -> list["Step"]:
        """The decoder, and the encoder if there is one."""
        return [self] if self.encoder is None else [self, self.encoder]

    def attention(self, kind: kernels.Kind | None = None) -> kernels.Choice:
        """What computes the attention of layers that all see the window of the model, or, `reading`, that to an
        encoder's tokens; and why."""
        m, L = self.cfg.model, self.cfg.data.length
        own: kernels.Kind = "both ways" if self.both_ways else "causal"
        keys, window = (L, m.window) if kind is None else (self.cfg.inputs, None)
        c = kernels.case(m, kind or own, L, keys, window, self.over("act_heads"), self.over("length"))
        return kernels.choose(m.attention_kernel, self.platform, c)

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        return leaves(self.cfg.model)

    @cached_property
    def count(self) -> Count:
        return count(self.cfg.model)

    @cached_property
    def flops(self) -> Flops:
        return flops_per_token(self.cfg, self.count)

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.cfg.model.dtype]

    @property
    def microbatches(self) -> int:
        return self.cfg.train.microbatches

    @property
    def schedule(self) -> Schedule | None:
        """How microbatches pass through the stages of a pipeline, if the mesh has stages."""
        mesh, train = self.cfg.mesh, self.cfg.train
        return None if mesh.stage == 1 else Schedule(mesh.stage, self.microbatches, train.rounds)

    @property
    def turns(self) -> float:
        """How often a device passes the model's layers in a step: all for each microbatch, or its share each tick."""
        s = self.schedule
        return self.microbatches if s is None else s.ticks / (s.stages * s.rounds)

    @property
    def shared(self) -> bool:
        """Whether the stages of a pipeline share the rows of embedding and head: they do where these divide."""
        mesh = self.cfg.mesh
        return self.schedule is not None and self.cfg.data.batch % (mesh.over(self.cfg.rules.batch) * mesh.stage) == 0

    @property
    def table_passes(self) -> int:
        """How often a step passes embedding and head: once for each microbatch, or once before and after a pipeline."""
        return self.microbatches if self.schedule is None else 1

    @property
    def table_tokens(self) -> int:
        """Tokens that a device embeds, and makes logits of, in a pass."""
        if self.schedule is None:
            return self.tokens
        return self.tokens * self.microbatches // (self.cfg.mesh.stage if self.shared else 1)

    @property
    def one_by_one(self) -> bool:
        """Whether microbatches are recomputed one by one in the backward pass; in a pipeline all are on their way."""
        return self.microbatches > 1 and self.schedule is None

    @cached_property
    def shards(self) -> int:
        """Token shards."""
        return self.cfg.mesh.over(self.cfg.rules.tokens)

    @cached_property
    def rows(self) -> int:
        """Sequences a device holds in a microbatch, whole or a part of each."""
        return max(1, self.cfg.data.batch // self.microbatches // self.over("batch"))

    @cached_property
    def tokens(self) -> int:
        """Tokens a device holds in a microbatch."""
        return self.rows * self.cfg.data.length // self.over("length")

    @property
    def key_heads(self) -> int:
        """Heads of keys and values that a device holds. Latent attention makes those of every query head."""
        m = self.cfg.model
        return m.heads // self.over("act_heads") if m.latent else m.resolved_kv_heads // self.over("kv_heads")

    def over(self, *names: str) -> int:
        """Shards of a dimension of activations, by logical names."""
        return self.cfg.mesh.over(tuple(axis for name in names for axis in getattr(self.cfg.rules, name)))

    # The mixture of experts

    @cached_property
    def expert_shards(self) -> int:
        return self.cfg.mesh.over(self.cfg.rules.experts)

    @cached_property
    def moe_layers(self) -> int:
        return self.cfg.model.layer_kinds.count("moe")

    @property
    def exchanged_again(self) -> int:
        """How often a microbatch's exchange is repeated in the backward pass: it is saved, or recomputed."""
        return (self.cfg.model.remat in ("full", "dots")) + self.one_by_one

    @cached_property
    def group(self) -> int:
        """Tokens S of a routing group in training."""
        m, moe = self.cfg.model, self.cfg.model.moe
        assert moe is not None
        return cost.group_size(moe, moe.capacity_factor, self.cfg.data.length, expert_width(m), matrices(m.ffn))

    @cached_property
    def slots(self) -> int:
        """Slots C of an expert in a group."""
        moe = self.cfg.model.moe
        assert moe is not None
        return cost.capacity(moe, self.group, moe.capacity_factor)

    @cached_property
    def dispatch(self) -> cost.Choice:
        """The dispatcher, and why."""
        m, moe = self.cfg.model, self.cfg.model.moe
        assert moe is not None
        sizes = {"group": self.group, "slots": self.slots, "d_ff": expert_width(m), "matrices": matrices(m.ffn)}
        return cost.settle(self.platform, moe, **sizes)

    @cached_property
    def groups(self) -> int:
        """Groups a device holds in a microbatch."""
        return max(1, self.tokens // self.group)

    @cached_property
    def sent_rows(self) -> int:
        """Rows of the buffers that a device sends and receives in one exchange: E*G*C, or for sorted rows the worst
        case of each pair of shards."""
        moe = self.cfg.model.moe
        assert moe is not None
        if moe.exchange == "ragged":  # as many as there are
            return self.tokens * moe.top_k
        if self.dispatch.dispatch != "ragged":
            return moe.experts * self.groups * self.slots
        rows = self.groups * min(self.group * moe.top_k, moe.experts * self.slots)
        n, local = self.expert_shards, moe.experts // self.expert_shards
        pair = min(rows, self.tokens * min(moe.top_k, local), local * self.groups * self.slots)
        return n * pair if n > 1 else rows

    @cached_property
    def expert_rows(self) -> float:
        """Rows that the experts of a device multiply: buffers with their empty slots, or the rows in use."""
        moe = self.cfg.model.moe
        assert moe is not None
        return self.sent_rows if self.dispatch.dispatch != "ragged" else self.tokens * moe.top_k

    def passes(self, part: str) -> float:
        """Forward passes of a part in a step and microbatch: remat and microbatches repeat them."""
        remat = self.cfg.model.remat
        again = 1.0 if remat in ("full", "exchange") else 0.0
        if part in ("scores", "experts", "dispatch") and remat == "dots":  # batched products are not saved
            again = 1.0
        if part in ("experts", "dispatch") and remat == "exchange":  # what the last product made is saved
            again = (matrices(self.cfg.model.ffn) - 1) / matrices(self.cfg.model.ffn) if part == "experts" else 0.0
        if part == "head":
            again = 0.0
        return 1 + again + self.one_by_one

    def backward(self, part: str) -> float:
        """Forward passes that the gradient of a part is worth: two, but for the scores in a kernel. It makes them again
        both for the queries and for keys and values, seven products where forward are two."""
        windows = self.cfg.model.windows
        if part != "scores":
            return 2
        fused = sum(self.seeing(w).attention().kernel == "fused" for w in windows) / len(windows)
        return 2 + 1.5 * fused

    def executed(self) -> dict[str, float]:
        """FLOPs that a device executes in a step, by part; empty slots, recomputation and dispatch among them."""
        m, moe = self.cfg.model, self.cfg.model.moe
        heads, D, L = m.heads * (m.key_dim + m.value_dim), m.d_model, self.cfg.data.length
        once: dict[str, float] = {}  # FLOPs of a forward pass
        for c, n, axis in self.parts():
            once[c] = once.get(c, 0.0) + 2 * n * self.tokens / self.over(axis)
        pairs = L * L  # of a layer, each with one that it sees; with windows on average
        if not self.both_ways:
            pairs = sum(rows * keys for w in m.windows for rows, keys in seen_blocks(L, w)) / m.layers
        pairs += L * self.cfg.inputs
        once["scores"] = 2 * pairs / L * heads / self.over("act_heads") * m.layers * self.tokens
        if self.encoder is not None:
            once["cross_attn"] += 2 * self.read_by_all * self.encoder.tokens / self.over("act_heads")
        once["head"] = 0.0 if self.both_ways else 2 * m.vocab * D / self.over("act_vocab") * self.table_tokens
        if moe is not None:
            each = 2 * matrices(m.ffn) * D * expert_width(m) / self.over("expert_mlp")
            once["experts"] = self.moe_layers * each * self.expert_rows
        out = {c: n * (self.passes(c) + self.backward(c)) for c, n in once.items()}
        if (
            moe is not None and self.dispatch.dispatch == "einsum"
        ):  # the mask has no gradient: one product back, not two
            both = 2 * 2 * self.group * moe.experts * self.slots * self.groups * D
            out["dispatch"] = self.moe_layers * both * (self.passes("dispatch") + 1)
        out = {c: n * (self.table_passes if c == "head" else self.turns) for c, n in out.items() if n}
        if self.encoder is not None:
            for c, n in self.encoder.executed().items():
                out[c] = out.get(c, 0.0) + n
        return out

    @property
    def read_by_all(self) -> int:
        """Elements of the matrices that make keys and values of what an encoder read, in all layers."""
        return sum(x.size for x in self.leaves if ".cross_attention.w_" in x.name and x.of_input)

    def parts(self) -> list[tuple[str, int, str]]:
        """Matrices that each token of a stack passes: component, parameters, the axis that splits their work."""
        axes = {"attn": "act_heads", "dense_ffn": "act_mlp", "shared_experts": "act_mlp", "router": "router_experts"}
        other = {} if self.encoder is None else self.encoder.count.components
        found = {c: self.count.components[c] - other.get(c, 0) for c in axes if c in self.count.components}
        narrow = sum(x.size for x in self.leaves if x.axes[-1] == "latent")  # those that make the latents
        found["attn"] -= narrow
        out = [("attn", narrow, "latent"), *((c, n, axes[c]) for c, n in found.items())]
        if self.encoder is not None:
            out.append(("cross_attn", self.count.components["cross_attn"] - self.read_by_all, "act_heads"))
        return out
