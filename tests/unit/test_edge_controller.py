"""Auto decides while an answer is made: the text stays the same whatever it chooses, and deciding stays cheap."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge import controller, policy, profile, rhythm
from isthmus.edge.figures import Figures, Wish
from isthmus.edge.policy import Plan
from isthmus.engine.sampling import Sampling
from isthmus.protocol import messages as m
from isthmus.protocol.errors import BundleError, DeviceError
from tests.edge_decider import SLOW, TimedCloud, decider
from tests.edge_exits import CUT
from tests.edge_toys import PROMPT, device, ids, local, toy_engine  # noqa: F401
from tests.edge_world import LossyWire, ToyBundle, ToyCloud, ToyService
from tests.toy_part import N_LAYERS, ToyPart

WARM = Sampling(0.9, seed=3)


@pytest.fixture
def deciding(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes devices in auto whose steps take time."""
    return lambda wire, **options: decider(monkeypatch, wire, **options)


def scripted(choices: random.Random) -> Any:
    """A policy that chooses any allowed way at all."""

    def decide(figures: Figures, wish: Wish, standing: Any) -> Plan:
        plan = policy.decide(figures, wish, standing)
        allowed = [one for one in plan.candidates if not one.why_not]
        return Plan(choices.choice(allowed), plan.candidates, "so it was written")

    return decide


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    every_s=st.sampled_from([0.0, 0.02, 0.1]),
    drop=st.sampled_from([0.0, 0.1]),
    slow_s=st.sampled_from([0.005, 0.2]),
    reconnect=st.sampled_from([11, 1 << 60]),
    held=st.sampled_from([CUT, N_LAYERS]),
    warm=st.booleans(),
)
def test_the_text_is_the_same_whatever_is_chosen_and_whenever(
    seed: int, every_s: float, drop: float, slow_s: float, reconnect: int, held: int, warm: bool
) -> None:
    sampling = WARM if warm else Sampling()
    wire = LossyWire(TimedCloud(), seed, drop=drop, repeat=drop, delay_s=(0.005, slow_s))
    wire.reconnect_every = reconnect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controller, "decide", scripted(random.Random(seed)))
        patch.setattr(rhythm, "DECIDE_S", every_s)
        patch.setattr(rhythm, "SELDOM_S", every_s)
        with decider(patch, wire, known=True, held=held) as one:
            ids(one.generate(PROMPT, max_tokens=30, sampling=sampling))
            text = one.stats.tokens
            ids(one.generate(max_tokens=10, sampling=sampling))
            text = text + one.stats.tokens
            assert one.stats.finish and not one.stats.unverified
    patch.undo()
    assert text[:30] == local(max_tokens=30, sampling=sampling)[: len(text)]
    expected = local(PROMPT.encode() + bytes(t % 256 for t in text[:30]), max_tokens=10, sampling=sampling)
    if 256 not in text:
        assert text[30:] == expected


def test_ways_change_in_the_middle_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "decide", scripted(random.Random(5)))
    monkeypatch.setattr(rhythm, "DECIDE_S", 0.0)
    monkeypatch.setattr(rhythm, "SELDOM_S", 0.0)
    told: list[str] = []
    with decider(monkeypatch, LossyWire(TimedCloud()), known=True, explain=told.append) as one:
        text = ids(one.generate(PROMPT, max_tokens=60))
        assert {"device", "cloud", "verified"} <= set(one.stats.sources)
    assert len(told) > 10 and all("so it was written" in why for why in told)
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isthmus.engine.open_part", lambda source, start, end, **_: ToyPart(end))
        assert text == local(max_tokens=60)


def test_a_slow_cloud_is_left_once_the_device_is_known_to_be_faster(deciding: Any) -> None:
    told: list[str] = []
    wire = LossyWire(TimedCloud(SLOW))
    with deciding(wire, explain=told.append) as one:
        text = ids(one.generate(PROMPT, max_tokens=40))
        assert one.stats.sources[:8] == ["cloud"] * 8 and one.stats.sources[-1] == "device"
        assert told[0].startswith("stream: too little is known")
        assert told[1].startswith("after ") and "* local" in told[1] and "  stream" in told[1]
        text += ids(one.generate(max_tokens=10))
        assert set(one.stats.sources) == {"device"}  # from the first token on
        assert told[-1].startswith("local: ")
    assert len(text) == 50


