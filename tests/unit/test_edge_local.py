"""This device's part: what was computed with a cut is filled from the states there, and never computed twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from isthmus.edge import local
from isthmus.edge.local import LocalPart
from isthmus.edge.shallow import ShallowStates
from isthmus.engine import KvConfig, open_part
from isthmus.engine.part import Rows, StepResult
from isthmus.engine.sampling import GREEDY
from isthmus.protocol.chain import Chain
from isthmus.split.bundle import Bundle
from tests.edge_bundle import CONFIG, write_tiny

CUT, DEEPER = 2, 3
TOKENS = np.random.default_rng(5).integers(0, CONFIG.vocab_size, 90).tolist()


class Counted:
    """A part, with how many rows went through its layers from each on."""

    def __init__(self, part: Any) -> None:
        self._part, self.rows = part, dict[int, int]()

    def step(self, rows: Rows) -> StepResult:
        for span in rows.spans:
            self.rows[span.enter] = self.rows.get(span.enter, 0) + span.count
        result: StepResult = self._part.step(rows)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(write_tiny(tmp_path_factory.mktemp("bundle") / "b"))


def opened(bundle: Bundle, window: int = 0, end: int = CONFIG.n_layers) -> tuple[LocalPart, Counted]:
    part = Counted(open_part(bundle, 0, end, threads=1, kv=KvConfig("f16", 512)))
    return LocalPart(part, window), part


@pytest.fixture
def one(bundle: Bundle) -> Iterator[tuple[LocalPart, Counted]]:
    found = opened(bundle)
    yield found
    found[0].close()


def log_of(tokens: list[int]) -> Chain:
    log = Chain()
    log.extend(tokens)
    return log


def alone(bundle: Bundle, log: Chain) -> int:
    """What a part says that has never heard of a cut."""
    part, _ = opened(bundle)
    try:
        return part.sample(log, GREEDY)
    finally:
        part.close()


def test_getting_ready_takes_nothing_from_those_who_work_with_the_cut(
    one: tuple[LocalPart, Counted], bundle: Bundle
) -> None:
    part, counted = one
    log, start = log_of(TOKENS[:60]), 0
    for token in TOKENS[60:]:
        for at, states in part.hidden(log, start, CUT):
            start = at + len(states)
        assert part.advance(log, 16)
        assert (counted.rows[0], part.held(log, CUT)) == (len(log), len(log))
        log.extend((token,))
    while part.advance(log, 16):
        pass
    assert part.held(log, CONFIG.n_layers) == len(log) - 1
    assert part.sample(log, GREEDY) == alone(bundle, log)
    assert counted.rows == {0: len(log), CUT: len(log) - 1}


def test_the_whole_model_goes_on_from_the_states_at_the_cut(
    one: tuple[LocalPart, Counted], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, counted = one
    monkeypatch.setattr(local, "CHUNK", 16)
    log = log_of(TOKENS)
    list(part.hidden(log, 30, CUT))  # the cloud has those before
    assert part.sample(log, GREEDY) == alone(bundle, log)
    assert counted.rows == {0: len(log) + 1, CUT: len(log) - 1}


@pytest.mark.parametrize("cut", [CUT, DEEPER])
def test_states_before_a_later_layer_are_made_of_those_before_an_earlier_one(bundle: Bundle, cut: int) -> None:
    """A device with a part of the model: one works with a cut, and another takes states before the part's end."""
    part, counted = opened(bundle, end=DEEPER)
    fresh, _ = opened(bundle, end=DEEPER)
    log, start, taken, made = log_of(TOKENS[:60]), 0, 0, []
    for token in TOKENS[60:]:
        for at, states in part.hidden(log, start, cut):
            start = at + len(states)
        end = min(taken + 16, len(log))
        assert part.gives(log, taken, DEEPER)
        for at, states in part.hidden(log, taken, DEEPER, end=end):
            assert at == taken
            made.append(states)
            taken += len(states)
        log.extend((token,))
    assert taken == len(log) - 1 == part.held(log, DEEPER)
    right = [states for _, states in fresh.hidden(log, 0, DEEPER, end=taken)]
    np.testing.assert_array_equal(np.concatenate(made), np.concatenate(right))
    assert counted.rows == ({0: taken, CUT: taken} if cut == CUT else {0: taken})
    part._shallow.truncate(0)
    assert part.gives(log, taken, DEEPER) and not part.gives(log, taken - 1, DEEPER)
    part.close()
    fresh.close()


@pytest.mark.parametrize("kept", [0, 7, 40])
def test_another_ending_leaves_nothing_of_the_first(one: tuple[LocalPart, Counted], bundle: Bundle, kept: int) -> None:
    part, _ = one
    list(part.hidden(log_of(TOKENS[:60]), 0, CUT))
    part.advance(log_of(TOKENS[:60]), 16)
    other = log_of(TOKENS[:kept] + TOKENS[80:])
    list(part.hidden(other, 0, CUT))
    assert part.sample(other, GREEDY) == alone(bundle, other)


def test_without_the_states_it_leaves_the_work_with_the_cut_alone_and_computes_anew_when_asked(
    one: tuple[LocalPart, Counted], bundle: Bundle
) -> None:
    part, counted = one
    part._shallow = ShallowStates(most=0)
    log = log_of(TOKENS)
    list(part.hidden(log, 0, CUT))
    assert not part.advance(log, 16) and part.held(log, CUT) == len(log)
    assert part.sample(log, GREEDY) == alone(bundle, log)
    assert counted.rows == {0: 2 * len(log)}


def test_where_nobody_works_with_the_cut_it_is_computed_anew(one: tuple[LocalPart, Counted], bundle: Bundle) -> None:
    part, counted = one
    part._shallow = ShallowStates(most=0)
    log = log_of(TOKENS)
    list(part.hidden(log, 0, CUT))
    slices = 0
    while part.advance(log, 16, anew=True):
        slices += 1
    assert slices == -(-(len(log) - 1) // 16) and part.held(log) == len(log) - 1
    assert part.sample(log, GREEDY) == alone(bundle, log)
    assert counted.rows == {0: 2 * len(log)}


def test_states_before_an_exit_serve_a_part_that_ends_later(bundle: Bundle) -> None:
    part, _ = opened(bundle)
    log = log_of(TOKENS)
    list(part.hidden(log, 0, CUT))
    assert part.gives(log, 5, CUT)
    made = np.concatenate([states for _, states in part.hidden(log, 0, DEEPER, end=40)])
    fresh, _ = opened(bundle)
    right = np.concatenate([states for _, states in fresh.hidden(log, 0, DEEPER, end=40)])
    np.testing.assert_array_equal(made, right)
    assert part.held(log, DEEPER) == 40 and part.held(log, CUT) == len(log)
    assert part.sample(log, GREEDY) == alone(bundle, log)
    part.close()
    fresh.close()


def test_under_a_window_nothing_is_filled(bundle: Bundle) -> None:
    part, counted = opened(bundle, window=64)
    log = log_of(TOKENS)
    list(part.hidden(log, 0, CUT))
    assert not part.advance(log, 16)
    part.sample(log, GREEDY)
    assert set(counted.rows) == {0}
    part.close()
