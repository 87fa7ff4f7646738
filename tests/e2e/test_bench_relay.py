"""The relay between real sockets: what goes through, in which order, not too early, and what events do to it."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Self

import pytest

from isthmus.apps.bench.relay import BenchError, Event, LinkProfile, Relay
from isthmus.split.traces import Trace

PATIENCE_S = 60.0
QUIET_S = 0.1  # waited before saying that nothing came


class Target:
    """A server whose `talk` answers each connection in a thread of its own."""

    def __init__(self, talk: Callable[[socket.socket], None]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.talk = talk
        self.threads: list[threading.Thread] = []
        self.ended: list[str] = []  # how each connection did

    def __enter__(self) -> Self:
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                sock.settimeout(PATIENCE_S)
                thread = threading.Thread(target=self.answer, args=(sock,), daemon=True)
                self.threads.append(thread)
                thread.start()

    def answer(self, sock: socket.socket) -> None:
        try:
            with sock:
                self.talk(sock)
        except OSError as error:
            self.ended.append(type(error).__name__)
        else:
            self.ended.append("end")


def echo(sock: socket.socket) -> None:
    while data := sock.recv(65536):
        sock.sendall(data)


@pytest.fixture
def target() -> Iterator[Target]:
    with Target(echo) as running:
        yield running


def dial(relay: Relay) -> socket.socket:
    return socket.create_connection(("127.0.0.1", relay.port), timeout=PATIENCE_S)


def receive(sock: socket.socket, size: int = -1) -> bytes:
    """That many bytes, or all up to the end."""
    got = bytearray()
    while len(got) != size and (data := sock.recv(65536 if size < 0 else size - len(got))):
        got += data
    return bytes(got)


def nothing_comes(sock: socket.socket) -> bool:
    sock.settimeout(QUIET_S)
    try:
        return sock.recv(1) is None
    except TimeoutError:
        return True
    finally:
        sock.settimeout(PATIENCE_S)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


PROFILES = {
    "perfect": LinkProfile(),
    "delayed": LinkProfile.of_rtt(20),
    "jitter": LinkProfile.of_rtt(4, jitter_ms=3, seed=5),
    "rate": LinkProfile.of_rtt(2, rate_up_bps=40_000_000, rate_down_bps=80_000_000, queue_bytes=20_000),
    "trace": LinkProfile(trace_up=Trace((1, 1, 1, 2, 5)), trace_down=Trace((1, 1, 3)), queue_bytes=1500),
}


@pytest.mark.parametrize("name", PROFILES)
def test_bytes_come_whole_and_in_order_both_ways(target: Target, name: str) -> None:
    data = noise(600_000)
    with Relay(target.address, PROFILES[name]) as relay, dial(relay) as sock:

        def send() -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        assert receive(sock) == data
        sender.join()
        until(lambda: relay.counts().open == 0)
        counts = relay.counts()
    assert counts.up.bytes == counts.down.bytes == len(data)
    assert counts.up.packets >= 400 and counts.down.packets >= 400
    assert counts.up.lost_bytes == counts.down.lost_bytes == 0
    assert counts.connections == 1


def test_nothing_comes_before_it_is_due(target: Target) -> None:
    profile = LinkProfile(delay_up_ms=20, delay_down_ms=10, jitter_ms=2, rate_up_bps=1_000_000)
    with Relay(target.address, profile) as relay, dial(relay) as sock:
        for size in (0, 1, 1250):
            start = time.monotonic()
            sock.sendall(bytes(size + 1))
            receive(sock, size + 1)
            assert time.monotonic() - start >= 0.030 + size * 8e-6
            last = relay.counts().down.last_byte_s
            assert last is not None and start + 0.030 <= last <= time.monotonic()


def test_a_new_connection_carries_bytes_after_a_round_trip() -> None:
    with (
        Target(lambda sock: sock.sendall(b"welcome")) as target,
        Relay(target.address, LinkProfile.of_rtt(40)) as relay,
    ):
        start = time.monotonic()
        with dial(relay) as sock:
            assert receive(sock) == b"welcome"
        assert time.monotonic() - start >= 0.040


def test_the_rate_is_one_for_all_connections(target: Target) -> None:
    profile = LinkProfile(rate_up_bps=2_000_000)
    with Relay(target.address, profile) as relay, ExitStack() as stack:
        socks = [stack.enter_context(dial(relay)) for _ in range(5)]
        start = time.monotonic()
        for sock in socks:
            sock.sendall(bytes(5000))
        for sock in socks:
            receive(sock, 5000)
        assert time.monotonic() - start >= 0.100
        assert relay.counts().up.bytes == 25_000


def test_either_side_may_end_first() -> None:
    def count(sock: socket.socket) -> None:
        sock.sendall(b"%d" % len(receive(sock)))

    def speak(sock: socket.socket) -> None:
        sock.sendall(b"that is all")
        sock.shutdown(socket.SHUT_WR)
        heard.append(receive(sock))

    heard: list[bytes] = []
    with Target(count) as target, Relay(target.address, LinkProfile.of_rtt(4)) as relay, dial(relay) as sock:
        sock.sendall(bytes(100_000))
        sock.shutdown(socket.SHUT_WR)
        assert receive(sock) == b"100000"
    with Target(speak) as target, Relay(target.address, LinkProfile.of_rtt(4)) as relay, dial(relay) as sock:
        assert receive(sock) == b"that is all"
        sock.sendall(b"I heard it")
        sock.shutdown(socket.SHUT_WR)
        until(lambda: heard == [b"I heard it"] and relay.counts().open == 0)


def test_many_connections_at_once(target: Target) -> None:
    profile = LinkProfile.of_rtt(2, jitter_ms=1, rate_up_bps=100_000_000, queue_bytes=4000)
    with Relay(target.address, profile) as relay, ExitStack() as stack:
        socks = [stack.enter_context(dial(relay)) for _ in range(100)]
        for i, sock in enumerate(socks):
            sock.sendall(noise(3000, i))
        for i, sock in enumerate(socks):
            assert receive(sock, 3000) == noise(3000, i)
        counts = relay.counts()
        assert (counts.connections, counts.open) == (100, 100)
        assert counts.up.bytes == counts.down.bytes == 300_000
        for sock in socks:
            sock.close()
        until(lambda: relay.counts().open == 0)


def fill(sock: socket.socket) -> int:
    """Sends until nothing more is taken, and says how many bytes were."""
    sock.settimeout(QUIET_S)
    taken = 0
    with suppress(TimeoutError):
        while taken < 100_000_000:
            taken += sock.send(bytes(16_384))
    sock.settimeout(PATIENCE_S)
    return taken


def test_a_full_queue_holds_the_sender() -> None:
    got: list[int] = []
    with (
        Target(lambda sock: got.append(len(receive(sock)))) as target,
        Relay(target.address, LinkProfile(queue_bytes=30_000)) as relay,
        dial(relay) as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        sock.sendall(b"x")
        until(lambda: relay.counts().up.bytes == 1)
        relay.stall()
        taken = fill(sock)
        assert 30_000 < taken < 2_000_000
        assert relay.counts().up.bytes == 1
        relay.resume()
        sock.shutdown(socket.SHUT_WR)
        until(lambda: got == [taken + 1])


def test_a_receiver_that_does_not_read_holds_its_sender_alone(target: Target) -> None:
    with Relay(target.address) as relay, dial(relay) as lazy, dial(relay) as other:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        taken = fill(lazy)
        assert taken < 100_000_000
        other.sendall(noise(50_000))
        assert receive(other, 50_000) == noise(50_000)
        lazy.shutdown(socket.SHUT_WR)
        assert len(receive(lazy)) == taken


def test_a_stall_holds_bytes_and_new_connections(target: Target) -> None:
    with Relay(target.address) as relay, dial(relay) as sock:
        sock.sendall(b"a")
        assert receive(sock, 1) == b"a"
        relay.stall()
        sock.sendall(b"bc")
        with dial(relay) as new:
            new.sendall(b"new")
            assert nothing_comes(sock) and nothing_comes(new)
            assert relay.counts().up.bytes == 1
            relay.resume()
            assert receive(sock, 2) == b"bc"
            assert receive(new, 3) == b"new"


def test_a_cut_swallows_and_lets_nobody_know(target: Target) -> None:
    with Relay(target.address, LinkProfile.of_rtt(2)) as relay, dial(relay) as old:
        old.sendall(b"a")
        assert receive(old, 1) == b"a"
        relay.cut()
        old.sendall(bytes(200_000))
        until(lambda: relay.counts().up.lost_bytes == 200_000)
        with dial(relay) as new:
            new.sendall(b"hello")
            assert nothing_comes(new) and nothing_comes(old)
            assert (relay.counts().connections, target.ended) == (1, [])
            relay.mend()
            assert receive(new, 5) == b"hello"
            old.sendall(b"still?")
            until(lambda: relay.counts().up.lost_bytes == 200_006)
            assert nothing_comes(old) and target.ended == []
        assert relay.counts().up.bytes == 6


def test_a_cut_may_refuse_new_connections(target: Target) -> None:
    with Relay(target.address) as relay:
        with dial(relay) as sock:
            sock.sendall(b"a")
            receive(sock, 1)
            for _ in range(2):
                relay.cut(new="refuse")
                with pytest.raises(ConnectionRefusedError):
                    dial(relay)
            assert nothing_comes(sock)
        relay.cut(new="hang")
        with dial(relay) as sock:
            sock.sendall(b"b")
            assert nothing_comes(sock)
            relay.mend()
            relay.mend()
            assert receive(sock, 1) == b"b"


def test_a_cut_loses_what_is_under_way(target: Target) -> None:
    with Relay(target.address, LinkProfile(rate_up_bps=8000)) as relay, dial(relay) as sock:
        sock.sendall(bytes(1400))
        sock.shutdown(socket.SHUT_WR)
        time.sleep(QUIET_S)
        relay.cut()
        until(lambda: relay.counts().up.lost_bytes == 1400)
        assert relay.counts().up.bytes == 0 and target.ended == []


def test_a_reset_ends_both_sides_at_once(target: Target) -> None:
    with Relay(target.address, LinkProfile.of_rtt(2)) as relay:
        with dial(relay) as sock:
            sock.sendall(b"a")
            receive(sock, 1)
            relay.stall()
            sock.sendall(bytes(1000))
            until(lambda: relay._carrier.up.pipe.queued == 1000)
            relay.reset()
            with pytest.raises(ConnectionResetError):
                receive(sock)
            until(lambda: target.ended == ["ConnectionResetError"])
            assert relay.counts().up.lost_bytes == 1000 and relay.counts().open == 0
        relay.resume()
        with dial(relay) as sock:
            sock.sendall(b"b")
            assert receive(sock, 1) == b"b"


def test_a_peer_that_resets_is_heard_of_over_the_link(target: Target) -> None:
    def rude(sock: socket.socket) -> None:
        sock.recv(1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with Target(rude) as other, Relay(other.address, LinkProfile.of_rtt(20)) as relay, dial(relay) as sock:
        start = time.monotonic()
        sock.sendall(b"a")
        with pytest.raises(ConnectionResetError):
            receive(sock)
        assert time.monotonic() - start >= 0.020
    with Relay(target.address) as relay:
        with dial(relay) as sock:
            sock.sendall(b"a")
            receive(sock, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        until(lambda: target.ended == ["ConnectionResetError"] and relay.counts().open == 0)


def test_a_target_that_is_not_there_ends_connections() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # never listens
        with Relay(f"127.0.0.1:{taken.getsockname()[1]}", LinkProfile.of_rtt(10)) as relay:
            start = time.monotonic()
            with dial(relay) as sock, pytest.raises(ConnectionResetError):
                receive(sock)
            assert time.monotonic() - start >= 0.010
            until(lambda: relay.counts().open == 0)


def test_a_schedule_happens_in_order(target: Target) -> None:
    cut = [Event(2000, "cut", "refuse"), Event(2000, "reset")]  # nobody gets in between
    plan = [Event(2100, "mend"), Event(0, "stall"), Event(100, "resume"), *cut]
    start = time.monotonic()
    with Relay(target.address, schedule=plan) as relay, dial(relay) as sock:
        sock.sendall(b"a")
        assert receive(sock, 1) == b"a"
        assert time.monotonic() - start >= 0.1
        with pytest.raises(ConnectionResetError):
            receive(sock)
        assert time.monotonic() - start >= 2.0
        while True:
            with suppress(ConnectionRefusedError), dial(relay) as new:
                assert time.monotonic() - start >= 2.1
                new.sendall(b"b")
                assert receive(new, 1) == b"b"
                break


def test_an_idle_relay_does_nothing(target: Target) -> None:
    profile = LinkProfile(delay_up_ms=1, trace_up=Trace((1,)), trace_down=Trace((1,)), jitter_ms=1)
    with Relay(target.address, profile) as relay, dial(relay) as sock:
        sock.sendall(b"a")
        receive(sock, 1)
        turns = []
        wait = relay._wait

        def counted() -> list[tuple[object, int]]:
            turns.append(1)
            return wait()  # type: ignore[return-value]

        relay._wait = counted  # type: ignore[assignment, method-assign]
        time.sleep(3 * QUIET_S)
        assert len(turns) <= 1


def test_errors_are_for_people(target: Target) -> None:
    for wrong in ("nowhere", "host:99999", "ipc://socket", "127.0.0.1:0", ":80"):
        with pytest.raises(BenchError, match="write HOST:PORT"):
            Relay(wrong)
    with pytest.raises(BenchError, match="there is no event 'explode'"):
        Event(0, "explode")  # type: ignore[arg-type]
    with pytest.raises(BenchError, match="at -1 ms"):
        Event(-1, "stall")
    relay = Relay(target.address)
    for act in (relay.stall, relay.resume, relay.cut, relay.mend, relay.reset, relay.counts):
        with pytest.raises(BenchError, match="not running"):
            act()
    relay.close()
    with relay:
        with pytest.raises(BenchError, match="cannot 'vanish'"):
            relay.cut(new="vanish")  # type: ignore[arg-type]
        with (
            pytest.raises(BenchError, match=f"cannot listen on port {relay.port}"),
            Relay("127.0.0.1:1", port=relay.port),
        ):
            pass
        assert relay.address == f"tcp://127.0.0.1:{relay.port}"
    with pytest.raises(BenchError, match="not running"):
        relay.stall()
    with pytest.raises(BenchError, match="started before"):
        relay.__enter__()
    assert relay.counts().connections == 0
