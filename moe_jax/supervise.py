"""The processes of a run held together from outside, so that the end of one is told by all and none hangs.

Where a process dies, JAX's collectives wait for it, or JAX aborts the others without saying who it was. So each command
forks: the child does the work, and the parent, which starts no JAX, supervises it. Each supervisor tells that of
process 0 how its child ended, and that one tells all whose end was the first. Where process 0 is the one that is gone,
its closed connection says so; where a machine is, the kernel's keep-alive.
"""

import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

from moe_jax.processes import HEARTBEAT_SECONDS, Place
from moe_jax.refused import Problem, Refused
from moe_jax.rendezvous import Link, numbers
from moe_jax.terminal import STOPPED

LOST, HUNG, LATE = 1000, 1001, 1002  # beside exit codes and minus the number of a signal: how a process can end
REFUSED, INTERRUPTED = 2, 130
GOOD = (0, STOPPED)  # exit codes of a process that does not end the run of the others
GRACE_SECONDS = 3.0  # for a first cause to come in after its consequence, and for a child that ends by itself
# What libraries print is held as long: the trace of an abort is dropped where a peer is why.
ERROR_SECONDS = GRACE_SECONDS + 1


class ProcessDied(Exception):
    """A process of the run died (exit code 1)."""


def blame(ended: Mapping[int, int], count: int) -> tuple[int, int]:
    """Which process ended the run and how, of those that have ended, in the order in which that became known.

    JAX aborts the others where process 0 dies, or where one of them hangs: an abort is the last cause to name.
    """
    bad = {i: how for i, how in ended.items() if how not in GOOD}
    causes = [i for i, how in bad.items() if how != -signal.SIGABRT]
    if causes:
        return causes[0], bad[causes[0]]
    silent = [i for i in range(count) if i not in ended]
    if len(silent) == 1 and (0 in bad or count > 2):  # the one that JAX did not abort
        return silent[0], HUNG
    first = next(iter(bad))
    return first, bad[first]


def words(how: int) -> str:
    """How a process ended."""
    if how == LOST:
        return "died: its connection closed"
    if how == HUNG:
        return f"hangs: JAX had no sign of life from it for {HEARTBEAT_SECONDS} s and ended the others"
    if how == LATE:
        return "did not come to JAX's service, which process 0 starts, in the time of --join-seconds"
    if how < 0:
        short = ", as the system does where memory is short" if how == -signal.SIGKILL else ""
        return f"died: killed by {signal.Signals(-how).name}{short}"
    return {REFUSED: "was refused, and has said why", INTERRUPTED: "was interrupted"}.get(
        how, f"failed with exit code {how}, and has said why"
    )


