"""`moe-jax doctor`: it names each planted ill within 50 steps of real training, and nothing of healthy runs."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import TINY, check_refusal, write_text

from moe_jax.metrics import read_metrics
from moe_jax.train.loop import Run
from moe_jax.train.optimizer import names_of

ONE = ["mesh.data=1", "mesh.expert=1", "train.checkpoint_every=unset", "train.log_every=50"]
STEPS = 45


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def doctor(call, inside, text, tmp_path, monkeypatch):
    """Train with overrides and a plant, and ask the doctor: its JSON, and the alarms that the run told."""
    start = Run.start

    def ask(*overrides: str, steps=STEPS, plant=lambda names, x: x, name="tiny_switch"):
        def planted(run):
            state = start(run)
            lay = lambda path, x: jax.device_put(plant(names_of(path), x), x.sharding)  # noqa: E731
            return state._replace(params=jax.tree_util.tree_map_with_path(lay, state.params))

        monkeypatch.setattr(Run, "start", planted)
        workdir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        more = [f"train.steps={steps}", f"data.path={text}", *overrides, "--workdir", workdir, "--json", "--quiet"]
        code, trained, err = call("train", name, *TINY[1:], *ONE, *more)
        assert code == 0, err
        code, found, err = call("doctor", workdir, "--json")
        assert code == 0, err
        return workdir, found, trained["alarms"]

    return ask


def towards(column):
    """A router that sees one direction, in which all embeddings point, and whose scores `column` gives to experts."""

    def plant(names, x):
        if names[0] == "embedding":
            return x.at[:, 0].set(3.0)
        return x.at[..., 0, :].set(jnp.asarray(column, x.dtype)) if names[-1] == "router" else x

    return plant


def kinds(report):
    return [(a["kind"], a["layer"]) for a in report["findings"]]


def test_a_healthy_run(doctor, call):
    workdir, found, alarms = doctor("train.seed=1")
    assert found["findings"] == found["past"] == alarms == []
    assert found["judged"] and found["step"] == STEPS and found["settles_until"] == 202
    (layer,), (records, _) = found["layers"], read_metrics(workdir / "metrics.jsonl")
    load = np.sum([r["load"][0] for r in records[-20:]], 0)
    assert layer["routed"] == load.sum() and layer["dropped"] == sum(r["dropped"] for r in records[-20:])
    assert layer["load_max_over_mean"] == pytest.approx(load.max() / load.mean()) and layer["dead"] == []
    assert layer["entropy_over_most"] == pytest.approx(records[-1]["router_entropy"][0] / math.log(8))
    code, out, _ = call("doctor", workdir)
    assert code == 0 and "nothing is wrong" in out and "a young run" in out


def test_collapse(doctor, call):
    """A router that is sure of itself has no gradient, and no z-loss makes it less sure."""
    workdir, found, alarms = doctor("model.moe.z_loss=0", plant=towards([9.0, *[-9.0] * 7]))
    assert ("collapse", 0) in kinds(found) and ("dead", 0) not in kinds(found)
    assert "1 of 8 experts get 100% of the choices" in found["findings"][0]["text"]
    assert found["findings"][0]["step"] == 20 and "step 20: MoE layer 0" in alarms[0]
    assert found["layers"][0]["load_max_over_mean"] == 8.0 and found["layers"][0]["dead"] == [1, 2, 3, 4, 5, 6, 7]
    _, out, _ = call("doctor", workdir)
    assert "collapse since step 20: MoE layer 0: 1 of 8" in out and "raise model.moe.balance_loss (now 0.01)" in out


def test_dead_experts(doctor):
    _, found, _ = doctor("model.moe.z_loss=0", plant=towards([0.0, 0.0, -9.0, 0.0, 0.0, -9.0, 0.0, 0.0]))
    assert ("dead", 0) in kinds(found) and "2 of 8 experts (2, 5)" in found["findings"][0]["text"]
    assert found["layers"][0]["dead"] == [2, 5]


def test_a_uniform_router(doctor):
    """Experts that answer nothing teach it nothing: its scores stay equal, and the first expert takes every token."""

    def nothing(names, x):
        return jnp.zeros_like(x) if names[-1] == "router" or "experts" in names else x

    _, found, _ = doctor("model.moe.balance_loss=0", plant=nothing)
    assert kinds(found)[0] == ("uniform", 0) and not {("collapse", 0), ("dead", 0)} & set(kinds(found))
    assert "around 1/8" in found["findings"][0]["text"] and "z_loss (now 0.001)" in found["findings"][0]["remedy"]


def test_heavy_drops(doctor):
    _, found, _ = doctor("model.moe.capacity_factor=0.5", "model.moe.min_capacity=1")
    assert kinds(found) == [("dropped", 0)] and found["layers"][0]["dropped"] >= found["layers"][0]["routed"] / 2
    assert "raise model.moe.capacity_factor (now 0.5)" in found["findings"][0]["remedy"]


def test_gradients_that_are_not_finite(doctor):
    """Steps so long that the numbers leave float32: the log has null, and the first such step is named."""
    workdir, found, alarms = doctor("train.optimizer.learning_rate=1e30", "train.optimizer.clip=unset", steps=8)
    (finding,), (records, _) = found["findings"], read_metrics(workdir / "metrics.jsonl")
    first = next(r for r in records if "nonfinite" in r)
    assert (finding["kind"], finding["layer"], finding["step"]) == ("nonfinite", None, first["step"])
    groups = [n.removeprefix("grad_norms.") for n in first["nonfinite"] if n.startswith("grad_norms.")]
    assert groups and f"gradient of {', '.join(groups)} is not finite" in finding["text"]
    assert len(alarms) == 1 and "train.optimizer.learning_rate" in alarms[0] and found["judged"]
    assert set(records[0]["grad_norms"]) == {"attention", "embedding", "experts", "ffn", "norm", "router"}
    whole = math.sqrt(sum(n**2 for n in records[0]["grad_norms"].values()))
    assert records[0]["grad_norm"] == pytest.approx(whole, rel=1e-5)


LATENT = [f"model.latent.{name}" for name in ("query=8", "key_value=8", "rotary=4")]
HEALTHY = {
    "tiny_switch": ["train.optimizer.warmup=20"],
    "tiny_gshard": ["model.moe.d_ff=16"],
    "tiny_mixtral": ["model.moe.d_ff=16", "model.moe.router.kind=noisy_topk"],
    "tiny_deepseek": ["model.moe.d_ff=16", *LATENT],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_raise_nothing(doctor, monkeypatch, name):
    """Five seeds of each of four models, by one compiled step a model."""
    compiled, build = [], Run.compile
    monkeypatch.setattr(
        Run, "compile", lambda run: compiled[0] if compiled else compiled.append(build(run)) or compiled[0]
    )
    for seed in range(5):
        _, found, alarms = doctor(*HEALTHY[name], f"train.seed={seed}", name=name, steps=50)
        assert found["findings"] == found["past"] == alarms == [], (seed, found["layers"])


def test_what_cannot_be_read_is_refused(call, inside, tmp_path):
    check_refusal(*call("doctor", tmp_path / "none"), "doctor", "does not exist")
    check_refusal(*call("doctor", tmp_path), "doctor", "holds no config.json and no metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.json").write_text("{")
    check_refusal(*call("doctor", tmp_path), "doctor", "config.json", "is damaged")
    (tmp_path / "config.json").write_text(json.dumps({"name": "x"}))
    check_refusal(*call("doctor", tmp_path), "doctor", "holds no step")
