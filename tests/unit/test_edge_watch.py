"""What messages tell as they pass: trips, transfers and the cloud's steps, each without what belongs to the others."""

from __future__ import annotations

from typing import Any

from isthmus.edge.watch import Watch
from isthmus.protocol import messages as m

HASH = bytes(16)


class Told:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def trip(self, now_s: float, ms: float) -> None:
        self.said.append(("trip", round(ms)))

    def moved(self, now_s: float, size: float, ms: float) -> None:
        self.said.append(("moved", size > 3000, round(ms)))

    def stepped(self, now_s: float, rows: int, prompt: int, ms: float, queue_ms: float, cut: int) -> None:
        self.said.append((f"stepped from {cut}" if cut else "stepped", rows, prompt, round(ms), round(queue_ms)))

    def checked(self, drafted: int, taken: int) -> None:
        self.said.append(("checked", drafted, taken))


def passing(*messages: tuple[float, m.Message, bool]) -> list[tuple[Any, ...]]:
    """What is told of messages at their times, up or down."""
    told = Told()
    watch = Watch(told, lambda now: None, lambda alias: 4 if alias == 2 else 0)
    for at, message, up in messages:
        if up:
            watch.sent(message, at)
        else:
            watch.heard(message, at)
    return told.said


def test_a_question_tells_of_the_trip_and_of_the_step() -> None:
    rows = m.Rows(1, 2, 10, HASH, [5, 6, 7])
    result = m.Result(1, 2, 10, [8], 13, HASH, 30_000, 10_000)
    assert passing((0.0, rows, True), (0.1, result, False)) == [("trip", 60), ("stepped", 1, 2, 30, 10)]


def test_many_bytes_tell_of_the_rate() -> None:
    rows = m.Rows(2, 2, 10, HASH, [5], m.Tensor("f32", (1, 1000), 0, bytes(4000)))
    result = m.Result(2, 2, 10, [8], 11, HASH, 30_000)
    told = passing((0.0, rows, True), (0.1, result, False))
    assert told == [("moved", True, 70), ("stepped from 4", 1, 0, 30, 0)]


def test_a_repeated_question_counts_from_the_first_time() -> None:
    opening, opened = m.Open(bytes(16), 1, 2, "ab"), m.Opened(1, 2, 0, HASH, "toy", "f16")
    assert passing((0.0, opening, True), (1.0, opening, True), (1.1, opened, False)) == [("trip", 1100)]
    assert passing((0.0, opened, False)) == []


def test_a_stream_tells_of_every_step() -> None:
    ask = m.Generate(1, 2, 0, HASH, [5, 6, 7], 3)
    news = [m.Tokens(1, 2, 3 + i, [9], i == 1, "", 3 + i, HASH, 20_000) for i in range(2)]
    told = passing((0.0, ask, True), (0.1, news[0], False), (0.15, news[1], False))
    assert told == [("trip", 80), ("stepped", 1, 2, 20, 0), ("stepped", 1, 0, 20, 30)]


def test_drafts_that_were_checked_are_counted() -> None:
    draft = m.Draft(1, 2, 10, HASH, [5, 6, 7, 8])
    verdict = m.Verdict(1, 2, 10, 3, 9, HASH, 20_000)
    told = passing((0.0, draft, True), (0.05, verdict, False))
    assert told == [("trip", 30), ("stepped", 4, 0, 20, 0), ("checked", 3, 2)]
