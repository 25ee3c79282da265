"""Specialisation of experts: classes of tokens, mutual information in closed forms and by hand, and its control."""

import numpy as np
import pytest

from moe_jax.data import ByteTokenizer
from moe_jax.specialise import (
    CLASSES,
    classes,
    crossed,
    entropy,
    given,
    information,
    loads,
    pull,
    shuffled,
    specialise,
)
from moe_jax.trace import pieces


def kinds(*parts):
    return [CLASSES[i] for i in classes(parts, [False] * len(parts))]


def test_tokens_of_words_have_classes():
    assert kinds("The", " cat", "s", " saw", " Mc", "Cat", ".", "\n\n", "  ", " 42", "½", "\r\n  x") == [
        *("upper_start", "lower_start", "lower_inside", "lower_start", "upper_start", "upper_inside", "punctuation"),
        *("newline", "space", "digit", "digit", "lower_start"),
    ]
    assert kinds(" don", "'", "t", " 猫", "が", "한", " ß", "É", "\x00", "$", "") == [
        *("lower_start", "punctuation", "lower_start", "caseless_start", "caseless_inside", "caseless_inside"),
        *("lower_start", "upper_inside", "part", "punctuation", "part"),
    ]
    assert kinds("e\u0301", "t", " क", "\u093f", "त") == [
        *("lower_start", "lower_inside", "caseless_start", "caseless_inside", "caseless_inside"),
    ]


def test_a_special_token_has_its_class_and_parts_words():
    out = classes(["a", "<s>", "b", "", "c"], [False, True, False, True, False])
    assert [CLASSES[i] for i in out] == ["lower_start", "special", "lower_start", "special", "lower_start"]
    assert classes([], []).shape == (0,)


def test_bytes_of_a_letter_do_not_part_its_word():
    ids = ByteTokenizer().encode("naïve A1")
    assert kinds(*pieces(ByteTokenizer(), ids.tolist())) == [
        *("lower_start", "lower_inside", "part", "lower_inside", "lower_inside", "lower_inside"),
        *("space", "upper_start", "digit"),
    ]


def by_hand(counts):
    """The definition, one pair after the other, in float64."""
    p = np.asarray(counts, np.float64) / np.sum(counts)
    total = 0.0
    for (c, e), x in np.ndenumerate(p):
        if x:
            total += x * (np.log2(x) - np.log2(p[c].sum()) - np.log2(p[:, e].sum()))
    return total


@pytest.mark.parametrize("shape", [(2, 2), (7, 5), (3, 64)])
def test_information_is_its_definition(shape):
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.8, (4, *shape))
    np.testing.assert_allclose(information(counts), [by_hand(c) for c in counts], rtol=1e-12)
    np.testing.assert_allclose(pull(counts).sum((1, 2)), information(counts), rtol=1e-12)
    totals = entropy(counts.sum(2)) + entropy(counts.sum(1)) - entropy(counts.reshape(4, -1))  # H(c) + H(e) - H(c,e)
    np.testing.assert_allclose(information(counts), totals, atol=1e-12)
    rows = counts.sum(2)
    np.testing.assert_allclose(given(counts) * rows[..., None], counts, atol=1e-12)
    assert np.allclose(given(counts).sum(2)[rows > 0], 1)


def test_two_by_two():
    """3 1 / 1 3: 1 bit less the entropy of a coin of 3 in 4."""
    want = 1 + 0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)
    assert information(np.array([[3, 1], [1, 3]])) == pytest.approx(want, rel=1e-12)
    assert information(np.array([[2, 4, 6], [1, 2, 3]])) == pytest.approx(0, abs=1e-15)  # a product of its margins
    assert information(np.zeros((2, 3))) == 0 and entropy(np.zeros(3)) == 0


def one_layer(expert):
    """Experts [T, K] as those of a layer, all kept."""
    return expert[None], np.ones((1, *expert.shape), bool)


@pytest.mark.parametrize("K", [1, 2])
def test_an_expert_that_tells_the_class_has_its_entropy(K):
    label = np.repeat([0, 1, 2, 3], [100, 300, 50, 550])
    own = np.array([2, 0, 3, 1])[label]
    found = specialise(label, *one_layer(own[:, None] * K + np.arange(K)), 4 * K, shuffles=20)
    p = np.array([0.1, 0.3, 0.05, 0.55])
    assert found.bits[0] == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-12) == found.most[0]
    assert found.chance_95[0] < 0.05 * found.bits[0]
    # Classes 1 and 3 share an expert: what it tells is one of three
    q = np.array([0.1, 0.85, 0.05])
    shared = specialise(label, *one_layer(np.array([2, 0, 3, 0])[label][:, None]), 4, shuffles=1)
    assert shared.bits[0] == pytest.approx(-(q * np.log2(q)).sum(), rel=1e-12)
    assert shared.bits[0] < shared.most[0] - 0.1


