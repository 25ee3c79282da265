"""What should not be in a compiled step: gathered tokens or experts, arrays resharded as a whole, sums left whole.

Each flag says what it found, how many bytes that moves, and which rule or key to change. None is a refusal.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from moe_jax.axes import WIDTHS, Rules
from moe_jax.collectives import BETWEEN, Collective
from moe_jax.config import Config
from moe_jax.inspect.least import Least
from moe_jax.pattern import STAGE

Leaves = dict[str, tuple[str, ...]]  # logical axes of each parameter by its name
# Dimensions of parameters over which they may be stored in parts and gathered for use: fully sharded data parallelism.
STORED = (*WIDTHS, "router_embed", "position", "norm", "bias")


class Flag(NamedTuple):
    """Something that should not be there."""

    kind: str
    what: str
    bytes: int  # that a device sends for it in a step
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}\n    remedy: {self.remedy}"


class Seen(NamedTuple):
    """What the checks look at."""

    cfg: Config
    platform: str
    least: Least | None
    tokens: int  # of a device and microbatch
    leaves: Leaves
    collectives: Sequence[Collective]
    replicated: Sequence[str]

    @property
    def rules(self) -> Rules:
        return self.cfg.rules


def total(group: Sequence[Collective]) -> int:
    return sum(c.moved * c.times for c in group)


def said(group: Sequence[Collective]) -> str:
    """Where and how often: `16 all-gathers over fsdp, forward, in attention+ffn, 1,234 bytes`."""
    first, times = group[0], sum(c.times for c in group)
    where = "+".join(dict.fromkeys(m for c in group for m in c.modules))
    return f"{times} x {first.op} over {'+'.join(first.axes)}, {first.phase}, in {where}, {total(group):,} bytes"


def alike(found: Sequence[Collective]) -> list[list[Collective]]:
    """Collectives of one kind, axes and phase together."""
    groups: dict[tuple, list[Collective]] = {}
    for c in found:
        groups.setdefault((c.op, c.axes, c.phase), []).append(c)
    return list(groups.values())


def leaf_of(argument: str, leaves: Leaves) -> str | None:
    """The parameter that an argument such as `state.params['embedding']['table']` is, or belongs to."""
    path = ".".join(re.findall(r"\['([^']+)'\]", argument))
    return path if path in leaves else None


def of_state(c: Collective) -> bool:
    """Whether it moves parameters or moments alone, and nothing of the batch."""
    return bool(c.arguments) and not any(argument.startswith("batch[") for argument in c.arguments)


def gathered_tokens(seen: Seen) -> Iterator[Flag]:
    """All-gathers of what is computed from tokens: a number a token or more, over stages or axes that split the tokens.

    Attention needs the keys and values of whole rows: its gathers over the length are meant.
    """
    for group in alike([c for c in seen.collectives if c.op == "all-gather" and not of_state(c)]):
        first = group[0]
        big = [c for c in group if c.bytes >= 4 * seen.tokens and BETWEEN not in c.modules]
        if not big or not set(first.axes) & {STAGE, *seen.rules.tokens} or first.phase == "optimizer":
            continue
        if set(first.axes) <= set(seen.rules.length) and {m for c in big for m in c.modules} == {"attention"}:
            continue
        yield Flag("tokens are gathered", said(big), total(big), token_remedy(seen, big))


def token_remedy(seen: Seen, group: Sequence[Collective]) -> str:
    """What makes tokens stay at home, by where they are gathered."""
    outside = [a for a in seen.rules.experts if a not in seen.rules.tokens]
    if outside:
        return f"rules.experts={list(seen.rules.experts)} must lie within rules.batch: add {outside} to rules.batch"
    modules = {m for c in group for m in c.modules}
    if modules & {"dispatch", "combine", "experts", "routing"}:
        return "leave rules.experts and rules.batch at their defaults, or set model.moe.dispatch to einsum or gather"
    return "give rules.batch, rules.length and rules.act_* the axes that this module's activations have"


def gathered_weights(seen: Seen) -> Iterator[Flag]:
    """All-gathers of parameters over other axes than those that only store them in parts."""
    found: dict[tuple[str, str], list[Collective]] = {}
    for c in seen.collectives:
        if c.op != "all-gather":
            continue
        for argument in c.arguments:
            leaf = leaf_of(argument, seen.leaves)
            if leaf is None:
                continue
            stored = {a for name in seen.leaves[leaf] if name in STORED for a in getattr(seen.rules, name)}
            wrong = [a for a in c.axes if a not in stored]
            names = [n for n in seen.leaves[leaf] if set(getattr(seen.rules, n)) & set(wrong)]
            if names:
                group = found.setdefault((names[0], c.phase), [])
                if c not in group:
                    group.append(c)
    for (name, _), group in found.items():
        kind = "expert weights are gathered" if name == "experts" else "weights are gathered"
        remedy = "make rules.experts a subset of rules.batch" if name == "experts" else f"change rules.{name}"
        yield Flag(kind, said(group), total(group), remedy)


def replicated(seen: Seen) -> Iterator[Flag]:
    """The partitioner's own warnings."""
    for operation in seen.replicated:
        remedy = (
            "give the two layouts of this array the same order of mesh axes: rules.batch, rules.experts, rules.act_*"
        )
        yield Flag("the partitioner gathers an array as a last resort", operation, 0, remedy)


