"""Connecting, encrypted, over links that are slow or stand still for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from isthmus.apps.bench.relay import LinkProfile, Relay
from isthmus.protocol import messages as m
from isthmus.protocol.errors import SlowLinkError
from isthmus.protocol.keys import AllowList, DeviceKeys, new_pair
from isthmus.protocol.limits import LinkLimits
from isthmus.protocol.link import Link
from isthmus.protocol.transport import DealerTransport, RouterTransport

WELCOME = m.Welcome(1, 1, (), (), m.Limits(1 << 20, 1 << 20, 1000, 64))
Linked = tuple[Link, Relay]
heard: list[bytes] = []  # routes of pings, in the order in which they came


@pytest.fixture
def linked(tmp_path: Path) -> Iterator[Callable[[LinkProfile, LinkLimits], Linked]]:
    """A link to a cloud that welcomes whoever greets it, by way of a relay."""
    cloud, device, allowed = new_pair(), new_pair(), AllowList(tmp_path / "allowed")
    allowed.allow(device.public, "device")
    over = threading.Event()

    def serve(router: RouterTransport) -> None:
        while not over.is_set():
            router.poll(10.0)
            while (incoming := router.recv()) is not None:
                match m.decode(incoming.frames):
                    case m.Hello():
                        router.send(incoming.route, m.encode(WELCOME))
                    case m.Ping(sent_us):
                        heard.append(incoming.route)
                        router.send(incoming.route, m.encode(m.Pong(sent_us)))
        router.close()

    with ExitStack() as opened:

        def link(profile: LinkProfile, limits: LinkLimits) -> Linked:
            router = RouterTransport("tcp://127.0.0.1:0", cloud, allowed, limits)
            relay = opened.enter_context(Relay(router.address, profile))
            thread = threading.Thread(target=serve, args=(router,))
            thread.start()
            opened.callback(thread.join)
            opened.callback(over.set)
            keys = DeviceKeys(device, cloud.public)
            found = Link(lambda: DealerTransport(relay.address, keys, limits), limits)
            opened.callback(found.close)
            return found, relay

        yield link


def wait(link: Link, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not until():
        assert time.monotonic() < deadline
        link.receive(50.0)


def test_a_round_trip_of_600_ms_is_no_reason_not_to_connect(linked: Callable[..., Linked]) -> None:
    link, _ = linked(LinkProfile.of_rtt(600), LinkLimits())
    wait(link, lambda: link.welcome is not None)


def test_a_link_that_stands_still_is_called_slow_and_connects_when_it_goes_on(linked: Callable[..., Linked]) -> None:
    link, relay = linked(LinkProfile(), LinkLimits(handshake_ms=300))
    relay.stall()
    wait(link, lambda: link.failure is not None)
    assert isinstance(link.failure, SlowLinkError)
    relay.resume()
    wait(link, lambda: link.welcome is not None)


def test_a_connection_outlives_a_stall(linked: Callable[..., Linked]) -> None:
    heard.clear()
    link, relay = linked(LinkProfile(), LinkLimits(heartbeat_ms=100, silent_intervals=3))
    wait(link, lambda: link.welcome is not None and bool(heard))
    first, since = heard[0], time.monotonic()
    relay.stall()
    wait(link, lambda: time.monotonic() - since > 1.5)  # fifteen heartbeats
    assert not link.up
    before = len(heard)
    relay.resume()
    wait(link, lambda: first in heard[before:] and link.up)