@pytest.mark.parametrize("K", [1, 3])
def test_blind_experts_stay_within_the_control(K):
    """In 1 of 20 cases above its 95th percentile, and in the mean at the bias of finite counts."""
    T, C, E = 1000, 5, 8
    above, means, bits = 0, [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        expert = rng.random((T, E)).argsort(1)[:, :K]
        found = specialise(rng.integers(0, C, T), *one_layer(expert), E, shuffles=50, seed=seed)
        above += found.bits[0] > found.chance_95[0]
        means.append(found.chance_mean[0])
        bits.append(found.bits[0])
    bias = (C - 1) * (E - K) / (2 * K * T * np.log(2))
    assert above <= 6  # of 40 with 1 in 20 each: more has a probability of 0.3 percent
    assert np.mean(means) == pytest.approx(bias, rel=0.03) and np.mean(bits) == pytest.approx(bias, rel=0.15)


def routes(T=300, K=3, E=6, layers=2):
    rng = np.random.default_rng(1)
    expert = np.stack([rng.random((T, E)).argsort(1)[:, :K] for _ in range(layers)]).astype(np.int32)
    kept = rng.random(expert.shape) < 0.7
    kept[:, :10] = False  # tokens without any choice
    return rng.integers(0, 4, T), expert, kept


def test_shuffles_keep_the_margins():
    label, expert, kept = routes()
    e, keep = expert[0], kept[0]
    token, rng = np.nonzero(keep)[0], np.random.default_rng(2)
    counts = crossed(label[token], e[keep], 4, 6)
    for _ in range(5):
        blind = shuffled(label, keep.sum(1), rng)
        other = crossed(blind[token], e[keep], 4, 6)
        assert (other != counts).any() and (np.bincount(blind) == np.bincount(label)).all()
        np.testing.assert_array_equal(other.sum(0), counts.sum(0))
        np.testing.assert_array_equal(other.sum(1), counts.sum(1))


def test_dropped_choices_are_left_out():
    label, expert, kept = routes()
    want = specialise(label, expert, kept, 6, shuffles=30)
    for layer in range(2):
        counts = np.zeros((4, 6), int)
        for t, k in zip(*np.nonzero(kept[layer]), strict=True):
            counts[label[t], expert[layer, t, k]] += 1
        np.testing.assert_array_equal(want.choices[layer], counts)
    other = np.where(kept, expert, ~expert)  # what is left out may hold anything, and layers do not touch each other
    for a, b in zip(specialise(label, other, kept, 6, shuffles=30), want, strict=True):
        np.testing.assert_array_equal(a, b)
    first = specialise(label, expert[:1], kept[:1], 6, shuffles=30)
    assert first.chance_mean[0] == want.chance_mean[0] != want.chance_mean[1]
    assert specialise(label, expert, kept, 6, shuffles=30, seed=1).chance_mean[0] != want.chance_mean[0]


def test_a_layer_without_a_choice_and_a_text_of_one_class_tell_nothing():
    label, expert, kept = routes()
    none = specialise(label, expert, np.zeros_like(kept), 6, shuffles=3)
    one = specialise(np.zeros_like(label), expert, kept, 6, shuffles=3)
    for found in (none, one):
        assert (np.stack(found[1:]) == 0).all()
    assert none.choices.sum() == 0 and one.choices.sum() == kept.sum()


def test_loads_count_what_was_asked_for():
    expert = routes()[1]
    made = np.where(np.arange(3) < 2, expert, ~expert)
    want = [[(layer[:, :2] == e).sum() for e in range(6)] for layer in expert]
    np.testing.assert_array_equal(loads(made, 6), want)


@pytest.mark.parametrize("label,shuffles", [(np.zeros(299, int), 3), (np.zeros(300, int), 0)])
def test_arrays_that_do_not_fit_are_refused(label, shuffles):
    with pytest.raises(ValueError, match=r"give \[T\], \[layers, T, K\] twice, and 1 shuffle or more"):
        specialise(label, *routes()[1:], 6, shuffles=shuffles)
