"""What tests of several processes share: ports and flags, meetings in threads, and supervised processes without JAX."""

import socket
import subprocess
import sys
import threading

from commands import ENV

from moe_jax import rendezvous
from moe_jax.config import Refused
from moe_jax.processes import Place


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def flags(index: int, count: int, port: int) -> list[object]:
    return ["--processes", count, "--process", index, "--coordinator", f"localhost:{port}"]


def meet(*places: tuple[Place, dict], seconds: float = 5.0) -> list:
    """What the meeting of some processes ends in for each."""
    out: list = [None] * len(places)

    def one(i: int) -> None:
        try:
            out[i] = rendezvous.meet(*places[i], seconds)
        except Refused as e:
            out[i] = str(e)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


WORKER = """
import os, sys, time
from moe_jax import cli, processes, rendezvous, supervise
from moe_jax.processes import Place

seconds = 300
exec(sys.argv[6])
index, count, port = map(int, sys.argv[1:4])
place, links = rendezvous.meet(Place(index, count, "localhost", port), {"text": "the same"}, 20)

def work(here):
    print(os.getpid(), flush=True)
    exec(sys.argv[4], scope := {"os": os, "time": time, "here": here, "place": place, "seconds": seconds})
    return scope["code"]

class args:
    command = "train"

run = supervise.Supervisor(place, links, lambda line: print(line, file=sys.stderr), sys.argv[5] == "True", seconds)
sys.exit(cli.checked(args, lambda args: run(work)))
"""
SLEEP = "time.sleep(60)"


def workers(*code: str, saves: bool = True, before: str = "") -> tuple[list[subprocess.Popen], list[int]]:
    """Supervised processes that do no more than some lines of Python, and what does it in each; `before` they meet."""
    port = free_port()
    argv = [
        [sys.executable, "-c", WORKER, str(i), str(len(code)), str(port), text, str(saves), before]
        for i, text in enumerate(code)
    ]
    children = [subprocess.Popen(a, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) for a in argv]
    return children, [int(child.stdout.readline()) for child in children]
