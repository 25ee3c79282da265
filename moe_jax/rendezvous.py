"""The processes of a run meet at the address of `--coordinator`, where process 0 listens, before anything else runs."""

import contextlib
import json
import resource
import selectors
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from moe_jax.processes import RETRY_SECONDS, Place
from moe_jax.refused import Problem, Refused

CLOSE_SECONDS = 3.0  # for the other end to read what has been sent
ANSWER_SECONDS = 30.0  # for process 0 to say who is missing when its own time is over
SHOWN = 8  # differences named in a message
GREETING_SECONDS = 10.0  # for a connection to say which process it is
STRANGERS = 128  # connections that have not said so yet; of more, the oldest goes
FILES = 256  # open at once beside a connection a process
LONGEST = 1 << 20  # bytes of a message
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a machine that is off is noticed in 30 s


class Link:
    """A connection to another supervisor: JSON objects, one a line."""

    def __init__(self, sock: socket.socket):
        self.sock, self.buffer, self.host = sock, b"", ""
        with contextlib.suppress(OSError):  # the other end may have gone again
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEP_ALIVE.items():
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send, if there is anyone left to read it."""
        with contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """What has come since; None once the other end is closed, or is none of ours."""
        try:
            piece = self.sock.recv(65536)
            *lines, self.buffer = (self.buffer + piece).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError):  # a stranger may send anything
            return None
        if not piece or len(self.buffer) > LONGEST or not all(isinstance(m, dict) for m in messages):
            return None
        return messages

    def close(self) -> None:
        """Say that nothing more comes, and let the other end read what has been sent."""
        deadline = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            self.sock.settimeout(CLOSE_SECONDS)
            while self.sock.recv(65536) and time.monotonic() < deadline:
                pass
        self.sock.close()


def meet(place: Place, asks: Mapping[str, str], seconds: float) -> tuple[Place, dict[int, Link]]:
    """Wait until all processes are here. Returns the place with the port of JAX's service, and the links.

    Args:
        asks: what all of them must have in common, by the names that a refusal uses.
        seconds: how long to wait.
    Raises:
        Refused: some did not come, process 0 is not there, or they do not fit together.
    """
    if place.index == 0:
        links, service = gather(place, asks, seconds)
    else:
        link, service = join(place, asks, seconds)
        links = {0: link}
    return replace(place, service=service), links


def refuse(links: Iterable[Link], *problem: str) -> Refused:
    """Tell these why they are refused, and return what to raise here."""
    for link in links:
        link.send({"refused": problem})
        link.close()
    return Refused(Problem(*problem))


def numbers(processes: list[int]) -> str:
    """process 3; processes 1, 2 and 5."""
    *most, last = map(str, processes)
    return f"processes {', '.join(most)} and {last}" if most else f"process {last}"


def gather(place: Place, asks: Mapping[str, str], seconds: float) -> tuple[dict[int, Link], int]:
    """Process 0: wait for all others. Returns their links and the port that JAX's service is to have."""
    allow_files(place)
    deadline = time.monotonic() + seconds
    with listen(place) as server, Door(place, asks, server) as door:
        while len(door.links) < place.count - 1:
            if time.monotonic() >= deadline:
                missing = numbers([i for i in range(1, place.count) if i not in door.links])
                why = f"{missing} of {place.count} did not join within {seconds:g} s at port {place.port}"
                remedy = "start every process with the same --coordinator, --processes and its own --process, see "
                remedy += "whether one failed, or raise --join-seconds"
                raise refuse(door.links.values(), "--processes", why, remedy)
            door.wait(deadline)
        service = service_port(place, door.links)
        for link in door.links.values():
            link.send({"start": service})
        return door.links, service


def service_port(place: Place, links: Mapping[int, Link]) -> int:
    """The port for JAX's service: what --service-port says, or else a free one."""
    try:
        with socket.create_server(("localhost" if place.local else "", place.service or 0)) as free:
            return free.getsockname()[1]
    except OSError as e:
        why = f"process 0 cannot listen at port {place.service} of its machine: {e.strerror}"
        remedy = "give all processes another port, or none, or end what holds it"
        raise refuse(links.values(), "--service-port", why, remedy) from None


class Door:
    """Process 0's end of the meeting: who has joined, and who has not said yet which process it is.

    Who does not say so in time, in one message of ours, is dropped, and the others go on.
    """

    def __init__(self, place: Place, asks: Mapping[str, str], server: socket.socket):
        self.place, self.asks, self.server = place, asks, server
        self.links: dict[int, Link] = {}
        self.strangers: dict[Link, float] = {}  # until when each may be one, the oldest first
        self.sources = selectors.DefaultSelector()
        self.sources.register(server, selectors.EVENT_READ)

    def __enter__(self) -> "Door":
        return self

    def __exit__(self, failed: type | None, *_: object) -> None:
        for link in [*self.strangers, *(self.links.values() if failed else ())]:
            link.sock.close()
        self.sources.close()

    def wait(self, deadline: float) -> None:
        """Take in what comes next."""
        now = time.monotonic()
        for link in [link for link, until in self.strangers.items() if now >= until]:
            self.drop(link)
        for key, _ in self.sources.select(min([deadline, *self.strangers.values()]) - now):
            if key.fileobj is self.server:
                self.accept()
            elif isinstance(key.fileobj, Link) and key.fileobj.fileno() >= 0:  # not dropped a moment ago
                self.hear(key.fileobj)

    def accept(self) -> None:
        """Let the next connection in, and of too many strangers the oldest go."""
        with contextlib.suppress(BlockingIOError, ConnectionError):  # it may have gone again
            link = Link(self.server.accept()[0])
            self.strangers[link] = time.monotonic() + GREETING_SECONDS
            self.sources.register(link, selectors.EVENT_READ)
            if len(self.strangers) > STRANGERS:
                self.drop(next(iter(self.strangers)))

    def hear(self, link: Link) -> None:
        """A greeting, or the end of a connection; a process that goes may start again and come back."""
        messages = link.receive()
        if messages is None:
            self.drop(link)
        elif messages and link in self.strangers:
            del self.strangers[link]
            self.sources.unregister(link)
            if admit(self.place, self.asks, self.links, link, messages[0]):
                self.sources.register(link, selectors.EVENT_READ)

    def drop(self, link: Link) -> None:
        self.strangers.pop(link, None)
        for index in [i for i, other in self.links.items() if other is link]:
            del self.links[index]
        self.sources.unregister(link)
        link.sock.close()


