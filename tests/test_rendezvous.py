"""How the processes of a run meet: strangers at the port, differing commands, and more connections than usual."""

import socket
import subprocess
import sys
import threading
import time

import pytest
from commands import ENV, check_refusal, finish
from joined import free_port, meet, workers

from moe_jax import cli, processes, rendezvous
from moe_jax.processes import Place


def test_who_runs_something_else_is_refused_by_all():
    """With each key that differs, and both values."""
    port = free_port()
    asks = [{"model.layers": "4" if i == 2 else "2", "train.keep": "1", "train.seed": "0"} for i in range(3)]
    del asks[2]["train.keep"]
    out = meet(*[(Place(i, 3, "localhost", port), asks[i]) for i in range(3)])
    assert out[0] == out[2] and "process 2 was started with another command than process 0:" in out[0]
    lines = out[0].split("\n    ")[1:-1]
    assert lines == ["model.layers: 4 in process 2, 2 in process 0", "train.keep: not set in process 2, 1 in process 0"]
    assert out[1] == out[0] or "did not answer" in out[1] or "is no longer" in out[1]


@pytest.mark.parametrize(
    "argv, flags, want",
    [
        (["eval", "run"], [["--batches", "2"], ["--batches", "3"]], ["--batches: 3 in process 1, 2 in process 0"]),
        (["eval", "run"], [[], ["--fake-devices", "4"]], ["--fake-devices: 4 in process 1, not set in process 0"]),
        (["eval", "run"], [["a.b=1"], ["a.b=2"]], ["a.b: 2 in process 1, 1 in process 0"]),
        (["eval", "run"], [["--service-port", "7"], []], ["--service-port: not set in process 1, 7 in process 0"]),
        (
            ["train", "tiny_switch", "--workdir", "run"],
            [["train.steps=7"], ["train.steps=8", "data.seed=3"]],
            ["data.seed: 3 in process 1, 0 in process 0", "train.steps: 8 in process 1, 7 in process 0"],
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x[0], str) else None,
)
def test_what_differs_is_named_with_both_values(argv, flags, want):
    process = ["--processes", "2", "--coordinator", "localhost:1", "--process"]
    given = [cli.parse([*argv, *flags[i], *process, str(i)]) for i in range(2)]
    asked = [processes.asks(args, processes.find_place(args)) for args in given]
    assert sorted(rendezvous.differences(*asked, 1)) == want


def test_the_port_of_the_service_is_the_one_given():
    port, service = free_port(), free_port()
    out = meet(*((Place(i, 2, "localhost", port, service=service), {}) for i in range(2)))
    assert [place.service for place, _ in out] == [service] * 2
    for _, links in out:
        links.popitem()[1].sock.close()


def test_a_port_of_the_service_that_is_taken_is_refused_by_all():
    with socket.create_server(("localhost", 0)) as taken:
        service, port = taken.getsockname()[1], free_port()
        out = meet(*((Place(i, 2, "localhost", port, service=service), {}) for i in range(2)))
    assert out[0] == out[1] and f"--service-port: process 0 cannot listen at port {service} of its machine" in out[0]


def test_another_number_of_processes_is_refused_by_all():
    port = free_port()
    out = meet((Place(0, 2, "localhost", port), {}), (Place(1, 3, "localhost", port), {}))
    assert out[0] == out[1] and "--processes: is 3 for process 1, and 2 for process 0" in out[0]


def test_a_number_is_given_once():
    """The second is refused, and the run begins without it; a stranger at the port is not taken for a process."""
    port = free_port()
    places = [Place(i, 3, "localhost", port) for i in (0, 1, 1, 2)]
    out: list = []
    first = threading.Thread(target=lambda: out.extend(meet(*((p, {}) for p in places[:3]), seconds=20)))
    first.start()
    time.sleep(0.5)
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        last = meet((places[3], {}))
    first.join()
    refused = [o for o in out if isinstance(o, str)]
    assert len(refused) == 1 and "--process: is 1, and a process of that number has joined already" in refused[0]
    (place, links), *others = [o for o in [*out, *last] if not isinstance(o, str)]
    assert sorted(links) == [1, 2] and len(others) == 2
    assert {p.service for p, _ in others} == {place.service}
    for _, each in [(place, links), *others]:
        for link in each.values():
            link.sock.close()


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET / HTTP/1.1\r\n", id="words"),
        pytest.param(b"{", id="half a line"),
        pytest.param(b"x" * 4000, id="an endless line"),
        pytest.param(b'{"process": 1}\n', id="another object"),
        pytest.param(b'{"process": 1, "processes": "2", "asks": {}}\n', id="a count in words"),
    ],
)
def test_a_stranger_is_dropped_while_the_others_are_waited_for(monkeypatch, sent):
    """Long before the meeting is over; a slow one that goes on sending as well."""
    monkeypatch.setattr(rendezvous, "GREETING_SECONDS", 1.0)
    monkeypatch.setattr(rendezvous, "LONGEST", 1000)
    port, out = free_port(), []
    first = threading.Thread(target=lambda: out.extend(meet((Place(0, 2, "localhost", port), {}), seconds=60)))
    first.start()
    with reached(port) as stranger:
        stranger.settimeout(0.2)
        begun, answer = time.monotonic(), None
        while answer != b"" and time.monotonic() < begun + 10:
            try:
                stranger.sendall(sent[:1] if answer == b"late" else sent)
                answer = stranger.recv(1)
            except TimeoutError:
                answer = b"late"
            except ConnectionError:
                answer = b""
        assert answer == b"" and first.is_alive()
    (joined,) = meet((Place(1, 2, "localhost", port), {}))
    first.join()
    assert list(out[0][1]) == [1] and out[0][0].service == joined[0].service
    out[0][1][1].sock.close()
    joined[1][0].sock.close()


