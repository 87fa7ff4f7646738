"""The connections of an emulated link: sockets at both its ends, and the bytes between them. One thread, no waiting."""

from __future__ import annotations

import errno
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from isthmus.apps.bench.shaping import MS, LinkProfile, Pipe

READ_BYTES = 64 * 1024
SOCKET_BUFFER = 64 * 1024  # small, as what the kernel holds here comes on top of the queue
HELD_BYTES = 64 * 1024  # due bytes kept for a receiver that does not take them, before its sender must wait
REARM_BYTES = 16 * 1024  # a full queue takes bytes again from this much room on, or half of its bound
GAP_NS = MS // 2  # while bytes flow, they are passed on no more often than this
BUFFERS = 64  # handed to the kernel in one call
NOTHING = memoryview(b"")
_RST = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST


@dataclass(frozen=True, slots=True)
class Flow:
    """What went one way.

    Attributes:
        bytes: payload that came out of the link.
        packets: segments of up to 1,500 bytes that it makes.
        lost_bytes: payload that a cut or a reset swallowed.
        last_byte_s: when the last byte came out, on the clock of `time.monotonic`; None before.
    """

    bytes: int
    packets: int
    lost_bytes: int
    last_byte_s: float | None


@dataclass(frozen=True, slots=True)
class Counts:
    """What a relay has carried so far.

    Attributes:
        up: from those who connected to the target.
        down: from the target to those who connected.
        connections: connections accepted.
        open: those of them with an end that is not closed.
    """

    up: Flow
    down: Flow
    connections: int
    open: int


class _Kind(Enum):
    DATA = 0
    SYN = 1  # up: connect to the target
    ACK = 2  # down: connected
    FIN = 3
    RST = 4


class End:
    """One socket of a connection, and what is due to be written to it."""

    def __init__(self, sock: socket.socket | None, way: _Way) -> None:
        self.sock = sock
        self.way = way  # the direction that takes what is read here
        self.peer: End = self
        self.dead = False  # cut off: what is read is swallowed
        self.opened = self.connecting = False
        self.at_end = self.fin = self.shut = False  # nothing more to read, to write; the other side was told
        self.waits = False  # for room in its direction
        self.mask = 0
        self.out: deque[memoryview] = deque()
        self.held = 0


