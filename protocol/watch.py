"""Connections that end, and those that send what never becomes a message.

ZeroMQ delivers whole messages only and keeps the parts of one until the last has come. It bounds each part but not
their number, so a peer whose message has no end would fill the memory. What the kernel received on a connection, less
what was delivered from it, is what ZeroMQ holds; where that grows too large the connection is cut off, which frees it.
Where all together hold too much, those that hold most go first. Linux alone tells how much a connection received;
elsewhere nothing is watched.

Heartbeats are received and never delivered. So what they can have amounted to is taken off a connection's count when no
message waits and one came since the last look: in a message without an end no other can come, so nobody is forgiven
twice.
"""

from __future__ import annotations

import logging
import socket
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from isthmus.protocol.limits import LinkLimits

_log = logging.getLogger("isthmus.protocol")
_CHECK_S = 0.1
_INFO_BYTES, _RECEIVED_AT = 136, 128  # tcpi_bytes_received in struct tcp_info of linux/tcp.h
_FRAME_BYTES = 64  # at least what framing and encryption add to a frame
_HEARTBEAT_BYTES_PER_S = 128  # more than they are
_ENDED = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED


@dataclass(slots=True)
class _Connection:
    peer: Any  # its address
    since_s: float  # from when on its heartbeats count
    delivered: int = 0
    spoke: bool = False  # since the last look
    route: bytes = b""


class Watch:
    """Watches the connections that a bound socket accepts; used by the thread that has the socket.

    Args:
        router: the socket, before it is bound.

    Attributes:
        cut: connections cut off so far.
        ended: routes of connections that ended; whoever reads them empties the list.
    """

    def __init__(self, router: Any, limits: LinkLimits) -> None:
        self.cut = 0
        self.ended: list[bytes] = []
        self._limits = limits
        self._router = router
        self._connections: dict[int, _Connection] = {}  # by descriptor
        self._check_at_s = 0.0
        self._monitor: Any = None
        if sys.platform == "linux":
            address = f"inproc://watch-{id(self)}"
            router.monitor(address, zmq.EVENT_ACCEPTED | _ENDED)
            self._monitor = router.context.socket(zmq.PAIR)
            self._monitor.setsockopt(zmq.LINGER, 0)
            self._monitor.setsockopt(zmq.RCVHWM, 0)  # a full queue would stop ZeroMQ's own thread
            self._monitor.connect(address)

    def delivered(self, descriptor: int, frames: int, size_bytes: int, route: bytes) -> None:
        """A message came out of the connection with that descriptor, which the socket calls `route`."""
        connection = self._connections.get(descriptor)
        if connection is None or connection.route not in (b"", route):
            self._follow()  # the descriptor may be another connection's by now
            connection = self._connections.get(descriptor)
        if connection is not None:
            connection.route = route
            connection.delivered += size_bytes + frames * _FRAME_BYTES
            connection.spoke = True

    def check(self) -> None:
        """Cuts off who sent too much; does something ten times a second at most."""
        now_s = time.monotonic()
        if now_s < self._check_at_s:
            return
        self._check_at_s = now_s + _CHECK_S
        self._follow()
        nothing_waits = not self._router.get(zmq.EVENTS) & zmq.POLLIN
        held: dict[int, int] = {}
        for descriptor, connection in self._connections.items():
            received = _received(descriptor)
            if nothing_waits and connection.spoke:
                connection.delivered += int(_HEARTBEAT_BYTES_PER_S * (now_s - connection.since_s))
                connection.since_s = now_s
            connection.spoke = False
            connection.delivered = min(connection.delivered, received)  # what was counted too high is no credit
            held[descriptor] = received - connection.delivered
        total = sum(held.values())
        for descriptor in sorted(held, key=held.__getitem__, reverse=True):
            if held[descriptor] <= self._limits.max_held_bytes and total <= self._limits.max_held_total_bytes:
                break
            total -= held[descriptor]
            self._cut_off(descriptor, held[descriptor])

    def close(self) -> None:
        """Stops watching."""
        if self._monitor is not None:
            self._router.disable_monitor()
            self._monitor.close()
            self._monitor = None

    def _follow(self) -> None:
        while self._monitor is not None and self._monitor.get(zmq.EVENTS) & zmq.POLLIN:
            event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            descriptor = int(event["value"])
            before = self._connections.pop(descriptor, None)
            if before is not None and before.route:
                self.ended.append(before.route)
            if event["event"] == zmq.EVENT_ACCEPTED and (peer := _peer(descriptor)) is not None:
                self._connections[descriptor] = _Connection(peer, time.monotonic())

    def _cut_off(self, descriptor: int, held_bytes: int) -> None:
        connection = self._connections.pop(descriptor)
        if connection.route:
            self.ended.append(connection.route)
        # ZeroMQ may have closed it since, and the descriptor be another connection's.
        if _peer(descriptor) != connection.peer:
            return
        self.cut += 1
        _log.warning("cut off %s: %d bytes of messages that do not end", connection.peer[0], held_bytes)
        try:
            with _Borrowed(descriptor) as tcp:
                tcp.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has gone by itself


class _Borrowed:
    """A socket of somebody else's descriptor, which stays open."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)

    def __enter__(self) -> socket.socket:
        return self._socket

    def __exit__(self, *_: object) -> None:
        self._socket.detach()


def _peer(descriptor: int) -> Any:
    try:
        with _Borrowed(descriptor) as tcp:
            return tcp.getpeername()
    except OSError:
        return None


def _received(descriptor: int) -> int:
    try:
        with _Borrowed(descriptor) as tcp:
            info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
            received: int = struct.unpack_from("=Q", info, _RECEIVED_AT)[0]
            return received
    except (OSError, struct.error):  # it has gone, or the kernel is older than 4.1
        return 0