class Supervisor:
    """One process's view of the run.

    Args:
        links: of process 0, to all others; of each other, to process 0.
        say: prints a line.
        saves: whether the command answers a SIGTERM by a checkpoint and its end; else it is killed.
        seconds: how long JAX may take to start in all.
    """

    def __init__(
        self,
        place: Place,
        links: Mapping[int, Link],
        say: Callable[[str], None],
        saves: bool = True,
        seconds: float = 300.0,
    ):
        self.place, self.links, self.say, self.saves = place, dict(links), say, saves
        self.leads = place.index == 0
        self.hosts = {place.index: socket.gethostname()} | {i: link.host for i, link in links.items()}
        self.code: int | None = None  # of the child, once it has ended
        self.deadline = time.monotonic() + seconds
        self.late = set(range(place.count)) if self.leads else set()  # whose JAX has not started yet
        self.ended: dict[int, int] = {}  # exit codes, as far as they are known here
        self.verdict: tuple[int, int] | None = None  # who ended the run, and how
        self.asked = 0  # signals to stop
        self.due = 0.0  # when what is waited for is given up
        self.held: list[tuple[float, bytes]] = []  # what libraries printed

    def __call__(self, command: Callable[[Callable[[], None]], int]) -> int:
        """Run the command in a child, with what it calls once JAX has started; returns its exit code.

        Raises:
            ProcessDied: names the process whose end ended the run.
            Refused: another process was refused.
        """
        bells, bell = os.pipe()
        for fd in (bells, bell):
            os.set_blocking(fd, False)
        stops = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) is not signal.SIG_IGN]
        old = {s: signal.signal(s, lambda number, frame: None) for s in (*stops, signal.SIGCHLD)}
        old_bell = signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
        self.fork(command)
        self.sources = selectors.DefaultSelector()
        self.sources.register(bells, selectors.EVENT_READ, "bells")
        self.sources.register(self.errors, selectors.EVENT_READ, "errors")
        self.sources.register(self.leash, selectors.EVENT_READ, "child")
        for index, link in self.links.items():
            self.sources.register(link, selectors.EVENT_READ, index)
        try:
            while not self.over():
                self.wait(bells)
            return self.finish()
        finally:
            if self.code is None:
                os.kill(self.child, signal.SIGKILL)
            self.sources.close()
            signal.set_wakeup_fd(old_bell)
            for s, handler in old.items():
                signal.signal(s, handler)
            for fd in (bells, bell, self.errors):
                os.close(fd)
            self.leash.close()

    def fork(self, command: Callable[[Callable[[], None]], int]) -> None:
        """Start the child. It dies with this process, whose end of a pair of sockets closes then."""
        leash, self.leash = socket.socketpair()
        self.errors, errors = os.pipe()
        os.set_blocking(self.errors, False)
        self.prints = True
        sys.stdout.flush()
        sys.stderr.flush()
        stops = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # none may find a child with this process's handlers
        self.child = os.fork()
        if self.child == 0:
            self.leash.close()
            os.close(self.errors)
            for link in self.links.values():
                link.sock.close()
            work(command, leash, errors)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
        leash.close()
        os.close(errors)

    # What comes in

    def wait(self, bells: int) -> None:
        """Take in what comes next: signals, messages, and what libraries print in the child."""
        seconds = self.deadline - time.monotonic() if self.late else None
        ready = {key.data for key, _ in self.sources.select(0.1 if self.held or self.due else seconds)}
        if "bells" in ready:
            for number in os.read(bells, 4096):
                self.ring(number)
        if "errors" in ready:
            self.hold()
        if "child" in ready:
            if not self.leash.recv(1):
                self.sources.unregister(self.leash)
            elif self.leads:
                self.late.discard(0)
            elif 0 in self.links:
                self.links[0].send({"here": True})
        for index in ready - {"bells", "errors", "child"}:
            self.hear(index)
        if self.verdict is None:
            self.print_held(time.monotonic() - ERROR_SECONDS)

    def hold(self) -> bool:
        """Keep what libraries have printed in the child; returns whether there was any."""
        try:
            piece = os.read(self.errors, 65536)
        except BlockingIOError:
            return False
        self.held.append((time.monotonic(), piece))
        if not piece:
            self.sources.unregister(self.errors)
            self.prints = False
        return bool(piece)

    def ring(self, number: int) -> None:
        """A signal: the child has ended, or someone asks to stop."""
        if number == signal.SIGCHLD and self.code is None:
            child, status = os.waitpid(self.child, os.WNOHANG)
            if child:
                code = os.waitstatus_to_exitcode(status)
                self.code = INTERRUPTED if self.asked > 1 and code == -signal.SIGKILL else code
                self.note(self.place.index, self.code)
        elif number in (signal.SIGTERM, signal.SIGINT) and self.code is None:
            name, self.asked = signal.Signals(number).name, self.asked + 1
            if not self.saves:
                self.asked = 2
                self.say(f"{name}: quits")
                os.kill(self.child, signal.SIGKILL)
            elif self.asked == 1:  # to JAX, which agrees with the others on the last step
                self.say(f"{name}: stopping after this step and saving; Ctrl-C again quits without saving")
                os.kill(self.child, signal.SIGTERM)
            else:
                self.say(f"{name}: quits without saving; the last complete checkpoint stays")
                os.kill(self.child, signal.SIGKILL)

    def hear(self, index: int) -> None:
        """Messages of another supervisor, or the end of its connection."""
        messages = self.links[index].receive()
        if messages is None:
            link = self.links.pop(index)
            self.sources.unregister(link)
            link.sock.close()
            if index not in self.ended and not (self.code in GOOD and not self.leads):
                self.note(index, LOST)
        for message in messages or ():
            if self.leads and "here" in message:
                self.late.discard(index)
            elif self.leads:
                self.note(index, int(message["ended"]))
            else:
                died = int(message["died"])
                self.hosts[died] = str(message["host"])
                self.end(died, int(message["how"]))

    def note(self, index: int, how: int) -> None:
        """A process has ended. Process 0 says what that means; the others tell it of their own child."""
        self.ended.setdefault(index, how)
        self.late.discard(index)
        if how in GOOD or self.verdict is not None:
            pass
        elif how == -signal.SIGABRT or (index == self.place.index and not self.leads):
            self.due = self.due or time.monotonic() + GRACE_SECONDS * (1 if self.leads else 2)
        else:
            self.judge()
        if index == self.place.index and not self.leads and 0 in self.links:
            self.links[0].send({"ended": how})

    def judge(self) -> None:
        """Say whose end it was."""
        self.tell(*blame(self.ended, self.place.count))

    def judge_late(self) -> None:
        """Say who has not come to JAX. Where process 0 has not, nobody can."""
        if 0 not in self.late and len(self.late) > 1:
            self.say(f"{numbers(sorted(self.late))} of {self.place.count} {words(LATE)}")
        self.tell(min(self.late), LATE)

    def tell(self, index: int, how: int) -> None:
        if self.leads:
            for link in self.links.values():
                link.send({"died": index, "how": how, "host": self.hosts[index]})
        self.end(index, how)

    # What follows

    def end(self, index: int, how: int) -> None:
        """The run is over. A child may end by itself where it may have been refused as well."""
        if self.verdict is None:
            self.verdict = index, how
            self.due = time.monotonic() + (GRACE_SECONDS if 0 < how < LOST else 0.0)

    def over(self) -> bool:
        """Whether this process is done; brings that about where the run is over."""
        late = bool(self.due) and time.monotonic() >= self.due
        if self.verdict is None and late:
            self.judge()
        elif self.verdict is None and self.late and time.monotonic() >= self.deadline:
            self.judge_late()
        if self.verdict is not None:
            if self.code is None and late:
                os.kill(self.child, signal.SIGKILL)
            return self.code is not None
        return self.code in GOOD and (not self.leads or len(self.ended) == self.place.count)

    def print_held(self, until: float) -> None:
        """What libraries printed in the child up to a time."""
        while self.held and self.held[0][0] <= until:
            sys.stderr.buffer.write(self.held.pop(0)[1])
            sys.stderr.flush()

    def finish(self) -> int:
        """Part with the others; the exit code, or the error that says who ended the run."""
        while self.prints and self.hold():
            pass
        failed = self.code not in (*GOOD, None) and self.code > 0  # by itself
        if self.verdict is None or self.verdict[0] == self.place.index or failed:
            self.print_held(time.monotonic())
        for link in self.links.values():
            if self.leads:
                link.close()
            else:
                link.sock.close()
        if self.verdict is None or failed:
            return self.code or 0
        index, how = self.verdict
        here = ", this one," if index == self.place.index else ""
        who = f"process {index} of {self.place.count}{here} on {self.hosts[index]}"
        again = "start all of them again with the same command"
        again += "; training goes on from the last complete checkpoint" if self.saves else ""
        if how == REFUSED:
            raise Refused(Problem(who, words(how), f"mend what it says, and {again}"))
        remedy = "see what it printed last"
        if how == LATE:
            remedy += f", whether it reaches port {self.place.service} of {self.place.host} (--service-port chooses it)"
            remedy += ", raise --join-seconds"
        raise ProcessDied(f"{who} {words(how)}\n    remedy: {remedy}, and {again}")


