"""Configs: what loads, what is refused and in which words, and the reference of keys."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax import config
from moe_jax.config import (
    Config,
    ConfigError,
    EncoderConfig,
    LatentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RouterConfig,
    from_dict,
    load,
)
from moe_jax.schema import ClaimConfig

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(p.stem for p in CONFIGS.glob("*.toml"))


def message(error):
    """The text of a refusal, after the checks that hold for each of them."""
    text = str(error)
    for leak in ("Traceback", "type=", "https://", "pydantic", "<class"):
        assert leak not in text
    assert len(error.problems) >= 1
    for problem in error.problems:
        assert problem.key.strip() and problem.reason.strip() and problem.remedy.strip()
        assert f"remedy: {problem.remedy}" in text
    return text


def refusal(f, *args):
    with pytest.raises(ConfigError) as e:
        f(*args)
    return message(e.value)


# What loads


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs(name):
    c = load(name)
    assert c.name == name and name in config.config_names()
    assert from_dict(config.to_dict(c)) == c
    assert load(str(CONFIGS / f"{name}.toml")) == c
    assert hash(c) == hash(load(name))
    comment = (CONFIGS / f"{name}.toml").read_text("utf-8").splitlines()[0]
    assert comment.startswith("# "), "a config says in its first lines what it is"


def test_the_chain_of_tiny_gshard():
    """Values of the file, of the one it extends and of the one below that."""
    c = load("tiny_gshard")
    assert (c.model.moe.router.kind, c.model.moe.router.second, c.model.moe.top_k) == ("gshard", "random", 2)
    assert (c.model.moe.every, c.model.moe.capacity_factor, c.mesh.expert) == (2, 2.0, 4)
    assert (c.model.vocab, c.train.optimizer.learning_rate, c.data.batch) == (320, 3e-3, 32)
    assert c.model.moe.router.threshold == 0.5 and load("tiny").model.moe is None


def test_defaults_are_a_config():
    assert from_dict({}) == Config()
    assert from_dict(config.to_dict(Config())) == Config()


FLAT = st.fixed_dictionaries(
    {},
    optional={
        "model.layers": st.integers(1, 4096),
        "model.kv_heads": st.sampled_from([1, 2, 4]),
        "model.norm": st.sampled_from(["layer", "rms"]),
        "model.rope_theta": st.floats(1e-3, 1e9),
        "model.tied_head": st.booleans(),
        "model.moe.experts": st.sampled_from([8, 16]),
        "model.moe.capacity_factor": st.floats(0.1, 10),
        "model.moe.router.balance": st.sampled_from(["all", "first"]),
        "rules.embed": st.lists(st.sampled_from(["data", "fsdp"]), unique=True),
        "data.path": st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
        "train.sample": st.text("abc", max_size=3),
        "train.optimizer.clip": st.floats(1e-9, 1e9),
        "train.seed": st.integers(0, 2**32 - 1),
    },
)


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *tables, last = path.split(".")
        node = tree
        for name in tables:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


@given(FLAT)
@settings(max_examples=60)
def test_round_trip(flat):
    c = from_dict(nested(flat))
    assert from_dict(config.to_dict(c)) == c
    assert hash(from_dict(config.to_dict(c))) == hash(c)
    for path, value in flat.items():
        node = c
        for name in path.split("."):
            node = getattr(node, name)
        assert node == (tuple(value) if isinstance(value, list) else value), path


def test_configs_are_frozen_and_hashable():
    c = load("tiny_gshard")
    for part in (c, c.model, c.model.moe, c.model.moe.router, c.mesh, c.rules, c.data, c.train, c.train.optimizer):
        hash(part)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)
    assert len({c, load("tiny_gshard"), load("tiny")}) == 2


def test_derived_values():
    m = ModelConfig(d_model=96, heads=4)
    assert (m.resolved_head_dim, m.resolved_kv_heads) == (24, 4)
    assert dataclasses.replace(m, head_dim=10, kv_heads=2).resolved_head_dim == 10
    mesh = MeshConfig(data=2, expert=3)
    assert (mesh.size, mesh.shape, str(mesh), str(MeshConfig())) == (
        6,
        (1, 2, 1, 3, 1, 1),
        "data=2 x expert=3",
        "one device",
    )
    assert mesh.over(("data", "expert", "nowhere")) == 6


# Overrides


@pytest.mark.parametrize(
    "text, path, value",
    [
        ("train.steps=100", "train.steps", 100),
        ("train.optimizer.learning_rate=1e-2", "train.optimizer.learning_rate", 0.01),
        ("train.optimizer.clip=2", "train.optimizer.clip", 2.0),
        ("model.tied_head=false", "model.tied_head", False),
        ("model.norm=layer", "model.norm", "layer"),
        ('model.norm="layer"', "model.norm", "layer"),
        ("data.path=some where/a=b.txt", "data.path", "some where/a=b.txt"),
        ('rules.vocab=["fsdp", "tensor"]', "rules.vocab", ("fsdp", "tensor")),
        ("rules.vocab=[]", "rules.vocab", ()),
        (" train.steps = 70 ", "train.steps", 70),
        ("model.moe.router={kind = 'switch'}", "model.moe.router", RouterConfig("switch")),
        ("model.moe.capacity_factor=", "model.moe.capacity_factor", None),
        ("train.sample=", "train.sample", None),
        ("model.moe=", "model.moe", None),
        ("train.steps=", "train.steps", 300),  # back to the default
        ("train.eval_every=", "train.eval_every", None),  # taking out what is not there is fine
    ],
)
def test_override(text, path, value):
    node = load("tiny_switch", [text])
    for name in path.split("."):
        node = getattr(node, name)
    assert node == value and type(node) is type(value)


def test_overrides_in_order_and_without_a_trace():
    below = {"train": {"steps": 1}, "model": {"moe": {"experts": 4}}}
    above = config.override(below, "model.moe.experts=8")
    assert above == {"train": {"steps": 1}, "model": {"moe": {"experts": 8}}}
    assert below == {"train": {"steps": 1}, "model": {"moe": {"experts": 4}}}
    assert load("tiny", ["train.steps=50", "train.steps=60"]).train.steps == 60
    assert load("tiny_dense", ["model.moe.top_k=2"]).model.moe == MoEConfig(top_k=2)  # makes the table
    assert load("tiny_switch", ["data.path=unset"]).data.path == "unset"  # a value like any other


@pytest.mark.parametrize("value", ["", "unset", '"unset"', " unset "])
def test_unset(value):
    """An inherited value is taken out; after a whole table, keys make a new one."""
    one = load("tiny_switch", [f"model.moe.capacity_factor={value}", f"train.sample={value}"])
    assert one.model.moe.capacity_factor is None and one.train.sample is None
    assert load("tiny_switch", [f"model.moe={value}", "mesh.expert=1"]).model.moe is None
    assert load("tiny_switch", [f"model.moe={value}", "model.moe.experts=4"]).model.moe == MoEConfig(experts=4)


# What is refused, on tiny_gshard (8 experts, mesh data=2 x expert=4, batch 32, length 128) unless said

BIG = "9" * 25
REFUSED = [
    # unknown keys, at each level, with the nearest name
    ("modle.layers=2", "modle", "did you mean 'model'?"),
    ("model.layer=2", "model.layer", "did you mean 'layers'?"),
    ("model.moe.expert=2", "model.moe.expert", "did you mean 'experts'?"),
    ("model.moe.router.kinds=switch", "model.moe.router.kinds", "did you mean 'kind'?"),
    ("mesh.exprt=2", "mesh.exprt", "did you mean 'expert'?"),
    ("rules.vocabulary=[]", "rules.vocabulary", "did you mean 'vocab'?"),
    ("data.batchsize=2", "data.batchsize", "did you mean 'batch'?"),
    ("train.stepz=2", "train.stepz", "did you mean 'steps'?"),
    ("train.optimizer.learningrate=1", "train.optimizer.learningrate", "did you mean 'learning_rate'?"),
    ("top_k=2", "top_k", "did you mean 'model.moe.top_k'?"),
    ("zzz=1", "zzz", "the keys of the top level are name, model"),
    # wrong types
    ("model.layers=two", "model.layers", "'two'"),
    ("model.layers=true", "model.layers", "give a whole number"),
    (
        "model.layers=1.5",
        "model.layers",
        "is 1.5, which is not a whole number (in an override)\n    remedy: give a whole number",
    ),
    ("model.layers=[1]", "model.layers", "give a whole number"),
    ("model.layers={a = 1}", "model.layers", "give a whole number"),
    ("model.tied_head=1", "model.tied_head", "give true or false"),
    ("model.rope_theta=big", "model.rope_theta", "is 'big', which is not a number"),
    ("data.path=2024", "data.path", """give text, with quotes inside quotes: 'data.path="2024"'"""),
    ("train.sample=1.5", "train.sample", """'train.sample="1.5"'"""),
    ("data.path=[3]", "data.path", "is [3], which is not text (in an override)\n    remedy: give text"),
    ("name=false", "name", """'name="false"'"""),
    ("model.moe=3", "model.moe", "a table of keys"),
    # what is not there is "unset", where a key may be
    ("model.moe=none", "model.moe", "write model.moe=unset for none, or give a table of keys"),
    ("model.kv_heads=None", "model.kv_heads", "write model.kv_heads=unset for none"),
    ("model.moe.capacity_factor=null", "model.moe.capacity_factor", "write model.moe.capacity_factor=unset for none"),
    ("model.moe.router.balance=none", "model.moe.router.balance", "model.moe.router.balance=unset for none"),
    ("model.layers=none", "model.layers", "remedy: give a whole number"),
    ("model.layers=unset", "model.layers", "is 'unset', which is not a whole number"),
    ("model=3", "model", "a table of keys"),
    ("rules.vocab=tensor", "rules.vocab", "give a list"),
    ("rules.vocab=[1]", "rules.vocab.0", "which is not text"),
    ("model.moe.router.kind.deeper=1", "model.moe.router.kind.deeper", "'gshard'"),
    # out of range
    ("model.layers=0", "model.layers", "greater than or equal to 1"),
    ("train.steps=-1", "train.steps", "-1"),
    ("train.seed=-1", "train.seed", "greater than or equal to 0"),
    ("train.seed=4294967296", "train.seed", "less than or equal to 4294967295"),
    ("data.seed=4294967296", "data.seed", "less than or equal to 4294967295"),
    ("data.heldout=1", "data.heldout", "less than 1"),
    ("model.dropout=1.0", "model.dropout", "less than 1"),
    ("model.moe.capacity_factor=0", "model.moe.capacity_factor", "greater than 0"),
    ("model.moe.z_loss=-1e-3", "model.moe.z_loss", "-0.001"),
    ("train.optimizer.final=1.5", "train.optimizer.final", "less than or equal to 1"),
    ("model.rope_theta=nan", "model.rope_theta", "finite"),
    ("model.rope_theta=inf", "model.rope_theta", "finite"),
    ("model.moe.balance_loss=-inf", "model.moe.balance_loss", "finite"),
    ("train.optimizer.learning_rate=1e400", "train.optimizer.learning_rate", "finite"),
    ("model.layers=nan", "model.layers", "give a whole number"),
    (f"mesh.expert={BIG}", "mesh.expert", BIG),
    ("model.layers=4097", "model.layers", "4096"),
    ("data.batch=1099511627777", "data.batch", "1099511627776"),
    ("model.d_ff=" + "9" * 5000, "model.d_ff", "give a whole number"),
    ("model.d_ff=0x" + "f" * 5000, "config", "cannot be read"),
    # wrong words
    ("model.norm=layers", "model.norm", "did you mean 'layer'?"),
    ("train.optimizer.kind=sgd", "train.optimizer.kind", "adamw, adafactor, muon"),
    ("model.moe.router.kind=topk_sofmax", "model.moe.router.kind", "did you mean 'topk_softmax'?"),
    ("model.moe.overflow=dorp", "model.moe.overflow", "did you mean 'drop'?"),
    ("model.norm=1979-05-27", "model.norm", "'1979-05-27'"),
    ("model.dtype=[]", "model.dtype", "float32, bfloat16"),
    # impossible combinations
    ("model.moe.top_k=9", "model.moe.top_k", "9 choices among 8 experts"),
    ("model.moe.top_k=1", "model.moe.top_k", "the gshard router picks 2"),
    ("model.moe.router.kind=switch", "model.moe.top_k", "the switch router picks 1"),
    ("model.moe.router.kind=softmax_topk", "model.moe.router.second", "router.kind=gshard"),
    ("model.heads=3", "model.heads", "d_model 128 is not divisible by 3 heads"),
    ("model.kv_heads=3", "model.kv_heads", "4 heads are not a multiple of 3"),
    ("model.head_dim=7", "model.head_dim", "7 is odd"),
    ("model.moe.every=5", "model.moe.every", "leave no MoE layer among 4"),
    ("model.moe.first_dense=3", "model.moe.every", "first_dense=3"),
    ("model.moe.experts=6", "mesh.expert", "6 experts do not divide over 4"),
    ("data.batch=12", "data.batch", "8 token shards"),
    ("train.microbatches=3", "train.microbatches", "batch 32 does not split into 3 parts"),
    ("train.microbatches=8", "data.batch", "multiple of 64"),
    ("model.moe.group_size=96", "model.moe.group_size", "data.length=128"),
    ("model.moe.group_size=1024", "model.moe.group_size", "8 token shards"),
    ("data.length=1024", "data.length", "exceeds model.max_length=512"),
    ("train.steps", "train.steps", "key.path=value"),
    ("=1", "=1", "key.path=value"),
    ("train..steps=1", "train..steps=1", "key.path=value"),
    # tables as deep as nobody means
    (".".join("a" * 3000) + "=1", "config", "recursion"),
    ("model=" + "{a=" * 300 + "1" + "}" * 300, "config", "recursion limit"),
    ("model=" + "[" * 50_000, "model", "a table of keys"),
    ("name=\udc80", "config", "cannot be read"),
]


@pytest.mark.parametrize(
    "text, key, words", REFUSED, ids=[case[0][:40].encode("ascii", "replace").decode() for case in REFUSED]
)
def test_refused(text, key, words):
    with pytest.raises(ConfigError) as e:
        load("tiny_gshard", [text])
    full = message(e.value)
    assert key in {p.key for p in e.value.problems}
    assert words in full
    assert len(full) < 2000


@pytest.mark.parametrize(
    "text, remedy",
    [
        ("model.qk_norm=yes", "use one of all, true, false"),
        ("model.biases=qvk", "did you mean 'qkv'? use one of attention, qkv, true, false"),
        ("model.moe.group_size=0", "use one of auto, or a value greater than or equal to 1"),
        ("model.moe.group_size=2.5", "use one of auto, or a whole number"),
        ("model.moe.group_size=none", "use one of auto, or a whole number, or model.moe.group_size=unset for none"),
    ],
)
def test_a_key_of_several_types_is_one_problem(text, remedy):
    """Which lists all that it may be."""
    with pytest.raises(ConfigError) as e:
        load("tiny_gshard", [text])
    message(e.value)
    (problem,) = e.value.problems
    assert (problem.key, problem.remedy) == (text.partition("=")[0], remedy)


def test_all_problems_at_once():
    tree = {"model": {"layers": 0, "norm": "x"}, "trian": {}, "data": {"batch": "all"}}
    with pytest.raises(ConfigError) as e:
        from_dict(tree)
    assert {p.key for p in e.value.problems} == {"model.layers", "model.norm", "trian", "data.batch"}
    tree = {"model": {"heads": 3, "head_dim": 7, "kv_heads": 2}, "train": {"microbatches": 5}}
    with pytest.raises(ConfigError) as e:
        from_dict(tree)
    assert {p.key for p in e.value.problems} == {"model.kv_heads", "model.head_dim", "train.microbatches"}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
PATHS = st.sampled_from([key for key, _, _ in config.all_keys()] + ["model", "model.moe", "train.optimizer", "rules"])


@given(st.dictionaries(PATHS, VALUES, max_size=3))
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_anything_is_a_config_or_refused(flat):
    """Whatever stands behind a known key: a config that survives the round trip, or a `ConfigError`."""
    tree = {}
    for path, value in sorted(flat.items()):
        *tables, last = path.split(".")
        node = tree
        for name in tables:
            node[name] = node = node[name] if isinstance(node.get(name), dict) else {}
        node[last] = value
    try:
        c = from_dict(tree)
    except ConfigError as e:
        message(e)
    else:
        assert from_dict(config.to_dict(c)) == c


# The reference of keys


def test_the_reference_is_up_to_date():
    shipped = (CONFIGS / "README.md").read_text("utf-8")
    assert shipped == config.HEADING + config.reference(), "run `python -m moe_jax.config > configs/README.md`"
    assert "python -m moe_jax.config" in config.HEADING


def test_the_reference_is_complete_and_true():
    """Every row's default, read back as TOML, is the default of the dataclasses; every key has a meaning."""
    rows = [line.strip("| ").split(" | ") for line in config.reference().splitlines()[2:]]
    keys = [row[0].strip("`") for row in rows]
    assert len(keys) == len(set(keys)) > 80
    assert {"train.steps", "mesh.expert", "model.moe.router.kind", "rules.expert_mlp"} <= set(keys)
    whole = Config(
        model=ModelConfig(moe=MoEConfig(), latent=LatentConfig(), encoder=EncoderConfig(), rope=RopeConfig()),
        claims=ClaimConfig(),
    )
    for name, kind, default, meaning in rows:
        node = whole
        for part in name.strip("`").split("."):
            node = getattr(node, part)
        if default == "`unset`":
            assert node is None and kind.endswith("or unset")
        else:
            value = tomllib.loads(f"x = {default.strip('`')}")["x"]
            assert (tuple(value) if isinstance(value, list) else value) == node
        assert meaning.strip()
    kinds = {row[0].strip("`"): row[1] for row in rows}
    assert kinds["model.dropout"] == "float >= 0, < 1"
    assert kinds["model.norm"] == "layer / rms"
    assert kinds["train.steps"] == "int >= 1"
    assert kinds["train.seed"] == kinds["data.seed"] == "int >= 0, <= 4294967295"
