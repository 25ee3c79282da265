"""How a model's work is cut: layers into loops and stages, the queries of a sequence into blocks. No arrays, no JAX."""

from collections.abc import Hashable
from typing import NamedTuple, TypeVar

STAGE = "stage"  # the mesh axis of a pipeline

QUERY_BLOCK = 64  # least rows of a query block
QUERY_BLOCKS = 8  # most blocks, so that compile time does not grow with the length

Kind = TypeVar("Kind", bound=Hashable)


def query_blocks(L: int) -> list[tuple[int, int]]:
    """Where the blocks of L queries begin and end; each sees the keys up to its end, and skips the future."""
    size = max(QUERY_BLOCK, -(-L // QUERY_BLOCKS))
    return [(begin, min(begin + size, L)) for begin in range(0, L, size)]


def first_key(begin: int, window: int | None) -> int:
    """The first key that a block of queries from `begin` on sees, each at most `window` of them, itself included."""
    return 0 if window is None else max(0, begin - window + 1)


def seen_blocks(L: int, window: int | None = None) -> list[tuple[int, int]]:
    """Queries and keys of each block."""
    return [(end - begin, end - first_key(begin, window)) for begin, end in query_blocks(L)]


def pattern(kinds: tuple[Kind, ...], period: int = 1) -> list[tuple[tuple[Kind, ...], int]]:
    """Layer kinds as at most three runs of a repeated period, each one loop: (dense, moe) x 6 is one run.

    Equal leading layers, a repeated period, equal trailing layers: the split with the fewest different layers to
    compile, then the fewest runs.

    Args:
        period: layers after which the kinds repeat, if that is known: of two patterns in one.
    """
    options = []
    other = [i for i, kind in enumerate(kinds) if kind != kinds[0]]
    step = other[1] - other[0] if len(other) > 1 else len(kinds)  # the period, if there is one
    leading = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), len(kinds))
    for head in range(leading + 1):
        rest = kinds[head:]
        for size in sorted({n for n in (1, step, period, len(rest)) if 0 < n <= len(rest)}):
            once, repeats = rest[:size], 1
            while rest[repeats * size : (repeats + 1) * size] == once:
                repeats += 1
            tail = rest[repeats * size :]
            if len(set(tail)) <= 1:
                runs = [(kinds[:1], head), (once, repeats), (tail[:1], len(tail))]
                options.append([run for run in runs if run[1]])
    return min(options, key=lambda runs: (sum(len(kinds) for kinds, _ in runs), len(runs)))


class Schedule(NamedTuple):
    """How microbatches pass through the stages."""

    stages: int
    microbatches: int
    rounds: int = 1
    together: int = 1  # rows that share a routing group, and so a microbatch

    @property
    def ticks(self) -> int:
        """Pieces of work of one stage from the first microbatch's start to the last one's end."""
        return self.rounds * self.microbatches + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of the ticks in which a stage has no work: (S-1)/(R*M+S-1) (Narayanan et al. 2021, section 2.2)."""
        return (self.stages - 1) / self.ticks
