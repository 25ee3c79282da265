"""Combinations of settings that cannot work, or have no effect, are refused; those beside them are not."""

import pytest
from test_config import message

from moe_jax.config import ConfigError, from_dict


def moe(**keys):
    return {"model": {"moe": keys}}


def adam(kind, **keys):
    return {"train": {"optimizer": {"kind": kind, **keys}}}


def latent(**keys):
    return {"model": {"positions": "rotary", "latent": {}} | keys}


def split(n=2, length=16, **keys):
    """A row of tokens split over n shards, with a mixture of experts."""
    return moe(capacity_factor=1.0, **keys) | {"mesh": {"context": n}, "data": {"length": length}}


V2, V3 = {"kind": "deepseek_v2"}, {"kind": "deepseek_v3"}
CHOICE = {"capacity_factor": 1.0, "router": {"kind": "expert_choice", "lookahead": True}}
HASH = {"router": {"kind": "hash"}}
LOSSES = ("balance_loss", "sequence_loss", "device_loss", "communication_loss", "importance_loss")
DEVICES = {"device_loss": 0.1, "balance_devices": 4}

IMPOSSIBLE = [  # settings of model.moe, the key that is refused, words of the message
    # gates and second experts
    ({"router": {"kind": "noisy_topk"}}, "router.kind", "gives the router no gradient"),
    ({"router": V3}, "router.normalize", "router.normalize=none"),
    ({"router": {"normalize": "after"}}, "router.normalize", "gives the router no gradient"),
    ({"top_k": 2, "router": {"kind": "noisy_topk", "normalize": "before"}}, "router.normalize", "already"),
    ({"router": {"kind": "hash", "normalize": "after"}}, "router.normalize", "leave it unset"),
    ({"router": {"second": "random"}}, "router.second", "set router.kind=gshard"),
    ({"router": {"gate_width": 9}}, "router.gate_width", "set router.gate=mlp"),
    ({"router": {"force_std": 2.0}}, "router.force_std", "set router.force=biased"),
    # the hash router learns nothing
    ({"router": {"kind": "hash", "gate": "mlp"}}, "router.gate", "learns nothing"),
    ({"router": {"kind": "hash", "jitter": 0.1}}, "router.jitter", "learns nothing"),
    *((HASH | {loss: 0.1}, loss, "learns nothing") for loss in (*LOSSES, "load_loss", "z_loss")),
    (HASH | {"priority": "batch", "capacity_factor": 1.0}, "priority", "equally probable"),
    # groups of experts
    ({"router": {"topk_groups": 2}}, "router.topk_groups", "use one of deepseek_v2, deepseek_v3"),
    ({"router": {"group_score": "max"}}, "router.group_score", "use one of deepseek_v2, deepseek_v3"),
    ({"router": {"groups": 2}}, "router.groups", "use one of deepseek_v2, deepseek_v3, or 1"),
    ({"router": V2 | {"groups": 3, "topk_groups": 1}}, "router.groups", "8 experts do not divide into 3 groups"),
    ({"router": V2 | {"groups": 4, "topk_groups": 5}}, "router.topk_groups", "5 groups of 4"),
    ({"router": V2 | {"groups": 4}}, "router.groups", "every group may be used"),
    ({"top_k": 3, "router": V2 | {"groups": 4, "topk_groups": 1}}, "router.topk_groups", "set it to 2 or more"),
    ({"top_k": 2, "router": V3 | {"groups": 8, "topk_groups": 3}}, "router.group_score", "in groups of one"),
    (
        {"top_k": 3, "router": V3 | {"groups": 4, "topk_groups": 2, "group_score": "sumk"}},
        "router.group_score",
        "top_k=3 over 2 groups of 2",
    ),
    ({"top_k": 2, "router": V3 | {"group_score": "max"}}, "router.group_score", "every group may be used"),
    # the bias and the losses
    ({"router": {"kind": "switch"}, "bias_rate": 0.1}, "bias_rate", "the switch router has no selection bias"),
    *(
        ({"bias_rate": 0.1, "balance_devices": 2 if loss in LOSSES[2:4] else None, loss: 0.1}, "bias_rate", loss)
        for loss in ("balance_loss", "importance_loss", "device_loss", "communication_loss")
    ),
    ({"bias_update": "centred"}, "bias_update", "without a bias"),
    # exchanges
    ({"exchange": "ragged"}, "exchange", "dispatch=einsum fills buffers of one size"),
    ({"exchange": "ragged", "dispatch": "auto"}, "exchange", "set dispatch=ragged"),
    ({"exchange": "hierarchical"}, "exchange", "rules.experts=['expert'] names no slow and fast axis"),
    ({"load_loss": 0.1}, "load_loss", "set router.kind=noisy_topk"),
    (
        {"top_k": 2, "load_loss": 0.1, "router": {"kind": "noisy_topk", "force": "balanced"}},
        "load_loss",
        "no effect on forced choices",
    ),
    ({"device_loss": 0.1}, "balance_devices", "device_loss needs it"),
    ({"communication_loss": 0.1}, "balance_devices", "communication_loss needs it"),
    ({"balance_devices": 2}, "balance_devices", "has no effect without"),
    (DEVICES | {"balance_devices": 3}, "balance_devices", "8 experts do not divide into 3 groups"),
    (
        DEVICES | {"communication_loss": 0.1, "router": V2 | {"groups": 2, "topk_groups": 1}},
        "balance_devices",
        "a token may use 1 of 2 groups",
    ),
    ({"balance_form": "per_token"}, "balance_form", "without a balance loss"),
    ({"balance_over": "sequence"}, "balance_over", "without a balance loss"),
    # expert choice
    (CHOICE | {"capacity_factor": None}, "capacity_factor", "how many tokens an expert chooses"),
    (CHOICE | {"priority": "token"}, "priority", "the experts decide"),
    (CHOICE | {"overflow": "error"}, "overflow", "never overflows"),
    (CHOICE | {"router": CHOICE["router"] | {"force": "balanced"}}, "router.force", "here experts choose"),
    (CHOICE | {"router": CHOICE["router"] | {"balance": "first"}}, "router.balance", "has no choices"),
    (CHOICE | {"router": CHOICE["router"] | {"normalize": "before"}}, "router.normalize", "does not normalise"),
    (CHOICE | {"bias_rate": 0.0}, "bias_rate", "no selection bias"),
    *((CHOICE | {loss: 0.1}, loss, "balanced by construction") for loss in LOSSES),
    (CHOICE | {"load_loss": 0.1}, "load_loss", "have no gradient"),
]


