"""tools/bench_transformers.py and `bench decode`: processes take turns, and what is missing is said. No timing is
asserted."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_jax import cli, config
from moe_jax.bench.decode import IMPLEMENTATIONS, compared, hopeless, lines

TOOL = Path(__file__).parent.parent / "tools" / "bench_transformers.py"


@pytest.fixture
def versus():
    spec = importlib.util.spec_from_file_location("bench_transformers", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_transformers_missing(versus, tmp_path, capsys):
    """One message with what to install, before anything of ours compiles."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    assert versus.main(["--python", str(bare), "--threads", "1"]) == 2
    err = capsys.readouterr().err
    assert "lacks torch or transformers: No module named 'torch'" in err and "pip install torch transformers" in err
    assert versus.main(["--python", str(tmp_path / "none"), "--threads", "1"]) == 2
    assert "No such file" in capsys.readouterr().err


def test_processes_take_turns(versus, tmp_path):
    """Each in its own process, one after the other; one that fails is left out and says why."""
    fake = f"""
import sys; sys.path.insert(0, {str(TOOL.parent)!r})
import bench_transformers as b
def build(spec):
    def step():
        with open(spec["log"], "a") as f: f.write(spec["name"])
        if spec["name"] == "c": raise MemoryError("too large")
        return 1.0
    return step, {{}}
b.serve(build)
"""
    log, processors = tmp_path / "log", sorted(versus.os.sched_getaffinity(0))
    programs = [
        versus.Program(
            f"transformers {n}", [sys.executable, "-c", fake], dict(name=n, log=str(log), processors=processors)
        )
        for n in "abc"
    ]
    versus.take_turns(programs, 2, 1, print)
    result = versus.report(programs, tokens=8)
    for p in programs:
        p.end()
    assert log.read_text() == "abc" + "ab" * 2
    assert result["rows"][2]["failed"] == "MemoryError: too large" and "seconds" not in result["rows"][2]
    assert all(r["tokens_per_second"] > 0 for r in result["rows"][:2]) and result["ratio_ours_to_fastest"] > 0


def test_a_program_that_dies_between_turns(versus):
    """It is left out, with its exit code; the others go on."""
    code = f"""
import os, sys, threading, time
sys.path.insert(0, {str(TOOL.parent.parent)!r})
from moe_jax.bench.turns import serve
def build(spec):
    if spec["dies"]: threading.Timer(0.2, os._exit, (7,)).start()
    return lambda: 1.0, {{}}
serve(build)
"""
    spec = {"processors": sorted(versus.os.sched_getaffinity(0))}
    programs = [
        versus.Program(f"{dies}", [sys.executable, "-c", code], spec | {"dies": dies}) for dies in (True, False)
    ]
    programs[0].process.wait()
    versus.take_turns(programs, 2, 0, print)
    programs[1].end()
    assert programs[0].failed == "the process ended with 7" and len(programs[1].times) == 2
    programs[0].end()  # once more does no harm


def test_the_programs_and_what_bounds_them(versus):
    """Ours first, the reference; one runs the products alone, of the same config; each of theirs twice."""
    args = versus.parser().parse_args(["--experts", "eager", "--threads", "1", "model.layers=1"])
    given = ["model.ffn=swiglu", *args.overrides]
    found = {name: spec for name, _, spec, _ in versus.specifications(args, config.load("bench_small", given), given)}
    assert list(found) == [
        "moe_jax",
        "moe_jax, dropless",
        "moe_jax, two matrices",
        versus.ALONE,
        "transformers eager",
        "transformers eager, memory kept",
    ]
    ours = {name: spec for name, spec in found.items() if name.startswith("moe_jax")}
    assert [name for name, spec in ours.items() if spec["alone"]] == [versus.ALONE]
    assert found[versus.ALONE]["overrides"] == found["moe_jax"]["overrides"] == given


SMALL = ["bench", "decode", "--rounds", "1", "--batch", "2", "--tokens", "3", "--prompt-tokens", "4", "--threads", "1"]


