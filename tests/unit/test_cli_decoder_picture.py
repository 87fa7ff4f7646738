"""Pictures of language models' plans: a page holds all ways, the fastest first, and crossings stand where they are."""

from __future__ import annotations

import re
from pathlib import Path

from isthmus.apps.cli.decoder_picture import crossing, draw
from isthmus.apps.cli.decoder_plan import plan
from isthmus.apps.cli.decoder_ways import Answer, Setting, Way, priced
from isthmus.split.link import Link
from tests.decoder_plans import a_profile, write_early

LINK = Link(20.0, 5e6, 20e6)


def way(mode: str, total_ms: float, fails: str = "") -> Way:
    return Way(mode, mode, 0, "", 0.0, 0.0, total_ms, 0.0, 0.0, 0.0, True, fails)  # type: ignore[arg-type]


def test_a_crossing_lies_between_points() -> None:
    def over(trip_ms: float) -> list[Way]:
        return [way("local", 300.0), way("stream", trip_ms), way("split", 1.0, "rounding")]

    place, ms = crossing(over, 100.0, 1000.0)
    assert 300.0 <= place <= 315.0 and ms == 300.0


def test_the_page_has_every_way_in_order(tmp_path: Path) -> None:
    bundle = write_early(tmp_path / "tiny")
    device, answer = a_profile(bundle.model_id), Answer(slo_ms=60.0)
    found = plan(Setting(bundle, device, device, 8.0, LINK, answer))
    draw(tmp_path / "plan.html", found, LINK, lambda over: priced(Setting(bundle, device, device, 8.0, over, answer)))
    page = (tmp_path / "plan.html").read_text()
    rows = re.findall(r"<tr(?: class=\"best\")?><td>([^<]+)</td>\s*<td>([\d.]+)</td>", page)
    assert len(rows) == len(found.ways) and rows[0][0] == found.ways[found.best].name
    able = sum(not one.fails for one in found.ways)
    for some in (rows[:able], rows[able:]):
        assert some and [float(s) for _, s in some] == sorted(float(s) for _, s in some)
    assert page.count('class="best"') == 1 and "the downlink in proportion" in page