def test_what_cannot_be_had_is_told_and_damage_is_noted(deciding: Any) -> None:
    told: list[str] = []
    with deciding(LossyWire(TimedCloud(SLOW)), known=True, explain=told.append) as one:

        def damaged(options: Any) -> Any:
            raise BundleError("layer-003 is damaged", "fetch the bundle again")

        one._modes.local = damaged
        ids(one.generate(PROMPT, max_tokens=10))
        assert "cannot be had (layer-003 is damaged)" in one.stats.note
        assert any("local cannot be had (layer-003 is damaged)" in why for why in told)
        assert not any("too little is known" in why for why in told)


def test_a_cloud_that_computes_only_its_part_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    with decider(monkeypatch, LossyWire(ToyService()), known=True, held=N_LAYERS) as one:
        ids(one.generate(PROMPT, max_tokens=4))
        knowledge = one._steering._controller._knowledge
        assert knowledge.enough
        before = knowledge.figures(0.0).cloud
        for rows, prompt in ((2, 5), (1, 0)):
            for _ in range(50):
                took = before.rest(CUT, rows) + before.prefill(prompt, CUT)
                knowledge.stepped(0.0, rows, prompt, took, 0.0, CUT)
            assert knowledge.figures(0.0).cloud.step(1) == pytest.approx(before.step(1))
        knowledge.stepped(0.0, 1, 0, 3 * before.step(1), 0.0, 0)
        assert knowledge.figures(0.0).cloud.step(1) > 1.1 * before.step(1)


def test_a_fast_cloud_is_kept(deciding: Any) -> None:
    with deciding(LossyWire(TimedCloud()), known=True) as one:
        ids(one.generate(PROMPT, max_tokens=40))
        assert set(one.stats.sources) == {"cloud"}


