"""Which attention a program runs: XLA's own products, or a kernel that never holds the scores. No arrays, no JAX.

A fused kernel passes over tiles of keys and keeps of each query a maximum and a sum alone; its gradient makes the tiles
again (Dao 2023, FlashAttention-2, Algorithms 1 and 2). Memory then grows with the length, not with its square. The
kernels are those that JAX ships: on TPU splash attention, on GPU that of Pallas and Triton. cuDNN's takes packed rows
by a mask of all pairs alone (`jax.nn.dot_product_attention`), and rows are packed here.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

from moe_jax.refused import Problem, Refused
from moe_jax.schema import Config, ModelConfig

TILES = {"tpu": 128, "gpu": 64}  # least tokens of a tile, of which a row is a multiple
WIDEST = {"tpu": 256, "gpu": 128}  # widest head: wider ones do not fit the memory beside a GPU's core
NARROWEST = {"tpu": 1, "gpu": 16}  # a product of Triton has 16 rows and columns at the least
LONG = 512
"""Pairs of so many queries and keys are worth a kernel. Splash attention writes 128 float32 a query and head, as much
as the scores of short rows take; tests/golden/medium.toml needs 3 percent less at 512 on v5e. Speed: not measured."""

Kind = Literal["causal", "both ways", "reading"]


class Case(NamedTuple):
    """The attention of some layers of a model, as a device computes it."""

    kind: Kind
    queries: int  # tokens of a row
    keys: int
    key_dim: int
    value_dim: int
    window: int | None
    sinks: bool
    distances: bool  # relative positions, whose biases are added to the scores
    split: bool  # rows lie in pieces on several devices
    fair: bool  # every device holds as many query heads of the same keys and values

    def __str__(self) -> str:
        """What a report calls it."""
        name = {"causal": "decoder", "both ways": "encoder", "reading": "decoder to encoder"}[self.kind]
        return name if self.window is None else f"{name}, window of {self.window}"


class Choice(NamedTuple):
    """`xla` or `fused`, and why, in one sentence."""

    kernel: str
    reason: str


def case(m: ModelConfig, kind: Kind, queries: int, keys: int, window: int | None, heads: int, pieces: int) -> Case:
    """Attention of a model over rows of these lengths.

    Args:
        heads: devices that share the query heads. pieces: devices that share a row.
    """
    J = m.heads if m.latent else m.resolved_kv_heads
    fair = not (J % heads and (m.heads // J) % heads)
    distances = m.positions == "relative" and kind != "reading"
    return Case(kind, queries, keys, m.key_dim, m.value_dim, window, m.sinks, distances, pieces > 1, fair)


def lacking(platform: str, c: Case) -> str | None:
    """What no kernel of a platform can do of a case, or None."""
    tile = TILES.get(platform)
    if tile is None:
        return f"there is no kernel for {platform}"
    if c.split:
        return "rules.length splits rows over devices, which have blocks of their own (model.attention_exchange)"
    if c.distances:
        return "relative positions add a bias to every score"
    if c.queries % tile or c.keys % tile:
        return f"rows of {c.queries:,} and {c.keys:,} tokens are no multiples of {tile}, a tile on {platform}"
    if not NARROWEST[platform] <= max(c.key_dim, c.value_dim) <= WIDEST[platform]:
        width = max(c.key_dim, c.value_dim)
        return f"heads are {width} wide, and {NARROWEST[platform]} to {WIDEST[platform]} fit on {platform}"
    if not c.fair:
        return "the devices of rules.act_heads hold unequal parts of the heads that share keys and values"
    return None if platform == "tpu" else lacking_on_gpu(c)


def lacking_on_gpu(c: Case) -> str | None:
    """What the kernel for GPUs cannot do beside that."""
    for there, what in {
        f"no windows, and this is one of {c.window} tokens": c.window is not None,
        "no sinks": c.sinks,
        "one row alone, and none to read": c.kind == "reading",
        f"one width of heads, and not {c.key_dim} and {c.value_dim}": c.key_dim != c.value_dim,
    }.items():
        if what:
            return f"the kernel for gpu has {there}"
    return None


def choose(setting: str, platform: str, c: Case) -> Choice:
    """The attention of a case: as set, or for `auto` fused where it can be and rows are long."""
    if setting == "xla":
        return Choice("xla", "as set")
    if why := lacking(platform, c):
        return Choice("xla", why)
    if setting == "fused":
        return Choice("fused", "as set")
    if c.queries * c.keys < LONG**2:
        pairs = f"{c.queries:,} x {c.keys:,}"
        return Choice("xla", f"{pairs} scores are few: a kernel saves memory from {LONG} x {LONG} on")
    return Choice("fused", f"no scores are held: the kernel that JAX has for {platform}")


def of_any_length(m: ModelConfig) -> ModelConfig:
    """The model for prompts and traced texts, whose lengths nobody set: `fused` asks for kernels in the rows of
    training, and is `auto` here."""
    return replace(m, attention_kernel="auto") if m.attention_kernel == "fused" else m


def refusal(platform: str, c: Case, why: str) -> Problem:
    """Of what `model.attention_kernel=fused` asks for and no kernel can do."""
    remedy = "set model.attention_kernel=auto, which takes xla there and says so"
    return Problem("model.attention_kernel", f"is 'fused', and on {platform} ({c}) {why}", remedy)


def choices(cfg: Config, platform: str) -> dict[str, Choice]:
    """What each kind of layer of a config runs in training, by its name in a report."""
    return {str(c): choose(cfg.model.attention_kernel, platform, c) for c in cases(cfg)}


def cases(cfg: Config) -> list[Case]:
    """Each kind of attention of a config in training, once."""
    m, L, M = cfg.model, cfg.data.length, cfg.inputs
    devices = cfg.mesh.over(cfg.rules.act_heads), cfg.mesh.over(cfg.rules.length)
    found = [case(m, "causal", L, L, window, *devices) for window in dict.fromkeys(m.windows)]
    if m.encoder is not None:
        found += [case(m, "both ways", M, M, None, *devices), case(m, "reading", L, M, None, *devices)]
    return found


def check(cfg: Config, platform: str) -> None:
    """Refuse a config whose attention is to be fused and cannot be.

    Raises:
        Refused: one problem for each kind of attention that no kernel of the platform computes.
    """
    if cfg.model.attention_kernel == "fused":
        lacks = [(c, lacking(platform, c)) for c in cases(cfg)]
        if problems := [refusal(platform, c, why) for c, why in lacks if why is not None]:
            raise Refused(*problems)
