"""What a plan's picture shows: times over rates, and where another way becomes the fastest."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from isthmus.apps.cli.plan_picture import RATES_BPS, crossings, over_rates
from isthmus.split.link import Link
from tests.unit.test_split_profile import row

LINK = Link(10.0, 1e6, 4e6)


def test_times_follow_the_rate() -> None:
    rows = [row("all on the device", "device", 30.0), row("raw", "cloud", 5.0)]
    times = over_rates(rows, LINK)
    assert times.shape == (2, len(RATES_BPS))
    np.testing.assert_allclose(times[0], 30.0)
    np.testing.assert_allclose(times[1], 5.0 + 10.0 + 8e3 * (10.0 + 10.0 / 4) / RATES_BPS)


def test_the_fastest_way_changes_where_lines_cross() -> None:
    rows = [row("all on the device", "device", 30.0), row("raw", "cloud", 5.0)]
    rows[1] = msgspec.structs.replace(rows[1], up_bytes=10_000.0, down_bytes=10_000.0)
    ((bps, ms),) = crossings(rows, LINK)
    assert bps == pytest.approx(8e3 * 12_500 / 15.0, rel=0.05) and ms == pytest.approx(30.0, rel=0.05)
    assert crossings(rows[:1], LINK) == []
