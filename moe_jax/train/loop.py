"""The training run: from a config and a folder to checkpoints, a log, a picture and a report."""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Generator as Yields
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import config, kernels
from moe_jax import mesh as meshes
from moe_jax.checkpoint import Checkpoints, check_workdir
from moe_jax.config import Config, Problem, Refused
from moe_jax.cost import for_training
from moe_jax.data import (
    Corpus,
    Windows,
    batches,
    bigram_loss,
    continued,
    load_tokenizer,
    opening,
    prepare,
    renew,
    wait_prepared,
)
from moe_jax.generate import Generator
from moe_jax.health import Watch
from moe_jax.mesh import fetch
from moe_jax.metrics import MetricsLog, Progress, load_max_over_mean, read_metrics, write_config
from moe_jax.picture import draw_run
from moe_jax.train.evaluate import Evaluator, local_rows, to_devices
from moe_jax.train.resume import (
    AgreedStop,
    Stop,
    changes,
    check_renewal,
    check_shared,
    checkpoint_info,
    claimed,
    left_behind,
)
from moe_jax.train.state import Model, State
from moe_jax.train.step import lower_train_step, schedule
from moe_jax.workdir import locked

IN_FLIGHT = 1  # steps dispatched ahead of the one whose metrics are read
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes elsewhere


class Overflow(Exception):
    """A token found no slot, and model.moe.overflow is `error`."""


