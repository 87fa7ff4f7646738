"""A real service on loopback sockets with CURVE: who gets in, what is answered, and what bad links do to the text."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.cloud.http import StatusServer
from isthmus.cloud.models import serve_part
from isthmus.cloud.service import Service
from isthmus.engine.part import Rows as EngineRows
from isthmus.engine.part import Want
from isthmus.protocol import messages as m
from isthmus.protocol import tensors
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import LinkError, ServiceError
from isthmus.protocol.keys import AllowList, DeviceKeys, new_pair
from isthmus.protocol.limits import LinkLimits
from isthmus.protocol.link import Link, connect
from isthmus.protocol.transport import DealerTransport, Refused, RouterTransport, Transport
from tests.fakes import FakePart, FaultyTransport, fake_text

PROMPT = [3, 1, 4, 1, 5]
LIMITS = LinkLimits(max_message_bytes=200_000, credit_bytes=400_000, connect_ms=5000, heartbeat_ms=100)


class Cloud:
    """A service on its own thread, with keys."""

    def __init__(self, folder: Path, *, keys: bool = True, address: str = "tcp://127.0.0.1:0") -> None:
        self.pair, self.device = new_pair(), new_pair()
        self.allowed = AllowList(folder / "allowed")
        self.allowed.allow(self.device.public, "anna")
        self.keys = DeviceKeys(self.device, self.pair.public) if keys else None
        self.start(address)

    def start(self, address: str) -> None:
        transport = RouterTransport(address, self.pair if self.keys else None, self.allowed, LIMITS)
        self.address = transport.address
        self.part = FakePart()
        allowed = self.allowed if self.keys else None
        self.service = Service([serve_part(self.part, "aa", "fake")], transport, allowed, link_limits=LIMITS)
        self.thread = threading.Thread(target=self.service.run)
        self.thread.start()

    def stop(self) -> None:
        self.service.stop()
        self.thread.join(20.0)
        assert not self.thread.is_alive()

    def connect(self) -> Link:
        return connect(self.address, self.keys, LIMITS)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    running = Cloud(tmp_path)
    yield running
    running.stop()


class Client:
    """The simplest device there is: asks for one token after the other, and again until it gets it.

    Args:
        cut: layers that it computes itself; 0 sends tokens.
    """

    def __init__(self, link: Link, cut: int = 0, retry_s: float = 0.5) -> None:
        self.link = link
        self.cut = cut
        self.retry_s = retry_s
        self.session = os.urandom(16)
        self.epoch = 0
        self.part = FakePart(0, cut) if cut else None
        self.opens = 0

    def generate(self, prompt: list[int], count: int, each: Callable[[int], None] = lambda index: None) -> list[int]:
        log = Chain(prompt)
        committed = self._open()
        deadline = time.monotonic() + 60.0
        while len(log) < len(prompt) + count:
            assert time.monotonic() < deadline, "no progress"
            self.link.send(self._rows(log, min(committed, len(log) - 1)))
            again = time.monotonic() + self.retry_s
            while time.monotonic() < again:
                message: Any = self.link.receive(20.0)
                if isinstance(message, m.Welcome):
                    committed = self._open()
                    break
                if getattr(message, "epoch", None) != self.epoch:
                    continue
                if isinstance(message, m.Result) and message.committed == len(log) and message.tokens:
                    assert message.prefix_hash == log.head
                    log.extend(message.tokens)
                    committed = message.committed
                    each(len(log))
                    break
                if isinstance(message, m.Fault):
                    assert message.code in (m.Code.GAP, m.Code.UNKNOWN_SESSION, m.Code.BUSY), message
                    if message.code is m.Code.UNKNOWN_SESSION:
                        committed = self._open()
                    elif message.code is m.Code.GAP:
                        committed = message.committed
                    break
        return log.tokens[len(prompt) :]

    def _open(self) -> int:
        self.epoch += 1
        self.opens += 1
        while True:
            self.link.send(m.Open(self.session, 1, self.epoch, "aa", self.cut))
            again = time.monotonic() + self.retry_s
            while time.monotonic() < again:
                message = self.link.receive(20.0)
                if isinstance(message, m.Opened) and message.epoch == self.epoch:
                    return message.committed
                if isinstance(message, m.Welcome):
                    break

    def _rows(self, log: Chain, at: int) -> m.Rows:
        tokens = log.tokens[at:]
        hidden = None
        if self.part is not None:
            sequence = self.part.open()
            rows = EngineRows().tokens(sequence, 0, log.tokens, leave=self.cut, want=Want.HIDDEN, want_all=True)
            hidden = tensors.encode(self.part.step(rows).hidden[at:], "int8")
            sequence.close()
        return m.Rows(1, self.epoch, at, log.at(at), tokens, hidden)


@pytest.mark.parametrize("cut", [0, 1, 5])
def test_an_honest_client_gets_the_models_text(cloud: Cloud, cut: int) -> None:
    link = cloud.connect()
    assert Client(link, cut).generate(PROMPT, 30) == fake_text(PROMPT, 30)
    link.close()


def test_without_keys_on_this_machine_only(tmp_path: Path) -> None:
    open_cloud = Cloud(tmp_path, keys=False)
    link = open_cloud.connect()
    assert Client(link).generate(PROMPT, 3) == fake_text(PROMPT, 3)
    link.close()
    open_cloud.stop()
    with pytest.raises(ServiceError, match="outside"):
        RouterTransport("tcp://0.0.0.0:0", None, None)
    with pytest.raises(ServiceError, match="outside"):
        RouterTransport("tcp://0.0.0.0:0", new_pair(), None)
    with pytest.raises(LinkError, match="no keys"):
        DealerTransport("tcp://192.0.2.1:5757", None)


def test_unknown_keys_and_wrong_clouds_are_told_apart(cloud: Cloud, caplog: pytest.LogCaptureFixture) -> None:
    stranger = new_pair()
    with caplog.at_level("INFO", "isthmus.protocol"):
        for _ in range(2):
            with pytest.raises(Refused, match="does not know this device's key"):
                connect(cloud.address, DeviceKeys(stranger, cloud.pair.public), LIMITS)
    assert caplog.messages.count(f"refused a device: the key {stranger.public} is not allowed") == 1
    with pytest.raises(LinkError, match="public key"):
        connect(cloud.address, DeviceKeys(cloud.device, new_pair().public), LinkLimits(connect_ms=2500))
    link = cloud.connect()
    assert Client(link).generate(PROMPT, 3) == fake_text(PROMPT, 3)
    link.close()


def test_a_device_in_the_clear_gets_nothing_from_a_cloud_with_keys(cloud: Cloud) -> None:
    with pytest.raises(LinkError):
        connect(cloud.address, None, LinkLimits(connect_ms=1500))


def test_nobody_there_is_a_clear_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(LinkError, match=f"nothing answers at tcp://127.0.0.1:{port}"):
        connect(f"tcp://127.0.0.1:{port}", None, LinkLimits(connect_ms=1000))
    with pytest.raises(LinkError, match="no address"):
        connect("ipc://", None, LinkLimits(connect_ms=1000))


def test_a_busy_port_is_a_clear_error(cloud: Cloud) -> None:
    with pytest.raises(ServiceError, match="taken"):
        RouterTransport(cloud.address, cloud.pair, cloud.allowed)


def test_keys_come_and_go_while_it_runs(cloud: Cloud) -> None:
    second = new_pair()
    keys = DeviceKeys(second, cloud.pair.public)
    AllowList(cloud.allowed.path).allow(second.public, "bert")
    deadline = time.monotonic() + 20.0
    while True:
        try:
            link = connect(cloud.address, keys, LIMITS)
            break
        except Refused:
            assert time.monotonic() < deadline
    AllowList(cloud.allowed.path).revoke("bert")
    fault = None
    # Until the list is read again the answer is that this cloud has no bundle to give.
    while not isinstance(fault, m.Fault) or fault.code is m.Code.NOT_FOUND:
        assert time.monotonic() < deadline
        link.send(m.GetManifest("aa"))
        fault = link.receive(200.0)
    assert fault.code is m.Code.NOT_ALLOWED
    link.close()


def test_an_older_protocol_is_refused_in_plain_msgpack(cloud: Cloud) -> None:
    """Another language's device, with nothing but ZeroMQ and msgpack."""
    assert cloud.keys is not None
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.curve_serverkey = cloud.pair.public.encode()
        dealer.curve_publickey = cloud.device.public.encode()
        dealer.curve_secretkey = cloud.device.secret.encode()
        dealer.connect(cloud.address)
        dealer.send(msgpack.packb([1, 0, 0, [], "old"]))
        assert dealer.poll(5000)
        tag, code, _, remedy, *_ = msgpack.unpackb(dealer.recv())
        assert (tag, code) == (15, int(m.Code.VERSION))
        assert "update isthmus on the device" in remedy
        dealer.send(msgpack.packb([1, 1, 1, [], "new"]))
        assert dealer.poll(5000)
        assert msgpack.unpackb(dealer.recv())[:3] == [2, 1, 1]
        dealer.send(msgpack.packb([3, bytes(16), 1, 1, "bb"]))
        assert dealer.poll(5000)
        _, code, _, remedy, *_ = msgpack.unpackb(dealer.recv())
        assert code == int(m.Code.UNKNOWN_MODEL)
        assert "fake" in remedy


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cut", [0, 3])
def test_a_bad_link_does_not_change_the_text(cloud: Cloud, seed: int, cut: int) -> None:
    made: list[FaultyTransport] = []

    def faulty() -> Transport:
        inner = DealerTransport(cloud.address, cloud.keys, LIMITS)
        made.append(FaultyTransport(inner, seed * 100 + len(made), drop=0.1, repeat=0.15, delay=0.15))
        return made[-1]

    link = Link(faulty, LIMITS)
    assert isinstance(link.receive(5000), m.Welcome)
    assert Client(link, cut, retry_s=0.05).generate(PROMPT, 30) == fake_text(PROMPT, 30)
    assert sum(transport.faults for transport in made) > 5
    link.close()


