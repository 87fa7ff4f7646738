"""Exit mode over the real service and a link that loses, repeats and overtakes: one text, whatever the link does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.engine.part import Rows, Want
from isthmus.engine.sampling import Sampling
from isthmus.protocol.errors import DeviceError
from tests.edge_exits import CUT, ToyExit, exiting
from tests.edge_toys import PROMPT, device, ids, local, toy_engine  # noqa: F401
from tests.edge_world import N_LAYERS, LossyWire, ToyPart, ToyService

WARM = Sampling(0.9, seed=3)


def oracle(count: int, threshold: float, sampling: Sampling = Sampling()) -> list[int]:  # noqa: B008
    """Token by token: the exit's where it is sure, else the whole model's."""
    whole, exit_part, lower = ToyPart(), ToyExit(), ToyPart()
    sequence, exits, first = whole.open(), exit_part.open(), lower.open()
    log = list(PROMPT.encode())
    feed, out = log, list[int]()
    for _ in range(count):
        at = sequence.length
        real = whole.step(Rows().tokens(sequence, at, feed, sampling=sampling)).tokens[0]
        states = lower.step(Rows().tokens(first, at, feed, leave=CUT, want=Want.HIDDEN, want_all=True)).hidden
        want = Want.SAMPLE | Want.CONFIDENCE
        said = exit_part.step(Rows().hidden(exits, at, states, enter=CUT, want=want, sampling=sampling))
        token = said.tokens[0] if said.confidence[0] >= threshold else real
        out.append(token)
        feed = [token]
        if token == 256:
            break
    return out


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
    with device(LossyWire(ToyService()), "exit", threshold=1.5) as one:
        with pytest.raises(DeviceError, match=r"threshold is 1\.5"):
            one._exits.threshold(CUT, 1.5)
        uncertified: Any = one._bundle
        uncertified.manifest.exit = lambda layer: SimpleNamespace(certificate=None)
        with pytest.raises(DeviceError, match="no certificate"):
            one._exits.threshold(CUT, None)


def test_it_holds_no_more_states_than_it_needs() -> None:
    with exiting(LossyWire(ToyService()), 0.0) as one:
        ids(one.generate(PROMPT, max_tokens=40))
        (speaker,) = one._exits._open.values()
        assert sum(map(len, speaker._states)) < 16
    assert N_LAYERS > CUT
