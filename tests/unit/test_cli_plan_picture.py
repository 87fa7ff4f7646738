"""What a plan's picture shows: times over rates, and where another way becomes the fastest."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from isthmus.apps.cli.plan_picture import RATES_BPS, crossings, draw, over_rates
from isthmus.protocol.errors import EngineError
from isthmus.split.link import Link
from isthmus.split.plan import Plan
from tests.unit.test_split_profile import profile, row

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


@pytest.mark.parametrize("name", ["plan.html", "plan.png"])
def test_a_page_has_everything_in_itself_and_a_picture_is_one(tmp_path: Path, name: str) -> None:
    rows = (row("<b>all</b> on the device", "device", 30.0), row("raw", "cloud", 5.0))
    plan = Plan("ab" * 32, "a <script> & more", 4, "a link", rows, 1, "Send it & see.")
    draw(tmp_path / name, plan, profile(), LINK)
    data = (tmp_path / name).read_bytes()
    if name.endswith("png"):
        assert data.startswith(b"\x89PNG")
        return
    page = data.decode()
    assert "<svg" in page and "&lt;b&gt;all&lt;/b&gt; on the device" in page and "Send it &amp; see." in page
    assert "<script" not in page and 'class="best"' in page
    sources = re.findall(r"""(?:src|href)=["']([^"'#]+)""", page)
    assert all(one.startswith(("http://www.w3.org/", "data:")) for one in sources)
    draw(tmp_path / "again.html", plan, profile(), LINK)
    assert (tmp_path / "again.html").read_bytes() == data
    with pytest.raises(EngineError, match="cannot write"):
        draw(tmp_path / "none" / name, plan, profile(), LINK)
