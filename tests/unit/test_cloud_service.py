"""The service over a transport without sockets and a clock of our own: who is served, refused, evicted, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud.models import serve_part
from isthmus.cloud.service import Letter
from isthmus.engine.part import KvConfig
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import EngineError, ServiceError
from isthmus.protocol.keys import AllowList
from isthmus.protocol.limits import LinkLimits
from tests.cloud_world import ANNA, BERT, PROMPT, SESSION, TEXT, World, code, rows
from tests.fakes import FakePart, fake_text


def test_hello_tells_what_is_served() -> None:
    (welcome,) = World().ask(m.Hello(1, 1, (), "test"))
    assert isinstance(welcome, m.Welcome)
    (offer,) = welcome.offers
    assert (offer.model_id, offer.n_layers, offer.d_model, offer.numerics, offer.exact) == ("aa", 6, 64, "fake-1", True)
    assert welcome.limits.credit_bytes == LinkLimits().credit_bytes


def test_what_an_expelled_device_sent_before_makes_no_session() -> None:
    world = World()
    world.ask(m.Hello(1, 1), route=b"r")
    (peer,) = world.service._peers.values()
    letter = Letter(peer, m.Open(SESSION, 1, 1, "aa"), "anna", 40, 0.0)
    world.service._letters.append(letter)
    world.service._drop(peer)
    world.service.turn(0.0)
    assert world.service.health()["sessions"] == 0
    world.ask(m.Hello(1, 1), route=b"r")
    (peer,) = world.service._peers.values()
    world.service._letters.append(letter._replace(peer=peer))
    world.service.turn(0.0)
    assert world.service.health()["sessions"] == 1


@pytest.mark.parametrize(("version", "blamed"), [(0, "device"), (9, "cloud")])
def test_no_common_version_is_a_clear_fault(version: int, blamed: str) -> None:
    (fault,) = World().ask(m.Hello(version, version))
    assert code(fault) == m.Code.VERSION
    assert str(version) in fault.problem
    assert blamed in fault.remedy


def test_nothing_goes_without_hello() -> None:
    (fault,) = World().ask(m.Ping(1))
    assert code(fault) == m.Code.VERSION
    assert fault.alias is None


def test_sessions_of_all_connections_share_one_step() -> None:
    part = FakePart()
    world = World(serve_part(part, "aa", "fake"))
    for number in range(10):
        world.open(b"%d" % number, session=bytes([number]) * 16)
    for number in range(10):
        world.wire.put(rows([number], 1), b"%d" % number)
    world.service.turn(0.0)
    assert part.steps == [10]
    for number in range(10):
        (result,) = world.wire.take(b"%d" % number)
        assert result.tokens == fake_text([number], 1)


def test_long_prompts_do_not_hold_decode_up() -> None:
    part = FakePart()
    world = World(serve_part(part, "aa", "fake"), prefill_rows=64, prefill_rows_beside_decode=16)
    world.open(b"long", session=b"l" * 16)
    world.open(b"short", session=b"s" * 16)
    world.wire.put(rows(list(range(640)), 640), b"long")
    log = [7]
    for _ in range(5):
        (result,) = world.ask(rows(log, 1), route=b"short")
        log += result.tokens
    assert log[1:] == fake_text([7], 5)
    assert part.steps == [17] * 5
    for _ in range(9):
        world.service.turn(0.0)
    (result,) = world.wire.take(b"long")
    assert result.tokens == fake_text(list(range(640)), 1)
    assert part.steps[5:] == [64] * 8 + [48]


def test_whole_model_and_upper_layers_share_one_part() -> None:
    world = World()
    assert world.open(enter=0).committed == 0
    assert world.open(b"b", session=b"b" * 16, enter=5).committed == 0
    assert code(world.open(b"c", session=b"c" * 16, enter=6)) == m.Code.UNSUPPORTED


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_id": "bb"}, m.Code.UNKNOWN_MODEL),
        ({"kv_format": "f8"}, m.Code.UNSUPPORTED),
        ({"numerics": "other"}, m.Code.UNSUPPORTED),
        ({"max_positions": 10**6}, m.Code.KV_FULL),
    ],
)
def test_what_cannot_be_served_is_a_clear_fault(fields: dict[str, Any], expected: m.Code) -> None:
    fault = World().open(**fields)
    assert code(fault) == expected
    assert fault.alias == 1
    assert fault.remedy


def test_several_models_behind_one_service() -> None:
    one, two = FakePart(), FakePart()
    world = World(serve_part(one, "aa", "first", weights="q4"), serve_part(two, "bb", "second"))
    fault = world.open(model_id="")
    assert code(fault) == m.Code.UNKNOWN_MODEL
    assert "first (q4, aa), second (bb)" in fault.problem
    world.open(model_id="aa")
    world.open(session=b"b" * 16, alias=2, model_id="bb")
    results = world.ask(rows(PROMPT, 5), rows(PROMPT, 5, alias=2))
    assert [result.tokens for result in results] == [TEXT[:1]] * 2
    assert (one.steps, two.steps) == ([5], [5])
    with pytest.raises(ServiceError, match="twice"):
        World(serve_part(one, "aa", "first"), serve_part(two, "aa", "again"))


def test_a_session_is_taken_up_on_another_connection() -> None:
    world = World()
    world.open()
    world.ask(rows(PROMPT, 5))
    opened = world.open(b"b", alias=9, epoch=2)
    assert (opened.alias, opened.epoch, opened.committed) == (9, 2, 5)
    assert opened.prefix_hash == Chain(PROMPT).head
    assert code(world.ask(rows(PROMPT + TEXT[:1], 1))[0]) == m.Code.UNKNOWN_SESSION
    (result,) = world.ask(rows(PROMPT + TEXT[:1], 1, alias=9, epoch=2), route=b"b")
    assert result.tokens == TEXT[1:2]
    assert code(world.open(b"a", epoch=1)) == m.Code.STALE_EPOCH


@pytest.mark.parametrize("fields", [{"epoch": 2, "enter": 3}, {"epoch": 2}, {"epoch": 1}])
def test_credit_goes_to_nobody_else_when_a_session_moves(fields: dict[str, Any]) -> None:
    world = World(link=LinkLimits(credit_bytes=1500, max_message_bytes=1000))
    world.open()
    world.wire.put(rows(list(range(600, 900)), 300))  # 900 bytes that wait
    world.wire.put(m.Hello(1, 1), b"b")
    world.wire.put(m.Open(SESSION, 1, fields.pop("epoch"), "aa", **fields), b"b")
    for _ in range(5):
        world.service.turn(0.0)
    answers = world.wire.take(b"b")
    assert [type(answer) for answer in answers[:2]] == [m.Welcome, m.Opened]
    assert not [answer for answer in answers if isinstance(answer, m.Credit)]
    # The old connection has it back: it may send as much again.
    returned = [answer.granted_bytes for answer in world.wire.take() if isinstance(answer, m.Credit)]
    assert sum(returned) > 900
    answers = world.ask(rows(list(range(600, 900)), 300))
    assert code(next(answer for answer in answers if isinstance(answer, m.Fault))) == m.Code.UNKNOWN_SESSION


def test_rows_that_enter_elsewhere_start_anew() -> None:
    part = FakePart()
    world = World(serve_part(part, "aa", "fake"))
    world.open()
    world.ask(rows(PROMPT, 5))
    assert world.open(epoch=2, enter=3).committed == 0
    assert world.open(epoch=3, enter=3, window=64).committed == 0
    assert len(part.sequences) == 1


def test_sessions_belong_to_principals_not_to_keys_or_connections(tmp_path: Path) -> None:
    allowed = AllowList(tmp_path / "allowed")
    allowed.allow(ANNA, "anna")
    allowed.allow("C" * 40, "anna")
    allowed.allow(BERT, "bert")
    world = World(allowed=allowed)
    world.open(key=ANNA)
    world.ask(rows(PROMPT, 5), key=ANNA)
    assert code(world.open(b"b", key=BERT, epoch=5)) == m.Code.NOT_ALLOWED
    # A connection that took over the routing id does not get the session either.
    assert code(world.ask(rows(PROMPT + TEXT[:1], 1), key=BERT)[0]) == m.Code.NOT_ALLOWED
    assert world.open(b"c", key="C" * 40, epoch=6).committed == 5


def test_a_revoked_key_is_out_at_once(tmp_path: Path) -> None:
    allowed = AllowList(tmp_path / "allowed")
    allowed.allow(ANNA, "anna")
    part = FakePart()
    world = World(serve_part(part, "aa", "fake"), allowed=allowed)
    world.open(key=ANNA)
    world.ask(m.Generate(1, 1, 0, Chain().head, PROMPT, 1000), key=ANNA, turns=3)
    AllowList(tmp_path / "allowed").revoke("anna")
    world.later(1.1)
    world.wire.take()
    assert part.sequences == []
    assert code(world.ask(rows(PROMPT, 5), key=ANNA, turns=3)[0]) == m.Code.NOT_ALLOWED
    assert world.wire.take() == []


def test_a_stream_is_sent_token_by_token_and_can_be_cancelled() -> None:
    world = World()
    world.open()
    answers = world.ask(m.Generate(1, 1, 0, Chain().head, PROMPT, 10), turns=4)
    assert [answer.tokens for answer in answers] == [[token] for token in TEXT[:4]]
    answers = world.ask(m.Cancel(1, 1), turns=3)
    assert [answer.reason for answer in answers if answer.done] == ["cancelled"]


def test_a_device_that_is_gone_is_not_computed_for() -> None:
    part = FakePart()
    world = World(serve_part(part, "aa", "fake"))
    world.open()
    world.ask(m.Generate(1, 1, 0, Chain().head, PROMPT, 1000), turns=3)
    world.wire.gone.add(b"a")
    for _ in range(5):
        world.service.turn(0.0)
    assert len(part.steps) == 4
    world.later(1.0)
    assert world.service.health()["connections"] == 0
    world.wire.gone.clear()
    assert world.open(b"b", epoch=2).committed == 8


def test_a_device_that_does_not_listen_is_dropped_before_it_fills_memory() -> None:
    part = FakePart()
    world = World(serve_part(part, "aa", "fake"), max_outbox_bytes=500)
    world.open()
    world.wire.full.add(b"a")
    world.ask(m.Generate(1, 1, 0, Chain().head, PROMPT, 1000), turns=100)
    assert len(part.steps) < 30
    world.later(1.0)
    assert world.service.health()["connections"] == 0


def test_answers_wait_for_a_slow_device_in_order() -> None:
    world = World()
    world.open()
    world.wire.full.add(b"a")
    assert world.ask(m.Generate(1, 1, 0, Chain().head, PROMPT, 10), turns=12) == []
    world.wire.full.clear()
    world.later(1.0)
    assert [token for answer in world.wire.take() for token in answer.tokens] == TEXT[:10]


def test_deadlines() -> None:
    world = World()
    world.open()
    world.wire.put(rows(PROMPT, 5, budget_ms=100))
    world.service._attend()  # it comes while the engine computes, for longer than there is time
    world.now += 0.2
    (fault,) = world.ask(turns=2)
    assert code(fault) == m.Code.DEADLINE
    assert fault.committed == 0


def test_a_full_cloud_says_busy_and_idle_sessions_give_way() -> None:
    world = World(max_sessions=2)
    world.open(b"a", session=b"a" * 16)
    world.open(b"b", session=b"b" * 16)
    fault = world.open(b"c", session=b"c" * 16)
    assert code(fault) == m.Code.BUSY
    assert fault.retry_ms > 0
    world.later(3.0)
    world.ask(rows(PROMPT, 5), route=b"b")
    world.later(3.0)
    assert world.open(b"c", session=b"c" * 16).committed == 0
    assert code(world.ask(rows(PROMPT, 5))[0]) == m.Code.UNKNOWN_SESSION
    assert world.ask(rows(PROMPT + TEXT[:1], 1), route=b"b")[0].tokens == TEXT[1:2]


def test_a_device_that_is_gone_gives_its_seat_to_whoever_needs_it_and_to_nobody_else() -> None:
    world = World(max_sessions=1)
    world.open(b"a", session=b"a" * 16)
    world.ask(rows(PROMPT, 5), route=b"a")
    assert code(world.open(b"b", session=b"b" * 16)) == m.Code.BUSY
    world.wire.ended.append(b"a")
    world.later(0.1)
    assert (world.service.health()["connections"], world.service.health()["sessions"]) == (1, 1)
    assert world.open(b"c", session=b"a" * 16, epoch=2).committed == 5
    world.wire.ended.append(b"c")
    world.later(0.1)
    assert world.open(b"b", session=b"b" * 16).committed == 0
    assert world.service.health()["sessions"] == 1


def test_an_owner_alone_may_have_all_sessions_and_several_share_them(tmp_path: Path) -> None:
    allowed = AllowList(tmp_path / "allowed")
    allowed.allow(ANNA, "anna")
    world = World(allowed=allowed, max_sessions=4)

    def opened(*numbers: int) -> list[type]:
        return [type(world.open(b"%d" % number, ANNA, session=bytes([number]) * 16)) for number in numbers]

    assert opened(0, 1, 2, 3, 4) == [m.Opened] * 4 + [m.Fault]
    for number in range(4):
        world.ask(m.Close(1, 1), route=b"%d" % number, key=ANNA)
    AllowList(tmp_path / "allowed").allow(BERT, "bert")
    world.later(1.1)
    assert opened(0, 1, 2) == [m.Opened] * 2 + [m.Fault]
    world.later(6.0)
    assert opened(3) == [m.Opened]  # an idle one of the same owner gave way
    assert world.service.health()["sessions"] == 2


def test_the_log_names_who_joins_leaves_and_is_expelled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    allowed = AllowList(tmp_path / "allowed")
    allowed.allow(ANNA, "anna")
    allowed.allow(BERT, "bert")
    world = World(allowed=allowed)
    with caplog.at_level("INFO", "isthmus.cloud"):
        world.ask(m.Hello(1, 1, (), "a phone"), route=b"a", key=ANNA)
        world.ask(m.Hello(1, 1, (), "a\nline"), route=b"b", key=BERT)
        world.wire.ended.append(b"b")
        world.later(0.1)
        AllowList(tmp_path / "allowed").revoke("anna")
        world.later(1.1)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if line.startswith(("anna", "bert"))] == [
        "anna joined ('a phone')",
        "bert joined ('a\\nline')",
        "bert left",
        "anna is expelled: its key is not allowed any more",
    ]
    assert code(world.wire.take(b"a")[-1]) == m.Code.NOT_ALLOWED
    assert world.service.health()["connections"] == 0


def test_one_principal_cannot_take_all_sessions(tmp_path: Path) -> None:
    allowed = AllowList(tmp_path / "allowed")
    allowed.allow(ANNA, "anna")
    allowed.allow(BERT, "bert")
    world = World(allowed=allowed, max_sessions=6, session_share=0.5)
    answers = [world.open(key=ANNA, alias=n, session=bytes([n]) * 16) for n in range(4)]
    assert [type(answer) for answer in answers] == [m.Opened] * 3 + [m.Fault]
    assert world.open(b"b", key=BERT, session=b"b" * 16).committed == 0


def test_idle_kv_is_taken_and_its_device_told_where_to_begin() -> None:
    kv = KvConfig(max_tokens=64)
    world = World(serve_part(FakePart(kv=kv), "aa", "fake", kv=kv))
    world.open(b"a", session=b"a" * 16)
    world.open(b"b", session=b"b" * 16)
    world.ask(rows(list(range(40)), 40))
    fault = world.ask(rows(list(range(40)), 40), route=b"b")[0]
    assert code(fault) == m.Code.BUSY
    world.later(10.0)
    (result,) = world.ask(rows(list(range(40)), 40), route=b"b", turns=2)
    assert result.tokens == fake_text(list(range(40)), 1)
    (fault,) = world.ask(rows(list(range(41)), 1))
    assert (code(fault), fault.committed) == (m.Code.GAP, 0)


def test_kv_that_one_session_fills_is_full() -> None:
    kv = KvConfig(max_tokens=32)
    world = World(serve_part(FakePart(kv=kv), "aa", "fake", kv=kv))
    world.open()
    fault = world.ask(rows(list(range(40)), 40))[0]
    assert code(fault) == m.Code.KV_FULL
    assert "overflow='slide'" in fault.remedy
    assert world.ask(rows(PROMPT, 5))[0].tokens == TEXT[:1]


@pytest.mark.parametrize(
    ("error", "says"),
    [(EngineError("the fake engine broke"), "broke"), (OverflowError("9 does not fit"), "engine failed")],
)
def test_one_sessions_failure_does_not_touch_the_others(
    monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    part = FakePart()
    world = World(serve_part(part, "aa", "fake"))
    for route in (b"a", b"b", b"c"):
        world.open(route, session=route * 16)
        world.ask(rows(PROMPT, 5), route=route)
    victim = next(s for model in world.service.models.values() for s in model.sessions if s.session_id == b"b" * 16)
    step = part.step

    def broken(engine_rows: Any) -> Any:
        if any(span.sequence is victim.sequence for span in engine_rows.spans):
            raise error
        return step(engine_rows)

    monkeypatch.setattr(part, "step", broken)
    log = PROMPT + TEXT[:1]
    for route in (b"a", b"b", b"c"):
        world.wire.put(rows(log, 1), route)
    world.service.turn(0.0)
    assert [result.tokens for route in (b"a", b"c") for result in world.wire.take(route)] == [TEXT[1:2]] * 2
    (fault,) = world.wire.take(b"b")
    assert code(fault) == m.Code.ENGINE
    assert says in fault.problem


def test_a_mistake_of_ours_does_not_end_the_service(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    world.open()
    (session,) = next(iter(world.service.models.values())).sessions
    monkeypatch.setattr(session, "rows", lambda *_: 1 // 0)
    (fault,) = world.ask(rows(PROMPT, 5))
    assert code(fault) == m.Code.ENGINE
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert world.ask(rows(PROMPT, 5))[0].tokens == TEXT[:1]


def test_idle_sessions_expire_and_their_kv_comes_back() -> None:
    part = FakePart()
    world = World(serve_part(part, "aa", "fake"), idle_s=60)
    world.open()
    world.ask(rows(PROMPT, 5))
    for _ in range(5):
        world.now += 20
        world.ask(m.Ping(1))
    assert part.sequences == []
    assert part.free_tokens == part.kv.max_tokens
    assert code(world.ask(rows(PROMPT, 5))[0]) == m.Code.UNKNOWN_SESSION


def test_close_frees_at_once() -> None:
    part = FakePart()
    world = World(serve_part(part, "aa", "fake"))
    world.open()
    world.ask(rows(PROMPT, 5))
    assert world.ask(m.Close(1, 0)) == []
    assert len(part.sequences) == 1
    assert world.ask(m.Close(1, 1)) == []
    assert part.sequences == []
    assert world.open(epoch=2).committed == 0


def test_credit_comes_back_and_overdrawing_is_refused() -> None:
    link = LinkLimits(credit_bytes=2000, max_message_bytes=1000)
    world = World(link=link)
    world.open()
    log: list[int] = []
    granted = sent = 0
    for token in range(200):
        log.append(token)
        message = rows(log, 1)
        sent += len(m.encode(message)[0])
        for answer in world.ask(message):
            granted += answer.granted_bytes if isinstance(answer, m.Credit) else 0
            assert not isinstance(answer, m.Fault)
    assert 0.7 * sent < granted <= sent + 200
    # Many ranges that are not read yet are bytes under way.
    flood = [m.GetRange("aa", "x" * 190, "0" * 64, 0, 1) for _ in range(30)]
    answers = world.ask(*flood)
    assert m.Code.BAD_MESSAGE in {answer.code for answer in answers if isinstance(answer, m.Fault)}


def test_credit_for_rows_that_were_sent_ahead_comes_back_once() -> None:
    link = LinkLimits(credit_bytes=2000, max_message_bytes=1000)
    world = World(link=link)
    world.open()
    log = Chain()
    granted = sent = 0
    for token in range(600):
        message = m.Fill(1, 1, token, log.head[:4], [token % 50])
        log.extend(message.tokens)
        sent += len(m.encode(message)[0])
        for answer in world.ask(message):
            granted += answer.granted_bytes if isinstance(answer, m.Credit) else 0
            assert not isinstance(answer, m.Fault)
    assert 0.5 * sent < granted <= sent


def test_stopping_finishes_what_is_under_way() -> None:
    world = World()
    world.open()
    world.wire.put(m.Generate(1, 1, 0, Chain().head, PROMPT, 10))
    world.service.turn(0.0)
    world.service.stop()
    assert world.service.health()["status"] == "stopping"
    world.wire.put(m.Open(b"n" * 16, 2, 1, "aa"))
    world.tick = 0.001
    world.service.run()
    answers = world.wire.take()
    assert sum(isinstance(answer, m.Bye) for answer in answers) == 1
    assert [answer.code for answer in answers if isinstance(answer, m.Fault)] == [m.Code.CLOSING]
    assert [token for answer in answers if isinstance(answer, m.Tokens) for token in answer.tokens] == TEXT[:10]
    assert world.wire.closed


def test_metrics_are_prometheus_text() -> None:
    world = World()
    world.open()
    world.ask(rows(PROMPT, 5))
    world.ask(rows([*PROMPT, 1, 2], 1))
    world.later(2.0)
    lines = world.service.metrics.text().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values["isthmus_rows_total"] == "5"
    assert values["isthmus_tokens_total"] == "1"
    assert values['isthmus_faults_total{code="gap"}'] == "1"
    assert values["isthmus_sessions"] == "1"
    assert values["isthmus_step_seconds_count"] == values['isthmus_step_seconds_bucket{le="+Inf"}'] == "1"
