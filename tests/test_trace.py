"""`moe-jax trace`: the experts and gates that a call of the model records, on any mesh, dropless and at capacity."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import TINY, check_refusal, write_text

from moe_jax import config
from moe_jax.config import Refused
from moe_jax.picture import draw_trace, strips
from moe_jax.terminal import shown
from moe_jax.trace import check, lines
from moe_jax.trained import Trained

TEXT = "abc é fgh\tij"
ONE = ["mesh.data=1", "mesh.expert=1"]
TIGHT = ["model.moe.capacity_factor=0.5", "model.moe.min_capacity=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, inside):
    """A run of two MoE layers between dense ones, top-2, on one device."""
    from moe_jax import cli

    folder = tmp_path_factory.mktemp("traced")
    more = ["model.layers=4", "model.moe.d_ff=16", "train.steps=3", "train.checkpoint_every=unset", *ONE]
    text = f"data.path={write_text(folder)}"
    assert cli.main(["train", "tiny_gshard", *TINY[1:], *more, text, "--workdir", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


def direct(run, factor, *overrides):
    """Experts and gates [layers, T, K] of one call of the module, on one device."""
    trained = Trained(run, overrides)
    ids = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
    with jax.set_mesh(trained.mesh):
        record = trained.module()(jnp.asarray(ids)[None], capacity_factor=factor, record=True).record
    return ids, np.asarray(record.expert)[:, 0], np.asarray(record.gate)[:, 0]


WIDE = ["mesh.expert=2", "mesh.tensor=2", "mesh.context=2", "model.moe.group_size=4"]


@pytest.mark.parametrize("mesh", [[], ["mesh.data=2", "mesh.expert=4"], WIDE], ids=" ".join)
def test_it_is_what_the_model_records(run, call, mesh):
    code, found, err = call("trace", run, *mesh, "--text", TEXT, "--json")
    assert code == 0, err
    ids, expert, gate = direct(run, None)
    assert found["ids"] == ids.tolist() and "".join(found["tokens"][:4]) == "abc " and len(found["tokens"]) == len(ids)
    assert [x["layer"] for x in found["layers"]] == [0, 1] and [x["block"] for x in found["layers"]] == [1, 3]
    assert [x["expert"] for x in found["layers"]] == expert.tolist()
    np.testing.assert_allclose([x["gate"] for x in found["layers"]], gate, atol=1e-6)
    assert found["dropped"] == 0 and found["routed"] == (expert >= 0).sum() == (gate > 0).sum()
    assert "abc"[0] in err and "dropless, 0 dropped" in err  # the table stands beside the JSON


def test_at_capacity_drops_are_seen(run, call):
    code, found, err = call("trace", run, *TIGHT, "--text", TEXT, "--capacity", "--json")
    assert code == 0, err
    _, expert, gate = direct(run, 0.5, *TIGHT)
    assert [x["expert"] for x in found["layers"]] == expert.tolist()
    np.testing.assert_allclose([x["gate"] for x in found["layers"]], gate, atol=1e-6)
    T = len(found["ids"])
    assert found["slots"] == -(-2 * T // 16)  # ceil(K T f / E)
    for e, g in zip(expert, gate, strict=True):
        kept = np.bincount(e[(e >= 0) & (g > 0)], minlength=8)
        np.testing.assert_array_equal(kept, np.minimum(np.bincount(e[e >= 0], minlength=8), found["slots"]))
    assert found["dropped"] == ((expert >= 0) & (gate == 0)).sum() > 0 and f"{found['dropped']} dropped" in err


def report(T=5, layers=3, K=2, E=4, **more):
    """Made-up routes: token t of layer i goes to t + i, with a second choice that is dropped or was not made."""
    own = [
        {"layer": i, "block": i, "expert": [[(t + i) % E, ~0 if t % 2 else 3] for t in range(T)]} for i in range(layers)
    ]
    own = [x | {"gate": [[0.5, 0.0] for _ in range(T)]} for x in own]
    head = {"tokens": ["a", " ", "\t", "\ufffd", "$x$"][:T] + ["b"] * (T - 5), "experts": E, "layers": own}
    return head | {"capacity_factor": 1.0, "slots": 2, "routed": 7, "dropped": 3} | more


def test_the_table_says_what_the_report_says():
    out = lines(report(layers=30))
    rows = [line.split() for line in out if re.match(r"  \S", line)]
    by_token = {}
    for name, *cells in rows:
        by_token.setdefault(name, []).extend(cells)
    assert by_token["␣"] == [f"{(1 + i) % 4}:0.50" for i in range(30)]
    assert by_token["\\t"] == [x for i in range(30) for x in (f"{(2 + i) % 4}:0.50", "3:-")]
    assert all(len(line) <= 100 for line in out) and "capacity factor 1: 2 slots an expert, 3 dropped" in out[-1]
    assert shown("a b\n") == "a␣b\\n"


@pytest.mark.parametrize("T,layers", [(5, 3), (100, 2), (3, 40)])
def test_the_picture_is_drawn(tmp_path, T, layers):
    from matplotlib.image import imread

    expert, colours = strips(report(T, layers)["layers"], 4)
    assert expert.shape == (layers, 2, T) and colours.shape == (layers, 2, T, 4)
    assert expert[0, :, 0].tolist() == [0, 3] and expert[0, :, 1].tolist() == [1, -1]
    assert (colours[:, 0, :, 3] == 1).all() and (colours[:, 1, :, 3] == 0).all()
    path = draw_trace(report(T, layers), tmp_path / "trace.png", title="a $title")
    assert imread(path).shape[1] == 1500 and [p.name for p in tmp_path.iterdir()] == ["trace.png"]


@pytest.mark.parametrize(
    "name,tokens,capacity,words",
    [
        ("tiny_t5", 5, False, "tiny_t5 has an encoder"),
        ("tiny_dense", 5, False, "tiny_dense is a dense model"),
        ("tiny_switch", 0, False, "makes 0 tokens, and the model reads 1 to model.max_length=512"),
        ("tiny_switch", 513, False, "makes 513 tokens"),
        ("tiny_mixtral", 5, True, "model.moe.capacity_factor is unset"),
    ],
)
def test_what_cannot_be_traced_is_refused(name, tokens, capacity, words):
    with pytest.raises(Refused, match=words):
        check(config.load(name), tokens, capacity)


def test_refusals_of_the_command(run, call, tmp_path):
    check_refusal(*call("trace", run, "--text", ""), "trace", "makes 0 tokens")
    check_refusal(*call("trace", run, "--text", "\udcff"), "trace", "is not UTF-8")
    check_refusal(*call("trace", run, "--text", "a", "--png", tmp_path), "trace", "--png")
    check_refusal(*call("trace", tmp_path, "--text", "a"), "trace", "DIR")
