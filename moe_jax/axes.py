"""The words of the library: axis letters, mesh axes and the table of logical axes.

Axis letters, used in names, einsums and shape comments:
`B` batch, `L` length, `T` tokens, `G` groups, `S` tokens of a group, `E` experts, `K` choices, `C` capacity,
`D` model width, `F` expert hidden width, `H` heads, `N` head width, `V` vocabulary.
"""

from dataclasses import dataclass, replace

MESH_AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
"""Mesh axes, slowest first: neighbouring devices share what talks most. Tokens are split over all but the ends."""

Axes = tuple[str, ...]
WIDTHS = ("embed", "expert_embed", "latent_embed")
"""Logical axes of the width, the model's or a latent's, that a matrix reads or writes."""
MANY = ("layers", "experts")
"""Logical axes over which a parameter is many matrices."""
NOT_MATRICES = ("norm", "bias", "position", "vocab", "router_embed")


def is_matrix(names: Axes) -> bool:
    """Whether a parameter of these logical axes is one matrix, or many, that Muon takes; others are AdamW's."""
    return sum(n not in MANY for n in names) >= 2 and not set(names) & set(NOT_MATRICES)


Layout = tuple[Axes | None, ...]
"""The mesh axes of each dimension of an array; None leaves one to the compiler."""


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes. The first block names dimensions of parameters, the second those of activations.

    A name maps to no mesh axis (replicated), one, or several (sharded over their product, first one slowest).
    `act_exchange` is the width of tokens on their way to the experts and back. `residual` splits the length once more
    where nothing but norms and sums is computed, between attention and feed-forward layers (Korthikanti et al. 2022,
    sequence parallelism).
    """

    vocab: Axes = ("tensor",)
    embed: Axes = ("fsdp",)
    heads: Axes = ("tensor",)
    kv_heads: Axes = ("tensor",)
    head: Axes = ()
    latent: Axes = ()
    latent_embed: Axes = ("fsdp",)
    mlp: Axes = ("tensor",)
    experts: Axes = ("expert",)
    expert_embed: Axes = ("fsdp",)
    expert_mlp: Axes = ("tensor",)
    router_embed: Axes = ()
    router_mlp: Axes = ()
    router_experts: Axes = ()
    position: Axes = ()
    norm: Axes = ()
    bias: Axes = ()
    layers: Axes = ("stage",)

    batch: Axes = ("data", "fsdp", "expert")
    length: Axes = ("context",)
    residual: Axes = ()
    act_embed: Axes = ()
    act_exchange: Axes = ()
    act_heads: Axes = ("tensor",)
    act_mlp: Axes = ("tensor",)
    act_vocab: Axes = ("tensor",)

    def layout(self, *names: str | None) -> Layout:
        """The mesh axes of each dimension, for logical names; None is replicated."""
        return tuple(() if name is None else getattr(self, name) for name in names)

    @property
    def tokens(self) -> Axes:
        """The axes that split tokens: those of the batch, then those of the length."""
        return self.batch + self.length

    @property
    def stream(self) -> Layout:
        """Layout of the tokens [B, L, D] between attention and feed-forward layers."""
        return self.batch, self.length + self.residual, self.act_embed

    @property
    def groups(self) -> Axes:
        """The axes of the groups `G` of tokens, the experts' last: that order makes the exchange one all-to-all."""
        rest = tuple(a for a in self.tokens if a not in self.experts)
        return rest + tuple(a for a in self.experts if a in self.tokens)

    @property
    def travelling(self) -> Axes:
        """The axes of D while tokens travel. `act_exchange` splits what the tensor shards would all send alike."""
        return self.act_exchange or self.act_embed

    @property
    def token_major(self) -> Layout:
        """Layout of a dispatched tensor `[E, G, C, D]` while tokens are at home: groups lie where their tokens do."""
        return ((), self.groups, (), self.travelling)

    @property
    def expert_major(self) -> Layout:
        """Layout of a dispatched tensor `[E, G, C, D]` at its experts: the expert axes moved from G to E."""
        return (self.experts, tuple(a for a in self.groups if a not in self.experts), (), self.travelling)

    def by_rows(self) -> "Rules":
        """These rules with whole sequences on every shard and more rows in the batch, as decoding needs it."""
        return replace(self, batch=self.tokens, length=(), residual=())
