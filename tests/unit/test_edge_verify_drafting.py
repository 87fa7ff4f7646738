"""Drafting while blocks are under way: what came is heard before more is drafted, and none is drafted twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from isthmus.edge.events import Answered, Verified
from isthmus.edge.link import Restart
from isthmus.edge.model_drafts import ModelDrafts, Said
from isthmus.edge.pace import Pace
from isthmus.edge.verify import VerifyRunner
from isthmus.engine.sampling import GREEDY, Sampling
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain

LANE: Any = SimpleNamespace(alias=1, epoch=1)
BLOCK = 3
WRONG = 99


class Link:
    """A cloud whose answers come while tokens are drafted, or when nobody drafts any more.

    Attributes:
        due: answers by the position for which a token is drafted as they come.
        came: answers that nobody has heard yet.
        blocks: (position, tokens) that were sent.
    """

    max_rows = 100

    def __init__(self, due: dict[int, list[Answered | Verified]]) -> None:
        self.due, self.came, self.blocks = due, list[Answered | Verified](), list[tuple[int, list[int]]]()
        self.session: Any = SimpleNamespace(lane=lambda *_: LANE, void=lambda *_: None)

    def align(self, lane: object, length: int) -> int:
        return length

    def rows(self, lane: object, rows: m.Rows) -> None:
        pass

    def draft(self, lane: object, draft: m.Draft, head: bytes) -> None:
        self.blocks.append((draft.position, list(draft.tokens)))

    def cancel(self, lane: object) -> None:
        pass

    def look(self) -> bool:
        return bool(self.came)

    def verdict(self, lane: object, wait: bool = True) -> Answered | Verified | None:
        if not self.came and wait:
            self.came += self.due.pop(min(self.due))
        return self.came.pop(0) if self.came else None


class Counting:
    """Says a token's position, and keeps for which it was asked."""

    def __init__(self, link: Link) -> None:
        self.said, self._link = list[int](), link

    def draft(self, log: Chain, sampling: Sampling) -> Said:
        self.said.append(len(log))
        self._link.came += self._link.due.pop(len(log), [])
        return Said(len(log), 0.9)

    def truncate(self, length: int) -> None:
        pass


class Blocks(Pace):
    """Of one length."""

    def length(self, idle: bool = False) -> int:
        return BLOCK


def running(due: dict[int, list[Answered | Verified]]) -> tuple[VerifyRunner, Link, Counting, Chain]:
    """After a prompt of three tokens."""
    link, log = Link(due), Chain()
    log.extend([0, 1, 2])
    speaker = Counting(link)
    runner: Any = VerifyRunner(link, log, GREEDY, (), ModelDrafts(speaker), Blocks(4, floor=0.0))  # type: ignore[arg-type]
    return runner, link, speaker, log


def said(runner: VerifyRunner, log: Chain, count: int) -> list[int]:
    for _ in range(count):
        log.extend((runner.next(20),))
    return log.tokens[3:]


def test_drafting_stops_for_news_and_goes_on_where_it_was() -> None:
    runner, link, speaker, log = running({4: [Answered(LANE, 2, [3])]})
    assert said(runner, log, 1) == [3]
    assert speaker.said == [3, 4, 5, 6]  # what was drafted before the news counts, and the block begins with them
    assert link.blocks == [(3, [3, 4, 5, 6])]
    assert runner.drafts == len(speaker.said)


def test_all_that_came_is_heard_before_more_is_drafted() -> None:
    # The first two blocks follow each other; their answers come in the middle of the third, which is in vain.
    first, second = Verified(LANE, 3, 4, 7, 1000), Verified(LANE, 7, 1, WRONG, 1000)
    runner, link, speaker, log = running({3: [Answered(LANE, 2, [3])], 10: [first, second]})
    assert said(runner, log, 2) == [3, 4]
    assert speaker.said == [3, 4, 5, 6, 7, 8, 9, 10, 9, 10, 11]
    assert link.blocks == [(3, [3, 4, 5, 6]), (7, [7, 8, 9]), (8, [WRONG, 9, 10, 11])]
    assert said(runner, log, 4) == [3, 4, 5, 6, 7, WRONG]


def test_what_came_before_a_restart_is_given_out(monkeypatch: Any) -> None:
    runner, link, _, log = running({3: [Answered(LANE, 2, [3])], 7: [Verified(LANE, 3, 4, 7, 1000)]})
    assert said(runner, log, 1) == [3]
    begun, heard = list[int](), link.verdict

    def verdict(lane: object, wait: bool = True) -> Answered | Verified | None:
        if not link.came and not link.due:
            raise Restart
        return heard(lane, wait)

    def align(lane: object, length: int) -> int:
        begun.append(length)
        link.due = {99: [Answered(LANE, length, [length + 1])]}
        return length

    monkeypatch.setattr(link, "verdict", verdict)
    monkeypatch.setattr(link, "align", align)
    assert said(runner, log, 5) == [3, 4, 5, 6, 7, 8]
    assert begun == [7]  # behind all that had been checked


def test_what_is_not_given_out_is_forgotten_when_it_is_stopped() -> None:
    runner, _, _, log = running({3: [Answered(LANE, 2, [3])], 7: [Verified(LANE, 3, 4, 7, 1000)]})
    assert said(runner, log, 2) == [3, 4] and runner.ready()
    runner.stop()
    assert not runner.ready()
