"""One owner of keys may fill its share of the KV and no more, so that the next one is served."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from isthmus.apps.cli import serve
from isthmus.cloud.admission import ServiceLimits, held_tokens, misfit, share_tokens
from isthmus.cloud.models import serve_part
from isthmus.edge.options import KV_TOKENS
from isthmus.engine.binding import cpu_names
from isthmus.engine.part import KV_BLOCK, KV_SINKS, KV_SLACK, KvConfig, Want
from isthmus.engine.part import Rows as EngineRows
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.keys import AllowList
from tests.cloud_world import ANNA, BERT, World, code, rows
from tests.fakes import FakePart, fake_text
from tests.native_tools import open_part, some_tokens
from tests.random_model import RandomModel, random_config

POOL = 256  # of which half is a share
ANNAS = (ANNA, "C" * 40)
LONG = list(range(100))
native = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")


class Shared:
    """A service that lets anna in, with two keys, and bert; sessions are numbered."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.allowed = AllowList(folder / "allowed")
        for key, name in ((ANNAS[0], "anna"), (ANNAS[1], "anna"), (BERT, "bert")):
            self.allowed.allow(key, name)
        kv = KvConfig(max_tokens=POOL)
        self.part = FakePart(kv=kv)
        self.model = serve_part(self.part, "aa", "fake", kv=kv)
        self.world = World(self.model, allowed=self.allowed, **limits)

    def open(self, number: int, key: str = ANNA, **fields: Any) -> Any:
        return self.world.open(b"%d" % number, key=key, session=bytes([number]) * 16, **fields)

    def ask(self, number: int, *messages: m.Message, key: str = ANNA, turns: int = 1) -> list[Any]:
        return self.world.ask(*messages, route=b"%d" % number, key=key, turns=turns)

    def fill(self, number: int, length: int, key: str = ANNA) -> Any:
        """What the cloud says to a prompt of so many tokens."""
        return self.ask(number, prompt(length), key=key, turns=-(-length // 100))[-1]

    def held(self) -> dict[int, int]:
        """Positions committed, by session."""
        return {session.session_id[0]: session.committed for session in self.model.sessions}


def prompt(length: int) -> m.Rows:
    return rows(list(range(length)), length)


def answered(result: Any, length: int) -> bool:
    """Whether a prompt of so many tokens was answered, and rightly."""
    return isinstance(result, m.Result) and result.tokens == fake_text(list(range(length)), 1)


def stream(max_tokens: int) -> m.Generate:
    """Goes on from LONG."""
    return m.Generate(1, 1, 99, Chain(LONG[:99]).head, LONG[99:], max_tokens)


def streamed(answers: list[Any]) -> list[int]:
    return [token for answer in answers if isinstance(answer, m.Tokens) for token in answer.tokens]


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    return Shared(tmp_path)


def test_a_greedy_owner_leaves_the_others_their_room(shared: Shared) -> None:
    for number in range(4):
        shared.open(number, key=ANNAS[number % 2])
    answers = [shared.fill(number, 60, ANNAS[number % 2]) for number in range(4)]
    assert [answered(answer, 60) for answer in answers] == [True, True, False, False]
    for fault in answers[2:]:
        assert code(fault) == m.Code.BUSY
        assert fault.retry_ms > 0
        assert "128" in fault.problem
    assert shared.part.free_tokens == POOL // 2
    assert shared.open(9, BERT).committed == 0
    assert answered(shared.fill(9, 100, BERT), 100)
    assert streamed(shared.ask(9, stream(20), key=BERT, turns=25)) == fake_text(LONG, 20)


def test_no_session_is_opened_for_an_owner_whose_share_is_full(shared: Shared) -> None:
    shared.open(0)
    shared.fill(0, 128)
    assert code(shared.open(1)) == m.Code.BUSY
    assert code(shared.open(2, max_positions=129)) == m.Code.KV_FULL
    assert shared.open(3, BERT).committed == 0
    shared.world.later(10.0)
    assert shared.open(1, epoch=2).committed == 0


def test_what_exceeds_a_share_by_itself_is_full(shared: Shared) -> None:
    shared.open(0)
    fault = shared.fill(0, 129)
    assert code(fault) == m.Code.KV_FULL
    assert fault.committed == 0
    assert "overflow='slide'" in fault.remedy
    assert shared.part.steps == []  # nothing was computed for it


def test_a_stream_grows_up_to_the_share(shared: Shared) -> None:
    shared.open(0)
    shared.fill(0, 100)
    answers = shared.ask(0, stream(100), turns=60)
    assert code(answers[-1]) == m.Code.KV_FULL
    assert streamed(answers) == fake_text(LONG, 29)  # the last one needs no KV yet
    assert answers[-1].committed == 128


def test_sliding_sessions_hold_their_window_only(tmp_path: Path) -> None:
    shared = Shared(tmp_path, prefill_rows=16, prefill_rows_beside_decode=16)
    shared.open(0, window=48)
    assert answered(shared.ask(0, prompt(200), turns=13)[-1], 200)


def test_a_window_that_outgrows_the_share_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    shared = Shared(tmp_path, prefill_rows=16, prefill_rows_beside_decode=16)
    fault = shared.open(0, window=49)
    assert code(fault) == m.Code.KV_FULL
    assert "128" in fault.problem
    assert "kv_tokens of at most 48" in fault.remedy
    assert shared.held() == {}
    shared.open(0, window=48)
    assert code(shared.open(0, epoch=2, window=49)) == m.Code.KV_FULL  # and so is a change to one
    assert shared.open(0, epoch=3, window=49, max_positions=128).committed == 0  # which is never reached


def test_several_owners_of_a_cloud_with_its_defaults_may_slide_with_a_devices_defaults() -> None:
    pool: int = inspect.signature(serve.command).parameters["kv_tokens"].default
    limits = ServiceLimits()
    assert inspect.signature(serve.command).parameters["kv_share"].default == limits.kv_share
    assert misfit(0, KV_TOKENS, share_tokens(pool, 2, limits), limits) is None


@native
@pytest.mark.parametrize(("window", "rows_a_step"), [(15, 8), (17, 16), (21, 128), (128, 100)])
def test_the_engine_holds_no_more_for_a_window_than_is_counted(window: int, rows_a_step: int) -> None:
    limits = ServiceLimits(decode_rows=8, prefill_rows=rows_a_step, prefill_rows_beside_decode=rows_a_step)
    pool, text, most = 1024, some_tokens(700), 0
    part = open_part(RandomModel("q4", random_config(n_layers=1)), max_tokens=pool)
    sequence = part.open(window=window)
    for count in (rows_a_step, 1, 7, rows_a_step, rows_a_step - 1, 5, *[rows_a_step] * 3):
        at = sequence.length
        part.step(EngineRows().tokens(sequence, at, text[at : at + count], want=Want.NONE))
        held = pool - part.free_tokens
        most = max(most, held)
        assert held <= held_tokens(sequence.length, window, limits)
    if window + rows_a_step > 100:
        assert most > -(-(window + KV_SINKS + KV_SLACK) // KV_BLOCK) * KV_BLOCK  # the rows of a step count too
    sequence.close()


def test_an_owners_own_idle_sessions_give_way_and_nobody_elses(shared: Shared) -> None:
    shared.open(0)
    shared.open(1)
    shared.open(9, BERT)
    shared.fill(9, 5, BERT)
    shared.fill(0, 100)
    assert code(shared.fill(1, 100)) == m.Code.BUSY
    shared.world.later(10.0)
    assert answered(shared.fill(1, 100), 100)
    assert shared.held() == {0: 0, 1: 100, 9: 5}


def test_deciding_who_is_overdrawn_changes_nothing(shared: Shared) -> None:
    registry = shared.world.service._registry
    for number in range(3):
        shared.open(number)
    shared.fill(0, 100)
    shared.world.later(10.0)
    for number in (1, 2):
        shared.world.wire.put(prompt(100), b"%d" % number, ANNA)
    shared.world.service._take_in()
    decided = [registry.overdrawn(shared.model, shared.world.now) for _ in range(2)]
    assert decided[0] == decided[1]
    spared, refused = decided[0]
    assert [session.session_id[0] for session in spared] == [0]
    assert [(session.session_id[0], waiting_helps) for session, _, waiting_helps in refused] == [(2, True)]
    assert shared.held() == {0: 100, 1: 0, 2: 0}
    shared.world.service.turn(0.0)
    assert shared.held() == {0: 0, 1: 100, 2: 0}


def test_waiting_helps_as_long_as_the_others_are_in_use(shared: Shared) -> None:
    shared.open(0)
    shared.open(1)
    shared.fill(0, 100)
    for _ in range(60):
        shared.ask(0, rows(LONG, 1))
        shared.world.now += 0.25
        assert code(shared.fill(1, 100)) == m.Code.BUSY
    shared.ask(0, m.Close(1, 1))
    assert answered(shared.fill(1, 100), 100)


def test_sessions_that_all_want_more_do_not_wait_for_each_other(shared: Shared) -> None:
    for number in range(2):
        shared.open(number)
        shared.fill(number, 60)
    assert code(shared.ask(1, rows(LONG, 40))[0]) == m.Code.BUSY
    assert answered(shared.ask(0, rows(LONG, 40))[0], 100)  # the older one goes first
    fault = shared.ask(1, rows(LONG, 40))[0]
    assert (code(fault), fault.committed) == (m.Code.GAP, 0)
    assert code(shared.fill(1, 100)) == m.Code.BUSY
    shared.ask(0, m.Close(1, 1))
    assert answered(shared.fill(1, 100), 100)


def test_requests_at_once_are_served_first_come_first(shared: Shared) -> None:
    for number in range(3):
        shared.open(number)
        shared.world.wire.put(prompt(60), b"%d" % number, ANNA)
    shared.world.service.turn(0.0)
    answers = [shared.world.wire.take(b"%d" % number) for number in range(3)]
    assert [[type(answer) for answer in each] for each in answers] == [[m.Result], [m.Result], [m.Fault]]


def test_the_share_follows_the_list_of_keys(tmp_path: Path) -> None:
    shared = Shared(tmp_path)
    AllowList(shared.allowed.path).revoke("bert")
    shared.world.later(1.1)
    shared.open(0)
    assert answered(shared.fill(0, 200), 200)
    AllowList(shared.allowed.path).allow(BERT, "bert")
    shared.world.later(1.1)
    assert code(shared.ask(0, rows([*range(200), 1], 1))[0]) == m.Code.KV_FULL


def test_sessions_that_want_more_at_the_same_moment_do_not_wait_for_each_other(shared: Shared) -> None:
    for number in range(2):
        shared.open(number)
        shared.fill(number, 60)
    answers: list[Any] = []
    for _ in range(4):
        for number in range(2):
            shared.world.wire.put(rows(LONG, 40), b"%d" % number, ANNA)
        shared.world.service.turn(0.0)
        answers += shared.world.wire.take(b"0")
        shared.world.later(0.25)
    assert [answer.tokens for answer in answers if isinstance(answer, m.Result)][:1] == [fake_text(LONG, 1)]


def test_nobody_loses_kv_for_a_request_that_is_refused_all_the_same(shared: Shared) -> None:
    for number in range(3):
        shared.open(number)
    shared.fill(0, 32)
    shared.world.later(10.0)  # idle from now on
    shared.fill(1, 90)
    assert code(shared.fill(2, 100)) == m.Code.BUSY
    assert shared.held() == {0: 32, 1: 90, 2: 0}