class Run:
    """One training run. Creating it checks everything that needs no data; calling it trains.

    Args:
        workdir: where checkpoints, log and picture go; a run already there goes on.
        started: `time.perf_counter()` when the process began.
    Raises:
        Refused: anything that cannot work, before it writes.
    """

    def __init__(self, cfg: Config, workdir: Path, *, started: float, quiet: bool = False):
        self.cfg, self.workdir, self.started = cfg, workdir, started
        self.main = jax.process_index() == 0
        self.quiet = quiet or not self.main
        self.mesh: Mesh = meshes.build_mesh(cfg.mesh)
        self.model = Model.of(cfg)
        self.model.validate()
        kernels.check(cfg, self.platform)
        check_workdir(workdir)
        self.checkpoints = Checkpoints(workdir / "checkpoints", cfg.train.keep)
        self.resumed_at = self.checkpoints.last()
        self.changed: dict[str, str] = {}
        if self.resumed_at is not None:
            self.changed = changes(self.checkpoints.info(self.resumed_at), cfg)
        self.renews = check_renewal(self.changed, jax.process_count())
        self.check_vocabulary()
        if self.main and self.resumed_at is not None and (workdir / "metrics.jsonl").exists():
            read_metrics(workdir / "metrics.jsonl")  # a damaged log is refused here, not after the data is read
        self.timing: dict[str, float] = {}
        self.watch = Watch(cfg.model.moe, cfg.train.optimizer.warmup)
        self.alarms: list[str] = []

    def __call__(self) -> dict[str, Any]:
        """Train, and return the report of the run."""
        if not self.main:
            check_shared(self.workdir)
            self.corpus = wait_prepared(self.workdir / "tokens", self.cfg.data)
            return self.run()
        with contextlib.ExitStack() as stack:
            with claimed(self.workdir):
                stack.enter_context(locked(self.workdir))
                check_shared(self.workdir)
                self.corpus = self.renewed() if self.renews else prepare(self.cfg.data, self.workdir / "tokens")
            return self.run()

    def say_left_behind(self, file: str) -> None:
        """Say so where a new run leaves the checkpoints beside its config file."""
        if self.resumed_at is None and (text := left_behind(file, self.workdir)) is not None:
            self.say(text)

    def renewed(self) -> Corpus:
        """The text of this config in place of an import's, whose checkpoint says from now on that it is of this one."""
        corpus = renew(self.cfg.data, self.workdir / "tokens")
        origin = {"imported": self.checkpoints.info(0)["imported"]}
        self.checkpoints.restate(0, checkpoint_info(self.cfg, corpus, 0) | origin)
        return corpus

    def run(self) -> dict[str, Any]:
        """Everything after the text is at hand."""
        data = self.cfg.data
        self.windows = Windows(self.corpus.train, data.length, data.packing, self.cfg.inputs)
        if self.cfg.inputs and not self.windows.any_in_front:
            why = "is 'pad', and no document is longer than a sequence: nothing stands in front of one for the encoder"
            raise Refused(Problem("data.packing", why, "set it to pack, or a smaller data.length"))
        self.evaluator = Evaluator(self.model, self.mesh, self.corpus)
        self.bigram = bigram_loss(self.windows, self.evaluator.windows, self.cfg.model.vocab)
        state = self.start()
        try:
            with self.open_screen() as self.screen, self.open_log() as self.log, self.open_stop() as stop:
                self.introduce()
                state, step = self.train(state, self.resumed_at or 0, stop)
                self.checkpoints.wait()  # a signal must not end the process while the last save is under way
                if stop.signal:
                    where = f"step {step} of {self.cfg.train.steps}"
                    self.screen.note(f"{stop.signal}: saved at {where}; the same command goes on from there")
        finally:
            self.checkpoints.wait()
        report = {"finished": step >= self.cfg.train.steps} | (self.report(step) if self.main else {})
        if "loss" in report:
            self.draw(report)
        if self.cfg.train.sample and step >= self.cfg.train.steps:
            text = self.sample(state, self.cfg.train.sample)
            report |= {"sample": text} if "loss" in report else {}
        return report

    def train(self, state: State, first: int, stop: Stop | AgreedStop) -> tuple[State, int]:
        """The loop. It dispatches a step ahead and reads the metrics of the step before, so it never waits for them."""
        train = self.cfg.train
        if first == 0:
            self.evaluate(state, 0)
        if first >= train.steps:
            goal = f"{first} of {first}" if first == train.steps else f"{first}, beyond train.steps={train.steps}"
            self.screen.note(f"nothing to do: the checkpoint is at step {goal}; raise train.steps to go on")
            return state, first
        if self.log is not None:
            write_config(self.workdir, config.to_dict(self.cfg))
        seed = jax.random.key(train.seed)
        pending: list[tuple[int, dict[str, jax.Array]]] = []
        with jax.set_mesh(self.mesh), contextlib.closing(self.rows(first)) as rows:
            train_step = self.compile()
            self.clock = time.perf_counter()
            for step in range(first + 1, train.steps + 1):
                state, metrics = train_step(state, to_devices(next(rows), self.model, self.mesh), seed)
                pending.append((step, metrics))
                last = stop.at(step) or step == train.steps
                saves = last or (train.checkpoint_every is not None and step % train.checkpoint_every == 0)
                evaluates = step == train.steps or (train.eval_every is not None and step % train.eval_every == 0)
                while len(pending) > (0 if saves or evaluates else IN_FLIGHT):
                    self.record(*pending.pop(0))
                if evaluates:
                    self.evaluate(state, step)
                if saves:
                    self.checkpoints.save(step, state, checkpoint_info(self.cfg, self.corpus, step))
                if last:
                    break
                if saves or evaluates:
                    self.clock = time.perf_counter()  # their time is not the next step's
        return state, step

    # Before the loop

    def check_vocabulary(self) -> None:
        """Every id of the tokenizer has a row in the embedding, and the sample's prompt fits the model."""
        tokenizer, prompt, limit = (
            load_tokenizer(self.cfg.data.tokenizer),
            self.cfg.train.sample,
            self.cfg.model.max_length,
        )
        more = len(opening(tokenizer, self.cfg.data.bos)) + (len(tokenizer.back) if self.cfg.model.answers else 0)
        count = 0 if not prompt else more + len(tokenizer.encode(prompt, marked=self.cfg.model.answers))
        if prompt is not None and not 0 < count < limit:
            why = f"makes {count} tokens"
            raise Refused(Problem("train.sample", why, f"give a text of 1 to {limit - 1} tokens, or take the key out"))
        m, size = self.cfg.model, tokenizer.size
        tables = {"model.vocab": m.vocab, "model.encoder.vocab": m.encoder.vocab if m.encoder else None}
        small = {key: vocab for key, vocab in tables.items() if vocab is not None and vocab < size}
        if small:
            why = "{} is smaller than the tokenizer's {}"
            raise Refused(*(Problem(k, why.format(n, size), f"set it to {size}") for k, n in small.items()))

    def start(self) -> State:
        """A new state in its shards, or the newest checkpoint placed on this mesh."""
        if self.resumed_at is None:
            return self.model.create(self.mesh)
        saved = self.checkpoints.info(self.resumed_at)
        if saved["text"] != self.corpus.fingerprint:
            remedy = "put the old text back, or train in another --workdir"
            raise Refused(
                Problem("data.path", "its text is not the one that the run in this workdir began with", remedy)
            )
        if "imported" in saved:  # weights without an optimizer
            weights = self.checkpoints.restore_weights(self.model.weight_targets(self.mesh), self.resumed_at)
            return self.model.begin(weights, self.mesh)
        return self.checkpoints.restore(self.model.targets(self.mesh), self.resumed_at)[0]

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        return self.mesh.devices.flat[0].platform

    def open_screen(self) -> Progress:
        return Progress(
            self.cfg.train.steps,
            log_every=self.cfg.train.log_every,
            bytes_per_token=self.corpus.bytes_per_token,
            bigram=self.bigram,
            quiet=self.quiet,
        )

    def open_log(self) -> contextlib.AbstractContextManager[MetricsLog | None]:
        """The log of process 0; others write none. From a checkpoint of step 0, an upcycled model, it begins anew."""
        if not self.main:
            return contextlib.nullcontext()
        return MetricsLog(self.workdir, tensorboard=self.cfg.train.tensorboard, resume_step=self.resumed_at or None)

    def open_stop(self) -> Stop | AgreedStop:
        return Stop(self.screen.note) if jax.process_count() == 1 else AgreedStop()

    def rows(self, first: int) -> Yields[dict[str, np.ndarray]]:
        """The rows of this process from step `first` on."""
        data, rows = self.cfg.data, local_rows(self.model, self.mesh)
        return batches(self.windows, batch=data.batch, seed=data.seed, start_step=first, rows=rows)

    def introduce(self) -> None:
        """Say what is about to run, and where."""
        total, active = self.model.count()
        note = self.screen.note
        note(f"{self.cfg.name}: {total:,} parameters, {active:,} of them active for a token")
        several = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        note(f"mesh {self.cfg.mesh}, on {jax.device_count()} {jax.devices()[0].platform} device(s){several}")
        if (s := schedule(self.cfg)) is not None:
            note(f"pipeline of {s.stages} stages: {s.ticks} ticks a step, bubble (S-1)/(R*M+S-1) = {s.bubble:.1%}")
        if self.cfg.model.moe is not None:
            note(self.dispatch())
        for name, choice in kernels.choices(self.cfg, self.platform).items():
            note(f"attention, {name}: {choice.kernel}: {choice.reason}")
        note(f"workdir {self.workdir}")
        note(f"text {self.cfg.data.path}: {len(self.corpus.train):,} tokens, {len(self.corpus.heldout):,} held out")
        if self.resumed_at is not None:
            note(f"goes on from the checkpoint at step {self.resumed_at}")
        for key, change in self.changed.items():
            note(f"changed since that checkpoint: {key}: {change}")

    def dispatch(self) -> str:
        """The dispatcher, the groups and why, in words."""
        m, found = self.cfg.model, {}
        stacks = (("", m.layer_kinds, self.cfg.data.length), ("of the encoder ", m.encoder_kinds, self.cfg.inputs))
        for stack, kinds, length in stacks:
            if "moe" in kinds:
                picked, why = for_training(jax.devices()[0].platform, m, length)
                found.setdefault(f"{picked} ({why})", stack)
        return f"dispatch {'; '.join(stack + text for text, stack in found.items())}"

    def compile(self) -> Any:
        """The train step, compiled."""
        begun = time.perf_counter()
        compiled = lower_train_step(self.model, self.mesh).compile()
        self.timing["compile_seconds"] = time.perf_counter() - begun
        self.screen.note(f"compiled the train step in {self.timing['compile_seconds']:.1f} s")
        return compiled

    # In the loop

    def record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Write the numbers of one step. Waits for that step only."""
        host = jax.tree.map(lambda x: fetch(x).tolist(), metrics)
        now = time.perf_counter()
        self.timing.setdefault("time_to_first_step_seconds", now - self.started)
        seconds, tokens = now - self.clock, host.pop("tokens")
        self.clock = now
        if "routed" in host:  # added up as Python integers: a sum over layers may pass 2^31
            host["dropped_by_layer"] = [a - b for a, b in zip(host["routed"], host["kept"], strict=True)]
            host["routed"], host["kept"] = sum(host["routed"]), sum(host["kept"])
            host["dropped"] = host["routed"] - host["kept"]
        speed = {"tokens": tokens, "step_seconds": seconds, "tokens_per_second": tokens / seconds}
        record = {"step": step, **host, **speed}
        if self.log is not None:
            self.log.train(record)
        self.screen.step(record)
        for alarm in self.watch.step(record):
            self.alarms.append(f"step {step}: {alarm}")
            self.screen.note(f"alarm at {self.alarms[-1]}")
        moe = self.cfg.model.moe
        if moe is not None and moe.overflow == "error" and host["dropped"]:
            remedy = "raise model.moe.capacity_factor, or set model.moe.overflow=drop"
            raise Overflow(f"step {step}: {host['dropped']} of {host['routed']} choices found no slot; {remedy}")

    def evaluate(self, state: State, step: int) -> None:
        record = {"step": step, **self.evaluator.report(state.weights, self.cfg.train.eval_batches)}
        if self.log is not None:
            self.log.eval(record)
        self.screen.eval(record)

    # After the loop

    def report(self, step: int) -> dict[str, Any]:
        """The JSON of `moe-jax train`. Routing counts are sums over the last tenth of the steps."""
        train, evals = read_metrics(self.workdir / "metrics.jsonl")
        if not train:
            return {"step": step, "workdir": str(self.workdir)}
        mine = [r for r in train if r["step"] > (self.resumed_at or 0)] or train
        total, active = self.model.count()
        speed = statistics.median(r["step_seconds"] for r in mine[1:] or mine)
        tail = train[-max(1, len(train) // 10) :]
        out = {
            "config": self.cfg.name,
            "step": step,
            "loss": train[-1]["loss"],
            "eval_loss": evals[-1]["eval_loss"] if evals else None,
            "eval_bits_per_byte": evals[-1].get("bits_per_byte") if evals else None,
            "eval_step": evals[-1]["step"] if evals else None,
            "first_eval_loss": evals[0]["eval_loss"] if evals else None,
            "bigram_loss": self.bigram,
            "tokens_per_second": train[-1]["tokens"] / speed,
            "step_seconds_median": speed,
            "time_to_first_step_seconds": self.timing.get("time_to_first_step_seconds"),
            "compile_seconds": self.timing.get("compile_seconds"),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,
            "params_total": total,
            "params_active": active,
            "mesh": self.cfg.mesh.sizes,
            "dispatch": None if self.cfg.model.moe is None else self.dispatch(),
            "attention": {name: c.kernel for name, c in kernels.choices(self.cfg, self.platform).items()},
            "alarms": self.alarms,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "platform": jax.devices()[0].platform,
            "workdir": str(self.workdir),
        }
        counts = {k: sum(r.get(k, 0) for r in tail) for k in ("routed", "kept", "dropped")}
        load = train[-1].get("load")
        return out | counts | {"load_max_over_mean": None if load is None else load_max_over_mean(load)}

    def draw(self, report: dict[str, Any]) -> None:
        """The picture."""
        train, evals = read_metrics(self.workdir / "metrics.jsonl")
        path = draw_run(train, evals, self.workdir / "run.png", title=self.cfg.name, bigram=self.bigram)
        report["picture"] = str(path)
        self.say(f"picture {path}")

    def sample(self, state: State, prompt: str) -> str:
        """The prompt and how the model continues it, or what it answers. Every process computes a part."""
        tokenizer = self.corpus.tokenizer
        generator = Generator(self.model, self.mesh, tokenizer.size, tokenizer.eos)
        whole = self.cfg.model.answers
        ids = self.corpus.prompt(prompt, whole)
        read = 1 if self.cfg.model.encoder else len(ids)  # by the decoder
        room = self.cfg.model.max_length - read
        new = generator(state.weights, [ids], min(self.cfg.train.sample_tokens, room))
        return tokenizer.decode(new.tokens[0]) if whole else prompt + continued(tokenizer, ids.tolist(), new.tokens[0])

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