def unscattered(seen: Seen) -> Iterator[Flag]:
    """Sums of which each device keeps only its part.

    It says nothing on a CPU, which has no reduce-scatter, nor of several slices, where the compiler takes sums apart.
    """
    if seen.platform == "cpu" or any(c.op == "send" for c in seen.collectives):
        return
    whole = [c for c in seen.collectives if c.sliced and c.op == "all-reduce" and c.bytes >= 4 * seen.tokens]
    for group in alike(whole):
        axes = set(group[0].axes)
        names = [n for n in (*STORED, "vocab", "mlp", "expert_mlp") if axes & set(getattr(seen.rules, n))]
        keys = ", ".join(f"rules.{n}" for n in names) or "rules.embed"
        remedy = f"twice the bytes of a reduce-scatter; shard another dimension ({keys}), or take the axis out"
        yield Flag("an all-reduce where a reduce-scatter would do", said(group), total(group), remedy)


def is_exchange(c: Collective, cfg: Config, least: Least) -> bool:
    """Whether a collective carries tokens to experts or back. Tables of counts travel too, a thousandth of that."""
    if c.op not in ("all-to-all", "ragged-all-to-all") or not set(c.axes) & set(cfg.rules.experts):
        return False
    return 100 * c.moved >= least.bytes_each_way


def too_much(seen: Seen) -> Iterator[Flag]:
    """An exchange that moves more than the least, or none at all."""
    least, moe = seen.least, seen.cfg.model.moe
    if least is None or moe is None:
        return
    found = [c for c in seen.collectives if is_exchange(c, seen.cfg, least)]
    if not found:
        why = f"no all-to-all over {'+'.join(seen.rules.experts)}"
        remedy = "leave rules.experts and rules.batch at their defaults"
        yield Flag("experts are not exchanged", why, 0, remedy)
        return
    if any(c.conditional or c.op == "ragged-all-to-all" for c in found):
        return  # of two branches one runs; of ragged buffers, which hold the worst case, the rows in use travel
    bound, moved = least.total_bytes, total(found)
    if moved <= 1.01 * bound:
        return
    what = f"{moved:,} bytes, {moved / bound:.2f} times the least of {bound:,}"
    if moe.capacity_factor is None and moe.router.kind != "expert_choice":
        remedy = "dropless buffers hold the worst case: set model.moe.capacity_factor"
    elif sum(c.times for c in found) > sum(least.count.values()):
        remedy = "more all-to-alls than needed: set model.remat=exchange, or fewer train.microbatches"
    else:
        remedy = "slots are rounded up: raise model.moe.group_size, or lower model.moe.min_capacity"
    yield Flag("the exchange moves more than it must", what, moved - bound, remedy)


CHECKS: tuple[Callable[[Seen], Iterator[Flag]], ...] = (
    gathered_tokens,
    gathered_weights,
    replicated,
    unscattered,
    too_much,
)


def flags(seen: Seen) -> list[Flag]:
    """All that should not be there, most bytes first."""
    found = [flag for check in CHECKS for flag in check(seen)]
    return sorted(found, key=lambda f: -f.bytes)
