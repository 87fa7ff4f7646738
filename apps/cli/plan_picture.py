"""A plan as a picture: latency against the uplink's rate, device time against bytes, and which nodes run where."""

from __future__ import annotations

from collections.abc import Sequence
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
PAGE = """{% block over %}Over {{ plan.link }}.{% endblock %}
{% block table %}<table><tr><th>way</th><th>ms</th><th>p{{ "%g" % plan.percentile }}, ms</th><th>device</th>
<th>link</th><th>cloud</th><th>kB up</th><th>kB down</th><th>answers that stay</th><th>fails</th></tr>
{% for row in plan.rows %}<tr{% if loop.index0 == plan.best %} class="best"{% endif %}><td>{{ row.name }}</td>
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
    _latency(latency, plan, link)
    _pareto(pareto, plan)
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


def _latency(axes: Any, plan: Plan, link: Link) -> None:
    order = sorted(plan.rows, key=lambda row: row.ms)
    drawn = [row for row in order if row in order[:_SHOWN] or row is plan.rows[plan.best]]
    for row, times in zip(drawn, over_rates(drawn, link), strict=True):
        axes.plot(RATES_BPS / 1e6, times, label=plain(row.name), linewidth=2.5 if row is plan.rows[plan.best] else 1.0)
    for bps, ms in crossings([row for row in drawn if not row.fails], link):
        mark(axes, bps / 1e6, ms, f"{bps / 1e6:.3g}")
    axes.axvline(link.rate().up_bps / 1e6, color="gray", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="uplink, Mbit/s (dotted: this link)", ylabel="ms an input")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="xx-small")


def _pareto(axes: Any, plan: Plan) -> None:
    able = sorted((row.device_ms, max(row.up_bytes, 1.0) / 1e3) for row in plan.rows if not row.fails)
    front = [(ms, size) for at, (ms, size) in enumerate(able) if all(size < other for _, other in able[:at])]
    axes.plot(*zip(*front, strict=True), color="gray", linestyle="--", linewidth=1.0, label="none is better in both")
    for at, row in enumerate(plan.rows):
        best = at == plan.best
        axes.plot(
            [row.device_ms], [max(row.up_bytes, 1.0) / 1e3], marker="*" if best else "o", markersize=11 if best else 5
        )
        axes.annotate(plain(row.name), (row.device_ms, max(row.up_bytes, 1.0) / 1e3), fontsize="xx-small")
    axes.set(yscale="log", xlabel="ms on the device", ylabel="kB up (0.001: none)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="xx-small")


def _nodes(axes: Any, best: Row, device: Profile) -> None:
    here, near = set(best.device), set(best.edge)
    for side, color, chosen in (
        ("device", _DEVICE, [at for at in range(len(device.nodes_ms)) if at in here]),
        ("edge server", _EDGE, [at for at in range(len(device.nodes_ms)) if at in near]),
        ("cloud", _CLOUD, [at for at in range(len(device.nodes_ms)) if at not in here | near]),
    ):
        if chosen:
            axes.bar(chosen, [device.nodes_ms[at] for at in chosen], width=1.0, color=color, label=f"on the {side}")
    if best.kind == "split":
        further = f", and after {shown(best.beyond)}" if best.three else ""
        axes.set_title(plain(f"cut after {shown(best.crossing)}{further}"), fontsize="small")
    axes.set(xlabel="node", ylabel="ms on the device")
    axes.legend(fontsize="x-small")
