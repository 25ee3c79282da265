"""`moe-jax trace --file`: what each expert gets of a long text, and what it likes more than by chance."""

from typing import Any

import numpy as np

from moe_jax.specialise import CLASSES, SHUFFLES, classes, crossed, given, pull, specialise
from moe_jax.terminal import shown, table
from moe_jax.trace import blocks, pieces, routes

FAVOURITES = 6  # tokens told of each expert


def likes(trained: Any, ids: np.ndarray, *, capacity: bool = False, seed: int = 0) -> dict[str, Any]:
    """What the experts get of T tokens, read in sequences of data.length: the JSON of `moe-jax trace --file`.

    Args:
        trained: a `Trained` run, on any mesh.
        ids: [T] integers, such as `corpus.prompt(text)` or a part of `corpus.heldout.tokens`.
        capacity: at the training capacity, each sequence a group; what was dropped counts in `load` alone.
        seed: of the shuffles.
    Returns:
        `load` [layers][E], choices of each expert; `classes`, the names of the classes that occur, and `class_tokens`,
        how many tokens each has; `layers`, bottom first, each with `choices` and `expert_given_class` [classes][E], the
        fields of `Specialisation` in bits, and `experts` [E]: the `class` (or null) and the `tokens` it likes, those
        that add most to the mutual information.
    Raises:
        Refused: a dense model, one with an encoder, or no tokens.
    """
    tokenizer, length = trained.corpus.tokenizer, min(max(len(ids), 1), trained.cfg.data.length)
    found = routes(trained, ids, length, capacity=capacity)
    alone, texts = {tokenizer.eos, *tokenizer.special.values()}, pieces(tokenizer, ids.tolist())
    present, label = np.unique(classes(texts, [i in alone for i in ids.tolist()]), return_inverse=True)
    names, E = [CLASSES[i] for i in present], trained.cfg.model.moe.experts
    special = specialise(label, found.expert, found.kept, E, seed=seed)
    words, word = np.unique(texts, return_inverse=True)

    def layer(i: int) -> dict[str, Any]:
        counts, keep = special.choices[i], found.kept[i]
        best = pull(counts)
        by_word = pull(crossed(word[np.nonzero(keep)[0]], found.expert[i][keep], len(words), E))
        order = np.argsort(-by_word, axis=0, kind="stable")[:FAVOURITES]
        told = {name: float(getattr(special, name)[i]) for name in ("bits", "most", "chance_mean", "chance_95")}
        own = [
            {
                "class": names[best[:, e].argmax()] if best[:, e].max() > 0 else None,
                "tokens": [str(words[w]) for w in order[:, e] if by_word[w, e] > 0],
            }
            for e in range(E)
        ]
        return told | {"choices": counts.tolist(), "expert_given_class": given(counts).tolist(), "experts": own}

    head = {"tokens": len(ids), "length": length, "classes": names, "class_tokens": np.bincount(label).tolist()}
    layers = [{"layer": i, "block": b} | layer(i) for i, b in enumerate(blocks(trained.cfg))]
    return head | {"shuffles": SHUFFLES, "seed": seed} | found.counts(trained.cfg) | {"layers": layers}


def lines(report: dict[str, Any]) -> list[str]:
    """A table of a row a layer and one of a row an expert. The JSON and the picture have where each class goes."""
    load = np.array(report["load"])
    parts = load / np.maximum(load.mean(1, keepdims=True), 1e-9)
    head = ["layer", "busiest/mean", "I(class; expert)", "shuffled", "95th pct.", "H(class)", "more than chance"]
    rows = [
        [
            str(x["layer"]),
            f"{part.max():.2f}",
            *(f"{x[name]:.4f}" for name in ("bits", "chance_mean", "chance_95", "most")),
            "yes" if x["bits"] > x["chance_95"] else "no",
        ]
        for x, part in zip(report["layers"], parts, strict=True)
    ]
    own = [
        [str(x["layer"]), str(e), f"{part[e]:.2f}", one["class"] or "-", " ".join(map(shown, one["tokens"]))]
        for x, part in zip(report["layers"], parts, strict=True)
        for e, one in enumerate(x["experts"])
    ]
    seen = ", ".join(f"{n:,} {name}" for name, n in zip(report["classes"], report["class_tokens"], strict=True))
    how = "dropless"
    if report["capacity_factor"] is not None:
        how = f"capacity factor {report['capacity_factor']:g}: {report['slots']} slots an expert"
    return [
        *table(head, rows, numbers=True),
        f"bits a choice; shuffled: the mean of {report['shuffles']} shuffles of the classes",
        "",
        *table(["layer", "expert", "load/mean", "likes", "and the tokens"], own),
        f"{report['tokens']:,} tokens in sequences of {report['length']}: {seen}",
        f"{report['routed']:,} choices, {how}, {report['dropped']:,} dropped",
    ]
