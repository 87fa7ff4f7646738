"""Channel statistics: named by what they hold, free of outlier rows, and the same parameters everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from isthmus.protocol.channels import ChannelStats
from isthmus.protocol.entropy import MAX_K
from isthmus.protocol.errors import ProtocolError

MEAN: NDArray[np.float32] = (np.arange(12) / 2 - 3).astype(np.float32)
SPREAD: NDArray[np.float32] = (2.0 ** np.arange(-6, 6)).astype(np.float32)


def test_the_digest_names_both() -> None:
    stats = ChannelStats(MEAN, SPREAD)
    assert len(stats.digest) == 8
    assert stats.digest == ChannelStats(MEAN.copy(), SPREAD.copy()).digest
    assert stats.digest.hex() == "e37e2e8072700c5f"
    others = [ChannelStats(MEAN + np.float32(1), SPREAD), ChannelStats(MEAN, SPREAD * np.float32(2))]
    assert len({stats.digest, *(other.digest for other in others)}) == 3


def test_they_cannot_be_changed() -> None:
    mean = MEAN.copy()
    stats = ChannelStats(mean, SPREAD)
    mean[0] = 99.0
    assert stats.mean[0] == MEAN[0]
    with pytest.raises(ValueError, match="read-only"):
        stats.mean[0] = 1.0


def test_outlier_rows_do_not_count() -> None:
    states = (np.random.default_rng(0).standard_normal((4000, 12)) * SPREAD + MEAN).astype(np.float32)
    clean = ChannelStats.of(states)
    assert np.allclose(clean.spread, SPREAD, rtol=0.05)
    assert np.allclose(clean.mean, MEAN, atol=0.1 * SPREAD.max())
    sunk = states[:1].copy()
    sunk[:, 3] = 20_000.0
    assert ChannelStats.of(np.concatenate([states, sunk])).digest == clean.digest


@given(st.integers(1, 64), st.floats(-6, 6))
def test_parameters_follow_the_spread(steps: int, octaves: float) -> None:
    spread = np.ones(5, np.float32)
    spread[4] = 2.0**octaves
    k = ChannelStats(np.zeros(5, np.float32), spread).spreads(steps)
    wanted = 2 * np.log2(float(spread[4]) * steps)
    assert abs(k[4] - min(max(wanted, 0), MAX_K)) <= 0.71
    assert k[:4] == k[:1] * 4


@pytest.mark.parametrize(
    ("mean", "spread", "problem"),
    [
        (MEAN, SPREAD[:5], "shapes"),
        (MEAN[:0], SPREAD[:0], "shapes"),
        (MEAN[None], SPREAD[None], "shapes"),
        (MEAN, SPREAD * 0, "range"),
        (MEAN, -SPREAD, "range"),
        (MEAN, SPREAD * np.float32("nan"), "range"),
        (np.full(12, np.inf), SPREAD, "range"),
    ],
)
def test_what_cannot_be_used_is_refused(mean: np.ndarray, spread: np.ndarray, problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        ChannelStats(mean, spread)


def test_states_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ProtocolError, match="at least"):
        ChannelStats.of(np.ones((3, 8), np.float32))
    broken = np.ones((40, 8), np.float32)
    broken[7, 3] = np.nan
    with pytest.raises(ProtocolError, match="finite"):
        ChannelStats.of(broken)