def test_deciding_is_rare(deciding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(*arguments: Any) -> Plan:
        nonlocal calls
        calls += 1
        return policy.decide(*arguments)

    monkeypatch.setattr(controller, "decide", counted)
    wire = LossyWire(TimedCloud(SLOW))
    with deciding(wire, row_ms=5.0, known=True) as one:
        before = wire.now
        looks = Mock(wraps=one._holding._held)
        one._holding._held = looks
        tokens = len(ids(one.generate(PROMPT, max_tokens=200)))
        assert calls == one._steering._controller.decisions
        assert calls <= 2 + (wire.now - before) / rhythm.DECIDE_S
        assert looks.call_count <= 3  # when the answer begins: it takes longer than a decision
        assert calls < tokens / 4  # a token takes 5 ms, and two decisions soon lie 200 ms apart


def test_a_cloud_that_falls_silent_is_not_waited_for(deciding: Any) -> None:
    class Mute(TimedCloud):
        quiet = False

        def receive(self, message: Any) -> list[tuple[float, Any]]:
            answers = super().receive(message)
            return [] if self.quiet and isinstance(message, m.Rows | m.Generate | m.Draft) else answers

    cloud = Mute()
    wire = LossyWire(cloud)
    with deciding(wire, known=True) as one:
        text = ids(one.generate(PROMPT, max_tokens=20))
        cloud.quiet = True
        before = wire.now
        answer = one.generate(max_tokens=10)
        text.append(next(answer).id)
        assert wire.now - before < 1.0  # and not the three seconds after which a link counts as down
        text += ids(answer)
        assert set(one.stats.sources) == {"device"}
        assert "the cloud took too long after" in one.stats.note
        asked = sum(isinstance(message, m.Generate) for message in wire.sent)
        text += ids(one.generate(max_tokens=200))
        assert sum(isinstance(message, m.Generate) for message in wire.sent) <= asked + 3  # in two seconds, at 10 ms
    assert len(text) == 230


def test_what_the_cloud_refuses_is_streamed_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    class Choosy(TimedCloud):
        def receive(self, message: Any) -> list[tuple[float, Any]]:
            if isinstance(message, m.Draft):
                return [(0.0, m.Fault(m.Code.UNSUPPORTED, "no drafts today", "", 0, message.alias, message.epoch))]
            return super().receive(message)

    def verify(figures: Figures, wish: Wish, standing: Any) -> Plan:
        plan = policy.decide(figures, wish, standing)
        return Plan(next(one for one in plan.candidates if one.source == "exit"), plan.candidates, "drafts")

    monkeypatch.setattr(controller, "decide", verify)
    told: list[str] = []
    with decider(monkeypatch, LossyWire(Choosy()), known=True, held=CUT, explain=told.append) as one:
        text = ids(one.generate(PROMPT, max_tokens=20))
        assert set(one.stats.sources) == {"cloud"} and "no drafts today" in told[-1]
    assert len(text) == 20


def test_privacy_speaks_to_nobody(deciding: Any) -> None:
    wire = LossyWire(TimedCloud())
    told: list[str] = []
    with deciding(wire, prefer="privacy", explain=told.append) as one:
        ids(one.generate(PROMPT, max_tokens=10))
        assert set(one.stats.sources) == {"device"} and one.stats.bytes_up == 0
        assert wire.sent == [] and not wire.greeted
        with pytest.raises(DeviceError, match="stream mode sends something and privacy is preferred"):
            one.generate(PROMPT, mode="stream")
    assert told == ["local: there is no cloud, or none may be asked"]


def test_cloud_cost_is_saved_where_it_may_be(deciding: Any) -> None:
    cloud = TimedCloud(((1, 9_000), (4, 18_000)))
    with deciding(LossyWire(cloud), known=True, prefer="cloud-cost") as one:
        ids(one.generate(PROMPT, max_tokens=30))
        assert set(one.stats.sources) == {"device"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prefer": "magic"}, "prefer is 'magic'; choose one of speed, cloud-cost, privacy"),
        ({"max_disagreement": 1.5}, "max_disagreement is 1.5; give a share from 0 to 1"),
        ({"max_disagreement": -0.1}, "max_disagreement is -0.1"),
        ({"max_disagreement": float("nan")}, "max_disagreement is nan"),
        ({"prefer": "privacy", "mode": "split"}, "split mode sends something and privacy is preferred"),
        ({"prefer": "privacy", "bundle": ToyBundle(held=3)}, "holds 3 of 6 layers and nothing may be sent"),
    ],
)
def test_wishes_that_cannot_be_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(DeviceError, match=problem):
        device(LossyWire(ToyCloud()), **options)


def test_what_was_measured_is_kept_for_the_next_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("profiles")
    monkeypatch.setattr(profile, "folder", lambda: folder)
    for times in range(2):
        with decider(monkeypatch, LossyWire(TimedCloud(SLOW))) as one:
            ids(one.generate(PROMPT, max_tokens=20))
            assert (one.stats.sources[0] == "device") == (times == 1)
    (path,) = folder.iterdir()
    found = profile.read(path)
    assert found is not None and found.numerics == "toy"
    with decider(monkeypatch, LossyWire(TimedCloud(SLOW)), threads=1) as one:  # another device
        ids(one.generate(PROMPT, max_tokens=2))
        assert one.stats.sources[0] == "cloud"
    for rubbish in ("", "{}", '{"ms_per_mb": -1, "row_ms": 1, "numerics": ""}', '{"ms_per_mb": NaN}'):
        path.write_text(rubbish)
        assert profile.read(path) is None


def test_a_conversation_that_slides_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = LossyWire(TimedCloud(), delay_s=(0.005, 0.005))
    with decider(monkeypatch, wire, known=True, held=N_LAYERS, overflow="slide", kv_tokens=64) as one:
        assert len(ids(one.generate(PROMPT, max_tokens=120))) == 120


def test_an_answer_that_nobody_read_does_not_steer_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = LossyWire(TimedCloud(), delay_s=(0.005, 0.005))
    with decider(monkeypatch, wire, known=True, held=N_LAYERS) as one:
        one.generate(PROMPT, max_tokens=20)
        sent = len(wire.sent)
        assert {token.source for token in one.generate(PROMPT, max_tokens=20, mode="local")} == {"device"}
        assert len(wire.sent) == sent
