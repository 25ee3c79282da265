"""Windows, batches and baselines, against slow loops and hand calculations."""

import math
from itertools import chain, islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig
from moe_jax.data import (
    TokenFile,
    Windows,
    batches,
    bigram_loss,
    heldout_batches,
    prepare,
    unigram_loss,
)

calm = settings(deadline=None, max_examples=50)  # a shared machine is slow now and then


def token_file(*sizes: int) -> TokenFile:
    """Documents of the given sizes with tokens that are all different, in order."""
    return TokenFile(np.arange(1, sum(sizes) + 1, dtype=np.uint16), np.cumsum(sizes))


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    return prepare(DataConfig(), tmp_path_factory.mktemp("prose") / "data")


# Windows


def slow_windows(file: TokenFile, length: int, packing: str) -> list[dict]:
    """Windows token by token."""
    text, begin = [], 0
    for number, end in enumerate(file.ends):
        text.append([(number, int(t)) for t in file.tokens[begin:end]])
        begin = end
    rows = []
    for part in [list(chain(*text))] if packing == "pack" else text:
        for start in range(0, len(part) - 1, length):
            row = {k: [0] * length for k in ("tokens", "targets", "segments", "positions", "weights")}
            for i, ((a, x), (b, y)) in enumerate(pairwise(part[start : start + length + 1])):
                same = i > 0 and part[start + i - 1][0] == a
                row["tokens"][i], row["targets"][i], row["weights"][i] = x, y, int(a == b)
                row["segments"][i] = 1 if i == 0 else row["segments"][i - 1] + (not same)
                row["positions"][i] = row["positions"][i - 1] + 1 if same else 0
            rows.append(row)
    return rows


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@pytest.mark.parametrize("packing", ["pack", "pad"])
@calm
@given(sizes=SIZES, length=st.integers(1, 20))
def test_windows_are_those_of_a_slow_loop(packing, sizes, length):
    file = token_file(*sizes)
    windows = Windows(file, length, packing)
    slow = slow_windows(file, length, packing)
    assert len(windows) == len(slow)
    for got, want in zip(windows, slow, strict=True):
        assert {k: v.tolist() for k, v in got.items()} == want
        assert {k: v.dtype.name for k, v in got.items()} == {
            **dict.fromkeys(("tokens", "targets", "segments", "positions"), "int32"),
            "weights": "float32",
        }
    for outside in (-1, len(windows)):
        with pytest.raises(IndexError, match=f"window {outside} of"):
            windows[outside]


@pytest.mark.parametrize("packing", ["pack", "pad"])
@calm
@given(sizes=SIZES, length=st.integers(1, 20), before=st.integers(1, 25))
def test_the_text_in_front_of_a_window(packing, sizes, length, before):
    """The tokens before it, of its own document alone in padded rows; a document is one segment in both."""
    file = token_file(*sizes)  # token t stands at place t - 1
    number = np.searchsorted(file.ends, np.arange(len(file)), side="right")
    windows = Windows(file, length, packing, before)
    for got, alone in zip(windows, Windows(file, length, packing), strict=True):
        assert all((got[k] == alone[k]).all() for k in ("tokens", "targets", "weights", "positions"))
        first = int(got["tokens"][0]) - 1  # place of the window
        own = number[first]
        want = [
            place + 1 if place >= 0 and (packing == "pack" or number[place] == own) else 0
            for place in range(first - before, first)
        ]
        assert got["inputs"].tolist() == want
        ids = np.concatenate([got["inputs"], got["tokens"]])
        segments = np.concatenate([got["input_segments"], got["segments"]])
        assert ((segments == 0) == (ids == 0)).all() and segments[ids > 0][0] == 1
        steps = np.diff(number[ids[ids > 0] - 1])
        assert (np.diff(segments[ids > 0]) == steps).all()
        inside = got["inputs"] > 0
        follows = np.diff(got["input_positions"][inside])
        assert (follows[np.diff(got["input_segments"][inside]) == 0] == 1).all()
        starts = np.diff(got["input_segments"][inside], prepend=0) > 0
        assert (got["input_positions"][inside][starts] == 0).all()
        assert {got[k].dtype.name for k in ("inputs", "input_segments", "input_positions")} == {"int32"}
    if len(windows):  # a row beyond them is nothing but padding
        assert not any(rows.any() for rows in windows.gather([len(windows)]).values())


