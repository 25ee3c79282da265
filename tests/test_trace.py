"""`moe-jax trace`: the experts and gates that a call of the model records, on any mesh, dropless and at capacity."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import TINY, check_refusal, words, write_text

from moe_jax import config
from moe_jax.config import Refused
from moe_jax.likes import likes
from moe_jax.picture import draw_trace, strips
from moe_jax.picture_likes import draw_likes
from moe_jax.specialise import information, specialise
from moe_jax.terminal import shown
from moe_jax.trace import MOST_BYTES, check, lines, routes
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
    assert found["load"] == [np.bincount(e[e >= 0], minlength=8).tolist() for e in expert]
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
    picture = imread(path)[..., :3].min(-1)  # white is 1
    right = np.flatnonzero((picture < 0.9).any(0)).max()
    assert right > 0.9 * picture.shape[1], "no blank on the right"
    assert picture.shape[1] == 1500 if T > 48 else picture.shape[1] < 1000
    assert [p.name for p in tmp_path.iterdir()] == ["trace.png"]


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


LONG = f"{words(3, 60)} É 12,\n\n"  # a byte each but for one letter, and not a multiple of data.length=16
FINE = ["mesh.data=2", "mesh.expert=4"]


@pytest.fixture(scope="module")
def long(run):
    """Ids of LONG, and experts [layers, T, K] that the module records of its full sequences and of the last one."""
    ids = np.frombuffer(LONG.encode(), np.uint8).astype(np.int32)
    trained, full, parts = Trained(run, ONE), len(ids) // 16 * 16, []
    with jax.set_mesh(trained.mesh):
        for rows in (ids[:full].reshape(-1, 16), ids[None, full:]):
            record = trained.module()(jnp.asarray(rows), capacity_factor=None, record=True).record
            parts.append(np.asarray(record.expert).reshape(2, rows.size, 2))
    assert full < len(ids)
    return ids, np.concatenate(parts, 1)


@pytest.mark.parametrize("mesh", [ONE, FINE, WIDE], ids=" ".join)
def test_a_file_is_read_in_sequences(run, call, long, tmp_path, mesh):
    """What the module records of them, one after the other; padding, in rows and of rows, counts nowhere."""
    (tmp_path / "long.txt").write_text(LONG, "utf-8")
    code, found, err = call("trace", run, *mesh, "--file", tmp_path / "long.txt", "--json")
    assert code == 0, err
    ids, expert = long
    assert found["load"] == [np.bincount(e[e >= 0], minlength=8).tolist() for e in expert]
    assert found["routed"] == (expert >= 0).sum() and found["dropped"] == 0
    assert found["tokens"] == len(ids) == sum(found["class_tokens"]) and found["length"] == 16
    per_class = dict(zip(found["classes"], found["class_tokens"], strict=True))
    assert per_class["digit"] == 2 and per_class["newline"] == 2 and per_class["part"] == 1
    assert per_class["space"] == LONG.count(" ") and per_class["lower_start"] == 60
    for x, e in zip(found["layers"], expert, strict=True):
        for name, row in zip(found["classes"], x["choices"], strict=True):
            assert sum(row) <= 2 * per_class[name]
        np.testing.assert_array_equal(np.sum(x["choices"], 0), np.bincount(e[e >= 0], minlength=8))
        assert x["bits"] == pytest.approx(float(information(np.array(x["choices"]))), rel=1e-12)
        np.testing.assert_allclose(np.sum(x["expert_given_class"], 1), 1)
        assert len(x["experts"]) == 8 and any(set(one["tokens"]) & set("abcdefghij") for one in x["experts"])
    assert "more than chance" in err and "60 lower_start" in err


def test_a_file_at_capacity(run):
    """Each sequence is a group with slots of its own; what is dropped counts as load, and not as liked."""
    trained = Trained(run, [*TIGHT, *ONE])
    ids = trained.corpus.prompt(LONG[:64])
    found, own = likes(trained, ids, capacity=True), routes(trained, ids, 16, capacity=True)
    assert found["slots"] == -(-2 * 16 // 16) == own.slots  # ceil(K S f / E)
    kept = np.zeros_like(own.expert, bool)
    for i in range(0, 64, 16):
        part = routes(trained, ids[i : i + 16], 16, capacity=True)
        np.testing.assert_array_equal(own.expert[:, i : i + 16], part.expert)
        kept[:, i : i + 16] = part.kept
        for e, k in zip(part.expert, part.kept, strict=True):
            np.testing.assert_array_equal(
                np.bincount(e[k], minlength=8), np.minimum(np.bincount(e[e >= 0], minlength=8), 2)
            )
    np.testing.assert_array_equal(own.kept, kept)
    assert found["dropped"] == (own.expert >= 0).sum() - kept.sum() > 0 and np.sum(found["load"]) == found["routed"]
    assert sum(np.sum(x["choices"]) for x in found["layers"]) == found["routed"] - found["dropped"]


def likings(T=200, layers=5, E=6, K=2):
    """A made-up report of a file, of experts that know the class."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, T)
    expert = np.stack([(2 * label[:, None] + np.arange(K)) % E] * layers)
    found = specialise(label, expert, np.ones_like(expert, bool), E, shuffles=5)
    own = [
        {name: float(getattr(found, name)[i]) for name in ("bits", "most", "chance_mean", "chance_95")}
        | {"layer": i, "expert_given_class": np.full((3, E), 1 / E).tolist()}
        for i in range(layers)
    ]
    load = np.ones((layers, E), int)
    load[0] = 0  # a layer without a choice
    head = {"tokens": T, "experts": E, "capacity_factor": None, "dropped": 0, "classes": ["space", "digit", "part"]}
    return head | {"layers": own, "load": load.tolist()}