def allow_files(place: Place) -> None:
    """Raise the limit on open files to what a connection a process takes. The child has it too, for JAX's service.

    Raises:
        Refused: more than the system lets this user have.
    """
    need, (soft, hard) = place.count + FILES, resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= need:
        return
    try:
        if hard != resource.RLIM_INFINITY and hard < need:
            raise ValueError
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
    except (OSError, ValueError):
        why = f"is {place.count}, for which process 0 may need {need} open files, a connection each and {FILES} more; "
        why += f"the hard limit on its host is {hard}"
        remedy = "raise it there (ulimit -Hn; systemd: LimitNOFILE=; containers: --ulimit nofile=), or start fewer"
        raise Refused(Problem("--processes", why, remedy)) from None


def listen(place: Place) -> socket.socket:
    """The socket at which process 0 waits for the others; for those of this machine alone where all are here."""
    try:
        if place.local:
            server = socket.create_server((place.host, place.port), family=family(place.host))
        elif socket.has_dualstack_ipv6():
            server = socket.create_server(("", place.port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", place.port))
        server.listen(max(128, place.count))  # all may come at once
        server.setblocking(False)
        return server
    except OSError as e:
        why = f"process 0 cannot listen at port {place.port} of this machine: {e.strerror}"
        raise Refused(Problem("--coordinator", why, "give all processes another port, or end what holds it")) from None


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def admit(place: Place, asks: Mapping[str, str], links: dict[int, Link], link: Link, hello: dict) -> bool:
    """Take a process in, or refuse it: alone where its number is taken, all together where it runs something else.

    Returns whether it is in. What is no greeting of ours is closed without a word.
    """
    index, count, theirs = hello.get("process"), hello.get("processes"), hello.get("asks")
    if type(index) is not int or type(count) is not int or not isinstance(theirs, dict):
        link.sock.close()
        return False
    everyone = [*links.values(), link]
    if count != place.count:
        why = f"is {count} for process {index}, and {place.count} for process 0"
        raise refuse(everyone, "--processes", why, "give all processes the same number")
    if lines := differences(asks, theirs, index):
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        why = "\n    ".join([f"process {index} was started with another command than process 0:", *lines])
        remedy = "start all processes with the same command but for --process, and with the same versions"
        raise refuse(everyone, "--process", why, remedy)
    if not 0 < index < count or index in links:
        why = f"is {index}, and a process of that number has joined already"
        refuse([link], "--process", why, f"give each process its own, 0 to {count - 1}")
        return False
    link.host = str(hello.get("host"))
    links[index] = link
    return True


def differences(asks: Mapping[str, str], theirs: Mapping[str, Any], index: int) -> list[str]:
    """What another process was started with in place of what process 0 was, a line each."""
    names = [name for name in {**asks, **theirs} if asks.get(name) != theirs.get(name)]
    return [f"{n}: {theirs.get(n, 'not set')} in process {index}, {asks.get(n, 'not set')} in process 0" for n in names]


def join(place: Place, asks: Mapping[str, str], seconds: float) -> tuple[Link, int]:
    """The others: come to process 0 and wait until all have. Returns the link to it and the port of JAX's service."""
    deadline, at = time.monotonic() + seconds, f"{place.host}:{place.port}"
    remedy = "start process 0, give its host and port to all, see whether a firewall is between, or raise "
    remedy += "--join-seconds"
    while True:
        try:
            sock = socket.create_connection((place.host, place.port), timeout=max(0.1, deadline - time.monotonic()))
            break
        except OSError as e:
            if time.monotonic() + RETRY_SECONDS > deadline:
                why = f"process 0 of {place.count} did not answer at {at} within {seconds:g} s ({e.strerror or e})"
                raise Refused(Problem("--coordinator", why, remedy)) from None
            time.sleep(RETRY_SECONDS)
    sock.settimeout(None)
    link = Link(sock)
    hello = {"process": place.index, "processes": place.count, "asks": asks, "host": socket.gethostname()}
    link.send(hello)
    messages: list[dict] | None = []
    deadline += ANSWER_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(link, selectors.EVENT_READ)
        while messages == []:
            left = deadline - time.monotonic()
            messages = link.receive() if left > 0 and selector.select(left) else None
    answer = messages[0] if messages else {}
    if "start" in answer:
        link.host = place.host
        return link, answer["start"]
    sock.close()
    if "refused" in answer:
        raise Refused(Problem(*map(str, answer["refused"])))
    why = f"what answers at {at} is not, or is no longer, process 0 of this run"
    raise Refused(Problem("--coordinator", why, remedy))
