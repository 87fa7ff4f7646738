"""A plan as a picture: latency against the uplink's rate, device time against bytes, and which nodes run where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.apps.cli.picture import mark, new_figure, plain, switches, write_picture
from isthmus.split.link import Link
from isthmus.split.plan import Plan, Row, shown
from isthmus.split.profile import Profile

RATES_BPS = np.geomspace(1e4, 1e9, 400)
_DEVICE, _CLOUD, _EDGE = "C0", "C1", "C2"
_SHOWN = 10  # ways with a line of their own
_MARKED = 20  # places at which nodes change sides
_NAME_CHARS = 64
PAGE = """{% block over %}Over {{ plan.link }}.{% endblock %}
{% block table %}<table><tr><th>way</th><th>ms</th><th>p{{ "%g" % plan.percentile }}, ms</th><th>device</th>
<th>link</th><th>cloud</th><th>kB up</th><th>kB down</th><th>answers that stay</th><th>fails</th></tr>
{% for row in plan.rows %}<tr{% if loop.index0 == plan.best %} class="best"{% endif %}>
<td>{{ loop.index }}. {{ row.name }}</td>
<td>{{ "%.2f" % row.ms }}</td><td>{{ "" if row.tail_ms is none else "%.2f" % row.tail_ms }}</td>
<td>{{ "%.2f" % row.device_ms }}</td><td>{{ "%.2f" % row.link_ms }}</td><td>{{ "%.2f" % row.cloud_ms }}</td>
<td>{{ "%.1f" % (row.up_bytes / 1e3) }}</td><td>{{ "%.1f" % (row.down_bytes / 1e3) }}</td>
<td>{{ "" if row.agreement is none else "%.1f %%" % (100 * row.agreement) }}</td><td>{{ row.fails }}</td></tr>
{% endfor %}</table>{% endblock %}"""


def draw(path: Path, plan: Plan, device: Profile, link: Link) -> None:
    """Writes a PNG, or a page where the file's name ends in .html.

    Args:
        device: the device's profile.
        link: which the plan was made for; both of its rates change together in the first panel.

    Raises:
        EngineError: the file cannot be written.
    """
    figure, (latency, pareto, nodes) = new_figure(3)
    colors = _colors(plan)
    _latency(latency, plan, link, colors)
    _pareto(pareto, plan, colors)
    _nodes(nodes, plan.rows[plan.best], device)
    write_picture(path, figure, plan, PAGE)


def over_rates(rows: Sequence[Row], link: Link) -> Any:
    """Milliseconds of each row at each of `RATES_BPS` up, [rows, rates]; the downlink changes in proportion.

    Of ways over an edge server, as if the link to it were the cloud's.
    """
    rate = link.rate()
    share = rate.down_bps / rate.up_bps
    trips = np.array([0.0 if row.kind == "device" else row.wait_ms or row.goes_on * link.trip_ms for row in rows])
    computing = np.array([row.device_ms + row.edge_ms + row.cloud_ms for row in rows]) + trips
    bits = np.array([0.0 if row.kind == "device" else 8e3 * (row.up_bytes + row.down_bytes / share) for row in rows])
    return computing[:, None] + bits[:, None] / RATES_BPS


def crossings(rows: Sequence[Row], link: Link) -> list[tuple[float, float]]:
    """Where the fastest way becomes another: bits per second up, and milliseconds."""
    times = over_rates(rows, link)
    return [(float(RATES_BPS[at]), float(times[:, at].min())) for at in switches(times)]


def _colors(plan: Plan) -> dict[int, str]:
    """By number, the rows that have a colour, the same one wherever ways are drawn: the fastest and the best."""
    order = sorted(range(len(plan.rows)), key=lambda at: plan.rows[at].ms)
    chosen = [plan.best, *(at for at in order if at != plan.best)][:_SHOWN]
    return {at: f"C{number}" for number, at in enumerate(chosen)}


def _latency(axes: Any, plan: Plan, link: Link, colors: Mapping[int, str]) -> None:
    order = sorted(colors, key=lambda at: plan.rows[at].ms)
    drawn = [plan.rows[at] for at in order]
    for at, row, times in zip(order, drawn, over_rates(drawn, link), strict=True):
        width = 2.5 if at == plan.best else 1.0
        axes.plot(RATES_BPS / 1e6, times, color=colors[at], label=_label(at, row), linewidth=width)
    for bps, ms in crossings([row for row in drawn if not row.fails], link):
        mark(axes, bps / 1e6, ms, f"{bps / 1e6:.3g}")
    axes.axvline(link.rate().up_bps / 1e6, color="gray", linestyle=":")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="uplink, Mbit/s; the downlink in proportion (dotted: this link)",
        ylabel="ms an input",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="xx-small")


def _pareto(axes: Any, plan: Plan, colors: Mapping[int, str]) -> None:
    places = [(row.device_ms, max(row.up_bytes, 1.0) / 1e3) for row in plan.rows]
    able = sorted(place for place, row in zip(places, plan.rows, strict=True) if not row.fails)
    front = [(ms, size) for at, (ms, size) in enumerate(able) if all(size < other for _, other in able[:at])]
    axes.plot(*zip(*front, strict=True), color="gray", linestyle="--", linewidth=1.0, label="none is better in both")
    for at, (ms, size) in enumerate(places):
        best = at == plan.best
        color = colors.get(at, "lightgray")
        axes.plot([ms], [size], marker="*" if best else "o", markersize=13 if best else 5, color=color)
    told: dict[tuple[str, str], list[int]] = {}  # rows at about one place share a label
    for at, (ms, size) in enumerate(places):
        if at in colors or (ms, size) in front:
            told.setdefault((f"{ms:.2g}", f"{size:.2g}"), []).append(at)
    for rows in told.values():
        text = ", ".join(str(at + 1) for at in rows)
        axes.annotate(text, places[rows[0]], textcoords="offset points", xytext=(4, 5), fontsize="x-small")
    axes.margins(0.08)
    axes.set(yscale="log", xlabel="ms on the device (numbers: rows of the plan)", ylabel="kB up (0.001: none)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="xx-small")


def _nodes(axes: Any, best: Row, device: Profile) -> None:
    """What the device would take for all nodes until each, and who computes it."""
    here, near, count = set(best.device), set(best.edge), len(device.nodes_ms)
    until = np.cumsum(device.nodes_ms)
    side = np.array([0 if at in here else 1 if at in near else 2 for at in range(count)])
    edges = np.repeat(np.arange(count + 1) - 0.5, 2)[1:-1]  # a node's left and right one
    for which, (name, color) in enumerate((("device", _DEVICE), ("edge server", _EDGE), ("cloud", _CLOUD))):
        mine = side == which
        if mine.any():
            label = f"on the {name}: {mine.sum()} of {count} nodes"
            height, shaded = np.repeat(until, 2), np.repeat(mine, 2)
            axes.fill_between(edges, height, where=shaded, color=color, alpha=0.5, linewidth=0, label=label)
    axes.plot(edges, np.repeat(until, 2), color="black", linewidth=1.0)
    if best.kind == "split":
        for at in np.flatnonzero(np.diff(side))[:_MARKED]:
            axes.axvline(at + 0.5, color="black", linestyle=":", linewidth=0.8)
        further = f", and after {shown(best.beyond)}" if best.three else ""
        axes.set_title(plain(f"cut after {shown(best.crossing)}{further}"), fontsize="small")
    axes.set(xlabel="node, in the model's order", ylabel="ms on the device until it", ylim=(0, None))
    axes.legend(fontsize="x-small", loc="upper left")


def _label(at: int, row: Row) -> str:
    name = row.name if len(row.name) <= _NAME_CHARS else row.name[: _NAME_CHARS - 1] + "…"
    return plain(f"{at + 1}  {name}")
