"""The service over a transport without sockets and a clock of our own: who is served, refused, evicted, and when."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.cloud.admission import ServiceLimits
from isthmus.cloud.files import BundleFiles
from isthmus.cloud.models import Model, serve_part
from isthmus.cloud.service import Service
from isthmus.engine.part import KvConfig
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import BundleError, EngineError, ServiceError
from isthmus.protocol.keys import AllowList
from isthmus.protocol.limits import LinkLimits
from isthmus.protocol.transport import Incoming
from tests.fakes import FakePart, MemoryServer, fake_text

ANNA, BERT = "A" * 40, "B" * 40
PROMPT = [3, 1, 4, 1, 5]
TEXT = fake_text(PROMPT, 20)
SESSION = bytes(range(16))


class World:
    """A service with one thread of time."""

    def __init__(self, *models: Model, allowed: AllowList | None = None, link: LinkLimits | None = None, **limits: Any):
        self.now = 1000.0
        self.wire = MemoryServer()
        self.service = Service(
            models or (serve_part(FakePart(), "aa", "fake"),),
            self.wire,
            allowed,
            limits=ServiceLimits(**limits),
            link_limits=link or LinkLimits(),
            clock=lambda: self.now,
        )

    def ask(self, *messages: m.Message, route: bytes = b"a", key: str = "", turns: int = 1) -> list[Any]:
        """What comes back when these messages arrive together."""
        for message in messages:
            self.wire.put(message, route, key)
        for _ in range(turns):
            self.service.turn(0.0)
        return self.wire.take(route)

    def open(self, route: bytes = b"a", key: str = "", **fields: Any) -> Any:
        """The answer to Hello and Open."""
        fields = {"session": SESSION, "alias": 1, "epoch": 1, "model_id": "aa", **fields}
        return self.ask(m.Hello(1, 1), m.Open(**fields), route=route, key=key)[-1]

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.service.turn(0.0)


def rows(log: list[int], count: int, **fields: Any) -> m.Rows:
    at = len(log) - count
    return m.Rows(fields.pop("alias", 1), fields.pop("epoch", 1), at, Chain(log[:at]).head, log[at:], **fields)


def code(message: Any) -> m.Code:
    assert isinstance(message, m.Fault), message
    assert message.problem
    return message.code


def test_hello_tells_what_is_served() -> None:
    (welcome,) = World().ask(m.Hello(1, 1, (), "test"))
    assert isinstance(welcome, m.Welcome)
    (offer,) = welcome.offers
    assert (offer.model_id, offer.n_layers, offer.d_model, offer.numerics, offer.exact) == ("aa", 6, 64, "fake-1", True)
    assert welcome.limits.credit_bytes == LinkLimits().credit_bytes


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
    world = World(serve_part(one, "aa", "first"), serve_part(two, "bb", "second"))
    fault = world.open(model_id="")
    assert code(fault) == m.Code.UNKNOWN_MODEL
    assert "first" in fault.remedy
    assert "second" in fault.remedy
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
    world = World(allowed=allowed)
    world.open(key=ANNA)
    AllowList(tmp_path / "allowed").revoke("anna")
    world.later(1.1)
    assert code(world.ask(rows(PROMPT, 5), key=ANNA)[0]) == m.Code.NOT_ALLOWED


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
    incoming = world.wire.waiting.popleft()
    world.service._receive(incoming)
    world.now += 0.2
    (fault,) = world.ask()
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


def test_one_principal_cannot_take_all_sessions(tmp_path: Path) -> None:
    allowed = AllowList(tmp_path / "allowed")
    allowed.allow(ANNA, "anna")
    allowed.allow(BERT, "bert")
    world = World(allowed=allowed, max_sessions_per_principal=3)
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
    assert "window" in fault.remedy
    assert world.ask(rows(PROMPT, 5))[0].tokens == TEXT[:1]


def test_one_sessions_failure_does_not_touch_the_others() -> None:
    part = FakePart()
    world = World(serve_part(part, "aa", "fake"))
    for route in (b"a", b"b", b"c"):
        world.open(route, session=route * 16)
        world.ask(rows(PROMPT, 5), route=route)
    victim = next(s for model in world.service.models.values() for s in model.sessions if s.session_id == b"b" * 16)
    step = part.step

    def broken(engine_rows: Any) -> Any:
        if any(span.sequence is victim.sequence for span in engine_rows.spans):
            raise EngineError("the fake engine broke")
        return step(engine_rows)

    part.step = broken  # type: ignore[method-assign]
    log = PROMPT + TEXT[:1]
    for route in (b"a", b"b", b"c"):
        world.wire.put(rows(log, 1), route)
    world.service.turn(0.0)
    assert [result.tokens for route in (b"a", b"c") for result in world.wire.take(route)] == [TEXT[1:2]] * 2
    (fault,) = world.wire.take(b"b")
    assert code(fault) == m.Code.ENGINE
    assert "broke" in fault.problem


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


def test_ranges_wait_for_decode(tmp_path: Path) -> None:
    world = World(serve_part(FakePart(), "aa", "fake", files=bundle(tmp_path)))
    world.open()
    world.open(b"b", session=b"b" * 16)
    world.wire.put(m.Generate(1, 1, 0, Chain().head, PROMPT, 10))
    digest = hashlib.sha256(DATA).hexdigest()
    for offset in range(0, 20000, 1000):
        world.wire.put(m.GetRange("aa", "weights/one.bin", digest, offset, 1000), b"b")
    world.service.turn(0.0)
    assert len(world.wire.take(b"b")) == 1
    for _ in range(25):
        world.service.turn(0.0)
    assert b"".join(answer.data for answer in world.wire.take(b"b") if isinstance(answer, m.Range)) == DATA[1000:20000]
    assert len(world.wire.take()) == 10


DATA = bytes(range(256)) * 300


def bundle(folder: Path) -> BundleFiles:
    (folder / "weights").mkdir()
    (folder / "weights" / "one.bin").write_bytes(DATA)
    (folder.parent / "secret").write_text("secret")
    entries = {
        "weights/one.bin": {"bytes": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest()},
        "../secret": {"bytes": 6, "sha256": "0" * 64},
        "absent": {"bytes": 6, "sha256": "0" * 64},
        "weights": {"bytes": 6, "sha256": "0" * 64},
    }
    (folder / "bundle.json").write_text(json.dumps({"files": entries}))
    (folder / "private.key").write_text("secret")
    return BundleFiles(folder)


def test_a_bundle_is_given_out_in_ranges_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    files = bundle(folder)
    world = World(serve_part(FakePart(), "aa", "fake", files=files))
    (_, manifest) = world.ask(m.Hello(1, 1), m.GetManifest(""))
    assert manifest.data == (folder / "bundle.json").read_bytes()
    digest = hashlib.sha256(DATA).hexdigest()
    whole = b""
    while True:
        (answer,) = world.ask(m.GetRange("aa", "weights/one.bin", digest, len(whole), 65536))
        assert answer.total_bytes == len(DATA)
        assert answer.offset == len(whole)
        if not answer.data:
            break
        whole += answer.data
    assert whole == DATA
    for name in ("../secret", "absent", "weights", "private.key", "bundle.json", "/etc/passwd", ""):
        (fault,) = world.ask(m.GetRange("aa", name, "0" * 64, 0, 100))
        assert code(fault) == m.Code.NOT_FOUND
    (fault,) = world.ask(m.GetRange("aa", "weights/one.bin", "1" * 64, 0, 100))
    assert code(fault) == m.Code.NOT_FOUND


def test_a_cloud_may_keep_its_bundle() -> None:
    world = World()
    _, fault = world.ask(m.Hello(1, 1), m.GetManifest("aa"))
    assert code(fault) == m.Code.NOT_FOUND


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": []}', '{"files": {"a": {}}}'])
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bundle.json").write_text(text)
    with pytest.raises(BundleError):
        BundleFiles(tmp_path)


def test_stopping_finishes_what_is_under_way() -> None:
    world = World()
    world.open()
    world.wire.put(m.Generate(1, 1, 0, Chain().head, PROMPT, 10))
    world.service.turn(0.0)
    world.service.stop()
    assert world.service.health()["status"] == "stopping"
    world.wire.put(m.Open(b"n" * 16, 2, 1, "aa"))
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
    assert values["isthmus_step_ms_count"] == values['isthmus_step_ms_bucket{le="+Inf"}'] == "1"


FRAMES = [
    m.encode(message)[0]
    for message in (
        m.Hello(1, 1),
        m.Open(SESSION, 1, 1, "aa"),
        m.Open(b"z" * 16, 2, 3, "aa", 2),
        rows(PROMPT, 5),
        rows(PROMPT, 2),
        m.Generate(1, 1, 0, Chain().head, PROMPT, 3),
        m.Truncate(1, 2, 1),
        m.Cancel(1, 1),
        m.Close(1, 1),
        m.GetRange("aa", "x", "0" * 64, 0, 1),
        m.GetManifest(""),
        m.Ping(1),
        m.Credit(5),
    )
]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(FRAMES), st.integers(0, 100), st.integers(0, 255), st.booleans(), st.binary(max_size=30)
        ),
        max_size=40,
    )
)
def test_an_honest_session_is_served_whatever_others_send(noise: list[tuple[bytes, int, int, bool, bytes]]) -> None:
    part = FakePart()
    world = World(serve_part(part, "aa", "fake"))
    world.open(b"honest", session=b"h" * 16)
    log, said = list(PROMPT), list(PROMPT)
    for frame, at, byte, mutate, extra in noise:
        changed = bytearray(frame)
        if mutate:
            changed[at % len(changed)] = byte
        world.wire.waiting.append(Incoming(b"bad", "", [bytes(changed), extra] if extra else [bytes(changed)]))
        world.wire.put(rows(log, len(said)), b"honest")
        world.service.turn(0.0)
        (result,) = [answer for answer in world.wire.take(b"honest") if isinstance(answer, m.Result)]
        said = result.tokens
        log += said
    assert log == PROMPT + fake_text(PROMPT, len(noise))
    for model in world.service.models.values():
        for session in model.sessions:
            assert session.sequence.length == session.committed <= len(session.chain)
    world.service.close()
    assert part.sequences == []