@pytest.mark.parametrize("packing", ["pack", "pad"])
@calm
@given(sizes=SIZES, length=st.integers(1, 20))
def test_every_token_but_the_first_of_a_document_is_a_target_once(packing, sizes, length):
    file = token_file(*sizes)
    targets = [t for w in Windows(file, length, packing) for t in w["targets"][w["weights"] == 1]]
    firsts = {0, *file.ends.tolist()}
    assert sorted(targets) == [int(t) for i, t in enumerate(file.tokens) if i not in firsts]


def test_windows_of_no_packing():
    with pytest.raises(ValueError, match="use one of pack, pad"):
        Windows(token_file(3), 2, "packed")
    with pytest.raises(ValueError, match="length is 0"):
        Windows(token_file(3), 0, "pack")


# Batches


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def joined(parts: list[dict]) -> dict:
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def read(n, windows, **kwargs) -> list[dict]:
    stream = batches(windows, **{"batch": 4, "seed": 1, "start_step": 0, **kwargs})
    got = list(islice(stream, n))
    stream.close()
    return got


@pytest.mark.parametrize("packing", ["pack", "pad"])
@pytest.mark.parametrize("processes", [2, 4])
def test_batches_do_not_depend_on_processes_or_interruption(packing, processes):
    windows = Windows(token_file(13, 5, 41, 2, 17), 5, packing)
    whole = read(20, windows)
    assert whole[0]["tokens"].shape == (4, 5)
    local = 4 // processes
    each = [range(p * local, (p + 1) * local) for p in range(processes)]
    parts = [read(13, windows, rows=rows, start_step=7) for rows in each]
    for n, local in enumerate(zip(*parts, strict=True)):
        assert local[0]["tokens"].shape == (4 // processes, 5)
        same(joined(local), whole[7 + n])
    for a, b in zip(read(3, windows, start_step=10**9, prefetch=0), read(3, windows, start_step=10**9), strict=True):
        same(a, b)


@settings(calm, max_examples=15)
@given(size=st.integers(2, 80), batch=st.integers(1, 7), seed=st.integers(0, 2**40))
def test_every_window_once_an_epoch(size, batch, seed):
    """Epochs are joined without a gap, whatever the batch."""
    windows = Windows(token_file(size), 3, "pack")
    n = len(windows)
    got = read(-(-3 * n // batch), windows, batch=batch, seed=seed, prefetch=0)
    firsts = [int(t) for b in got for t in b["tokens"][:, 0]]
    for epoch in range(3):
        assert sorted(firsts[epoch * n : (epoch + 1) * n]) == [1 + 3 * i for i in range(n)]


def test_epochs_and_seeds_are_shuffled_apart(prose):
    windows = Windows(prose.train, 4096, "pack")
    n = len(windows)
    orders = []
    for seed in range(3):
        rows = read(2 * n, windows, batch=1, seed=seed, prefetch=0)
        tokens = [b["tokens"].tobytes() for b in rows]
        orders += [tuple(tokens[:n]), tuple(tokens[n:])]
    assert len(set(orders)) == 6
    in_order = [windows[i]["tokens"].tobytes() for i in range(n)]
    ranks = np.array([[in_order.index(t) for t in order] for order in orders])
    assert np.abs(np.corrcoef([np.arange(n), *ranks]) - np.eye(7)).max() < 0.4


def test_batches_are_refused_at_the_call():
    windows = Windows(token_file(9), 2, "pack")
    for wrong, says in [
        ({"batch": 0}, "a batch of 0"),
        ({"rows": [0, 4]}, r"rows \[0, 4\] of a batch of 4"),
        ({"rows": [-1]}, r"rows \[-1\] of a batch of 4"),
        ({"start_step": -1}, "start_step=-1"),
    ]:
        with pytest.raises(ValueError, match=says):
            batches(windows, **{"batch": 4, "seed": 0, "start_step": 0, **wrong})
    with pytest.raises(ValueError, match="no windows"):
        batches(Windows(token_file(1), 2, "pack"), batch=1, seed=0, start_step=0)


@pytest.mark.parametrize("packing", ["pack", "pad"])
@pytest.mark.parametrize("count, expected", [(1, 1), (2, 2), (9, 3)])
def test_held_out_batches_are_in_order_and_end_with_padding(packing, count, expected):
    windows = Windows(token_file(10) if packing == "pack" else token_file(7, 3), 1, packing)
    assert len(windows) in (9, 8)
    whole = list(heldout_batches(windows, batch=4, count=count))
    assert len(whole) == min(expected, -(-len(windows) // 4))
    flat = joined(whole)
    for i, row in enumerate(zip(*(flat[k] for k in flat), strict=True)):
        got = dict(zip(flat, row, strict=True))
        if i < len(windows):
            same(got, windows[i])
        else:
            assert not any(v.any() for v in got.values())
    halves = [list(heldout_batches(windows, batch=4, count=count, rows=rows)) for rows in ([0, 1], [2, 3])]
    for local, all_ in zip(zip(*halves, strict=True), whole, strict=True):
        same(joined(local), all_)


# Baselines


def test_baselines_by_hand():
    """Train a b | a b b, vocabulary 3. Pairs ab ab bb: N(b)=3, T=1, so P = [1/3, 3+1/3, 1/3] / 4 = [1, 10, 1] / 12."""
    train = TokenFile(np.array([0, 1, 0, 1, 1]), np.array([2, 5]))
    heldout = TokenFile(np.array([0, 1, 2, 0]), np.array([3, 4]))  # pairs 01, 12; the pair 20 joins two documents
    unigram = [1 / 12, 10 / 12, 1 / 12]
    assert unigram_loss(train, heldout, 3) == pytest.approx(-(math.log(unigram[1]) + math.log(unigram[2])) / 2)
    after_a = (2 + 1 * unigram[1]) / (2 + 1)
    after_b = (0 + 1 * unigram[2]) / (1 + 1)
    assert bigram_loss(train, heldout, 3) == pytest.approx(-(math.log(after_a) + math.log(after_b)) / 2)
    never_seen = TokenFile(np.array([2, 0]), np.array([2]))
    assert bigram_loss(train, never_seen, 3) == pytest.approx(-math.log(unigram[0]))


@calm
@given(st.lists(st.integers(0, 4), min_size=2, max_size=60))
def test_baselines_are_distributions(tokens):
    train = np.array(tokens)
    for before in range(5):
        p = [math.exp(-bigram_loss(train, np.array([before, after]), 5)) for after in range(5)]
        assert sum(p) == pytest.approx(1) and min(p) > 0


def test_baselines_on_prose(prose, monkeypatch):
    from moe_jax.data import baseline

    size = prose.tokenizer.size
    unigram, bigram = (f(prose.train, prose.heldout, size) for f in (unigram_loss, bigram_loss))
    assert 2.0 < bigram < unigram - 0.5 < 3.5
    monkeypatch.setattr(baseline, "CHUNK", 1009)  # where the text is split into chunks must not matter
    for packing in ("pack", "pad"):
        assert bigram_loss(prose.train, Windows(prose.heldout, 64, packing), 320) == pytest.approx(bigram, rel=1e-2)
        windows = Windows(prose.heldout, 64, packing)
        assert bigram_loss(prose.train, windows, size) == pytest.approx(bigram, rel=1e-12)
        assert unigram_loss(prose.train, windows, size) == pytest.approx(unigram, rel=1e-12)


def test_baselines_say_what_they_cannot_do():
    file = token_file(5)
    assert bigram_loss(file, file, 8193) is None
    with pytest.raises(ValueError, match="token 5 in a vocabulary of 5"):
        bigram_loss(file, file, 5)
    with pytest.raises(ValueError, match="to predict"):
        unigram_loss(file, token_file(1), 6)
    with pytest.raises(ValueError, match="to learn from"):
        unigram_loss(token_file(1), file, 6)


def test_importing_the_data_room_is_quick():
    """Neither jax nor grain nor tokenizers, which take seconds, until they are needed."""
    import subprocess
    import sys

    code = "import sys, moe_jax.data; print([m for m in ('jax', 'grain', 'tokenizers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
