"""What counting alone reaches: the losses a model has to beat.

Both models are smoothed by Witten and Bell (IEEE Trans. Inf. Theory 37, 1991, method C), which needs no constant to be
tuned. With N(c) the number of tokens seen after c and T(c) the number of different ones:

    P(w)   = (N(w) + T / V) / (N + T)                     the unigram, interpolated with the uniform distribution
    P(w|c) = (N(c,w) + T(c) P(w)) / (N(c) + T(c))         the bigram, interpolated with the unigram

Pairs across two documents are neither counted nor predicted, as in `Windows`.
"""

from collections.abc import Iterator

import numpy as np

from moe_jax.data.corpus import TokenFile
from moe_jax.data.windows import Windows

LARGEST = 8192  # V*V counts of 4 bytes: 268 MB
CHUNK = 2**22  # tokens at a time

Tokens = Windows | TokenFile | np.ndarray


def _pairs(source: Tokens, vocab: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(token, next token) within documents, in chunks of two int64 arrays [n]."""
    file = source.file if isinstance(source, Windows) else source
    tokens, ends = (file.tokens, file.ends) if isinstance(file, TokenFile) else (file, np.array([len(file)]))
    for start in range(0, len(tokens) - 1, CHUNK):
        chunk = np.asarray(tokens[start : start + CHUNK + 1]).astype(np.int64)
        if len(chunk) and not 0 <= chunk.min() <= chunk.max() < vocab:
            raise ValueError(f"token {chunk.max()} in a vocabulary of {vocab}: the tokenizer is another one")
        inside = np.ones(len(chunk) - 1, bool)
        last = ends - 1 - start  # the last token of each document, seen from here
        inside[last[(last >= 0) & (last < len(inside))]] = False
        yield chunk[:-1][inside], chunk[1:][inside]


def _unigram(counts: np.ndarray) -> np.ndarray:
    """P [V] from counts [V]."""
    types = np.count_nonzero(counts)
    if types == 0:
        raise ValueError("no pair of tokens to learn from")
    return (counts + types / len(counts)) / (counts.sum() + types)


def _mean(total: float, count: int) -> float:
    if count == 0:
        raise ValueError("no pair of tokens to predict")
    return total / count


def unigram_loss(train: Tokens, heldout: Tokens, vocab: int) -> float:
    """Nats a target of the held-out part, each predicted from its frequency in the training part.

    Windows stand for all targets of weight 1 in them, which are the same in both packings; an array is one document.
    """
    counts = np.zeros(vocab, np.int64)
    for _, target in _pairs(train, vocab):
        counts += np.bincount(target, minlength=vocab)
    log_p = np.log(_unigram(counts))
    total, n = 0.0, 0
    for _, target in _pairs(heldout, vocab):
        total -= log_p[target].sum()
        n += len(target)
    return float(_mean(total, n))


def bigram_loss(train: Tokens, heldout: Tokens, vocab: int) -> float | None:
    """Nats a target of the held-out part, each predicted from the token before it; None for V > 8192.

    Arguments as for `unigram_loss`.
    """
    if vocab > LARGEST:
        return None
    counts = np.zeros((vocab, vocab), np.uint32)  # [V,V]: before, after
    for token, target in _pairs(train, vocab):
        codes, times = np.unique(token * vocab + target, return_counts=True)
        counts.reshape(-1)[codes] += times.astype(np.uint32)
    unigram = _unigram(counts.sum(0, dtype=np.int64))  # [V]
    followers = np.count_nonzero(counts, axis=1)  # T(c) [V]
    seen = counts.sum(1, dtype=np.int64)  # N(c) [V]
    total, n = 0.0, 0
    for token, target in _pairs(heldout, vocab):
        kinds = followers[token]
        mixed = (counts[token, target] + kinds * unigram[target]) / np.maximum(seen[token] + kinds, 1)
        p = np.where(kinds > 0, mixed, unigram[target])  # after a token that was never seen: the unigram
        total -= np.log(p).sum()
        n += len(target)
    return float(_mean(total, n))
