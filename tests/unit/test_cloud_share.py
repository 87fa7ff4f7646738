"""One owner of keys may fill its share of the KV and no more, so that the next one is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud.models import serve_part
from isthmus.engine.part import KvConfig
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.keys import AllowList
from tests.cloud_world import ANNA, BERT, PROMPT, World, code, rows
from tests.fakes import FakePart, fake_text

POOL = 256  # of which half is a share
LONG = list(range(100))


class Shared:
    """A service that lets anna in, with two keys, and bert; anna's sessions are numbered."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.allowed = AllowList(folder / "allowed")
        for key, name in ((ANNA, "anna"), ("C" * 40, "anna"), (BERT, "bert")):
            self.allowed.allow(key, name)
        kv = KvConfig(max_tokens=POOL)
        self.part = FakePart(kv=kv)
        self.world = World(serve_part(self.part, "aa", "fake", kv=kv), allowed=self.allowed, **limits)

    def open(self, number: int, key: str = ANNA, **fields: Any) -> Any:
        return self.world.open(b"%d" % number, key=key, session=bytes([number]) * 16, **fields)

    def ask(self, number: int, *messages: m.Message, key: str = ANNA, turns: int = 1) -> list[Any]:
        return self.world.ask(*messages, route=b"%d" % number, key=key, turns=turns)


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    return Shared(tmp_path)


def test_a_greedy_owner_leaves_the_others_their_room(shared: Shared) -> None:
    for number in range(4):
        shared.open(number, key=(ANNA, "C" * 40)[number % 2])
    answers = [shared.ask(n, rows(LONG[:60], 60), key=(ANNA, "C" * 40)[n % 2])[0] for n in range(4)]
    assert [type(answer) for answer in answers] == [m.Result, m.Result, m.Fault, m.Fault]
    for fault in answers[2:]:
        assert code(fault) == m.Code.BUSY
        assert fault.retry_ms > 0
        assert "128" in fault.problem
    assert shared.part.free_tokens == POOL // 2
    assert shared.open(9, BERT).committed == 0
    assert shared.ask(9, rows(LONG, 100), key=BERT)[0].tokens == fake_text(LONG, 1)
    stream = m.Generate(1, 1, 99, Chain(LONG[:99]).head, LONG[99:], 20)
    tokens = [token for answer in shared.ask(9, stream, key=BERT, turns=25) for token in answer.tokens]
    assert tokens == fake_text(LONG, 20)


def test_no_session_is_opened_for_an_owner_whose_share_is_full(shared: Shared) -> None:
    shared.open(0)
    shared.ask(0, rows(list(range(128)), 128))
    fault = shared.open(1)
    assert code(fault) == m.Code.BUSY
    assert shared.open(2, max_positions=129).code == m.Code.KV_FULL
    assert shared.open(3, BERT).committed == 0
    shared.world.later(10.0)
    assert shared.open(1, epoch=2).committed == 0


def test_what_exceeds_a_share_by_itself_is_full(shared: Shared) -> None:
    shared.open(0)
    fault = shared.ask(0, rows(list(range(129)), 129))[0]
    assert code(fault) == m.Code.KV_FULL
    assert fault.committed == 0
    assert "overflow slide" in fault.remedy
    assert shared.part.steps == []  # nothing was computed for it


def test_a_stream_grows_up_to_the_share(shared: Shared) -> None:
    shared.open(0)
    shared.ask(0, rows(LONG, 100))
    answers = shared.ask(0, m.Generate(1, 1, 99, Chain(LONG[:99]).head, LONG[99:], 100), turns=60)
    tokens = [token for answer in answers if isinstance(answer, m.Tokens) for token in answer.tokens]
    assert code(answers[-1]) == m.Code.KV_FULL
    assert tokens == fake_text(LONG, 29)  # the last one needs no KV yet
    assert answers[-1].committed == 128


def test_sliding_sessions_hold_their_window_only(tmp_path: Path) -> None:
    shared = Shared(tmp_path, kv_share=0.5)
    shared.open(0, window=32)
    log = list(range(200))
    assert shared.ask(0, rows(log, 200), turns=3)[-1].tokens == fake_text(log, 1)


def test_an_owners_own_idle_sessions_give_way_and_nobody_elses(shared: Shared) -> None:
    shared.open(0)
    shared.open(1)
    shared.open(9, BERT)
    shared.ask(9, rows(PROMPT, 5), key=BERT)
    shared.ask(0, rows(LONG, 100))
    assert code(shared.ask(1, rows(LONG, 100))[0]) == m.Code.BUSY
    shared.world.later(10.0)
    assert shared.ask(1, rows(LONG, 100))[0].tokens == fake_text(LONG, 1)
    held = {s.session_id[0]: s.committed for model in shared.world.service.models.values() for s in model.sessions}
    assert held == {0: 0, 1: 100, 9: 5}


def test_waiting_helps_as_long_as_the_others_are_in_use(shared: Shared) -> None:
    shared.open(0)
    shared.open(1)
    shared.ask(0, rows(LONG, 100))
    for _ in range(60):
        shared.ask(0, rows(LONG, 1))
        shared.world.now += 0.25
        assert code(shared.ask(1, rows(LONG, 100))[0]) == m.Code.BUSY
    shared.ask(0, m.Close(1, 1))
    assert shared.ask(1, rows(LONG, 100))[0].tokens == fake_text(LONG, 1)


def test_sessions_that_all_want_more_do_not_wait_for_each_other(shared: Shared) -> None:
    for number in range(2):
        shared.open(number)
        shared.ask(number, rows(LONG[:60], 60))
    assert code(shared.ask(1, rows(LONG, 40))[0]) == m.Code.BUSY
    assert shared.ask(0, rows(LONG, 40))[0].tokens == fake_text(LONG, 1)  # the older one goes first
    fault = shared.ask(1, rows(LONG, 40))[0]
    assert (code(fault), fault.committed) == (m.Code.GAP, 0)
    assert code(shared.ask(1, rows(LONG, 100))[0]) == m.Code.BUSY
    shared.ask(0, m.Close(1, 1))
    assert shared.ask(1, rows(LONG, 100))[0].tokens == fake_text(LONG, 1)


def test_requests_at_once_are_served_first_come_first(shared: Shared) -> None:
    for number in range(3):
        shared.open(number)
        shared.world.wire.put(rows(LONG[:60], 60), b"%d" % number, ANNA)
    shared.world.service.turn(0.0)
    answers = [shared.world.wire.take(b"%d" % number) for number in range(3)]
    assert [[type(answer) for answer in each] for each in answers] == [[m.Result], [m.Result], [m.Fault]]


def test_the_share_follows_the_list_of_keys(tmp_path: Path) -> None:
    shared = Shared(tmp_path)
    AllowList(shared.allowed.path).revoke("bert")
    shared.world.later(1.1)
    shared.open(0)
    log = list(range(200))
    assert shared.ask(0, rows(log, 200), turns=3)[-1].tokens == fake_text(log, 1)
    AllowList(shared.allowed.path).allow(BERT, "bert")
    shared.world.later(1.1)
    assert code(shared.ask(0, rows([*log, 1], 1))[0]) == m.Code.KV_FULL
