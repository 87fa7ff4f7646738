"""Messages that never end: who sends one is cut off before it fills the service's memory."""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import msgpack
import pytest

from isthmus.protocol import messages as m
from isthmus.protocol.limits import LinkLimits
from isthmus.protocol.transport import DealerTransport, Incoming, RouterTransport

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts a connection's bytes")
LIMITS = LinkLimits(max_message_bytes=100_000, max_held_bytes=1_000_000, max_held_total_bytes=4_500_000)
HELLO = m.encode(m.Hello(1, 1))[0]
MORE, LONG, COMMAND = 1, 2, 4


Connect = Callable[[], "Raw"]


@pytest.fixture
def router() -> Iterator[RouterTransport]:
    transport = RouterTransport("tcp://127.0.0.1:0", None, None, LIMITS)
    yield transport
    transport.close()


@pytest.fixture
def connect(router: RouterTransport) -> Iterator[Connect]:
    with ExitStack() as opened:

        def one() -> Raw:
            raw = Raw(router)
            opened.callback(raw.tcp.close)
            return raw

        yield one


class Raw:
    """A ZMTP 3.0 peer (ZeroMQ RFC 23) that sends any frames it likes."""

    def __init__(self, router: RouterTransport) -> None:
        host, port = router.address.removeprefix("tcp://").split(":")
        self.tcp = socket.create_connection((host, int(port)))
        self.tcp.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
        ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
        self.tcp.sendall(bytes([4, len(ready)]) + ready)
        said = b""
        while b"ROUTER" not in said:
            said += self.tcp.recv(1000)
        self.send(HELLO, 0)
        assert heard(router).frames == [HELLO]

    def send(self, data: bytes, flags: int) -> bool:
        """Sends a frame; False when the connection is cut."""
        try:
            self.tcp.sendall(bytes([LONG | flags]) + struct.pack(">Q", len(data)) + data)
        except ConnectionError:
            return False
        return True


def heard(router: RouterTransport) -> Incoming:
    """The next message."""
    deadline = time.monotonic() + 20.0
    while (incoming := router.recv()) is None:
        assert time.monotonic() < deadline
        router.poll(100.0)
    return incoming


def looked_on(router: RouterTransport) -> None:
    """Lets the watch look at its connections twice at least."""
    until = time.monotonic() + 0.25
    while time.monotonic() < until:
        assert not router.poll(10.0)


def served(router: RouterTransport) -> bool:
    """Whether an honest device is heard."""
    honest = DealerTransport(router.address, None, LIMITS)
    deadline = time.monotonic() + 20.0
    sent = False
    try:
        while time.monotonic() < deadline:
            sent = sent or honest.send([HELLO])
            router.poll(10.0)
            if (incoming := router.recv()) is not None:
                return bool(msgpack.unpackb(incoming.frames[0])[0] == 1)
        return False
    finally:
        honest.close()


def test_a_message_without_an_end_is_cut_off(
    router: RouterTransport, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    raw = connect()
    sent = 0
    while sent < 500 and raw.send(bytes(90_000), MORE):
        sent += 1
        router.poll(1.0)
        assert router.recv() is None
    assert router.watch.cut == 1
    assert sent < 500
    assert "127.0.0.1" in caplog.text
    assert served(router)


def test_each_connection_may_hold_what_one_may(router: RouterTransport, connect: Connect) -> None:
    raws = [connect() for _ in range(5)]
    for raw in raws:
        for _ in range(9):
            raw.send(bytes(90_000), MORE)
    looked_on(router)
    for raw in raws:
        raw.send(b"", 0)
        assert heard(router).frames == []
    assert router.watch.cut == 0


def test_where_all_hold_too_much_those_that_hold_most_go_first(router: RouterTransport, connect: Connect) -> None:
    raws = [connect() for _ in range(6)]
    looked_on(router)
    little, *much = raws
    little.send(bytes(90_000), MORE)
    for raw in much:
        for _ in range(10):
            raw.send(bytes(90_000), MORE)
    deadline = time.monotonic() + 20.0
    while not router.watch.cut and time.monotonic() < deadline:
        router.poll(10.0)
    assert router.watch.cut == 1
    little.send(b"", 0)
    assert len(heard(router).frames) == 2
    assert served(router)


def test_what_credit_allows_is_never_cut_off() -> None:
    limits = LinkLimits()
    assert limits.credit_bytes + 2 * limits.max_message_bytes < limits.max_held_bytes


def test_heartbeats_of_a_connection_that_speaks_are_not_held(
    router: RouterTransport, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.protocol.watch._HEARTBEAT_BYTES_PER_S", 1e6)  # for heartbeats as large as these
    raw = connect()
    ping = b"\x04PING\0\0" + bytes(10_000)
    for _ in range(15):
        for _ in range(10):
            raw.send(ping, COMMAND)
        raw.send(HELLO, 0)
        assert heard(router).frames == [HELLO]
        looked_on(router)
    assert router.watch.cut == 0


def test_a_message_without_an_end_right_after_a_whole_one_gains_nothing_by_it(
    router: RouterTransport, connect: Connect
) -> None:
    raw = connect()
    looked_on(router)
    raw.send(HELLO, 0)
    assert heard(router).frames == [HELLO]
    for _ in range(15):
        raw.send(bytes(90_000), MORE)
    looked_on(router)
    assert router.watch.cut == 1


def test_who_sends_whole_messages_may_send_for_ever(router: RouterTransport, connect: Connect) -> None:
    raw = connect()
    got = 0
    for _ in range(100):
        raw.send(bytes(90_000), 0)
        got += len(heard(router).frames[0])
    assert got > 5 * LIMITS.max_held_bytes
    # Messages of thousands of parts are thrown away, but they are messages.
    for _ in range(1000):
        for part in range(50):
            raw.send(b"x", MORE if part < 49 else 0)
        assert heard(router).frames == []
    assert router.watch.cut == 0
    assert served(router)
