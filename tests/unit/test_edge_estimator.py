"""What a device learns: a link that worsens is believed at once, one that improves only when it lasts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.costs import Standing, candidates
from isthmus.edge.estimator import PACE_BOUND, SPAN_S, Estimator, LinkEstimator, Share, quantile
from isthmus.edge.figures import CloudFigures, DeviceFigures, DraftFigures, ExitFigures, Figures, Wish

DEVICE = DeviceFigures(20, 30, ((1, 0.25), (20, 5.0), (30, 7.5)), 2.0, 0.25, 1.5)
CLOUD = CloudFigures(30, ((1, 9.5), (2, 11.0), (4, 14.0)), 2.0, 1.5)
DRAFTS = DraftFigures("exit", 20, 7.25, 0.5, ((1, 1.5), (2, 1.75)), ((1, 2.0), (2, 3.0)))
KNOWN = Figures(DEVICE, CLOUD, None, (ExitFigures(20, 0.8, 0.6, 0.2, 0.05, 384.0),), (DRAFTS,))


def test_the_first_greeting_counts_until_there_is_more() -> None:
    link = LinkEstimator(30.0)
    assert link.figures(0.0).trip_ms == 30.0
    link.trip(0.0, 50.0)
    assert link.figures(0.0).trip_ms == 50.0


def test_quickly_sceptical_slowly_trusting() -> None:
    link = LinkEstimator(0.0)
    for i in range(20):
        link.trip(0.1 * i, 20.0)
    for i in range(4):
        link.trip(2.4 + 0.5 * i, 400.0)
    assert link.figures(4.0).trip_ms == 400.0
    for i in range(4):
        link.trip(4.2 + 0.05 * i, 20.0)
    found = link.figures(4.4)
    assert found.trip_ms == 20.0 and found.expected_trip_ms > 20.0

    slow = LinkEstimator(0.0)
    for i in range(20):
        slow.trip(0.5 * i, 400.0)
    for i in range(5):
        slow.trip(10.0 + 0.1 * i, 20.0)
    assert slow.figures(10.5).trip_ms == 400.0


def test_trips_that_were_under_way_together_are_one_moment_of_the_link() -> None:
    link = LinkEstimator(0.0)
    for i in range(10):
        link.trip(0.1 * i, 20.0)
    for i in range(5):
        link.trip(2.0 + 0.001 * i, 1000.0 - i)  # a pipe behind one stall
    found = link.figures(2.1)
    assert found.trip_ms == found.trip_high_ms == 20.0


def test_a_stall_counts_as_often_as_work_would_have_met_it() -> None:
    """A ping follows half a second after the one before was answered; work asks again at once."""
    asked, pinged = LinkEstimator(0.0), LinkEstimator(0.0)
    now_s = 0.0
    while now_s < 16.0:
        trip = 500.0 if 8.0 <= now_s % 16.0 < 10.0 else 40.0
        now_s += (trip + 50.0) * 1e-3
        asked.trip(now_s, trip)
    now_s = 0.0
    while now_s < 16.0:
        trip = 500.0 if 8.0 <= now_s < 10.0 else 40.0
        now_s += 0.5 + trip * 1e-3
        pinged.trip(now_s, trip, idle_s=0.5)
    seen, told = asked.figures(16.0), pinged.figures(16.0)
    assert seen.trip_ms == told.trip_ms == 40.0
    assert told.expected_trip_ms == pytest.approx(seen.expected_trip_ms, rel=0.1)


def test_what_is_old_is_forgotten_but_for_the_last() -> None:
    link = LinkEstimator(0.0)
    link.trip(0.0, 500.0)
    assert link.figures(10 * SPAN_S).trip_ms == 500.0
    link.trip(2 * SPAN_S, 20.0)
    found = link.figures(2 * SPAN_S)
    assert (found.trip_ms, found.trip_high_ms) == (20.0, 20.0)


def test_rates_come_from_bulk_only() -> None:
    link = LinkEstimator(0.0, rate_bps=1e6)
    link.moved("up", 0.0, 100, 1000.0)
    assert link.figures(0.0).up_bps == 1e6
    link.moved("up", 0.0, 100_000, 100.0)
    found = link.figures(0.0)
    assert (found.up_bps, found.down_bps) == (8e6, 1e6)
    link.moved("up", 1.0, 100_000, 1000.0)
    assert link.figures(1.0).up_low_bps < link.figures(1.0).up_bps < 8e6


def test_a_silence_and_a_loss_are_passed_on() -> None:
    found = Estimator(KNOWN, 20.0).figures(0.0, 250.0, up=False)
    assert found.link and (found.link.silent_ms, found.link.up) == (250.0, False)


@given(st.floats(0.01, 0.99), st.floats(0, 1))
def test_a_share_moves_from_its_prior_to_what_is_seen(prior: float, real: float) -> None:
    share = Share(prior)
    assert share.value == pytest.approx(prior)
    gaps = []
    for _ in range(40):
        share.saw(10 * real, 10)
        gaps.append(abs(share.value - real))
    assert gaps == sorted(gaps, reverse=True) or gaps[0] == pytest.approx(0, abs=1e-9)
    assert gaps[-1] <= 0.35 * abs(prior - real) + 1e-9


def test_steps_scale_the_figures() -> None:
    learning = Estimator(KNOWN)
    for _ in range(100):
        learning.device_step(5.0, 10.0)
        learning.cloud_step(9.5, 28.5)
    learning.queued(0.0, 4.0)
    found = learning.figures(0.0)
    assert found.cloud and found.device.token_ms == pytest.approx(2 * DEVICE.token_ms, rel=1e-3)
    assert found.cloud.step(1) == pytest.approx(28.5, rel=1e-3)
    assert found.cloud.queue_ms == pytest.approx(4.0, rel=1e-3)
    assert found.drafts[0].draft_ms == pytest.approx(14.5, rel=1e-3)


def test_exits_and_drafts_are_counted() -> None:
    learning = Estimator(KNOWN)
    for _ in range(500):
        learning.exit(20, 0.8, 0, learning.figures(0.0).exits[0].asked(0.0))
        learning.block("exit", 20, 2, 2, 2)
    found = learning.figures(0.0)
    assert found.exits[0].unsure < 0.25 and found.exits[0].asked(0.0) < 0.15
    assert found.drafts[0].accepted > 0.75
    once, twice = (tokens for _, tokens in found.drafts[0].tokens_a_round)
    assert once > 1.7 and twice > 2.3  # a length that was not tried gains by the one that was
    for _ in range(500):
        learning.block("exit", 20, 2, 2, 0)
    once, twice = (tokens for _, tokens in learning.figures(0.0).drafts[0].tokens_a_round)
    assert once < 1.3 and twice < 1.4


def test_one_long_queue_is_no_queue() -> None:
    learning = Estimator(KNOWN)
    for i, ms in enumerate((0.0, 900.0, 0.0)):
        learning.queued(0.1 * i, ms)
    found = learning.figures(0.3)
    assert found.cloud and found.cloud.queue_ms == 0.0


def test_a_mode_out_of_use_is_given_another_chance() -> None:
    learning = Estimator(KNOWN)
    for i in range(100):
        learning.paced("exit", 0.01 * i, 10.0, 1000.0)
    (bad,) = learning.figures(1.0).pace
    assert bad[0] == "exit" and 0.9 * PACE_BOUND < bad[1] <= PACE_BOUND
    (later,) = learning.figures(300.0).pace
    assert later[1] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("times", [0.8, 1.0, 1.1, 2.0])
def test_a_pace_does_not_grow_with_the_tokens_between_two_decisions(times: float) -> None:
    learning, now_s = Estimator(KNOWN), 0.0
    for _ in range(4):  # decisions: what was learned so far is in the price
        choice = candidates(learning.figures(now_s), Wish(), Standing(100))[0]
        assert choice.mode == "local" and choice.formula_ms == pytest.approx(DEVICE.token_ms)
        for _ in range(200):
            now_s += 0.01
            learning.paced("local", now_s, choice.formula_ms, times * DEVICE.token_ms)
        assert dict(learning.figures(now_s).pace)["local"] == pytest.approx(times, rel=0.01)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_lies_among_the_values(values: list[float], share: float) -> None:
    assert min(values) <= quantile(values, share) <= max(values) * (1 + 1e-9)


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=20), st.floats(0.0, 1.0), st.integers(1, 5))
def test_a_quantile_does_not_care_for_the_unit_of_weights(values: list[float], share: float, weight: int) -> None:
    assert quantile(values, share, [float(weight)] * len(values)) == pytest.approx(quantile(values, share))


def test_a_weighted_quantile() -> None:
    assert quantile([1.0, 2.0, 9.0], 0.5, [1.0, 1.0, 1.0]) == 2.0
    assert quantile([1.0, 2.0, 9.0], 0.9, [10.0, 10.0, 1.0]) == pytest.approx(2.0 + 7.0 * 3.95 / 5.5)
    assert quantile([9.0, 1.0], 1.0, [1.0, 3.0]) == 9.0
