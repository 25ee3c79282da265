"""The processes of one run: flags or a cluster say which one this is, and JAX joins them.

`supervise` holds them together from outside; nothing here is touched where `--processes` is not given.
"""

import argparse
import importlib.metadata
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_jax import config
from moe_jax.checks import check_devices
from moe_jax.convert.sample import sample
from moe_jax.refused import Problem, Refused

DETECT = "detect"
JAX_SECONDS = 60  # for JAX to start and to connect what has come already, at the least
RETRY_SECONDS = 0.3
HEARTBEAT_SECONDS = 50  # until JAX gives a process up that hangs; one that dies is seen at once, by its supervisor


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is.

    Attributes:
        index: from 0. count: of all. host, port: where process 0 listens.
        detected: JAX read them from the cluster, and knows which devices of the machine are this process's.
        service: port of JAX's own service on the same host: as --service-port says, or once process 0 has chosen it.
    """

    index: int
    count: int
    host: str
    port: int
    detected: bool = False
    service: int | None = None

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"

    @property
    def local(self) -> bool:
        """Whether all processes are on this machine."""
        return self.host in ("localhost", "127.0.0.1", "::1")

    def start(self, seconds: float, here: Callable[[], None]) -> None:
        """Join the processes in JAX; call it before anything asks JAX for a device.

        JAX aborts a process whose time is over, and cannot say for whom it waited. So its time is longer than that of
        the supervisor of process 0, which knows who is `here`.
        From then on SIGTERM, in any process, is JAX's preemption notice, which `AgreedStop` answers.

        Args:
            seconds: how long to wait for the others.
            here: tells the supervisor that JAX is loaded and process 0 is in reach.
        """
        import jax

        self.reach(seconds)
        here()
        host = f"[{self.host}]" if ":" in self.host else self.host
        address = f"{host}:{self.service}"
        jax.distributed.initialize(
            address,
            self.count,
            self.index,
            cluster_detection_method=None if self.detected else "deactivate",
            initialization_timeout=math.ceil(seconds) + JAX_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            coordinator_bind_address=address if self.local else None,
        )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked by the supervisor until here

    def reach(self, seconds: float) -> None:
        """Wait until process 0 has started JAX's service."""
        deadline = time.monotonic() + seconds
        while self.index != 0:
            try:
                socket.create_connection((self.host, self.service or 0), timeout=max(1.0, seconds)).close()
                return
            except OSError as e:
                if time.monotonic() > deadline:
                    why = f"JAX's service at {self.host}:{self.service} cannot be reached within {seconds:g} s: {e}"
                    remedy = "let that port of process 0 pass, choose one with --service-port, or raise --join-seconds"
                    raise Refused(Problem("--service-port", why, remedy)) from None
                time.sleep(RETRY_SECONDS)


def find_place(args: argparse.Namespace) -> Place | None:
    """What the flags or the cluster say; None: this process is alone.

    Raises:
        Refused: flags that do not fit together, or no cluster.
    """
    given = getattr(args, "processes", None)
    if given is None:
        for name in ("process", "coordinator", "service_port"):
            if getattr(args, name, None) is not None:
                flag, why = f"--{name.replace('_', '-')}", f"is {getattr(args, name)}, and --processes is not given"
                raise Refused(Problem(flag, why, f"give --processes N as well, or take {flag} out"))
        return None
    if not args.join_seconds > 0:
        raise Refused(Problem("--join-seconds", f"is {args.join_seconds:g}", "give more than 0"))
    if args.service_port is not None and not 0 < args.service_port < 65536:
        raise Refused(Problem("--service-port", f"is {args.service_port}", "give a port, 1 to 65535"))
    place = _find_place(args, given)
    if place is not None and place.service == place.port:
        why = f"is {place.port}, and there the processes meet before it starts"
        raise Refused(Problem("--service-port", why, "give another port than that of --coordinator"))
    return place


