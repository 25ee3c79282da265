"""Batches by step number: what step n reads is a function of the seed and n alone.

Neither the number of processes nor an interruption changes it, so that a checkpoint holds nothing of the data but its
step.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np

from moe_jax.data.windows import Windows

Batch = dict[str, np.ndarray]

STEPS = 2**40  # as good as endless; grain wants a number


def _rows(batch: int, rows: Sequence[int] | None) -> Sequence[int]:
    """The rows of the global batch to read."""
    if batch < 1:
        raise ValueError(f"a batch of {batch}: it holds at least 1 row")
    if rows is None:
        return range(batch)
    if not all(0 <= row < batch for row in rows):
        raise ValueError(f"rows {list(rows)} of a batch of {batch}: they run from 0 to the batch less one")
    return rows


class _Steps:
    """Random access to some rows of the batches from `start` on."""

    def __init__(
        self, windows: Windows, batch: int, rows: Sequence[int], seed: int, start: int, shuffle: Callable[..., int]
    ):
        self.windows, self.batch, self.rows, self.seed = windows, batch, rows, seed
        self.start, self.shuffle = start, shuffle

    def __len__(self) -> int:
        return STEPS

    def _window(self, item: int) -> int:
        """The window at a place of the endless list: epoch e is a permutation drawn from (seed, e)."""
        epoch, place = divmod(item, len(self.windows))
        digest = hashlib.blake2b(f"{self.seed} {epoch}".encode(), digest_size=4).digest()
        # The permutation is computed for one place at a time, so that no list of all windows is ever made.
        return self.shuffle(place, max_index=len(self.windows) - 1, seed=int.from_bytes(digest, "little"), rounds=4)

    def __getitem__(self, index: int) -> Batch:
        first = (self.start + int(index)) * self.batch
        return self.windows.gather([self._window(first + row) for row in self.rows])


def batches(
    windows: Windows,
    *,
    batch: int,
    seed: int,
    start_step: int,
    rows: Sequence[int] | None = None,
    prefetch: int = 2,
) -> Generator[Batch]:
    """Endless batches from a step on, each a dict of arrays [rows, L].

    Row r of step n is item n*B + r of an endless list that shuffles the windows anew in each epoch: every window once
    an epoch, epochs joined without a gap.

    Args:
        batch: rows B of a step.
        start_step: the step of the first batch.
        rows: those of them to read, in this order, such as those that the devices of a process hold; None: all.
        prefetch: batches read ahead in a thread; 0 reads in the caller's.

    Raises:
        ValueError: at the call, for numbers that do not fit together.
    """
    rows = _rows(batch, rows)
    if len(windows) == 0:
        raise ValueError("no windows: the token file is empty")
    if start_step < 0 or prefetch < 0:
        raise ValueError(f"start_step={start_step} and prefetch={prefetch} cannot be negative")
    return _read(windows, batch, rows, seed, start_step, prefetch)


def _read(windows: Windows, batch: int, rows: Sequence[int], seed: int, start: int, prefetch: int) -> Generator[Batch]:
    import grain  # takes seconds, and the commands that only look at a corpus need none of it
    from grain.experimental import index_shuffle

    source = _Steps(windows, batch, rows, seed, start, index_shuffle)
    options = grain.ReadOptions(num_threads=min(1, prefetch), prefetch_buffer_size=prefetch)
    iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def heldout_batches(windows: Windows, *, batch: int, count: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
    """The first windows in order, at most `count` batches of B rows; what the last one lacks is padding of weight 0.

    Args:
        rows: those of each batch to read; None: all.
    """
    chosen = _rows(batch, rows)
    total = min(count, -(-len(windows) // batch))
    return (windows.gather([step * batch + row for row in chosen]) for step in range(total))
