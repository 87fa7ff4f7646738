"""Frames over ZeroMQ: a DEALER for the device, a ROUTER for the cloud, both with CURVE.

A connection is one socket: ZeroMQ's own reconnecting is off, so that nothing queued for a dead connection shows up on
the next one. `protocol.link` makes fresh connections.
"""

from __future__ import annotations

import errno
import logging
import selectors
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import zmq
from zmq.utils import z85

from isthmus.protocol.address import REMEDY, check_address, check_listening
from isthmus.protocol.errors import LinkError, ServiceError, SlowLinkError
from isthmus.protocol.keys import AllowList, DeviceKeys, KeyPair
from isthmus.protocol.limits import LIMITS, LinkLimits
from isthmus.protocol.watch import Watch

_log = logging.getLogger("isthmus.protocol")
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_MAX_FRAMES = 2
_MAX_STRANGERS = 1000  # refused keys that are remembered so that each is logged once
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_FULL = "close other programs, or raise the limit of open files (ulimit -n)"
_BROKEN = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Transport(Protocol):
    """A connection to the other side; used by one thread at a time. Tests put a faulty one in its place."""

    def send(self, frames: Sequence[bytes]) -> bool:
        """Takes a message; False when it cannot now (not connected yet, or the queue is full)."""
        ...

    def poll(self, timeout_ms: float, *, sending: bool = False) -> bool:
        """Waits for a message (or, with `sending`, for room to send); whether there is one.

        Raises:
            LinkError: the connection is broken for good.
        """
        ...

    def recv(self) -> list[bytes] | None:
        """The next message's frames, or None; never waits."""
        ...

    def close(self) -> None:
        """Ends the connection; may be called twice."""
        ...


class DealerTransport:
    """A device's connection to a cloud.

    Args:
        address: such as "tcp://192.0.2.7:5757".
        keys: the device's pair and the cloud's public key; None speaks in the clear, to loopback only.

    Raises:
        LinkError: an address that is none, or in the clear and not on this machine.
    """

    def __init__(self, address: str, keys: DeviceKeys | None, limits: LinkLimits = LIMITS) -> None:
        address = check_address(address, encrypted=keys is not None)
        self.address = address
        self._key = keys.pair.public if keys is not None else ""
        self._spin_s = limits.spin_us * 1e-6
        self._slow_at = time.monotonic() + 0.9e-3 * limits.handshake_ms
        self._socket = _socket(zmq.Context.instance(), zmq.DEALER)
        _tune(self._socket, address, limits)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, limits.connect_ms)
        if keys is not None:
            self._socket.curve_publickey = keys.pair.public.encode()
            self._socket.curve_secretkey = keys.pair.secret.encode()
            self._socket.curve_serverkey = keys.cloud.encode()
        self._monitor = self._socket.get_monitor_socket(_BROKEN)
        self._monitor.setsockopt(zmq.LINGER, 0)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise LinkError(f"{address!r} is no address: {error.strerror}", REMEDY) from error

    def send(self, frames: Sequence[bytes]) -> bool:
        try:
            if len(frames) == 1:
                self._socket.send(frames[0], zmq.NOBLOCK)
            else:
                self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def poll(self, timeout_ms: float, *, sending: bool = False) -> bool:
        wanted = zmq.POLLIN | zmq.POLLOUT if sending else zmq.POLLIN
        if self._spin_s and timeout_ms > 0:
            until = time.perf_counter() + self._spin_s
            while time.perf_counter() < until:
                if self._socket.get(zmq.EVENTS) & wanted:
                    return True
        if sending:
            self._poller.modify(self._socket, wanted)
        try:
            ready = dict(self._poller.poll(max(0, int(timeout_ms + 0.999))))
        finally:
            if sending:
                self._poller.modify(self._socket, zmq.POLLIN)
        if self._socket in ready:
            return True
        if self._monitor in ready:
            self._raise_broken()
        return False

    def recv(self) -> list[bytes] | None:
        socket = self._socket
        # Asking first is several times cheaper than zmq.Again.
        if not socket.get(zmq.EVENTS) & zmq.POLLIN:
            return None
        frames: list[bytes] = [socket.recv(zmq.NOBLOCK)]
        while socket.get(zmq.RCVMORE):
            frames.append(socket.recv(zmq.NOBLOCK))
        return frames

    def close(self) -> None:
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close()
            self._socket.close()

    def _raise_broken(self) -> None:
        from zmq.utils.monitor import recv_monitor_message

        event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
        kind: int = event["event"]
        if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise Refused(
                f"the cloud at {self.address} does not know this device's key",
                f"on the cloud run: isthmus keys allow '{self._key}' NAME",
            )
        if kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and time.monotonic() >= self._slow_at:
            raise SlowLinkError(f"the encrypted handshake with {self.address} takes too long", "try again")
        if kind in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
            raise LinkError(
                f"the encrypted handshake with {self.address} failed",
                "try again; else check that the cloud's public key is the right one and that both sides use keys",
            )
        raise LinkError(f"nothing answers at {self.address}", "check that `isthmus serve` runs there")


