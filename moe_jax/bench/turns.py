"""Programs that take turns, each a process of its own that waits on a pipe, so that no two share a thread pool.

Only the standard library is imported: another interpreter, which lacks JAX, serves as well.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HOME = str(Path(__file__).parents[2])  # of the package, where an interpreter that has not installed it finds it
Step = Callable[[], Any]
"""One more turn; returns what is to be told of it."""


class Missing(Exception):
    """What the other interpreter cannot import."""


class ProgramFailed(Exception):
    """No number comes of a benchmark without this program."""


def serve(build: Callable[[dict[str, Any]], tuple[Step, dict[str, Any]]]) -> None:
    """Build a program from the first line of standard input; every further line is a turn, answered with its times."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    spec = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, spec["processors"])  # before a thread pool is made
    try:
        step, about = build(spec)
        if "memory" in spec:  # an honest failure instead of a machine out of memory
            resource.setrlimit(resource.RLIMIT_DATA, (spec["memory"], resource.RLIM_INFINITY))
        answer(**about)
        for _ in sys.stdin:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            cpu, wall = time.process_time(), time.perf_counter()
            returned = step()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            answer(wall=wall, cpu=cpu, faults=faults, returned=returned)
    except Missing as e:
        answer(missing=str(e))
    except Exception as e:
        answer(failed=f"{type(e).__name__}: {str(e).strip().splitlines()[-1] if str(e).strip() else 'no message'}")


class Program:
    """A process that serves."""

    def __init__(self, name: str, command: Sequence[str], spec: dict[str, Any], env: dict[str, str] | None = None):
        self.name, self.times, self.failed = name, [], None
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **(env or {})}, text=True
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.about = self.ask(json.dumps(spec))

    def ask(self, line: str) -> dict[str, Any]:
        """Its answer; what it cannot do is kept in `failed`, and ends it."""
        try:
            print(line, file=self.stdin, flush=True)
            text = self.stdout.readline()
        except BrokenPipeError:
            text = ""
        answer = json.loads(text) if text else {"failed": f"the process ended with {self.process.wait()}"}
        if "missing" in answer:
            self.end()
            raise Missing(answer["missing"])
        if "failed" in answer:
            self.failed = answer["failed"]
            self.end()
        return answer

    def end(self) -> None:
        """Close its input, at which it ends."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, and closing writes what it did not take
            self.stdin.close()
        self.process.wait()
        self.stdout.close()


def take_turns(programs: Sequence[Program], rounds: int, warm: int, tell: Callable[[str], None]) -> None:
    """One step of each program, one after the other, and again; the first `warm` rounds do not count."""
    for turn in range(warm + rounds):
        tell(f"turn {turn + 1} of {warm + rounds}")
        for program in programs:
            if program.failed is None:
                answer = program.ask("step")
                if turn >= warm and program.failed is None:
                    program.times.append(answer)


def available_memory() -> int:
    """Bytes that programs can still take."""
    with open("/proc/meminfo") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
