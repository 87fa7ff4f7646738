"""When auto decides and asks the link, and what it still expects: told the time, and nothing else."""

from __future__ import annotations

import pytest

from isthmus.edge import rhythm
from isthmus.edge.costs import Candidate
from isthmus.edge.figures import CloudFigures, DeviceFigures, Figures, LinkFigures
from isthmus.edge.rhythm import Pulse, Rhythm, expected, usual_ms


def test_what_is_expected_of_an_answer_falls_as_it_grows() -> None:
    assert [expected(made, 256 - made) for made in (0, 40, 96, 200)] == [120, 80, 24, 24]
    assert expected(0, 16) == 16 and expected(250, 6) == 6 and expected(256, 0) == 1


def test_decisions_grow_rare_while_nothing_changes() -> None:
    beat = Rhythm()
    assert beat.due(0.0)
    beat.decided(0.0)
    assert not beat.due(0.04) and beat.due(0.05)
    for _ in range(9):
        beat.stayed()
    assert not beat.due(0.19) and beat.due(rhythm.SELDOM_S)
    beat.changed()
    assert beat.due(0.05)


def test_a_silence_lasts_from_the_first_question_that_has_no_answer() -> None:
    pulse = Pulse()
    assert pulse.asks(0.0, float("-inf"), False) == 0
    assert pulse.silent_ms(0.03, float("-inf"), 20.0) < 0
    assert pulse.asks(0.1, 0.05, False) is None and pulse.asks(0.56, 0.05, False) == 0
    assert pulse.asks(4.0, 0.05, True) is None  # nothing else is asked while that has no answer
    assert pulse.asks(5.6, 0.05, False) == 0  # it may have been lost
    assert pulse.silent_ms(5.6, 0.05, 20.0) == pytest.approx(5000.0)
    assert pulse.silent_ms(5.6, 5.6, 20.0) == 0.0


def test_a_rate_is_measured_where_it_might_change_the_way() -> None:
    pulse = Pulse()
    assert pulse.asks(1.0, 0.9, True) == rhythm.PROBE_BYTES
    assert not pulse.probes(2.0) and pulse.asks(1.2, 1.1, True) is None
    assert pulse.probes(3.0) and pulse.asks(3.0, 2.9, True) == rhythm.PROBE_BYTES


def test_nothing_is_late_before_its_time() -> None:
    device = DeviceFigures(30, 30, ((30, 10.0),), 1.0, 1.0, 1.0)
    link = LinkFigures(20.0, 30.0, 1e6, 1e6, 1e6, 1e6)
    known = Figures(device, CloudFigures(30, ((1, 80.0), (5, 100.0)), 10.0, 1.0), link)
    assert usual_ms(Candidate("stream"), known, False) == 90.0
    assert usual_ms(Candidate("stream", setup_ms=50.0), known, True) == 90.0 + 50.0 + 3 * 30.0
    assert usual_ms(Candidate("verify", draft_tokens=4), known, False) == 100.0 + 1.5 * 30.0
    fast = Figures(device, CloudFigures(30, ((1, 8.0),), 1.0, 1.0), link)
    assert usual_ms(Candidate("stream"), fast, False) == rhythm.LATE_MS