@pytest.mark.parametrize("layers,E", [(1, 4), (5, 6), (20, 64)])
def test_the_picture_of_likes_is_drawn(tmp_path, layers, E):
    from matplotlib.image import imread

    path = draw_likes(likings(layers=layers, E=E), tmp_path / "likes.png", title="a $title")
    assert imread(path).shape[1] == 1500 and [p.name for p in tmp_path.iterdir()] == ["likes.png"]


def test_pictures_do_not_follow_settings_of_matplotlib(tmp_path):
    """Those of a notebook, where text would lie on the panels."""
    import matplotlib

    for draw, made in ((draw_trace, report()), (draw_likes, likings())):
        plain = draw(made, tmp_path / "plain.png", title="a").read_bytes()
        with matplotlib.rc_context({"figure.constrained_layout.use": True, "xtick.labelsize": 20, "figure.dpi": 50}):
            assert draw(made, tmp_path / "other.png", title="a").read_bytes() == plain


@pytest.mark.parametrize(
    "content,words",
    [
        (b"", "holds no text: 0 bytes"),
        (b" \n\n", "holds no text: 3 bytes"),
        (b"abc\xff", "is not UTF-8: byte 0xff at offset 3"),
        (b"a" * (MOST_BYTES + 1), "has 1,048,577 bytes, and at most 1,048,576 are read"),
        (None, "does not exist"),
    ],
    ids=["empty", "blank", "not UTF-8", "too long", "absent"],
)
def test_a_file_that_cannot_be_read_is_refused(run, call, tmp_path, content, words):
    path, picture = tmp_path / "a.txt", tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    check_refusal(*call("trace", run, "--file", path, "--png", picture), "trace", "--file", words)
    assert not picture.exists()


def test_a_picture_does_not_replace_the_text(run, call, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    check_refusal(*call("trace", run, "--file", path, "--png", path), "trace", "--png", "is the text of --file")
    assert path.read_text() == "abc"


def test_a_folder_is_no_file_and_one_text_is_read(run, call, tmp_path, capfd):
    check_refusal(*call("trace", run, "--file", tmp_path), "trace", "--file", "is no file")
    for both in (["--file", "a", "--text", "a"], []):
        with pytest.raises(SystemExit, match="2"):
            call("trace", run, *both)
        assert re.search("not allowed with|one of the arguments --text --file is required", capfd.readouterr().err)
