"""What each expert likes: classes of tokens, the experts they go to, and whether that is more than chance.

`classes` names the kind of each token of a text, with any tokenizer; `specialise` counts which experts each class goes
to, and measures by mutual information how much the class of a token tells of its expert, as Zoph et al. (2022, ST-MoE,
section 7) look at it in tables. Pure NumPy.
"""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A token is of the first class that fits. What a token shows first, after the blanks that it begins with, decides.
CLASSES = (
    "special",  # stands for no text: begin and end of a document
    "newline",  # blanks alone, with an end of a line
    "space",  # blanks alone
    "digit",  # 0 to 9 and all that Unicode calls a number
    "upper_start",  # a capital letter that begins a word: a blank, a sign or nothing is before it
    "upper_inside",
    "lower_start",  # a small letter
    "lower_inside",
    "caseless_start",  # a letter of a script without capitals, or a mark on a letter
    "caseless_inside",
    "punctuation",  # marks and signs: all else that prints
    "part",  # a piece of a character, as tokens of bytes are, or a control character
)
SHUFFLES = 200


def classes(pieces: Sequence[str], special: Sequence[bool]) -> np.ndarray:
    """The class of each token, [T] int32 numbers of `CLASSES`.

    Args:
        pieces: what each of T tokens adds to the text before it, in the order of the text.
        special: which of them stand for no text, whatever they are called.
    """
    out, last = np.empty(len(pieces), np.int32), " "  # a text begins as after a blank
    for t, (piece, alone) in enumerate(zip(pieces, special, strict=True)):
        out[t] = CLASSES.index("special" if alone else kind(piece, last))
        # The first bytes of a letter do not end the word before it, nor does a mark on a letter
        ends = (c for c in reversed(piece) if c != "\ufffd" and not mark(c))
        last = " " if alone else next(ends, last)
    return out


def mark(character: str) -> bool:
    """Whether it stands on the letter before it, such as an accent or the sign of a vowel."""
    return unicodedata.category(character)[0] == "M"


def kind(piece: str, before: str) -> str:
    """The class of a piece of text after the character `before`."""
    visible = piece.lstrip()
    if not visible:
        return "part" if not piece else "newline" if set(piece) & set("\n\r\v\f\x85\u2028\u2029") else "space"
    first = visible[0]
    if first.isnumeric():
        return "digit"
    if first.isalpha() or mark(first):
        case = "upper" if first.isupper() or first.istitle() else "lower" if first.islower() else "caseless"
        return f"{case}_{'inside' if visible == piece and before.isalpha() else 'start'}"
    return "part" if first == "\ufffd" or unicodedata.category(first)[0] == "C" else "punctuation"


class Specialisation(NamedTuple):
    """What the experts of each MoE layer do with the classes; all in bits a choice."""

    choices: np.ndarray  # [layers, classes, E] int64, of the tokens of a class for an expert; dropped ones left out
    bits: np.ndarray  # [layers], mutual information I(class; expert) of these counts
    most: np.ndarray  # [layers], entropy H(class), which `bits` reaches where the expert tells the class
    chance_mean: np.ndarray  # [layers], `bits` of the same tokens with their classes shuffled
    chance_95: np.ndarray  # [layers], 95th percentile of the same: what 1 of 20 routers blind to the class exceeds


def loads(expert: np.ndarray, experts: int) -> np.ndarray:
    """Choices of each expert [layers, E] int64, of experts [layers, T, K]; negative ones are none. Dropped ones count:
    they are the load that was asked for, by which `placement.place` lays experts on devices."""
    return np.stack([np.bincount(e[e >= 0], minlength=experts) for e in expert])


def crossed(row: np.ndarray, expert: np.ndarray, rows: int, experts: int) -> np.ndarray:
    """How often each pair occurs, [rows, E] int64, of choices with these rows and experts [N]."""
    return np.bincount(row.astype(np.int64) * experts + expert, minlength=rows * experts).reshape(rows, experts)


def pull(counts: np.ndarray) -> np.ndarray:
    """The terms p(c,e) log2(p(c,e) / p(c)p(e)) of the mutual information of counts [..., C, E], in bits.

    Positive where the expert gets more of the class than its share; their sum is the mutual information.
    """
    p = counts / np.maximum(counts.sum((-2, -1), keepdims=True), 1)
    fair = p.sum(-1, keepdims=True) * p.sum(-2, keepdims=True)
    return p * np.log2(np.divide(p, fair, out=np.ones_like(p), where=p > 0))


def information(counts: np.ndarray) -> np.ndarray:
    """Mutual information I(class; expert) of counts [..., C, E] -> [...] in bits, as the counts are (plug-in).

    It is never negative, and so, of finite counts of blind experts, above 0: for T tokens of C classes with K different
    ones of E experts each by about (C - 1)(E - K) / (2 K T ln 2). That is Miller (1955) for K = 1; a token that
    does not choose an expert twice leaves fewer degrees of freedom. `chance_mean` is this bias as it was measured.
    """
    return np.maximum(pull(counts).sum((-2, -1)), 0.0)


def entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy in bits of counts [..., C] -> [...]."""
    p = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1)


def given(counts: np.ndarray) -> np.ndarray:
    """p(expert | class) of counts [..., C, E]; 0 for a class without a choice."""
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def shuffled(label: np.ndarray, made: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels [T] dealt anew among the tokens that made as many choices [T]: all margins of the counts stay."""
    out = label.copy()
    for n in np.unique(made):
        same = np.flatnonzero(made == n)
        out[same] = rng.permutation(label[same])
    return out


def specialise(
    label: np.ndarray, expert: np.ndarray, kept: np.ndarray, experts: int, *, shuffles: int = SHUFFLES, seed: int = 0
) -> Specialisation:
    """How much the class of a token tells of its experts, against tokens whose classes are shuffled.

    The control keeps how many tokens a class has, how many choices each expert got and which experts chose a token
    together; it asks whether a router blind to the classes could have done the same. Neighbours in a text are not
    independent, so that the true chance is a little more than that of shuffled tokens.

    Args:
        label: [T] integers, the class of each token.
        expert, kept: [layers, T, K], as a router records them; only kept choices count: not those that were dropped or
            not made. Padding is no token: leave it out.
        shuffles: of the control, each layer with its own. seed: of them.
    Raises:
        ValueError: no shuffle, or arrays that do not fit one another.
    """
    if expert.shape != kept.shape or expert.ndim != 3 or label.shape != expert.shape[1:2] or shuffles < 1:
        why = f"label {list(label.shape)}, expert {list(expert.shape)}, kept {list(kept.shape)}, {shuffles} shuffles"
        raise ValueError(f"{why}: give [T], [layers, T, K] twice, and 1 shuffle or more")
    rows, choices, chance = int(label.max(initial=0)) + 1, [], []
    for layer, (e, keep) in enumerate(zip(expert, kept, strict=True)):
        rng, made = np.random.default_rng([seed, layer]), keep.sum(1)
        token, chosen = np.nonzero(keep)[0], e[keep]  # [N]
        choices.append(crossed(label[token], chosen, rows, experts))
        blind = (crossed(shuffled(label, made, rng)[token], chosen, rows, experts) for _ in range(shuffles))
        chance.append([information(counts) for counts in blind])
    counts, control = np.stack(choices), np.array(chance)  # [layers, classes, E], [layers, shuffles]
    means, high = control.mean(1), np.percentile(control, 95, axis=1)
    return Specialisation(counts, information(counts), entropy(counts.sum(2)), means, high)
