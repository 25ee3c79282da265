"""The log holds each step once whatever cuts a run; progress tells the numbers; the picture draws odd runs."""

import contextlib
import io
import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.metrics import MetricsLog, Progress, clock, dead_experts, encode, load_max_over_mean, read_metrics
from moe_jax.picture import draw_run, final_shares, smooth


def record(step, experts=4, layers=2, tokens=70, **changes):
    """A train record; without experts, that of a dense model."""
    rng = np.random.default_rng(step)
    loss = 2 + 4 * math.exp(-step / 20) + 0.05 * rng.normal()
    out = {"step": step, "loss": loss, "total_loss": loss + 0.07, "grad_norm": 0.82, "learning_rate": 3e-3}
    out |= {"tokens": tokens, "step_seconds": 0.5, "tokens_per_second": tokens / 0.5, "balance": None}
    if experts:
        load = rng.multinomial(tokens, np.full(experts, 1 / experts), size=layers).tolist()
        routed = tokens * layers
        out |= {"balance": 1.04, "z_loss": 0.3, "routed": routed, "kept": routed - 7, "dropped": 7, "load": load}
    return out | changes


def write(workdir, steps, resume_step=None, tensorboard=False):
    with MetricsLog(workdir, tensorboard=tensorboard, resume_step=resume_step) as log:
        for step in steps:
            log.train(record(step))
            if step % 5 == 0:
                log.eval({"step": step, "eval_loss": 2.5})


def steps_of(records):
    return [r["step"] for r in records]


# The log


@pytest.mark.parametrize("tail", [b"", b'{"step":13,"lo', b'{"step":13}', b"7", b"\0\0\0"])
@pytest.mark.parametrize("resume", [0, 4, 5, 7, 12, 20])
def test_a_resumed_log_holds_each_step_once(tmp_path, resume, tail):
    write(tmp_path, range(1, 13))
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + tail)
    assert steps_of(read_metrics(path)[0])[:12] == list(range(1, 13))
    write(tmp_path, range(resume + 1, 31), resume_step=resume)
    train, evals = read_metrics(path)
    kept = [s for s in range(1, 13 + (tail == b'{"step":13}')) if s <= resume]
    assert steps_of(train) == kept + list(range(resume + 1, 31))
    assert steps_of(evals) == [s for s in steps_of(train) if s % 5 == 0]
    assert path.read_bytes().startswith(b"".join(before.splitlines(True)[:resume]))  # what stays keeps its bytes
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_every_kill_leaves_a_log_that_reads_and_resumes(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        got = steps_of(read_metrics(path)[0])
        assert got == [1, 2][: len(got)] and len(got) >= whole[:cut].count(b"\n")
        MetricsLog(tmp_path, tensorboard=False, resume_step=2).close()
        assert steps_of(read_metrics(path)[0]) == got
        assert path.read_bytes()[-1:] in (b"", b"\n")


def test_each_line_is_on_disk_when_the_call_returns(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False, resume_step=None) as log:
        for step in (1, 2, 3):
            log.train(record(step))
            assert steps_of(read_metrics(tmp_path / "metrics.jsonl")[0]) == list(range(1, step + 1))


def test_a_new_run_sets_an_older_log_aside(tmp_path):
    write(tmp_path, range(1, 4))
    write(tmp_path, range(1, 3))
    assert steps_of(read_metrics(tmp_path / "metrics.jsonl")[0]) == [1, 2]
    assert steps_of(read_metrics(tmp_path / "metrics.jsonl.old")[0]) == [1, 2, 3]


def test_wrong_calls_and_foreign_lines_are_refused(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False, resume_step=5) as log:
        log.train(record(6))
        for step in (5, 6):
            with pytest.raises(ValueError, match=f"step {step} comes after step 6"):
                log.train(record(step))
        with pytest.raises(ValueError, match="eval_loss"):
            log.eval({"step": 6})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"hello\n" + path.read_bytes())
    with pytest.raises(ValueError, match="line 1 of"):
        read_metrics(path)