@pytest.mark.usefixtures("transformers")
def test_decoding_beside_transformers(capfd):
    """Programs of one size, each with a speed in both phases; what is fastest is compared with."""
    assert cli.main([*SMALL, "model.layers=1", "model.d_model=32", "--against", "transformers", "--json"]) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    (row,) = report["rows"]
    assert row["batch"] == 2 and list(row["programs"]) == ["moe_jax", *(f"transformers {x}" for x in IMPLEMENTATIONS)]
    assert len({p["params_total"] for p in row["programs"].values()}) == 1
    for phase in ("prefill", "decode"):
        speeds = {n: p[f"{phase}_tokens_per_second"] for n, p in row["programs"].items()}
        ours, fastest = speeds.pop("moe_jax"), max(speeds, key=speeds.get)
        assert row[f"{phase}_fastest"] == fastest and row[f"{phase}_ratio"] == pytest.approx(ours / speeds[fastest])
    assert {"transformers", "torch", "machine"} <= report.keys() and report["overrides"][0] == "model.ffn=swiglu"


def test_nothing_to_compare_with(tmp_path, monkeypatch, capfd):
    """Where no implementation of transformers runs, there is no report but their reasons, in one message."""
    (tmp_path / "torch.py").write_text("def set_num_threads(n): raise RuntimeError('no threads here')")
    (tmp_path / "transformers.py").write_text("MixtralConfig = MixtralForCausalLM = __version__ = None")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert cli.main([*SMALL, "model.layers=1", "model.d_model=32", "--against", "transformers", "--quiet"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("moe-jax bench: failed\nthere is nothing to compare with\n"), err
    assert err.count("RuntimeError: no threads here") == len(IMPLEMENTATIONS) and "remedy: " in err


def test_who_takes_no_more_turns():
    """Several times slower than one other program, in both phases."""
    speeds = {"best": (90.0, 30.0), "slow": (29.0, 9.0), "slow to prefill": (29.0, 11.0), "other": (40.0, 40.0)}
    programs = [
        SimpleNamespace(name=n, about={}, failed=None, times=[{"returned": list(s)}]) for n, s in speeds.items()
    ]
    programs.append(SimpleNamespace(name="failed", about={}, failed="MemoryError", times=[]))
    assert [p.name for p in hopeless(programs)] == ["slow"]
    (mine, *others), slow = programs, programs[1:2]
    row = compared(mine, others, slow)
    assert row["prefill_fastest"] == row["decode_fastest"] == "other" and row["programs"]["slow"]["turns"] == 1


def test_the_report_says_what_was_set():
    """The config's experts have two matrices, and Mixtral's three."""
    assert lines({"config": "bench_small", "overrides": ["model.ffn=swiglu"], "rows": []}) == [
        "bench_small with model.ffn=swiglu"
    ]


@pytest.mark.parametrize(
    "more, why",
    {
        "a bias of the head": (["model.head_bias=true"], "model.head_bias: is not as in Mixtral"),
        "scales": (
            ["model.embed_scale=12.0", "model.residual_scale=0.2"],
            "model.residual_scale: is not as in Mixtral",
        ),
        "scaled logits": (["model.logit_scale=0.5"], "model.logit_scale: is not as in Mixtral"),
        "a window": (["model.window=8"], "model.window: is not as in Mixtral"),
        "a bias of the router": (["model.moe.router.bias=true"], "model.moe.router.bias: is not as in Mixtral"),
        "a router of two": (["model.moe.router.gate=mlp"], "model.moe.router.gate: is not as in Mixtral"),
        "another shape": (["tiny_deepseek"], "model.moe.shared_experts: is not as in Mixtral"),
        "too long": (["model.max_length=6", "data.length=4"], "4 tokens and 3 new ones exceed model.max_length=6"),
        "no package": (["--against", "transformers", "--python", "{bare}"], "lacks torch or transformers"),
        "no rows": (["--batch", "0"], "--batch: is 0"),
    }.values(),
)
def test_what_decode_refuses(more, why, tmp_path, capfd):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    assert cli.main([*SMALL, *(text.format(bare=bare) for text in more)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and why in err and "remedy" in err