class _Way:
    """One direction: its timing, who waits for room in it, and its counts."""

    def __init__(self, profile: LinkProfile, name: str, start_ns: int) -> None:
        self.pipe: Pipe[tuple[End, _Kind]] = Pipe(
            getattr(profile, f"delay_{name}_ms"),
            rate_bps=getattr(profile, f"rate_{name}_bps"),
            trace=getattr(profile, f"trace_{name}"),
            jitter_ms=profile.jitter_ms,
            queue_bytes=profile.queue_bytes,
            seed=2 * profile.seed + (name == "down"),
            start_ns=start_ns,
        )
        self.rearm = min(REARM_BYTES, profile.queue_bytes // 2)
        self.waiting: deque[End] = deque()
        self.lost = 0
        self.last_ns: int | None = None
        self.not_before = 0

    def flow(self) -> Flow:
        last = self.last_ns
        return Flow(self.pipe.bytes, self.pipe.packets, self.lost, None if last is None else last / 1e9)


class Carrier:
    """Carries connections over one emulated link.

    Args:
        selector: tells when a socket is ready; its data is then an `End`, for `ready`.
        profile: the link.
        connect: opens a socket to the target; it may still be connecting.
        start_ns: when traces begin, on the clock of `time.monotonic_ns`.

    Attributes:
        accepted: connections so far.
        closed: called when a socket was closed, so that a descriptor is free.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        profile: LinkProfile,
        connect: Callable[[], tuple[socket.socket, int]],
        start_ns: int,
    ) -> None:
        self._selector = selector
        self._dial = connect
        self.up = _Way(profile, "up", start_ns)
        self.down = _Way(profile, "down", start_ns)
        self.ways = (self.up, self.down)
        self._ends: set[End] = set()
        self.accepted = 0
        self.closed: Callable[[], None] = lambda: None

    def counts(self) -> Counts:
        """May be called from any thread."""
        open_now = {id(end if end.way is self.up else end.peer) for end in list(self._ends)}
        return Counts(self.up.flow(), self.down.flow(), self.accepted, len(open_now))

    def next_ns(self) -> int | None:
        """When `deliver` has something to do next; None is never."""
        times = []
        for way in self.ways:
            due = way.pipe.next_ns(way.rearm if way.waiting else 0)
            if due is not None:
                times.append(max(due, way.not_before))
        return min(times, default=None)

    def accept(self, sock: socket.socket) -> None:
        """Takes a new connection from the device's side."""
        self.accepted += 1
        device, cloud = End(sock, self.up), End(None, self.down)
        device.peer, cloud.peer = cloud, device
        self._open(device, sock)
        self.up.pipe.push(time.monotonic_ns(), NOTHING, (cloud, _Kind.SYN))

    def stall(self) -> None:
        """Nothing is delivered from now on."""
        self.deliver()
        for way in self.ways:
            way.pipe.stall()

    def resume(self) -> None:
        """Ends a stall."""
        for way in self.ways:
            way.pipe.resume(time.monotonic_ns())

    def cut(self) -> None:
        """Loses what is under way, and swallows from now on what the present connections send."""
        self.deliver()
        self._lose()
        for way in self.ways:
            way.waiting.clear()
        for end in self._ends:
            end.dead = end.opened = True
            end.waits = False
            self._arm(end)

    def reset(self) -> None:
        """Ends all connections with RST."""
        self._lose()
        for end in list(self._ends):
            self._drop(end)

    def close(self) -> None:
        """Closes all connections; what was under way is lost."""
        self._lose()
        for end in list(self._ends):
            self._drop(end, rst=False)

    def _lose(self) -> None:
        for way in self.ways:
            way.lost += way.pipe.clear(time.monotonic_ns())

    def _open(self, end: End, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.sock = sock
        self._ends.add(end)

    def _connect(self, end: End) -> None:
        try:
            sock, error = self._dial()
        except OSError:
            self._send_on(end, NOTHING, _Kind.RST)
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        self._open(end, sock)
        end.connecting = True
        if error in (0, errno.EINPROGRESS):
            self._arm(end)
        else:
            self._broken(end)

    def ready(self, end: End, mask: int) -> None:
        """A socket can be read or written, as the selector says in `mask`."""
        if end.connecting and end.sock:
            if end.dead or end.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._broken(end)
                return
            end.connecting, end.opened = False, True
            self._send_on(end, NOTHING, _Kind.ACK)
            self._flush(end)
        elif mask & selectors.EVENT_WRITE:
            self._flush(end)
        if mask & selectors.EVENT_READ and end.sock and not end.waits:
            self._read(end)

    def _read(self, end: End) -> None:
        assert end.sock
        room = READ_BYTES if end.dead else min(end.way.pipe.room, READ_BYTES)
        if not room:
            self._await_room(end)
            return
        try:
            data = end.sock.recv(room)
        except BlockingIOError:
            return
        except OSError:
            self._broken(end)
            return
        if end.dead:
            end.way.lost += len(data)
            if not data:
                self._drop(end, rst=False)
        elif data:
            self._send_on(end, memoryview(data), _Kind.DATA)
        else:
            end.at_end = True
            self._send_on(end, NOTHING, _Kind.FIN)
            self._flush(end)

    def _send_on(self, end: End, data: memoryview, kind: _Kind) -> None:
        """Puts on the link what comes from `end`: stamped now, after it was read, so that nothing is ever early."""
        if not end.dead:
            end.way.pipe.push(time.monotonic_ns(), data, (end.peer, kind))

    def _await_room(self, end: End) -> None:
        end.waits = True
        end.way.waiting.append(end)
        self._arm(end)

    def deliver(self) -> None:
        """Does all that is due."""
        for way in self.ways:
            self._deliver(way)

    def _deliver(self, way: _Way) -> None:
        """Hands over all that is due, and reads again from those who waited for room, in turn."""
        now = time.monotonic_ns()
        touched: dict[End, None] = {}
        for data, (end, kind) in way.pipe.pop(now):
            way.not_before = now + GAP_NS
            touched[end] = None
            if kind is _Kind.DATA:
                way.last_ns = now
                if end.sock:  # else its socket is gone, as for a segment that comes after RST
                    end.out.append(data)
                    end.held += len(data)
            elif kind is _Kind.SYN:
                self._connect(end)
            elif kind is _Kind.ACK:
                end.opened = True
            elif kind is _Kind.FIN:
                end.fin = True
            else:
                self._drop(end)
        for end in touched:
            self._flush(end)
        while way.waiting and way.pipe.room >= way.rearm:
            end = way.waiting.popleft()
            end.waits = False
            self._arm(end)
            if end.mask & selectors.EVENT_READ:
                self._read(end)

    def _flush(self, end: End) -> None:
        """Writes what is due, as far as the socket takes it, and closes what is finished."""
        if end.sock is None:
            return
        try:
            while end.out and not end.connecting:
                sent = end.sock.sendmsg(list(islice(end.out, BUFFERS)))
                end.held -= sent
                while end.out and sent >= len(end.out[0]):
                    sent -= len(end.out.popleft())
                if sent:
                    end.out[0] = end.out[0][sent:]
            if end.fin and not end.shut and not end.out and not end.connecting:
                end.shut = True
                end.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:
            self._broken(end)
            return
        if end.shut and end.at_end:
            self._drop(end, rst=False)
        self._arm(end)
        self._arm(end.peer)

    def _arm(self, end: End) -> None:
        """Asks the selector for what this end waits for now."""
        if end.sock is None:
            return
        mask = 0
        taken = end.dead or end.peer.held < HELD_BYTES
        if end.opened and taken and not (end.at_end or end.waits):
            mask |= selectors.EVENT_READ
        if end.out or end.connecting:
            mask |= selectors.EVENT_WRITE
        if mask == end.mask:
            return
        if not end.mask:
            self._selector.register(end.sock, mask, end)
        elif mask:
            self._selector.modify(end.sock, mask, end)
        else:
            self._selector.unregister(end.sock)
        end.mask = mask

    def _broken(self, end: End) -> None:
        """A socket failed, or its peer ended it: the other end hears of it over the link."""
        self._send_on(end, NOTHING, _Kind.RST)
        self._drop(end)

    def _drop(self, end: End, *, rst: bool = True) -> None:
        if end.sock is None:
            return
        if end.mask:
            self._selector.unregister(end.sock)
        if rst:
            end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
        end.sock.close()
        if end.waits:
            end.way.waiting.remove(end)
        end.sock, end.mask, end.held, end.waits = None, 0, 0, False
        end.out.clear()
        self._ends.discard(end)
        self._arm(end.peer)
        self.closed()