def test_a_lost_connection_goes_on_where_it_was(cloud: Cloud) -> None:
    made: list[DealerTransport] = []

    def transport() -> Transport:
        made.append(DealerTransport(cloud.address, cloud.keys, LIMITS))
        return made[-1]

    link = Link(transport, LIMITS)
    assert isinstance(link.receive(5000), m.Welcome)
    client = Client(link)

    def cut(length: int) -> None:
        if length % 7 == 0:
            made[-1]._socket.disconnect(cloud.address)

    assert client.generate(PROMPT, 30, cut) == fake_text(PROMPT, 30)
    assert client.opens > 3
    # Nothing was computed twice.
    assert sum(cloud.part.steps) == len(PROMPT) + 29
    link.close()


def test_a_restarted_cloud_gives_the_same_text(cloud: Cloud) -> None:
    link = cloud.connect()
    client = Client(link)

    def restart(length: int) -> None:
        if length == 20:
            cloud.stop()
            cloud.start(cloud.address)

    assert client.generate(PROMPT, 30, restart) == fake_text(PROMPT, 30)
    assert client.opens >= 2
    link.close()


def test_devices_that_go_without_a_word_are_counted_out(cloud: Cloud) -> None:
    gone, idle = cloud.connect(), cloud.connect()
    assert gone._main is not None
    gone._main.close()
    deadline = time.monotonic() + 20.0
    while cloud.service.health()["connections"] > 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Who is idle stays, though the device's own thread answers nothing.
    time.sleep(4 * LIMITS.heartbeat_ms * LIMITS.silent_intervals * 1e-3)
    assert cloud.service.health()["connections"] == 1
    idle.close()


