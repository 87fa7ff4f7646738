"""A TCP relay of our own that emulates a link between a device and a cloud, with no help from the kernel.

    with Relay("127.0.0.1:5757", LinkProfile.of_rtt(50, rate_up_bps=2_000_000)) as relay:
        Device("my-smollm2", cloud=relay.address)

What it cannot do: the kernel acknowledges segments on this machine at once, so a sender sees no loss and no slow start,
connect() returns before the emulated round trip (the connection carries bytes only after it), and each end's own socket
buffers come on top of the queue. A thread of the same process that holds the interpreter's lock makes it late.
"""

from __future__ import annotations

import math
import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self

from isthmus.apps.bench.carrier import SOCKET_BUFFER, Carrier, Counts, End, Flow
from isthmus.apps.bench.shaping import MS, BenchError, LinkProfile
from isthmus.protocol.address import address_fault

__all__ = ["BenchError", "Counts", "Event", "Flow", "LinkProfile", "Relay"]

Action = Literal["stall", "resume", "cut", "mend", "reset"]
NewOnes = Literal["hang", "refuse"]
ACTIONS = ("stall", "resume", "cut", "mend", "reset")
NEW_ONES = ("hang", "refuse")

BACKLOG = 128
NOT_RUNNING = ("the relay is not running", "use it in a `with` statement")
ANSWER_S = 10.0
SELECTABLE = 1024  # numbers of descriptors below this one, for select()


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens to a link at a given time.

    Attributes:
        at_ms: when, in ms since the relay was started.
        action: as the method of `Relay` of this name.
        new: for a cut, what becomes of new connections.

    Raises:
        BenchError: a time below 0, or no such action.
    """

    at_ms: float
    action: Action
    new: NewOnes = "hang"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.at_ms) and self.at_ms >= 0):
            raise BenchError(f"an event at {self.at_ms} ms", "give a time of 0 ms or more")
        if self.action not in ACTIONS:
            raise BenchError(f"there is no event {self.action!r}", f"choose one of {', '.join(ACTIONS)}")
        if self.new not in NEW_ONES:
            raise BenchError(f"new connections cannot {self.new!r}", f"choose one of {', '.join(NEW_ONES)}")


class Relay:
    """Listens on a loopback port and passes every connection on to `target` through one emulated link.

    All connections share the link: one delay, one rate and one queue for each direction. A context manager, which
    runs in a thread of its own; traces and the schedule begin when it is entered. Methods may be called from any
    thread, and have taken effect when they return.

    Args:
        target: HOST:PORT of the cloud.
        profile: the link; by default a perfect one.
        schedule: events at given times after the start; those of equal times happen in the given order.
        port: where to listen; 0 is any free port.

    Raises:
        BenchError: `target` is no address, or the port is taken (when entered).
    """

    def __init__(
        self, target: str, profile: LinkProfile | None = None, *, schedule: Iterable[Event] = (), port: int = 0
    ) -> None:
        plain = target.removeprefix("tcp://")
        fault = f"{target!r} is no TCP address" if "://" in plain else address_fault(plain)
        if fault:
            raise BenchError(fault, "write HOST:PORT")
        host, _, target_port = plain.rpartition(":")
        self.profile = profile or LinkProfile()
        self._target = (host.strip("[]"), int(target_port))
        self._schedule = deque(sorted(schedule, key=lambda event: event.at_ms))
        self._port = port
        self._thread: threading.Thread | None = None
        self._commands: deque[tuple[Event, Future[None]]] = deque()
        self._stopping = False
        self._full = False  # no descriptor is free

    def __enter__(self) -> Self:
        if self._thread:
            raise BenchError("this relay has been started before", "make another one")
        self._resolve()
        self._bind()
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ, self._woken)
        self._listener: socket.socket | None = None
        self._door("open")
        self._start_ns = time.monotonic_ns()
        self._carrier = Carrier(self._selector, self.profile, self._dial, self._start_ns)
        self._carrier.closed = self._closed
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops, and closes every connection. Does nothing when called again."""
        if not self._thread:
            return
        if self._thread.is_alive():
            self._stopping = True
            self._wake()
        self._thread.join()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._port

    @property
    def address(self) -> str:
        """Where to connect: tcp://127.0.0.1:PORT."""
        return f"tcp://127.0.0.1:{self._port}"

    def counts(self) -> Counts:
        """What it has carried so far; also after it was closed."""
        if not self._thread:
            raise BenchError(*NOT_RUNNING)
        return self._carrier.counts()

    def stall(self) -> None:
        """Bytes wait from now on, those under way too, and nothing comes out."""
        self._call(Event(0, "stall"))

    def resume(self) -> None:
        """Ends a stall: what waited comes out in order, as fast as the link allows."""
        self._call(Event(0, "resume"))

    def cut(self, new: NewOnes = "hang") -> None:
        """Drops every connection without a word: both its ends stay open, and what they send is swallowed for good.

        Args:
            new: what becomes of new connections. "hang": nothing comes of them before `mend`. "refuse": they are.

        Raises:
            BenchError: there is no such choice.
        """
        self._call(Event(0, "cut", new))

    def mend(self) -> None:
        """New connections work again; those that were cut do not."""
        self._call(Event(0, "mend"))

    def reset(self) -> None:
        """Ends every connection at once, with RST to both sides; what was under way is lost."""
        self._call(Event(0, "reset"))

    def _call(self, event: Event) -> None:
        """Has the relay's thread do it, and waits until it has."""
        done: Future[None] = Future()
        if self._thread and self._thread.is_alive():
            self._commands.append((event, done))
            self._wake()
            with suppress(TimeoutError):
                return done.result(ANSWER_S)
        raise BenchError(*NOT_RUNNING)

    def _wake(self) -> None:
        with suppress(OSError):  # full, which wakes as well, or closed
            self._wake_in.send(b"x")

    def _woken(self, _: int) -> None:
        with suppress(BlockingIOError):
            self._wake_out.recv(4096)

    def _resolve(self) -> None:
        try:
            found = socket.getaddrinfo(*self._target, type=socket.SOCK_STREAM)
        except OSError as error:
            raise BenchError(f"there is no host {self._target[0]!r}: {error.strerror}", "check the target") from error
        found.sort(key=lambda one: one[0] != socket.AF_INET)
        self._family: socket.AddressFamily
        self._where: tuple[Any, ...]
        self._family, _, _, _, self._where = found[0]

    def _socket_at_port(self) -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)  # what it accepts inherits these
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        made.setblocking(False)
        made.bind(("127.0.0.1", self._port))
        return made

    def _bind(self) -> None:
        try:
            with socket.socket() as probe:  # SO_REUSEPORT alone would share the port with another relay
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", self._port))
            # Never listens: keeps the port, and has connections refused while the other one is closed.
            self._keeper = self._socket_at_port()
        except (OSError, OverflowError) as error:
            raise BenchError(f"cannot listen on port {self._port}: {error}", "choose another port, or 0") from error
        self._port = self._keeper.getsockname()[1]

    def _run(self) -> None:
        """The thread: all below, and the carrier, belong to it."""
        try:
            while not self._stopping:
                for key, mask in self._wait():
                    if isinstance(key.data, End):
                        self._carrier.ready(key.data, mask)
                    else:
                        key.data(mask)
                self._happen()
                self._carrier.deliver()
        finally:
            self._stopping = True
            self._carrier.close()
            for one in (self._listener, self._keeper, self._wake_in, self._wake_out):
                if one:
                    one.close()
            self._selector.close()
            while self._commands:
                self._commands.popleft()[1].set_exception(BenchError(*NOT_RUNNING))

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready, once something is or something is due: to the microsecond, where a selector counts ms."""
        times = [self._start_ns + round(self._schedule[0].at_ms * MS)] if self._schedule else []
        due = self._carrier.next_ns()
        if due is not None:
            times.append(due)
        if not times:
            return self._selector.select()
        left_s = (min(times) - time.monotonic_ns()) / 1e9
        if left_s > 0:
            number = self._selector.fileno()
            if number >= SELECTABLE:
                return self._selector.select(left_s)
            if not select.select([number], [], [], left_s)[0]:
                return []
        return self._selector.select(0)

    def _happen(self) -> None:
        """Does what is asked for, and what is due by the schedule."""
        while self._commands:
            event, done = self._commands.popleft()
            self._do(event)
            done.set_result(None)
        while self._schedule and time.monotonic_ns() >= self._start_ns + round(self._schedule[0].at_ms * MS):
            self._do(self._schedule.popleft())

    def _do(self, event: Event) -> None:
        match event.action:
            case "stall":
                self._carrier.stall()
            case "resume":
                self._carrier.resume()
            case "reset":
                self._carrier.reset()
            case "cut":
                self._carrier.cut()
                self._door(event.new)
            case "mend":
                self._door("open")

    def _door(self, door: Literal["open", "hang", "refuse"]) -> None:
        """What becomes of those who connect."""
        self._full = False
        if self._listener and self._listener in self._selector.get_map():
            self._selector.unregister(self._listener)
        if door == "refuse":
            if self._listener:
                self._listener.close()
            self._listener = None
            return
        if not self._listener:
            self._listener = self._socket_at_port()
            self._listener.listen(BACKLOG)
        if door == "open":
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self, _: int) -> None:
        assert self._listener
        try:
            sock, _address = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:  # no descriptor is free: whoever comes waits until one is
            self._door("hang")
            self._full = True
            return
        self._carrier.accept(sock)

    def _closed(self) -> None:
        if self._full and not self._stopping:
            self._door("open")

    def _dial(self) -> tuple[socket.socket, int]:
        sock = socket.socket(self._family)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)  # before it connects, to count
        return sock, sock.connect_ex(self._where)