def _find_place(args: argparse.Namespace, given: str) -> Place | None:
    if given == DETECT:
        return _from_cluster(args)
    if not (given.isascii() and given.isdecimal() and int(given) >= 1):
        raise Refused(Problem("--processes", f"is {given!r}", f"give a number from 1, or {DETECT}"))
    count = int(given)
    if args.process is None and count > 1:
        raise Refused(Problem("--process", f"is missing, of {count} processes", f"give each its own, 0 to {count - 1}"))
    if args.process is not None and not 0 <= args.process < count:
        why = f"is {args.process}, of {count} processes"
        raise Refused(Problem("--process", why, f"give each its own, 0 to {count - 1}, or raise --processes"))
    if count == 1:
        return None
    return Place(args.process, count, *_address(args.coordinator), service=args.service_port)


def asks(args: argparse.Namespace, place: Place) -> dict[str, str]:
    """What all processes must have in common, under the names that a refusal uses.

    Raises:
        Refused: what cannot work in as many processes, before they meet.
    """
    given = {"--fake-devices": args.fake_devices, "--service-port": args.service_port}
    given |= {f"version of {name}": importlib.metadata.version(name) for name in ("moe-jax", "jax")}
    given["command"] = args.command
    if args.command != "train":
        own = {"--batches": args.batches} if args.command == "eval" else {"SRC": sample(args.source)}
        overrides = {name: value for name, _, value in (text.partition("=") for text in args.overrides)}
        return words(given | own | overrides)
    if args.workdir is None:
        why, remedy = "is missing, and each process would make a folder of its own", "give all of them the same folder"
        raise Refused(Problem("--workdir", why, f"{remedy}, on a disk that all of them see"))
    cfg = config.load(args.config, args.overrides)
    if problems := check_devices(cfg.mesh, args.fake_devices, place.count):
        raise Refused(*problems)
    return words(given | config.to_dict(cfg))


def words(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The values of nested dicts as texts, under keys `a.b.c`; what is unset is left out."""
    out: dict[str, str] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            out |= words(value, f"{prefix}{name}.")
        elif value is not None:
            out[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return out


def _address(text: str | None) -> tuple[str, int]:
    """Host and port of HOST:PORT."""
    host, _, port = (text or "").rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        why = "is missing" if text is None else f"is {text!r}"
        raise Refused(
            Problem("--coordinator", why, "give HOST:PORT of process 0, such as node-0:12355, to all of them")
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _from_cluster(args: argparse.Namespace) -> Place | None:
    for flag in ("process", "coordinator"):
        if getattr(args, flag) is not None:
            why = f"is {getattr(args, flag)}, and --processes {DETECT} asks the cluster for it"
            raise Refused(Problem(f"--{flag}", why, f"take it out, or give --processes N in place of {DETECT}"))
    # In a process of its own: JAX starts threads, and the supervisor is forked from this process later on.
    code = "import json; from moe_jax.processes import detected; print(json.dumps(detected()))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    remedy = "give --processes N --process I --coordinator HOST:PORT"
    if done.returncode:
        why = f"is {DETECT}, and asking the cluster failed: {(done.stderr.strip() or '?').splitlines()[-1]}"
        raise Refused(Problem("--processes", why, f"mend that, or {remedy}"))
    address, count, index = json.loads(done.stdout.splitlines()[-1])
    if address is None or count is None or index is None:
        why = f"is {DETECT}, and JAX finds no SLURM step, Kubernetes job, TPU pod or other cluster around this process"
        raise Refused(Problem("--processes", why, f"start it in one, or {remedy}"))
    return None if count == 1 else Place(index, count, *_address(address), detected=True, service=args.service_port)


def detected() -> tuple[str | None, int | None, int | None]:
    """Address of process 0, number of processes and index of this one, by JAX's own detection; None: no cluster."""
    # JAX offers it only as a part of `jax.distributed.initialize`, which needs the others to be there already.
    from jax._src.clusters import ClusterEnv

    return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, JAX_SECONDS)[:3]
