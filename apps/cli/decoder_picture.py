"""A language model's plan as a picture: an answer's time against rate, round trip and cut, and device against bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.apps.cli.decoder_plan import DecoderPlan
from isthmus.apps.cli.decoder_ways import Way
from isthmus.apps.cli.picture import mark, new_figure, plain, switches, write_picture
from isthmus.split.link import Link

RATES_MBPS = np.geomspace(0.01, 1000.0, 40)
TRIPS_MS = np.geomspace(1.0, 1000.0, 40)
MODES = ("local", "stream", "split", "exit", "verify")
STYLES = ("-", "--", ":", "-.")  # of codecs
_HALVINGS = 6  # by which a crossing between two points of a line is found
_LEAST_BYTES = 0.1  # drawn for none
Prices = Callable[[Link], Sequence[Way]]
PAGE = """{% block over %}Over {{ plan.link }}; {{ plan.tokens }} tokens to a prompt of {{ plan.prompt }}.{% endblock %}
{% block table %}<table><tr><th>way</th><th>s in all</th><th>ms a token</th><th>p{{ "%g" % plan.percentile }}, ms</th>
<th>first, ms</th><th>device, ms</th><th>cloud, ms</th><th>bytes up</th><th>device, MB</th><th>J</th><th>fails</th></tr>
{% for way in plan.sorted %}<tr{% if way == plan.ways[plan.best] %} class="best"{% endif %}><td>{{ way.name }}</td>
<td>{{ "%.2f" % (way.total_ms / 1e3) }}</td><td>{{ "%.1f" % way.token_ms }}</td>
<td>{{ "" if way.tail_ms is none else "%.1f" % way.tail_ms }}</td><td>{{ "%.0f" % way.first_ms }}</td>
<td>{{ "%.1f" % way.device_ms }}</td><td>{{ "%.1f" % way.cloud_ms }}</td><td>{{ "%.0f" % way.up_bytes }}</td>
<td>{{ "%.0f" % way.device_mb }}</td><td>{{ "%.3g" % way.energy_j if way.energy_j else "" }}</td>
<td>{{ way.fails }}</td></tr>
{% endfor %}</table>{% endblock %}"""


def draw(path: Path, plan: DecoderPlan, link: Link, prices: Prices) -> None:
    """Writes a PNG, or a page where the file's name ends in .html.

    Args:
        link: which the plan was made for.
        prices: all ways over another link.

    Raises:
        EngineError: the file cannot be written.
    """
    rate = link.rate()
    share = rate.down_bps / rate.up_bps
    figure, (rates, trips, pareto, cuts) = new_figure(4)
    here = {"color": "gray", "linestyle": ":"}
    _lines(rates, RATES_MBPS, lambda mbps: prices(Link(link.trip_ms, mbps * 1e6, mbps * 1e6 * share)))
    rates.axvline(rate.up_bps / 1e6, **here)
    rates.set(xlabel="uplink, Mbit/s; the downlink in proportion (dotted: this link in the mean)")
    _lines(trips, TRIPS_MS, lambda ms: prices(Link(ms, rate.up_bps, rate.down_bps)))
    trips.axvline(link.trip_ms, **here)
    trips.set(xlabel="round trip, ms (dotted: this link's)")
    _pareto(pareto, plan)
    _cuts(cuts, plan)
    write_picture(path, figure, plan, PAGE)


def best_times(ways: Sequence[Sequence[Way]]) -> tuple[list[str], Any]:
    """Modes, and the milliseconds of an answer in the best way of each, [modes, points]; infinite where none may be."""
    times = np.full((len(MODES), len(ways)), np.inf)
    for at, some in enumerate(ways):
        for row, mode in enumerate(MODES):
            times[row, at] = min((way.total_ms for way in some if way.mode == mode and not way.fails), default=np.inf)
    known = np.isfinite(times).any(axis=1)
    return [mode for mode, one in zip(MODES, known, strict=True) if one], times[known]


def crossing(priced: Callable[[float], Sequence[Way]], low: float, high: float) -> tuple[float, float]:
    """Where, between two points, another mode than at the first becomes the fastest; and the ms of an answer there.

    Args:
        priced: all ways at a point.
        low, high: the points, at both of which there is a way that keeps to what was asked for.
    """

    def fastest(at: float) -> tuple[float, str]:
        return min(((way.total_ms, way.mode) for way in priced(at) if not way.fails), default=(float("inf"), ""))

    _, before = fastest(low)
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if fastest(middle)[1] == before else (low, middle)
    return high, fastest(high)[0]


def _lines(axes: Any, along: Any, priced: Callable[[float], Sequence[Way]]) -> None:
    modes, times = best_times([priced(float(at)) for at in along])
    for mode, line in zip(modes, times, strict=True):
        axes.plot(along, line / 1e3, label=mode, color=f"C{MODES.index(mode)}")
    for at in switches(times) if modes else []:
        if np.isfinite(times[:, at - 1 : at + 1].min(axis=0)).all():
            place, ms = crossing(priced, float(along[at - 1]), float(along[at]))
            mark(axes, place, ms / 1e3, f"{place:.3g}")
    axes.set(xscale="log", yscale="log", ylabel="s an answer, best of\neach mode (steady rates)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="xx-small")


def _pareto(axes: Any, plan: DecoderPlan) -> None:
    able = [way for way in plan.ways if not way.fails]
    points = sorted((way.device_ms, max(way.up_bytes, _LEAST_BYTES)) for way in able)
    front = [(ms, size) for at, (ms, size) in enumerate(points) if all(size < other for _, other in points[:at])]
    if len(front) > 1:
        axes.plot(
            *zip(*front, strict=True), color="gray", linestyle="--", linewidth=1.0, label="none is better in both"
        )
    for mode in MODES:
        some = [way for way in able if way.mode == mode]
        if some:
            sizes = [max(way.up_bytes, _LEAST_BYTES) for way in some]
            axes.plot([way.device_ms for way in some], sizes, "o", color=f"C{MODES.index(mode)}", label=mode)
    best = plan.ways[plan.best]
    place = (best.device_ms, max(best.up_bytes, _LEAST_BYTES))
    axes.plot([place[0]], [place[1]], "*", markersize=13, color=f"C{MODES.index(best.mode)}")
    axes.annotate(plain(best.name), place, textcoords="offset points", xytext=(4, 6), fontsize="xx-small")
    axes.set(yscale="log", xlabel="ms a token on the device", ylabel=f"bytes up a token ({_LEAST_BYTES:g}: none)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="xx-small")


def _cuts(axes: Any, plan: DecoderPlan) -> None:
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for way in plan.ways:
        if way.cut:
            line = lines.setdefault((way.mode, way.codec), {})
            line[way.cut] = min(way.total_ms / 1e3, line.get(way.cut, np.inf))
    styles = {codec: STYLES[at % len(STYLES)] for at, codec in enumerate(sorted({codec for _, codec in lines}))}
    for (mode, codec), line in sorted(lines.items()):
        look = {"color": f"C{MODES.index(mode)}", "linestyle": styles[codec], "marker": "."}
        axes.plot(*zip(*sorted(line.items()), strict=True), label=plain(f"{mode} {codec}".strip()), **look)
    for name in ("local", "stream"):
        alone = next((way.total_ms / 1e3 for way in plan.ways if way.mode == name), None)
        if alone is not None:
            axes.axhline(alone, color=f"C{MODES.index(name)}", linewidth=1.0, label=name)
    best = plan.ways[plan.best]
    if best.cut:
        axes.axvline(best.cut, color="gray", linestyle=":")
    dotted = " (dotted: the best way's)" if best.cut else ""
    axes.set(yscale="log", xlabel=f"layers on the device{dotted}", ylabel="s an answer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="xx-small", ncols=2)