def reached(port: int) -> socket.socket:
    """A connection to process 0, once it listens."""
    for _ in range(100):
        try:
            return socket.create_connection(("localhost", port))
        except OSError:
            time.sleep(0.05)
    return pytest.fail("process 0 does not listen")


def test_of_many_strangers_the_oldest_go(monkeypatch):
    """They would take the connections that processes need."""
    monkeypatch.setattr(rendezvous, "STRANGERS", 5)
    port, out = free_port(), []
    first = threading.Thread(target=lambda: out.extend(meet((Place(0, 2, "localhost", port), {}), seconds=60)))
    first.start()
    strangers = [reached(port) for _ in range(12)]
    for stranger in strangers[:7]:
        stranger.settimeout(5)
        assert stranger.recv(1) == b""
    (joined,) = meet((Place(1, 2, "localhost", port), {}))
    first.join()
    for sock in [*strangers, out[0][1][1].sock, joined[1][0].sock]:
        sock.close()


def test_an_endless_trickle_from_process_0_is_given_up(monkeypatch):
    """What answers there may be anything."""
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 1.0)
    port, ends = free_port(), threading.Event()

    def trickle() -> None:
        with socket.create_server(("localhost", port)) as server, server.accept()[0] as sock:
            while not ends.wait(0.1):
                try:
                    sock.sendall(b"x")
                except OSError:
                    return

    thread = threading.Thread(target=trickle)
    thread.start()
    begun = time.monotonic()
    (out,) = meet((Place(1, 2, "localhost", port), {}), seconds=1)
    ends.set()
    thread.join()
    assert "is not, or is no longer, process 0 of this run" in out and time.monotonic() - begun < 10


MANY = """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
"""


def test_descriptors_beyond_those_of_select():
    """As a run of more than a thousand processes has."""
    children, _ = workers("code = 0", "os.write(2, b'a line'); code = 0", before=MANY)
    for code, _, log in map(finish, children):
        assert code == 0, log


FEW = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))"
CHECK = "import resource; code = 0 if resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 258 else 5"


def test_the_limit_on_open_files_grows_with_the_processes():
    """For process 0, and for its child, in which JAX has a connection to each."""
    children, _ = workers(CHECK, "code = 0", before=FEW.format(hard=1000))
    for code, _, log in map(finish, children):
        assert code == 0, log


def test_more_processes_than_the_system_has_files_for():
    code = f"{FEW.format(hard=128)}; from moe_jax import cli; import sys; sys.exit(cli.main(sys.argv[1:]))"
    argv = ["train", "tiny_switch", "mesh.data=1", "mesh.expert=3", "data.batch=3", "model.moe.experts=3", "--workdir"]
    argv += [
        "nowhere",
        "--join-seconds",
        "5",
        "--processes",
        "3",
        "--process",
        "0",
        "--coordinator",
        f"localhost:{free_port()}",
    ]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *argv], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    needles = ["--processes: is 3, for which process 0 may need 259 open files", "is 128", "ulimit -Hn"]
    check_refusal(*finish(child), "train", *needles)