def test_many_devices_at_once(cloud: Cloud) -> None:
    texts: dict[int, list[int]] = {}

    def one(number: int) -> None:
        link = cloud.connect()
        texts[number] = Client(link, number % 3).generate([number, 7], 20)
        link.close()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert texts == {number: fake_text([number, 7], 20) for number in range(8)}


def test_stopping_tells_the_devices(tmp_path: Path) -> None:
    stopping = Cloud(tmp_path)
    link = stopping.connect()
    stopping.service.stop()
    messages = [link.receive(100.0) for _ in range(10)]
    assert any(isinstance(message, m.Bye) for message in messages)
    assert not link.up
    link.close()
    stopping.stop()


FRAMES = [
    m.encode(message)[0]
    for message in (
        m.Hello(1, 1),
        m.Open(b"f" * 16, 1, 1, "aa"),
        m.Rows(1, 1, 0, Chain().head, [1, 2, 3]),
        m.Rows(1, 1, 0, Chain().head, [1], tensors.encode(np.ones((1, 64), np.float32), "f16")),
        m.Generate(1, 1, 0, Chain().head, [1], 5),
        m.Truncate(1, 2, 0),
        m.GetRange("aa", "weights/x", "0" * 64, 0, 65536),
        m.Close(1, 1),
    )
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cloud, Link]]:
    running = Cloud(tmp_path_factory.mktemp("shared"))
    link = running.connect()
    yield running, link
    link.close()
    running.stop()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.lists(st.binary(max_size=300), min_size=1, max_size=4),
            st.tuples(st.sampled_from(FRAMES), st.integers(0, 500), st.integers(0, 255)).map(
                lambda given: [given[0][: given[1] % len(given[0])] + bytes([given[2]]) + given[0][given[1] :]]
            ),
            st.tuples(st.sampled_from(FRAMES), st.binary(max_size=50)).map(list),
        ),
        min_size=1,
        max_size=60,
    )
)
def test_noise_beside_an_honest_client(shared: tuple[Cloud, Link], noise: list[list[bytes]]) -> None:
    running, link = shared
    bad = DealerTransport(running.address, running.keys, LIMITS)
    while not bad.send(noise[0]):
        bad.poll(100.0, sending=True)
    for frames in noise[1:]:
        bad.send(frames)
    assert Client(link).generate(PROMPT, 3) == fake_text(PROMPT, 3)
    bad.close()