@pytest.mark.parametrize(
    "tree, key, words",
    [
        (moe(top_k=1, router={"kind": "topk_softmax"}), "model.moe.router.kind", "gives the router no gradient"),
        (moe(top_k=1, router={"normalize": "before"}), "model.moe.router.normalize", "set router.kind=switch"),
        (moe(top_k=2, router={"kind": "topk_softmax", "normalize": "none"}), "model.moe.router.normalize", "already"),
        (moe(overflow="error"), "model.moe.overflow", "never overflows"),
        (moe(router={"threshold": 0.2}), "model.moe.router.threshold", "is 0.2, and only a gshard router"),
        (
            moe(top_k=2, router={"kind": "gshard", "threshold": 0.2}),
            "model.moe.router.threshold",
            "router.second=random",
        ),
        ({"model": {"positions": "learned", "rope_theta": 5e5}}, "model.rope_theta", "learned positions do not turn"),
        (adam("adafactor", b1=0.8), "train.optimizer.b1", "is 0.8, and adafactor has no such setting"),
        (adam("adafactor", b2=0.99), "train.optimizer.b2", "take it out, or set train.optimizer.kind=adamw"),
        (adam("adafactor", eps=1e-6), "train.optimizer.eps", "adafactor has no such setting"),
        (adam("muon", eps=1e-6), "train.optimizer.eps", "muon has no such setting"),
        (adam("adamw", decay=0.5), "train.optimizer.decay", "the cosine schedule has no final decay"),
        (adam("adamw", schedule="constant", decay=0.5), "train.optimizer.decay", "set train.optimizer.schedule=wsd"),
        ({"model": {"positions": "sinusoidal", "d_model": 5, "heads": 1}}, "model.d_model", "5 is odd"),
        ({"mesh": {"expert": 2}, "rules": {"batch": ["data"]}}, "mesh.expert", "a dense model has no experts"),
        ({"model": {"layers": None}}, "model.layers", "None"),
        ({"mesh": {"context": 3}}, "data.length", "128 tokens do not split into two pieces for each of 3 shards"),
        (split(length=18, group_size=1), "data.length", "set it to a multiple of 4"),
        (
            {"mesh": {"tensor": 4}, "rules": {"residual": ["tensor"]}, "data": {"length": 18}},
            "rules.residual",
            "rows of 18 tokens over 4 shards (mesh.context x mesh.tensor), which does not divide them",
        ),
        (latent(kv_heads=2), "model.kv_heads", "latent attention makes keys and values for each head"),
        (latent(positions="learned"), "model.positions", "model.latent.rotary turns a part of each key"),
        (latent(latent={"rotary": 3}), "model.latent.rotary", "3 is odd"),
        (latent(qk_norm=True), "model.qk_norm", "set model.qk_norm=false"),
        (latent(biases=True), "model.biases", "has norms of its own and no biases"),
        (split(), "model.moe.group_size", "groups of one sequence, which do not fit into the pieces of 4 tokens"),
        (
            {"mesh": {"context": 2, "tensor": 4}, "model": {"heads": 4, "kv_heads": 2}},
            "model.kv_heads",
            "2 heads of keys and values for 2 queries each: neither divides over 4",
        ),
        (
            moe(experts=8) | {"mesh": {"context": 3}, "rules": {"experts": ["context"]}, "data": {"length": 36}},
            "mesh.context",
            "8 experts do not divide over 3 expert shards",
        ),
        (split(group_size=8), "model.moe.group_size", "set it to a divisor of 4"),
        (split(group_size="auto"), "model.moe.group_size", "'auto' cuts groups of whole rows"),
        (split(group_size=32), "model.moe.group_size", "groups of 32 tokens do not fit"),
        (
            moe(expert_dropout=0.1, dispatch="gather") | {"mesh": {"context": 2}},
            "model.moe.expert_dropout",
            "would depend on the shards of a row (mesh.context)",
        ),
        ({"model": None}, "model", "a table of keys"),
        ([1], "config", "a table of keys"),
        *((moe(**keys), f"model.moe.{key}", words) for keys, key, words in IMPOSSIBLE),
        (moe(capacity_factor=1.0, router={"kind": "expert_choice"}), "model.moe.router.kind", "is causal"),
        (moe(router={"lookahead": True}), "model.moe.router.lookahead", "no effect on the softmax_topk router"),
        (
            moe(capacity_factor=1.0, router={"kind": "expert_choice", "lookahead": True}) | {"train": {"sample": "a"}},
            "train.sample",
            "cannot decode a token at a time",
        ),
    ],
)
def test_refused_tree(tree, key, words):
    with pytest.raises(ConfigError) as e:
        from_dict(tree)
    assert key in {p.key for p in e.value.problems}
    assert words in message(e.value)