# In the child


def work(command: Callable[[Callable[[], None]], int], leash: socket.socket, errors: int) -> NoReturn:
    """Run the command as the child of a supervisor."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all: the supervisor passes it on
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # SIGTERM waits until JAX can answer it
    threading.Thread(target=follow, args=(leash,), daemon=True).start()
    # Gloo reports on standard output, and an abort prints its trace: only what Python prints is the command's.
    sys.stdout = os.fdopen(os.dup(1), "w", 1, sys.stdout.encoding, sys.stdout.errors)
    sys.stderr = os.fdopen(os.dup(2), "w", 1, sys.stderr.encoding, sys.stderr.errors)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(errors, 2)
    code = 1
    try:
        code = command(lambda: leash.sendall(b"h"))
        if code in GOOD:
            import jax

            jax.distributed.shutdown()  # together with the others
    except BaseException:
        code = 1 if code in GOOD else code
        time.sleep(GRACE_SECONDS + 2)  # where another process has died or was refused, this is only its consequence
        with contextlib.suppress(Exception):
            traceback.print_exc()
    finally:  # Python's own way out would wait for processes that have died
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the terminal may be gone
                stream.flush()
        os._exit(code)


def follow(leash: socket.socket) -> None:
    """End with the supervisor."""
    leash.recv(1)
    os._exit(1)