def test_nonfinite_numbers_are_valid_json_and_named():
    line = encode({"step": 3, "loss": math.nan, "grad_norm": np.float32("inf"), "router_entropy": [1.0, -math.inf]})
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    got = json.loads(line, parse_constant=pytest.fail)
    assert got.pop("nonfinite") == ["loss", "grad_norm", "router_entropy.1"]
    assert got == {"step": 3, "loss": None, "grad_norm": None, "router_entropy": [1.0, None]}
    assert json.loads(encode({"step": np.int64(3), "load": np.eye(2, dtype=int)})) == {
        "step": 3,
        "load": [[1, 0], [0, 1]],
    }


def tensorboard_scalars(folder):
    """{(tag, step): value} as TensorBoard shows it: a restart at step n hides what came before it from n on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = {}
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == SessionLog.START:
                shown = {key: v for key, v in shown.items() if key[1] < event.step}
            shown |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    return shown


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    write(tmp_path, range(1, 9), tensorboard=True)
    with MetricsLog(tmp_path, tensorboard=True, resume_step=4) as log:
        log.train(
            record(
                5,
                load=[[0, 5, 5, 10], [5, 5, 5, 5]],
                router_entropy=[1.25, 1.5],
                grad_norms={"norm": 0.5},
                loss=math.nan,
            )
        )
        log.eval({"step": 5, "eval_loss": 2.25, "eval_loss_at_capacity": 2.5})
    shown = tensorboard_scalars(tmp_path / "tensorboard")
    assert sorted(step for tag, step in shown if tag == "train/loss") == [1, 2, 3, 4, 5]
    assert math.isnan(shown["train/loss", 5])
    wanted = {"moe/dead_experts": 1, "moe/load_max_over_mean": 1.5, "moe/load_max_over_mean/layer_00": 2}
    wanted |= {"moe/load_max_over_mean/layer_01": 1, "moe/router_entropy/layer_01": 1.5, "eval/loss_at_capacity": 2.5}
    wanted |= {
        "moe/dropped_fraction": 0.05,
        "eval/loss": 2.25,
        "speed/tokens_per_second": 140,
        "optimizer/grad_norm/norm": 0.5,
    }
    assert {tag: shown[tag, 5] for tag in wanted} == pytest.approx(wanted)


# Numbers


@pytest.mark.parametrize(
    ("load", "ratio", "dead"),
    [
        ([[5, 5, 5, 5]], 1, 0),
        ([[20, 0, 0, 0]], 4, 3),
        ([[5, 5, 5, 5], [20, 0, 0, 0]], 2.5, 3),
        ([[5, 5, 5, 5], [0, 0, 0, 0]], 1, 0),  # a layer that routed nothing says nothing
        ([[1, 99]], 1.98, 0),
        ([[1, 199, 100, 100]], 1.99, 0),  # 1 percent of the fair share of 100 is alive, below it is dead
        ([[1, 199, 100, 104]], 199 / 101, 1),
        ([[7]], 1, 0),
        ([], math.nan, 0),
    ],
)
def test_load_statistics(load, ratio, dead):
    assert load_max_over_mean(load) == pytest.approx(ratio, nan_ok=True)
    assert dead_experts(load) == dead


def test_clock():
    assert [clock(s) for s in (0, 41, 725, 10800, 183600)] == ["0:00", "0:41", "12:05", "3:00:00", "2d 03:00:00"]


# Progress


def test_plain_progress_prints_the_numbers_in_columns():
    out = io.StringIO()
    with Progress(300, log_every=10, bytes_per_token=2.0, bigram=2.61, stream=out) as progress:
        for step in range(1, 31):
            slow = {"step_seconds": 90.0} if step == 1 else {}  # a compilation does not distort the time left
            progress.step(record(step, tokens=12345, dropped=765, loss=2.9 if step < 30 else math.nan, **slow))
        progress.eval({"step": 30, "eval_loss": math.log(4), "eval_loss_at_capacity": 1.5})
        progress.note("saved")
    legend, first, *lines, held, note = out.getvalue().splitlines()
    assert "nats/token" in legend and note == "saved"
    assert [line.split()[1] for line in (first, *lines)] == ["1/300", "10/300", "20/300", "30/300"]
    for part in ("loss  2.900", "balance  1.04", "dropped   3.1%", "grad    0.82", "lr 3.0e-03", "24,690 tok/s"):
        assert part in lines[1] and lines[0].index(part) == lines[1].index(part)
    assert lines[1].endswith("left 2:20") and "nan" in lines[2] and first.endswith("left -")
    assert len({line.index("tok/s") for line in lines}) == 1
    assert "1.386 nats/token (1.000 bits/byte)" in held and "2.610" in held and "at capacity 1.500" in held


def test_a_dense_model_has_no_expert_columns():
    out = io.StringIO()
    Progress(1, stream=out).step(record(1, experts=0))
    assert "loss" in out.getvalue() and "balance" not in out.getvalue() and "dropped" not in out.getvalue()


def test_quiet_is_silent():
    out = io.StringIO()
    with Progress(1, quiet=True, stream=out) as progress:
        progress.step(record(1))
        progress.eval({"step": 1, "eval_loss": 2.0})
        progress.note("x")
    assert out.getvalue() == ""


def test_a_terminal_gets_the_lines_and_a_bar(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    with contextlib.redirect_stderr(out), Progress(300, log_every=10) as progress:
        for step in range(1, 21):
            progress.step(record(step, tokens=12345))
        progress._bar.refresh()
        print("{}")  # standard output is not the bar's to move
    assert capsys.readouterr().out == "{}\n"
    assert "step  20/300" in out.getvalue() and "step 20/300 " in out.getvalue()
    bar = next(line for line in out.getvalue().splitlines() if "step 20/300 " in line)
    assert "left 2:20" in bar and "tok/s" in bar


def test_importing_costs_neither_jax_nor_a_plotting_library():
    code = "import sys, moe_jax; before = set(sys.modules); import moe_jax.metrics, moe_jax.picture; "
    code += "print(sorted({'jax', 'matplotlib', 'rich', 'tensorboardX'} & (set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# The picture


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


RUNS = {
    "moe": [record(s) for s in range(1, 101)],
    "dense": [record(s, experts=0) for s in range(1, 50)],
    "one step": [record(1)],
    "one dense step": [record(1, experts=0)],
    "one expert": [record(s, experts=1, layers=1) for s in range(1, 4)],
    "256 experts, 64 layers": [record(s, experts=256, layers=64, tokens=4096) for s in range(1, 4)],
    "gaps": [record(s, **({"loss": math.nan, "balance": None, "dropped": None} if s % 2 else {})) for s in range(1, 9)],
    "nothing finite": [record(s, loss=math.inf, balance=math.nan, routed=0) for s in range(1, 9)],
    "no balance": [record(s, balance=None) for s in range(1, 9)],
    "a silent layer": [record(s, load=[[0, 0, 0], [1, 2, 3]]) for s in range(1, 9)],
    "resumed far on": [record(s) for s in range(1_000_000, 1_000_020)],
}


@pytest.mark.parametrize("name", RUNS)
def test_the_picture_draws_odd_runs(tmp_path, name):
    train = RUNS[name]
    last = train[-1]["step"]
    evals = [{"step": last, "eval_loss": None}, {"step": last, "eval_loss": 2.5}] if name != "one step" else []
    path = draw_run(train, evals, tmp_path / "new" / "run.png", title=f"$ {name} \\", bigram=2.61)
    assert png_size(path) == (1500, 900)
    assert [p.name for p in path.parent.iterdir()] == ["run.png"]


def test_the_picture_is_drawn_from_the_log_and_refuses_an_empty_one(tmp_path):
    write(tmp_path, range(1, 7))
    draw_run(*read_metrics(tmp_path / "metrics.jsonl"), tmp_path / "run.png", title="run")
    with pytest.raises(ValueError, match="at least one train record"):
        draw_run([], [], tmp_path / "none.png", title="none")
    assert not (tmp_path / "none.png").exists()


def test_final_shares_are_of_the_last_tenth():
    early, late = ([{"load": [[9, 0]]}] * 18, [{"load": [[1, 3]]}, {"load": [[3, 5]]}])
    np.testing.assert_allclose(final_shares(early + late), [[1 / 3, 2 / 3]])
    assert final_shares([{"load": None}, {}]) is None


def test_smoothing_keeps_constants_lines_and_gaps():
    x = np.arange(50.0)
    np.testing.assert_allclose(smooth(0 * x + 3, 7), 3)
    np.testing.assert_allclose(smooth(x, 7)[:43], x[:43])
    gap = np.where(x == 20, np.nan, 3.0)
    assert np.flatnonzero(np.isnan(smooth(gap, 4))).tolist() == [20]
    np.testing.assert_array_equal(smooth(gap, 0), gap)
