"""The benchmarks: what their rows hold, which products a floor counts, what is refused. No timing is asserted."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from moe_jax import cli, config
from moe_jax.bench import layer, step
from moe_jax.bench.timing import Times, by_turns, ratio


def test_turns_and_ratio():
    order = []
    functions = {n: (lambda n=n: order.append(n)) for n in "ab"}
    times = by_turns(functions, rounds=3, warm=1)
    assert order == ["a", "b"] * 4 and len(times["a"].wall) == 3
    assert ratio(Times([2.0, 9.0, 4.0], [], []), Times([1.0, 3.0, 4.0], [], [])) == 2.0


def test_layer_rows():
    """A dispatcher in both phases with a positive ratio, memory and parts; the ideal is the products alone."""
    shape = layer.Shape(tokens=32, experts=4, d_model=8, d_ff=16, group_size=16)
    with jax.numpy_dtype_promotion("standard"):
        report = layer.measure([shape, replace(shape, experts=2)], ("ragged",), rounds=1, parts=False, ragged_dot=True)
    keys = [(r["phase"], r["dispatcher"], r["experts"]) for r in report["rows"]]
    assert keys == [(p, "ragged", E) for p in ("forward", "forward+backward") for E in (4, 2)]
    for row in report["rows"]:
        assert row["ratio_to_ideal"] > 0 and row["temporaries_bytes"] > 0 and row["ragged_dot_to_experts"] > 0
        assert (row["ratio_to_first"] == 1) == (row["experts"] == 4)
        assert (row["top_k"], row["d_model"], row["d_ff"]) == (2, 8, 16)
    json.dumps(report, allow_nan=False)
    assert "2 experts take" in "".join(layer.lines(report)) and "ragged_dot take" in "".join(layer.lines(report))
    text = layer.ideal(shape, "forward").compiled.as_text()
    assert text.count(" dot(") == 2 and "gather" not in text


@pytest.mark.parametrize("dispatch", ["einsum", "gather", "ragged"])
def test_parts_are_the_layer(dispatch):
    """The parts timed one by one, each on what the part before it made, compute what the layer computes."""
    shape = layer.Shape(tokens=32, experts=4, d_model=8, d_ff=16, group_size=16, capacity_factor=0.5)
    made = layer.pieces(*layer.build(shape, dispatch), "forward")
    assert set(made) == {"layer", "routing", "dispatch", "experts", "combine"}
    slots, routed, stats = made["routing"]()
    assert (int(stats.kept) < int(stats.routed)) == (dispatch != "ragged"), "the test needs drops"
    tokens, _ = made["dispatch"].args[0]
    moved, second = made["dispatch"].compiled((tokens, slots.gate), (routed, slots))
    (ready, weights), sizes = made["experts"].args
    np.testing.assert_array_equal(ready, moved)
    out = made["experts"].compiled((moved, weights), sizes)
    # to combine: sorted rows come with their gates, buffers with the plan
    plan = made["combine"].args[1]
    y = made["combine"].compiled(*(((out, second), plan) if dispatch == "ragged" else (out, second)))
    want = made["layer"]()[0]
    assert float(abs(want).max()) > 0
    np.testing.assert_allclose(y.reshape(want.shape), want, atol=1e-6 * float(abs(want).max()))


def test_ragged_dot_is_the_experts():
    """What is timed beside the blocks computes the same."""
    shape = layer.Shape(tokens=16, experts=4, d_model=8, d_ff=16, group_size=16)
    made = layer.programs(shape, "ragged", "forward", parts=True, ragged_dot=True)
    np.testing.assert_allclose(made["ragged_dot"](), made["experts"](), atol=1e-6)


def test_products_of_a_step():
    """bench_small: FLOPs from the sizes, by hand."""
    cfg = config.load("bench_small")
    m, moe, T, L = cfg.model, cfg.model.moe, 8 * 256, 256
    attention = 4 * T * m.d_model**2 + sum(2 * 8 * 64 * (64 * (i + 1)) * m.d_model for i in range(L // 64))
    experts = 2 * (8 * 80 * 8) * m.d_model * moe.d_ff + T * m.d_model * 8
    want = 6 * (m.layers * (attention + experts) + T * m.d_model * m.vocab)
    assert sum(p.flops for part in step.step_products(cfg) for p in part) == want
    assert step.dense_twin(cfg).model.d_ff == 1024


def test_products_of_an_encoder_with_its_decoder():
    """Those of its layers, which see both ways, and of the decoder's, which see half and all that the encoder read."""
    cfg = config.load("tiny_t5", ["model.encoder.length=64", "model.encoder.layers=1", "model.layers=1", "model.moe="])
    B, L, M, D, F, V = 32, 128, 64, 128, 256, cfg.model.vocab
    encoder = 4 * B * M * D * D + 2 * B * M * M * D + 2 * B * M * D * F
    own = 4 * B * L * D * D + 2 * B * (64 * 64 + 64 * 128) * D + 2 * B * L * D * F  # queries in blocks of 64
    reading = 2 * B * L * D * D + 2 * B * M * D * D + 2 * B * L * M * D
    parts = [sum(p.flops for p in part) for part in step.step_products(cfg)]
    assert parts == [6 * encoder, 6 * (own + reading), 6 * B * L * D * V]


@pytest.mark.parametrize(
    "argv,message",
    [
        (["layer", "--experts", "0"], "--experts: is 0"),
        (["layer", "--experts", "8,0"], "--experts: is 0"),
        (["layer", "--ragged-dot", "--dispatch", "gather"], "--dispatch leaves it out"),
        (["layer", "--dispatch", "scatter"], "--dispatch: has no 'scatter'"),
        (["layer", "model.layers=2"], "a layer has no config"),
        (["layer", "--tokens", "64", "--group-size", "7"], "7 does not divide 64 tokens"),
        (["step", "bench_smal"], "no such config"),
        (["step", "--rounds", "0"], "--rounds: is 0"),
    ],
)
def test_refusals(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    assert cli.main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("more,where", [([], 0), (["--quiet"], 0), (["--json"], 1), (["--json", "--quiet"], None)])
def test_the_table_is_a_result(capsys, monkeypatch, more, where):
    """On standard output, --quiet or not; beside a JSON object on standard error, which --quiet leaves out."""
    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    monkeypatch.setattr(layer, "measure", lambda *args, **kwargs: {"rows": []})
    monkeypatch.setattr(layer, "lines", lambda report: ["the table"])
    assert cli.main(["bench", "layer", *more]) == 0
    told = capsys.readouterr()
    assert [i for i, text in enumerate(told) if "the table" in text] == ([] if where is None else [where])


def test_a_step_from_the_command_line(capsys, monkeypatch):
    """One JSON object with a row for the products, the MoE and its dense twin."""
    monkeypatch.setattr(cli, "keep_memory", lambda: None)
    monkeypatch.setattr("moe_jax.mesh.build_mesh", lambda m, build=step.meshes.build_mesh: build(m, jax.devices()[:1]))
    sizes = ["model.layers=1", "model.d_model=16", "model.d_ff=16", "model.heads=2", "data.length=16", "data.batch=2"]
    more = ["model.moe.d_ff=16", "model.moe.group_size=16", "model.moe.dispatch=gather", "model.scan=false"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert cli.main(["bench", "step", "--rounds", "1", "--json", *sizes, *more]) == 0
    out, _ = capsys.readouterr()
    report = json.loads(out)
    assert [r["program"] for r in report["rows"]] == ["products", "moe", "dense"]
    assert report["moe_to_dense"] > 0 and all(r["page_faults"] >= 0 for r in report["rows"])