def test_bytes_that_are_not_even_zeromq(cloud: Cloud) -> None:
    host, port = cloud.address.removeprefix("tcp://").split(":")
    chance = random.Random(1)
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
    sockets = []
    for kind in range(40):
        raw = socket.create_connection((host, int(port)))
        sockets.append(raw)
        if kind % 4 == 1:
            raw.sendall(chance.randbytes(200))
        elif kind % 4 == 2:
            raw.sendall(greeting + b"\x06" + struct.pack(">Q", 2**31) + chance.randbytes(100))
        elif kind % 4 == 3:
            raw.sendall(greeting[: chance.randrange(64)])  # and then nothing: a slow loris
    link = cloud.connect()
    assert Client(link).generate(PROMPT, 10) == fake_text(PROMPT, 10)
    link.close()
    for raw in sockets:
        raw.close()


def test_a_message_that_is_too_large_ends_its_connection_only(cloud: Cloud) -> None:
    link = cloud.connect()
    bad = DealerTransport(cloud.address, cloud.keys, LIMITS)
    while not bad.send(m.encode(m.Hello(1, 1))):
        bad.poll(100.0, sending=True)
    bad.send([bytes(LIMITS.max_message_bytes + 1)])
    deadline = time.monotonic() + 20.0
    with pytest.raises(LinkError):
        while time.monotonic() < deadline:
            bad.poll(100.0)
            bad.recv()
    bad.close()
    assert Client(link).generate(PROMPT, 10) == fake_text(PROMPT, 10)
    link.close()


def test_the_status_port_answers(cloud: Cloud) -> None:
    status = StatusServer("127.0.0.1:0", cloud.service.metrics.text, cloud.service.health)
    base = f"http://{status.address}"
    assert b'"status": "ok"' in urlopen(f"{base}/health").read()
    assert b"isthmus_messages_total" in urlopen(f"{base}/metrics").read()
    with pytest.raises(HTTPError, match="404") as missing:
        urlopen(f"{base}/other")
    missing.value.close()
    cloud.service.stop()
    with pytest.raises(HTTPError, match="503") as stopping:
        urlopen(f"{base}/health")
    stopping.value.close()
    with pytest.raises(ServiceError, match="cannot listen"):
        StatusServer(status.address, str, dict)
    with pytest.raises(ServiceError, match="no address"):
        StatusServer("nonsense", str, dict)
    status.close()


def test_the_status_port_answers_over_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    status = StatusServer("[::1]:0", lambda: "counters", dict)
    try:
        assert status.address == f"[::1]:{status.port}"
        assert urlopen(f"http://{status.address}/metrics").read() == b"counters"
    finally:
        status.close()