@pytest.mark.parametrize(
    "tree",
    [
        adam("adamw", b1=0.8, b2=0.99, eps=1e-6),
        adam("muon", b1=0.8, b2=0.99),
        adam("muon", schedule="wsd", decay=0.5),
        adam("adafactor", b1=0.9, b2=0.95, eps=1e-8, decay=0.2),  # the defaults
        {"model": {"positions": "rotary", "rope_theta": 5e5}},
        {"model": {"positions": "learned", "rope_theta": 1e4}},
        moe(top_k=2, router={"kind": "gshard", "second": "random", "threshold": 0.2}),
        moe(router={"threshold": 0.5}),
        split(group_size=4),
        split(4, group_size=2),
        moe() | {"mesh": {"context": 8}},  # no group is ever full, whatever its size
        moe(exchange="hierarchical") | {"rules": {"experts": ["data", "expert"]}},
        moe(exchange="ragged", dispatch="ragged"),
    ],
)
def test_what_has_an_effect_or_is_the_default_is_allowed(tree):
    from_dict(tree)


POSSIBLE = [  # near the ones above, and fine
    {"router": V3 | {"normalize": "none"}},
    {"top_k": 2, "router": {"kind": "gshard", "second": "random", "threshold": 0.2}},
    {"top_k": 4, "router": V2 | {"groups": 4, "topk_groups": 2}, "communication_loss": 0.1, **DEVICES},
    {"top_k": 2, "router": V3 | {"groups": 8, "topk_groups": 2, "group_score": "sumk"}, "bias_rate": 0.1},
    {"bias_rate": 0.1, "bias_update": "centred", "sequence_loss": 0.1, "z_loss": 0.1},
    {"bias_rate": 0.0, "balance_loss": 0.1, "balance_form": "per_token", "balance_over": "sequence"},
    {"top_k": 2, "router": {"kind": "noisy_topk"}, "load_loss": 0.1, "importance_loss": 0.1},
    CHOICE | {"z_loss": 0.1},
    HASH | {"priority": "random", "capacity_factor": 1.0, "top_k": 8},
]


@pytest.mark.parametrize("keys", POSSIBLE, ids=str)
def test_not_refused(keys):
    from_dict(moe(**keys))
