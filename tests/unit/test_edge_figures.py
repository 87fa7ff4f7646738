"""Figures: times by interpolation, and errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.figures import (
    CloudFigures,
    DeviceFigures,
    ExitFigures,
    LinkFigures,
    Wish,
    between,
    round_of,
)
from isthmus.edge.pace import LIKELY
from isthmus.protocol.errors import DeviceError

DEVICE = DeviceFigures(20, 30, ((1, 0.25), (20, 5.0), (30, 7.5)), 2.0, 0.25, 1.5)
CLOUD = CloudFigures(30, ((1, 9.5), (2, 11.0), (4, 14.0)), 2.0, 1.5)
LINK = LinkFigures(20, 40, 1e6, 2e6, 5e5, 1e6)


@pytest.mark.parametrize(("count", "value"), [(1, 4.0), (2, 6.0), (3, 8.0), (4, 9.0), (6, 11.0)])
def test_values_between_and_beyond_points(count: int, value: float) -> None:
    assert between(((1, 4.0), (3, 8.0), (4, 9.0)), count) == pytest.approx(value)


def test_values_below_the_first_point_go_through_nothing() -> None:
    assert between(((10, 5.0), (30, 7.5)), 5) == pytest.approx(2.5)
    assert between(((10, 5.0),), 30) == 5.0


def test_times_of_a_device() -> None:
    assert DEVICE.token_ms == pytest.approx(9.5)
    assert DEVICE.through(10) == pytest.approx(0.25 + 9 * 4.75 / 19)
    assert DEVICE.drafted(20) == pytest.approx(7.25)
    assert DEVICE.prefill(100, 20) == pytest.approx(100.0)
    assert not DEVICE.whole and replace(DEVICE, held=30).whole


def test_times_of_a_cloud() -> None:
    assert CLOUD.step(3) == pytest.approx(12.5)
    assert CLOUD.step(6) == pytest.approx(14 + 2 * 3.5)
    assert CLOUD.rest(20) == pytest.approx(7.5 / 3 + 2)
    assert CLOUD.rest(20, 10) == pytest.approx((12 + 6 * 1.5) / 3 + 2)
    assert CLOUD.prefill(30, 20) == pytest.approx(15.0)


@given(st.floats(0, 1), st.integers(0, 12))
def test_tokens_of_a_round_are_the_sum_of_powers(accepted: float, drafted: int) -> None:
    assert round_of(accepted, drafted) == pytest.approx(sum(accepted**i for i in range(drafted + 1)), abs=1e-6)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Wish("beauty"), "prefer is 'beauty'"),  # type: ignore[arg-type]
        (lambda: Wish(max_disagreement=5), "max_disagreement is 5"),
        (lambda: replace(DEVICE, held=31), "31 of 30"),
        (lambda: replace(DEVICE, head_ms=float("nan")), "head_ms is nan"),
        (lambda: replace(CLOUD, rows_ms=((2, 1.0), (1, 1.0))), r"counts \[2, 1\]"),
        (lambda: replace(CLOUD, rows_ms=((1, -1.0),)), "rows_ms is"),
        (lambda: replace(LINK, up_bps=0), "up_bps is 0"),
        (lambda: ExitFigures(1, 0.5, 1.5, 0.0, 0.0, 384), "unsure is 1.5"),
    ],
)
def test_figures_that_cannot_be(make: Callable[[], object], problem: str) -> None:
    with pytest.raises(DeviceError, match=problem):
        make()


def test_an_exit_asks_less_where_guesses_pay() -> None:
    one = ExitFigures(20, 0.62, 0.65, 0.15, 0.05, 384)
    evens = (0.0, LIKELY, 0.4, 0.62, 5.0)
    asked = [one.asked(even) for even in evens]
    assert asked[0] == asked[1] == pytest.approx(0.5) and asked[-2] == asked[-1] == 0.65
    assert asked[1] < asked[2] < asked[3]
    assert ExitFigures(20, LIKELY / 2, 0.65, 0.15, 0.05, 384).asked(0.0) == 0.65  # what it guesses, it is sure of
