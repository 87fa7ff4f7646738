"""Exit mode over the real service and a link that loses, repeats and overtakes: one text, whatever the link does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge.exit import KEPT_STATES
from isthmus.edge.exits import Exits
from isthmus.edge.local import CHUNK
from isthmus.engine.sampling import Sampling
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import DeviceError, OutOfBlocks
from isthmus.split.certificate import Said, emitted
from tests.edge_exits import CUT, Oracle, exiting, give_exit
from tests.edge_toys import PROMPT, device, ids, local, toy_engine  # noqa: F401
from tests.edge_world import LossyWire, ToyService
from tests.toy_part import EOS, N_LAYERS

WARM = Sampling(0.9, seed=3)

ORACLE = Oracle()


def oracle(count: int, threshold: float, sampling: Sampling = Sampling()) -> list[int]:  # noqa: B008
    """Token by token: the exit's where it is sure, else the whole model's."""
    log = list(PROMPT.encode())
    start = len(log)
    while len(log) < start + count and log[-1] != EOS:
        log.append(ORACLE.after(log, sampling, threshold))
    return log[start:]


@pytest.mark.parametrize("sampling", [Sampling(), WARM])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("guesses", [None, 0, 1, 5])
def test_the_text_is_the_oracles(threshold: float, guesses: int | None, sampling: Sampling) -> None:
    with exiting(LossyWire(ToyService()), threshold, guesses) as one:
        text = ids(one.generate(PROMPT, max_tokens=50, sampling=sampling))
        assert text == oracle(50, threshold, sampling)
        assert set(one.stats.sources) <= {"exit", "cloud", "verified"}
        if threshold == 0.0:
            assert set(one.stats.sources) == {"exit"}
        if threshold == 1.0 and guesses == 0:
            assert one.stats.round_trips >= len(text) - 1


@pytest.mark.parametrize("threshold", [0.3, 0.7])
@pytest.mark.parametrize("guesses", [None, 0, 3])
def test_what_is_said_while_a_question_is_under_way_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, threshold: float, guesses: int | None
) -> None:
    monkeypatch.setattr("isthmus.edge.pace.Pace.answer_s", lambda self: 60.0)  # time to say all that follows
    with exiting(LossyWire(ToyService()), threshold, guesses) as one:
        assert ids(one.generate(PROMPT, max_tokens=50)) == oracle(50, threshold)
        text = oracle(50, threshold)
        one.reset()
        assert ids(one.generate(PROMPT, max_tokens=20)) == text[:20]
        assert ids(one.generate(max_tokens=30)) == text[20:]  # what was said beyond the end is said again


def test_a_threshold_that_nothing_reaches_gives_the_models_own_text() -> None:
    with exiting(LossyWire(ToyService()), 1.0, 3) as one:
        assert ids(one.generate(PROMPT, max_tokens=50)) == local(max_tokens=50)
        assert one.stats.accepted < one.stats.drafted
        assert one.stats.filled == 0  # every state was asked about


def test_layers_that_fill_what_nobody_asked_about_are_counted() -> None:
    with exiting(LossyWire(ToyService()), 0.7, 0) as one:
        ids(one.generate(PROMPT, max_tokens=50))
        rest, sources = N_LAYERS - CUT, one.stats.sources
        assert 0 < one.stats.filled <= sources.count("exit") * rest and one.stats.filled % rest == 0
        # All that the exit said before the last question.
        last = max(i for i, source in enumerate(sources) if source != "exit")
        assert one.stats.filled == sources[:last].count("exit") * rest


@pytest.mark.parametrize(("threshold", "sources"), [(1.0, {"cloud", "verified"}), (0.995, {"exit"})])
def test_a_certain_exit_is_believed_as_its_certificate_was_measured(threshold: float, sources: set[str]) -> None:
    with exiting(LossyWire(ToyService()), threshold) as one:
        speaker = one._exits.speaker(CUT)
        say = speaker.say
        speaker.say = lambda log, sampling: say(log, sampling)._replace(confidence=1.0)
        text = ids(one.generate(PROMPT, max_tokens=30))
        assert set(one.stats.sources) == sources
        said = [Said(np.ones(len(text), np.float32), np.zeros(len(text), bool))]
        assert emitted(said, threshold) == np.mean([source == "exit" for source in one.stats.sources])


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    drop=st.sampled_from([0.0, 0.1, 0.3]),
    repeat=st.sampled_from([0.0, 0.3]),
    slow_s=st.sampled_from([0.005, 0.3]),
    guesses=st.sampled_from([None, 0, 3]),
    threshold=st.sampled_from([0.3, 0.7]),
    reconnect=st.sampled_from([7, 23, 1 << 60]),
    restart=st.sampled_from([5, 17, 1 << 60]),
)
def test_whatever_happens_to_messages_the_text_is_the_same(
    seed: int,
    drop: float,
    repeat: float,
    slow_s: float,
    guesses: int | None,
    threshold: float,
    reconnect: int,
    restart: int,
) -> None:
    wire = LossyWire(ToyService(), seed, drop=drop, repeat=repeat, delay_s=(0.001, slow_s))
    wire.reconnect_every, wire.restart_after = reconnect, restart
    with exiting(wire, threshold, guesses) as one:
        told = list(one.generate(PROMPT, max_tokens=40))
        assert one.stats.tokens == oracle(40, threshold)
        assert len(told) == len(one.stats.tokens) + one.stats.replaced


def test_one_conversation_with_other_modes_in_between() -> None:
    text = local(max_tokens=36)
    with exiting(LossyWire(ToyService()), 1.0) as one:
        got: list[int] = ids(one.generate(PROMPT, max_tokens=6))
        for mode in ("stream", "exit", "local", "exit", "verify"):
            got += ids(one.generate(max_tokens=6, mode=mode))
        assert got == text
        one.reset()
        assert ids(one.generate(PROMPT, max_tokens=6)) == text[:6]


def test_an_answer_left_early_leaves_nothing_behind() -> None:
    with exiting(LossyWire(ToyService()), 0.5, 4) as one:
        whole = oracle(30, 0.5)
        for start in range(1, 8):
            tokens = one.generate(PROMPT, max_tokens=30)
            head = [next(tokens).id for _ in range(start)]
            assert head + ids(one.generate(max_tokens=4)) == whole[: start + 4]


def test_no_exit_no_certificate_no_such_threshold() -> None:
    bundle_less = device(LossyWire(ToyService()), "exit")
    bare: Any = bundle_less._bundle
    bare.exits = ()
    with bundle_less as one, pytest.raises(DeviceError, match="has no exit"):
        ids(one.generate(PROMPT, max_tokens=3))
    with pytest.raises(DeviceError, match=r"threshold is 1\.5"):
        device(LossyWire(ToyService()), "exit", threshold=1.5)
    with device(LossyWire(ToyService()), "exit") as one:
        uncertified: Any = one._bundle
        uncertified.manifest.exit = lambda layer: SimpleNamespace(certificate=None)
        with pytest.raises(DeviceError, match="no certificate"):
            one._exits.threshold(CUT, None)


def sent_ahead(wire: LossyWire) -> list[int]:
    """Positions of states that went up, each as often as it did."""
    rows = [one for one in wire.sent if isinstance(one, m.Fill | m.Draft | m.Rows) and one.hidden is not None]
    return [one.position + i for one in rows for i in range(len(one.tokens))]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_states_go_up_once_however_many_turns_there_are(threshold: float) -> None:
    wire = LossyWire(ToyService())
    with exiting(wire, threshold, 0) as one:
        text = oracle(60, threshold)
        got: list[int] = []
        for count in (17, 9, 14, 20):
            got += ids(one.generate(PROMPT if not got else None, max_tokens=count))
            if len(got) == 26:
                wire.receive(100.0)  # what is under way arrives
                wire.reconnect()  # rows that wait in the cloud outlast the connection
        assert got == text
        went = sent_ahead(wire)
        assert len(went) > 30 and len(went) == len(set(went))


def test_split_mode_goes_on_from_states_that_were_sent_ahead() -> None:
    wire = LossyWire(ToyService())
    with exiting(wire, 0.0, 0) as one:
        said = ids(one.generate(PROMPT, max_tokens=30))
        log = [*PROMPT.encode(), *said]
        got = ids(one.generate(max_tokens=4, mode="split", cut=CUT))
        for token in got:
            assert token == ORACLE.after(log, Sampling())
            log.append(token)
        went = sent_ahead(wire)
        assert len(went) == len(set(went))


@pytest.mark.parametrize("first", ["exit", "split"])
def test_rounded_states_are_no_ground_for_others(first: str) -> None:
    """What the cloud made of them is not what it makes of exact ones, at the same cut: they are sent anew."""
    wire = LossyWire(ToyService())
    with exiting(wire, 0.0, 0) as one:
        ids(one.generate(PROMPT, max_tokens=30, mode=first, cut=CUT, codec="f16"))
        log, at = one.tokens, len(wire.sent)
        ids(one.generate(max_tokens=4, mode="split", cut=CUT, codec="f32"))
        rows = [message for message in wire.sent[at:] if isinstance(message, m.Rows)]
        assert rows[0].position == 0 and sum(len(message.tokens) for message in rows) >= len(log)
        assert sum(isinstance(message, m.Close) for message in wire.sent[at:]) == 1
        at = len(wire.sent)
        ids(one.generate(max_tokens=4, mode="split", cut=CUT, codec="f32"))  # these are
        assert min(message.position for message in wire.sent[at:] if isinstance(message, m.Rows)) >= len(log)


def test_what_was_sent_ahead_and_is_not_said_is_taken_back() -> None:
    wire = LossyWire(ToyService())
    with exiting(wire, 0.3, 0) as one:
        said = ids(one.generate(PROMPT, max_tokens=30))
        cut = [*PROMPT.encode(), *said[:12], 65, 66, 67]
        began = wire.now
        text = ids(one.generate(cut, max_tokens=20))
        for token in text:
            assert token == ORACLE.after(cut, Sampling(), 0.3)
            cut.append(token)
        assert wire.now - began < 0.3  # nobody had to ask twice


def test_a_cloud_that_stops_does_not_change_the_text() -> None:
    wire = LossyWire(ToyService())
    cloud: Any = wire.cloud
    with exiting(wire, 0.6) as one:
        tokens = one.generate(PROMPT, max_tokens=60)
        for _ in range(5):
            next(tokens)
        cloud._service.stop()
        while next(tokens).verified:
            pass
        cloud.forget()
        wire.reconnect()
        list(tokens)
        assert one.stats.tokens == oracle(60, 0.6) and one.stats.unverified == 0


def test_drafts_of_an_exit_without_room_are_made_no_more() -> None:
    with device(LossyWire(ToyService()), "verify", draft="exit") as one:
        give_exit(one)
        head = one._exits.speaker(CUT)._head
        step, left = head.step, iter(range(8))

        def full(rows: Any) -> Any:
            if next(left, None) is None:
                raise OutOfBlocks("no block is left")
            return step(rows)

        head.step = full  # type: ignore[method-assign]
        assert ids(one.generate(PROMPT, max_tokens=40)) == local(max_tokens=40)
        assert one.stats.drafted > 0 and one.stats.note == ""


def test_an_exit_does_not_slide() -> None:
    holding: Any = SimpleNamespace(slides=True)
    bundle: Any = SimpleNamespace(exits=())
    with pytest.raises(DeviceError, match="where a conversation slides"):
        Exits(bundle, holding).speaker(CUT)


def test_who_only_drafts_keeps_the_last_states() -> None:
    with exiting(LossyWire(ToyService())) as one:
        log, speaker = Chain(), one._exits.speaker(CUT)
        log.extend(PROMPT.encode())
        for _ in range(2 * KEPT_STATES):
            log.extend((speaker.sample(log, WARM),))
        assert sum(map(len, speaker._states)) <= KEPT_STATES + CHUNK
        early = speaker.states(log, 3, 9)
        speaker.truncate(0)
        np.testing.assert_array_equal(early, next(one._holding.open(CUT).hidden(log, 0, CUT))[1][3:9])


def test_it_holds_no_more_states_than_it_needs() -> None:
    with exiting(LossyWire(ToyService()), 0.0) as one:
        ids(one.generate(PROMPT, max_tokens=40))
        (speaker,) = one._exits._open.values()
        assert sum(map(len, speaker._states)) < 16
    assert N_LAYERS > CUT


def test_what_was_taken_in_by_and_by_says_the_same() -> None:
    with exiting(LossyWire(ToyService())) as one, exiting(LossyWire(ToyService())) as two:
        log, speaker, fresh = Chain(), one._exits.speaker(CUT), two._exits.speaker(CUT)
        log.extend(PROMPT.encode() * 36)
        slices = 0
        while speaker.advance(log, 16):
            slices += 1
            assert speaker.held(log) == min(16 * slices, len(log) - 1)
        assert slices == -(-(len(log) - 1) // 16) and sum(map(len, speaker._states)) <= KEPT_STATES + 16
        assert not speaker.remembers(log, WARM)
        assert speaker.draft(log, WARM) == fresh.draft(log, WARM) and speaker.remembers(log, WARM)
        other = Chain()
        other.extend([*log.tokens[:100], *b"something else"])  # the log goes another way
        assert speaker.held(other) == 100 and speaker.advance(other, 99) and speaker.held(other) == len(other) - 1
        assert speaker.draft(other, WARM) == fresh.draft(other, WARM)
