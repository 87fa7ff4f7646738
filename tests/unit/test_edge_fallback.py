"""What a device does when its cloud is away, busy or unwilling: it goes on by itself, and says so."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from isthmus.edge import Timeouts
from isthmus.edge.fallback import Rest
from isthmus.protocol import messages as m
from isthmus.protocol.errors import DeviceError, IsthmusError, LinkError
from isthmus.protocol.keys import DeviceKeys, new_pair
from isthmus.protocol.transport import Refused
from tests.edge_toys import PROMPT, device, ids, local, toy_engine  # noqa: F401
from tests.edge_world import LossyWire, ToyBundle, ToyCloud


def test_a_dead_cloud_is_replaced_by_the_whole_model() -> None:
    for mode in ("stream", "split", "auto"):
        wire = LossyWire(ToyCloud())
        wire.die_after = 8
        with device(wire, mode, timeouts=Timeouts()) as one:
            tokens = list(one.generate(PROMPT, max_tokens=20))
            assert ids(tokens) == local(max_tokens=20)
            assert {tokens[0].source, tokens[-1].source} == {"split" if mode == "split" else "cloud", "device"}
            assert "went on by itself" in one.stats.note


def test_auto_looks_only_shortly_for_a_cloud_that_went_away() -> None:
    cloud, wire = ToyCloud(), LossyWire(ToyCloud())
    wire.die_after = 8
    with device(wire, timeouts=Timeouts()) as one:
        tokens = ids(one.generate(PROMPT, max_tokens=20))
        before = wire.now
        tokens += ids(one.generate(max_tokens=4))
        assert set(one.stats.sources) == {"device"}
        assert wire.now - before < 0.2
        wire.cloud, wire.die_after = cloud, 1 << 60
        wire.reconnect()
        tokens += ids(one.generate(max_tokens=4))
        assert set(one.stats.sources) == {"cloud"}
    assert tokens == local(max_tokens=28)


def test_a_dead_cloud_is_an_error_without_the_whole_model() -> None:
    wire = LossyWire(ToyCloud())
    wire.die_after = 8
    with device(wire, "split", ToyBundle(held=3), timeouts=Timeouts()) as one:
        tokens = one.generate(PROMPT, max_tokens=20)
        with pytest.raises(LinkError, match="went away"):
            list(tokens)
    wire = LossyWire(ToyCloud())
    wire.die_after = 8
    with device(wire, "stream", timeouts=Timeouts(), fallback=False) as one, pytest.raises(LinkError):
        list(one.generate(PROMPT, max_tokens=20))


def test_auto_goes_on_alone_when_nobody_answers_and_returns_to_the_cloud() -> None:
    cloud, wire = ToyCloud(), LossyWire(ToyCloud())
    wire.cloud = None
    with device(wire, timeouts=Timeouts()) as one:
        assert {token.source for token in one.generate(PROMPT, max_tokens=3)} == {"device"}
        assert "does not answer" in one.stats.note
        wire.cloud = cloud
        assert {token.source for token in one.generate(max_tokens=3)} == {"cloud"}
    wire.cloud = None
    with device(wire, "stream") as one, pytest.raises(LinkError, match="does not answer"):
        one.generate(PROMPT)


def test_a_key_that_is_refused_is_never_passed_over() -> None:
    class Closed(LossyWire):
        def receive(self, timeout_ms: float) -> Any:
            raise Refused("the cloud does not know this device's key", "have its owner run: isthmus keys allow")

    with device(Closed(ToyCloud())) as one, pytest.raises(LinkError, match="does not know this device's key"):
        one.generate(PROMPT)


class Unwilling(ToyCloud):
    """A cloud that refuses everything but greetings once it has a reason to."""

    def __init__(self) -> None:
        super().__init__()
        self.reason: m.Fault | None = None

    def receive(self, message: Any) -> list[tuple[float, Any]]:
        if self.reason is None or isinstance(message, m.Hello | m.Ping):
            return super().receive(message)
        alias, epoch = getattr(message, "alias", None), getattr(message, "epoch", 0)
        fault = m.Fault(self.reason.code, self.reason.problem, self.reason.remedy, self.reason.retry_ms)
        if self.reason.code is not m.Code.NOT_ALLOWED:
            fault.alias, fault.epoch = alias, epoch
        return [(0.0, fault)]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (m.Code.NOT_ALLOWED, "this key is not allowed any more"),
        (m.Code.KV_FULL, "the KV of 64 positions is full"),
        (m.Code.UNKNOWN_MODEL, "no such model here"),
    ],
)
def test_auto_goes_on_alone_when_the_cloud_does_not_want_it_any_more(code: m.Code, problem: str) -> None:
    cloud = Unwilling()
    with device(LossyWire(cloud), timeouts=Timeouts()) as one:
        tokens = ids(one.generate(PROMPT, max_tokens=4))
        cloud.reason = m.Fault(code, problem, "ask its owner")
        tokens += ids(one.generate(max_tokens=4))
        assert set(one.stats.sources) == {"device"}
        assert problem in one.stats.note and "by itself" in one.stats.note
        assert tokens == local(max_tokens=8)
        for mode in ("stream", "split"):
            with pytest.raises(IsthmusError, match=f"{problem}; ask its owner, or use mode local"):
                ids(one.generate(max_tokens=4, mode=mode))
        cloud.reason = None
        assert {token.source for token in one.generate(max_tokens=4)} == {"cloud"}
        assert one.stats.note == ""
    with device(LossyWire(cloud), bundle=ToyBundle(held=3), timeouts=Timeouts()) as one:
        cloud.reason = m.Fault(code, problem, "ask its owner")
        with pytest.raises(IsthmusError, match=f"{problem}; ask its owner$"):
            ids(one.generate(PROMPT, max_tokens=4))


class Silent(ToyCloud):
    """A cloud that opens sessions and never answers a question."""

    def receive(self, message: Any) -> list[tuple[float, Any]]:
        return [] if isinstance(message, m.Rows | m.Generate) else super().receive(message)


@pytest.mark.parametrize(("mode", "whole"), [("auto", True), ("split", True), ("stream", True), ("stream", False)])
def test_a_cloud_that_is_given_up_is_told_to_stop(mode: str, whole: bool) -> None:
    wire = LossyWire(Silent())
    bundle = ToyBundle() if whole else ToyBundle(held=3)
    with device(wire, mode, bundle, timeouts=Timeouts(progress_ms=4_000)) as one:
        answer = one.generate(PROMPT, max_tokens=4)
        if whole:
            assert next(answer).source == "device"
        else:
            with pytest.raises(LinkError, match="gave no answer in 4 s"):
                next(answer)
        opened = next(message for message in wire.sent if isinstance(message, m.Open))
        assert wire.sent[-1] == m.Cancel(opened.alias, opened.epoch)


def test_auto_does_not_wait_long_for_a_busy_cloud(caplog: pytest.LogCaptureFixture) -> None:
    cloud = Unwilling()
    wire = LossyWire(cloud)
    cloud.reason = m.Fault(m.Code.BUSY, "all seats are taken", "", 250)
    with device(wire, timeouts=Timeouts()) as one:
        before = wire.now
        assert {token.source for token in one.generate(PROMPT, max_tokens=4)} == {"device"}
        assert 5.0 <= wire.now - before < 6.0
        assert "the cloud is busy: all seats are taken" in one.stats.note
    assert "the cloud is busy: waiting (all seats are taken)" in caplog.messages
    waiting = device(LossyWire(cloud), "stream", timeouts=Timeouts(), fallback=False)
    with waiting as one, pytest.raises(LinkError, match=r"gave no answer in 120 s.*or use mode local"):
        ids(one.generate(PROMPT, max_tokens=4))


def test_a_cloud_that_was_busy_for_a_while_leaves_no_note(caplog: pytest.LogCaptureFixture) -> None:
    cloud = Unwilling()
    wire = LossyWire(cloud)
    cloud.reason = m.Fault(m.Code.BUSY, "all seats are taken", "", 250)

    def free(record: logging.LogRecord) -> None:
        cloud.reason = None

    with device(wire, "stream", timeouts=Timeouts()) as one:
        handler = logging.Handler()
        handler.emit = free  # type: ignore[method-assign]
        logging.getLogger("isthmus.edge").addHandler(handler)
        try:
            assert ids(one.generate(PROMPT, max_tokens=4)) == local(max_tokens=4)
        finally:
            logging.getLogger("isthmus.edge").removeHandler(handler)
        assert one.stats.note == ""
    assert len([line for line in caplog.messages if "busy: waiting" in line]) == 1


def test_a_busy_cloud_is_left_alone_for_a_while() -> None:
    cloud = Unwilling()
    wire = LossyWire(cloud)
    cloud.reason = m.Fault(m.Code.BUSY, "all seats are taken", "", 250)
    with device(wire, timeouts=Timeouts()) as one:

        def took_s() -> float:
            before = wire.now
            tokens.extend(ids(one.generate(None if tokens else PROMPT, max_tokens=2)))
            return wire.now - before

        tokens: list[int] = []
        assert took_s() >= 5.0
        for _ in range(3):
            assert took_s() < 0.2
            assert set(one.stats.sources) == {"device"}
            assert one.stats.note == "the cloud is busy: all seats are taken: this device goes on by itself"
        wire.now += 10.0
        assert took_s() >= 5.0  # asked again, in vain
        cloud.reason = None
        wire.now += 10.0
        took_s()
        assert set(one.stats.sources) == {"device"}
        wire.now += 10.0
        assert took_s() < 0.2
        assert (set(one.stats.sources), one.stats.note) == ({"cloud"}, "")
        took_s()
        assert set(one.stats.sources) == {"cloud"}
        assert tokens == local(max_tokens=len(tokens))


def test_an_answer_of_the_cloud_ends_the_rest() -> None:
    cloud = Unwilling()
    cloud.reason = m.Fault(m.Code.BUSY, "all seats are taken", "", 250)
    with device(LossyWire(cloud), timeouts=Timeouts()) as one:
        list(one.generate(PROMPT, max_tokens=2))
        cloud.reason = None
        for mode in ("stream", None):
            assert {token.source for token in one.generate(max_tokens=2, mode=mode)} == {"cloud"}


def test_a_rest_grows_up_to_a_bound() -> None:
    rest, now, lengths = Rest(10.0, 70.0), 5.0, []
    assert rest.over(now)
    for _ in range(5):
        rest.begin(now)
        lengths.append(next(s for s in range(1000) if rest.over(now + s)))
        now += lengths[-1]
    assert lengths == [10, 20, 40, 70, 70]
    rest.end()
    rest.begin(now)
    assert rest.over(now + 10.0) and not rest.over(now + 9.9)


class Other(Unwilling):
    """An unwilling cloud with another arithmetic."""

    def receive(self, message: Any) -> list[tuple[float, Any]]:
        answers = super().receive(message)
        if isinstance(message, m.Hello):
            greeting = answers[0][1]
            offers = tuple(msgspec.structs.replace(offer, numerics="other") for offer in greeting.offers)
            return [(0.0, msgspec.structs.replace(greeting, offers=offers))]
        return answers


def test_waiting_and_what_else_did_not_go_as_asked_are_both_said() -> None:
    cloud = Other()
    cloud.reason = m.Fault(m.Code.BUSY, "all seats are taken", "", 250)
    lasting, seen = "the cloud computes with other, this device with toy", []
    with device(LossyWire(cloud), "split", timeouts=Timeouts()) as one:

        def free(record: logging.LogRecord) -> None:
            cloud.reason = None
            seen.append(one.stats.note)

        handler = logging.Handler()
        handler.emit = free  # type: ignore[method-assign]
        logging.getLogger("isthmus.edge").addHandler(handler)
        try:
            ids(one.generate(PROMPT, max_tokens=4))
        finally:
            logging.getLogger("isthmus.edge").removeHandler(handler)
        assert seen == [f"{lasting}; the cloud is busy: waiting (all seats are taken)"]
        assert one.stats.note == lasting


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a device whose cloud has a name that nobody knows."""

    def getaddrinfo(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return {"cloud": "tcp://mistyped.example:5757", "keys": DeviceKeys(new_pair(), new_pair().public)}


@pytest.mark.parametrize("mode", ["auto", "stream", "split"])
def test_a_cloud_that_cannot_exist_is_an_error_at_once(mode: str, nowhere: dict[str, Any], tmp_path: Path) -> None:
    for bundle in (ToyBundle(held=3), tmp_path / "none"):
        with pytest.raises(LinkError, match=r"no host 'mistyped\.example'"):
            device(mode=mode, bundle=bundle, **nowhere)  # type: ignore[arg-type]
    with pytest.raises(LinkError, match="has no port"):
        device(mode=mode, **{**nowhere, "cloud": "tcp://127.0.0.1:99999"})


def test_a_cloud_that_cannot_exist_is_not_needed_for_the_whole_model(nowhere: dict[str, Any]) -> None:
    for mode, note in (("local", ""), ("auto", "there is no host 'mistyped.example' (tcp://mistyped.example:5757)")):
        with device(mode=mode, **nowhere) as alone:
            went_on = "this device goes on by itself (check the spelling of the cloud's address)"
            for _ in range(2):
                assert ids(alone.generate(PROMPT, max_tokens=3)) == local(max_tokens=3)
                assert alone.stats.note == (f"{note}: {went_on}" if note else "")


class Counted(LossyWire):
    """A wire that counts how often it was closed."""

    closed = 0

    def close(self) -> None:
        self.closed += 1
        super().close()


@pytest.mark.parametrize(
    "options",
    [
        {"kv_tokens": 1000},
        {"cut": 9},
        {"memory_mb": 1.0, "mode": "local"},
        {"bundle": ToyBundle(held=3), "mode": "local"},
    ],
)
def test_a_device_that_cannot_begin_closes_its_connection(options: dict[str, Any]) -> None:
    wire = Counted(ToyCloud())
    with pytest.raises(DeviceError):
        device(wire, **options)
    assert wire.closed == 1


def test_a_device_that_begins_keeps_its_connection() -> None:
    wire = Counted(ToyCloud())
    with device(wire):
        assert wire.closed == 0
    assert wire.closed == 1