class Refused(LinkError):
    """The cloud said no, and will say so again: an unknown key or no common version."""


class Incoming(NamedTuple):
    """A message at the cloud: the connection it came on, the sender's public key ("" in the clear), its frames."""

    route: bytes
    key: str
    frames: list[bytes]


class RouterTransport:
    """The cloud's end of all its devices' connections; one thread at a time has it.

    The ZAP handler (ZeroMQ RFC 27) that asks the allow-list runs inside `poll`, on the same thread.

    Args:
        address: such as "tcp://127.0.0.1:5757"; port 0 takes a free one, see `address` afterwards.
        keys: the cloud's pair; None speaks in the clear and is refused on an address others can reach.
        allowed: keys that are let in.

    Raises:
        ServiceError: the address is taken, is none, or would be open to everybody.
    """

    def __init__(
        self, address: str, keys: KeyPair | None, allowed: AllowList | None, limits: LinkLimits = LIMITS
    ) -> None:
        address = check_listening(address, encrypted=keys is not None and allowed is not None)
        self._allowed = allowed
        self._strangers: set[str] = set()
        self._curve = keys is not None
        self._spin_s = limits.spin_us * 1e-6
        self._context = zmq.Context()
        try:
            self._stirring = _selector()
            self._zap, self._socket = _socket(self._context, zmq.REP), _socket(self._context, zmq.ROUTER)
        except LinkError:
            self._context.destroy(0)
            raise
        self._zap.setsockopt(zmq.LINGER, 0)
        self._zap.bind(_ZAP_ADDRESS)
        _tune(self._socket, address, limits)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
        # ZeroMQ's own thread answers these on a device that is idle, and nobody on one that is gone.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, limits.heartbeat_ms)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, limits.dead_ms)
        if keys is not None:
            self._socket.curve_server = True
            self._socket.curve_secretkey = keys.secret.encode()
            self._socket.zap_domain = b"isthmus"
        self.watch = Watch(self._socket, limits)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._zap, zmq.POLLIN)
        for socket in (self._socket, self._zap):
            self._stirring.register(socket.get(zmq.FD), selectors.EVENT_READ)
        try:
            _bind(self._socket, address)
        except ServiceError:
            self.close()
            raise
        self.address: str = self._socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()

    def poll(self, timeout_ms: float) -> bool:
        """Waits for a message and meanwhile lets known keys in; whether there is one."""
        if self._spin_s and timeout_ms > 0:
            until = time.perf_counter() + self._spin_s
            while time.perf_counter() < until:
                if self._socket.get(zmq.EVENTS) & zmq.POLLIN:
                    return True
        ready = dict(self._poller.poll(max(0, int(timeout_ms + 0.999))))
        if self._zap in ready:
            self._admit()
        self.watch.check()
        return self._socket in ready

    def stirs(self, timeout_s: float) -> bool:
        """Waits until there may be a message or somebody who wants in; by one thread, which need not have the sockets.

        It tells of what comes after `recv` has given None until somebody polls, and may tell of nothing.
        """
        return bool(self._stirring.select(timeout_s))

    def recv(self) -> Incoming | None:
        """The next message, or None; never waits. One of more than two frames comes with none at all."""
        socket = self._socket
        if not socket.get(zmq.EVENTS) & zmq.POLLIN:
            return None
        route = socket.recv(zmq.NOBLOCK)
        frames: list[bytes] = []
        key, count, size, more = "", 0, 0, bool(socket.get(zmq.RCVMORE))
        while more:
            frame = socket.recv(zmq.NOBLOCK, copy=False)
            count += 1
            size += len(frame)
            if count <= _MAX_FRAMES:
                frames.append(frame.bytes)
            if count == 1 and self._curve:
                key = frame.get("User-Id")
            more = frame.more
        if count:
            self.watch.delivered(frame.get(zmq.SRCFD), count, size, route)
        return Incoming(route, key, frames if count <= _MAX_FRAMES else [])

    def send(self, route: bytes, frames: Sequence[bytes]) -> bool:
        """Sends to a connection; False when its queue is full.

        Raises:
            LinkError: the connection is gone.
        """
        try:
            self._socket.send(route, _MORE)
            for frame in frames[:-1]:
                self._socket.send(frame, _MORE)
            self._socket.send(frames[-1], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise LinkError("the device is gone") from None
            raise
        return True

    def lost(self) -> list[bytes]:
        """Routes of connections that ended since the last call; Linux alone tells."""
        lost, self.watch.ended = self.watch.ended, []
        return lost

    def close(self) -> None:
        """Ends all connections; messages under way get the limits' linger time."""
        if not self._socket.closed:
            self.watch.close()
            self._stirring.close()
            self._socket.close()
            self._zap.close()
            self._context.term()

    def _admit(self) -> None:
        # Request: version, id, domain, address, identity, mechanism, credentials. Reply: RFC 27.
        while True:
            try:
                request = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            key = ""
            if len(request) == 7 and request[5] == b"CURVE" and len(request[6]) == 32:
                key = z85.encode(request[6]).decode()
            known = self._allowed is not None and self._allowed.principal(key) is not None
            if not known and key not in self._strangers:
                if len(self._strangers) >= _MAX_STRANGERS:
                    self._strangers.clear()
                self._strangers.add(key)
                _log.info("refused a device: the key %s is not allowed", key or "(none)")
            status, text = (b"200", b"OK") if known else (b"400", b"unknown key")
            self._zap.send_multipart(
                [b"1.0", request[1] if len(request) > 1 else b"", status, text, key.encode() if known else b"", b""]
            )


def check_free(address: str) -> None:
    """Makes sure that one can listen at an address now.

    Raises:
        ServiceError: another program does, or the address is not this machine's.
    """
    context = zmq.Context()
    try:
        probe = _socket(context, zmq.ROUTER)
        probe.setsockopt(zmq.IPV6, int("[" in address))
        _bind(probe, address)
    finally:
        context.destroy(0)


def _bind(socket: Any, address: str) -> None:
    try:
        socket.bind(address.replace("//localhost:", "//127.0.0.1:"))
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServiceError(
                f"{address} is taken by another program", "choose another port with --listen, or stop that program"
            ) from error
        remedy = "name an address or a network interface of this machine, and a port that you may use"
        raise ServiceError(f"cannot listen on {address!r}: {zmq.strerror(error.errno or 0)}", remedy) from error


def _socket(context: Any, kind: int) -> Any:
    try:
        return context.socket(kind)
    except zmq.ZMQError as error:
        raise LinkError(f"cannot make a socket: {zmq.strerror(error.errno or 0)}", _FULL) from error


def _selector() -> selectors.BaseSelector:
    try:
        return selectors.DefaultSelector()
    except OSError as error:
        raise LinkError(f"cannot watch sockets: {error.strerror}", _FULL) from error


def _tune(socket: Any, address: str, limits: LinkLimits) -> None:
    socket.setsockopt(zmq.LINGER, limits.linger_ms)
    socket.setsockopt(zmq.SNDHWM, limits.max_queued_messages)
    socket.setsockopt(zmq.RCVHWM, limits.max_queued_messages)
    socket.setsockopt(zmq.MAXMSGSIZE, limits.max_message_bytes)
    socket.setsockopt(zmq.HANDSHAKE_IVL, limits.handshake_ms)
    socket.setsockopt(zmq.IPV6, int("[" in address))
