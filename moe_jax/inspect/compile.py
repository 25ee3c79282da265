"""Compiling a program to read it: fast, with what the compiler warns of and how much memory it needs."""

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh

# Nothing runs: leave out what only makes the program faster. None of it touches the partitioner.
OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
    # A gather stays a gather, where it would be cut into steps that overlap with a product.
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "100000"},
    "gpu": {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
}
LEVEL = {"tpu": "O0"}  # the same collectives five times sooner, none of them overlapped with other work
REPLICATES = re.compile(
    r"Involuntary full rematerialization(?:.*?from sharding (?P<old>.*?) to (?P<new>.*?)"
    r"(?: efficiently)? for HLO operation %(?P<operation>\S+ = \S+ [\w-]+))?"
)


def resharded(line: str) -> str | None:
    """What the partitioner says that it replicates, if the line is such a warning."""
    m = REPLICATES.search(line)
    if m is None:
        return None
    return line.strip() if m["operation"] is None else f"{m['operation']}, from {m['old']} to {m['new']}"


class TooLarge(Exception):
    """A program that the compiler refuses, because it does not fit the memory of a device."""


class Compiled(NamedTuple):
    """A compiled program."""

    text: str
    peak_bytes: int  # of memory on each device
    seconds: float
    replicated: tuple[str, ...]  # operations that the partitioner could only reshard by gathering all of them


@contextlib.contextmanager
def captured_errors() -> Generator[list[str]]:
    """Lines that libraries write to standard error meanwhile, in the list after it. They bypass `sys.stderr`."""
    lines: list[str] = []
    failed = True
    sys.stderr.flush()
    with tempfile.TemporaryFile("w+b") as file:
        keep = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
            failed = False
        except TooLarge:
            failed = False  # it holds what there is to say
            raise
        finally:
            os.dup2(keep, 2)
            os.close(keep)
            file.seek(0)
            lines += file.read().decode("utf-8", "replace").splitlines()
            if failed:  # what the compiler said is all that there is to go by
                print(*lines, sep="\n", file=sys.stderr)


@contextlib.contextmanager
def for_reading(platform: str) -> Generator[None]:
    """Settings under which the text of a program is complete and readable."""
    settings = {"jax_enable_compilation_cache": False}  # a program out of the cache comes without its warnings
    if platform in LEVEL:
        settings["jax_optimization_level"] = LEVEL[platform]
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        reset_cache()  # JAX asks once, at the first program of a process, whether there is a cache
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


def compile_to_read(lowered: jax.stages.Lowered, mesh: Mesh) -> Compiled:
    """Compile a lowered program for the platform of its mesh, which may be a topology.

    Raises:
        TooLarge: it does not fit a device's memory, which only the TPU compiler holds against it.
    """
    platform, begun = mesh.devices.flat[0].platform, time.perf_counter()
    with for_reading(platform), captured_errors() as lines:
        try:
            compiled = lowered.compile(compiler_options=OPTIONS[platform])
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            remedy = "name a larger topology, raise mesh.fsdp, lower data.batch, or set model.remat=full"
            raise TooLarge(f"{str(e).splitlines()[0]}\n    remedy: {remedy}") from None
    seconds = time.perf_counter() - begun
    replicated = tuple(dict.fromkeys(text for line in lines if (text := resharded(line)) is not None))
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None, "every compiler tells both of a program that it has just compiled"
    peak = memory.peak_memory_in_bytes
    if platform == "cpu":  # whose peak leaves the temporaries out
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = kept + memory.temp_size_in_bytes
    return Compiled(text, int(peak), seconds, replicated)
