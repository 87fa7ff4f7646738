"""Latencies over traces and through queues, against what can be computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol.errors import PlanError
from isthmus.split.link import Link
from isthmus.split.plan import Row
from isthmus.split.replay import INPUTS, latencies, passed, waits
from isthmus.split.traces import SEGMENT, Trace, synthetic_pair


def row(up_bytes: float = 3000.0, down_bytes: float = 100.0, **changed: object) -> Row:
    told = {
        "name": "split",
        "kind": "split",
        "codec": "f32",
        "device": (0,),
        "crossing": ("x",),
        "device_ms": 3.0,
        "cloud_ms": 5.0,
        "link_ms": 0.0,
        "up_bytes": up_bytes,
        "down_bytes": down_bytes,
        "ms": 0.0,
    }
    return Row(**{**told, **changed})  # type: ignore[arg-type]


def one_by_one(trace: Trace, at_ms: float, size: float) -> float:
    """Takes an opportunity after the other."""
    cycle, left = 0, size
    while True:
        for time_ms in trace.times_ms:
            if cycle * trace.period_ms + time_ms >= at_ms:
                left -= SEGMENT
                if left <= 0:
                    return float(cycle * trace.period_ms + time_ms)
        cycle += 1


@given(
    gaps=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    at_ms=st.floats(0, 500),
    size=st.integers(1, 40_000),
)
def test_bytes_pass_as_opportunities_come(gaps: list[int], at_ms: float, size: int) -> None:
    trace = Trace(tuple(int(time_ms) for time_ms in np.cumsum(gaps)))
    assert passed(trace, np.array([at_ms]), size)[0] == one_by_one(trace, at_ms, size)


def test_a_link_that_does_not_change_takes_its_rate() -> None:
    taken = latencies(row(), Link(20.0, 1e6, 10e6), beside_ms=1.0)
    assert taken == pytest.approx(np.full(INPUTS, 3.0 + 24.0 + 20.0 + 5.0 + 1.0 + 0.08))


def test_what_stays_on_the_device_needs_no_link() -> None:
    taken = latencies(row(kind="device"), Link(20.0, 1e6, 1e6), load=0.9)
    assert taken == pytest.approx(np.full(INPUTS, 3.0))


def test_a_trace_of_even_opportunities_is_a_rate() -> None:
    even = Trace(tuple(range(1, 1001)))
    taken = latencies(row(up_bytes=150_000.0), Link(0.0, even, 1e9))
    assert taken.mean() == pytest.approx(3.0 + 100.0 + 5.0, abs=1.0)
    assert Link(0.0, even, 1e9).rate().up_bps == pytest.approx(12e6)


def test_a_changing_link_has_a_tail() -> None:
    up, down = synthetic_pair()
    taken = latencies(row(up_bytes=20_000.0), Link(50.0, up, down))
    assert np.quantile(taken, 0.99) > 3 * np.median(taken)
    assert latencies(row(up_bytes=20_000.0), Link(50.0, up, down)).tolist() == taken.tolist()


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8, 0.99, 0.9999])
def test_a_busy_cloud_makes_one_wait_as_in_a_queue_of_equal_requests(load: float) -> None:
    seen = [waits(load, 5.0, np.random.default_rng(seed)).mean() for seed in range(60)]
    assert np.mean(seen) == pytest.approx(load * 5.0 / (2 * (1 - load)), rel=0.08)


def test_waits_are_spread_as_in_such_a_queue() -> None:
    load, generator, waited = 0.6, np.random.default_rng(1), 0.0
    seen = []
    for _ in range(200_000):  # Lindley's recursion
        waited = max(0.0, waited + 1.0 - generator.exponential(1.0 / load))
        seen.append(waited)
    found = np.concatenate([waits(load, 1.0, np.random.default_rng(seed)) for seed in range(40)])
    for share in (0.3, 0.5, 0.9, 0.99):
        assert np.quantile(found, share) == pytest.approx(np.quantile(seen[1000:], share), abs=0.06, rel=0.06)


def test_a_cloud_without_time_is_none() -> None:
    for load in (1.0, -0.1, float("nan")):
        with pytest.raises(PlanError, match="of the cloud's time"):
            latencies(row(), Link(1.0, 1e6, 1e6), load)
    with pytest.raises(PlanError, match="nothing arrives"):
        Link(1.0, 0.0, 1e6).rate()
