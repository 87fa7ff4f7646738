"""How far to draft before asking: what times and acceptance make of it."""

from __future__ import annotations

import pytest

from isthmus.edge.pace import BLOCKS, SEVERAL, Pace


def paced(draft_s: float, trip_s: float, pass_s: float, right: int = 5, wrong: int = 5, depth: int = 1) -> Pace:
    """After many answers that all took the same."""
    pace = Pace(depth)
    for _ in range(50):
        pace.drafted(2, 2 * draft_s)
        pace.answered(right + wrong, right, 1, trip_s + pass_s, pass_s)
    return pace


def test_nothing_is_known_before_an_answer() -> None:
    pace = Pace(acceptance=0.3)
    assert pace.acceptance == pytest.approx(0.3)
    assert pace.even() == pace.answer_s() == pace.draft_s == 0.0
    assert pace.length() in BLOCKS and pace.most == BLOCKS[-1]


def test_times_are_learned() -> None:
    pace = paced(0.01, 0.05, 0.005)
    assert pace.draft_s == pytest.approx(0.01) and pace.answer_s() == pytest.approx(0.055)
    assert pace.acceptance == pytest.approx(0.5, abs=0.02)
    pace.answered(0, 0, 0, 0.001, 0.002)  # the cloud's clock is not this one's: no trip takes less than nothing
    assert 0 < pace.answer_s() < 0.055


def test_a_longer_trip_is_worth_less_likely_guesses() -> None:
    evens = [paced(0.01, trip_s, 0.005).even() for trip_s in (0.0, 0.005, 0.05, 0.2)]
    assert evens == sorted(evens, reverse=True)
    assert evens[0] > 1  # asking costs less than drafting: nothing is worth it
    assert evens[2] == pytest.approx((0.01 + 0.2 * 0.005) / 0.055)


def test_longer_trips_and_better_drafts_give_longer_blocks() -> None:
    assert paced(0.01, 0.001, 0.005).length() < paced(0.01, 0.2, 0.005).length()
    assert paced(0.01, 0.05, 0.005, 1, 9).length() < paced(0.01, 0.05, 0.005, 9, 1).length()


def test_several_blocks_keep_the_cloud_from_falling_behind() -> None:
    assert paced(0.01, 0.05, 0.005, depth=8).length() == SEVERAL
    slow = paced(0.01, 0.05, 0.02, depth=8).length()
    assert paced(0.01, 0.05, 0.02, depth=8).length(idle=True) == 1  # the cloud waits for it
    assert slow > SEVERAL and 0.02 * (1 + 0.2 * (slow - 1)) <= slow * 0.01


def test_guesses_under_way_are_likely_enough() -> None:
    good, bad = paced(0.01, 0.05, 0.005, 9, 1), paced(0.01, 0.05, 0.005, 1, 9)
    assert good.odds(0) == 1.0 and good.odds(8) > good.floor > bad.odds(8)
    assert good.odds(8) == pytest.approx(good.acceptance**8)
