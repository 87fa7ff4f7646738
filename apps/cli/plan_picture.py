"""A plan as a picture: latency against the uplink's rate, device time against bytes, and which nodes run where.

As a PNG, or as one page of HTML that also has the table and the verdict, and asks nothing of any other place.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.protocol.errors import EngineError
from isthmus.split.files import write_whole
from isthmus.split.link import Link
from isthmus.split.plan import Plan, Row, shown
from isthmus.split.profile import Profile

RATES_BPS = np.geomspace(1e4, 1e9, 400)
_DEVICE, _CLOUD, _EDGE = "C0", "C1", "C2"
_SHOWN = 10  # ways with a line of their own
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ plan.name }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .2em .6em; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
tr.best { font-weight: bold; background: #eef6ee }
svg { width: 100%; height: auto }
</style></head><body>
<h1>{{ plan.name }}</h1>
<p><strong>{{ plan.verdict }}</strong></p>
<p>Over {{ plan.link }}.</p>
<table><tr><th>way</th><th>ms</th><th>p{{ "%g" % plan.percentile }}, ms</th><th>device</th><th>link</th><th>cloud</th>
<th>kB up</th><th>kB down</th><th>answers that stay</th><th>fails</th></tr>
{% for row in plan.rows %}<tr{% if loop.index0 == plan.best %} class="best"{% endif %}><td>{{ row.name }}</td>
<td>{{ "%.2f" % row.ms }}</td><td>{{ "" if row.tail_ms is none else "%.2f" % row.tail_ms }}</td>
<td>{{ "%.2f" % row.device_ms }}</td><td>{{ "%.2f" % row.link_ms }}</td><td>{{ "%.2f" % row.cloud_ms }}</td>
<td>{{ "%.1f" % (row.up_bytes / 1e3) }}</td><td>{{ "%.1f" % (row.down_bytes / 1e3) }}</td>
<td>{{ "" if row.agreement is none else "%.1f %%" % (100 * row.agreement) }}</td><td>{{ row.fails }}</td></tr>
{% endfor %}</table>
{{ picture | safe }}
</body></html>
"""


def draw(path: Path, plan: Plan, device: Profile, link: Link) -> None:
    """Writes a PNG, or a page where the file's name ends in .html.

    Args:
        device: the device's profile.
        link: which the plan was made for; both of its rates change together in the first panel.

    Raises:
        EngineError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = path.suffix.lower() in (".html", ".htm")
    figure = Figure(figsize=(8, 11), dpi=120)
    FigureCanvasAgg(figure)
    latency, pareto, nodes = figure.subplots(3)
    _latency(latency, plan, link)
    _pareto(pareto, plan)
    _nodes(nodes, plan.rows[plan.best], device)
    if not page:
        figure.suptitle(_plain(f"{plan.name}: {plan.verdict}"), fontsize="small", wrap=True)
    figure.tight_layout()
    drawn = io.BytesIO()
    if page:
        with rc_context({"svg.hashsalt": "isthmus"}):
            figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
        data = _page(plan, drawn.getvalue().decode()).encode()
    else:
        figure.savefig(drawn, format="png", metadata={"Software": None})
        data = drawn.getvalue()
    try:
        write_whole(path, data)
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error.strerror}", "choose another file") from error


def _page(plan: Plan, svg: str) -> str:
    """The picture with the table and the verdict."""
    from jinja2 import Environment

    return Environment(autoescape=True).from_string(PAGE).render(plan=plan, picture=svg[svg.index("<svg") :])


def over_rates(rows: Sequence[Row], link: Link) -> Any:
    """Milliseconds of each row at each of `RATES_BPS` up, [rows, rates]; the downlink changes in proportion.

    Of ways over an edge server, as if the link to it were the cloud's.
    """
    rate = link.rate()
    share = rate.down_bps / rate.up_bps
    trips = np.array([0.0 if row.kind == "device" else row.goes_on * link.trip_ms for row in rows])
    computing = np.array([row.device_ms + row.edge_ms + row.cloud_ms for row in rows]) + trips
    bits = np.array([0.0 if row.kind == "device" else 8e3 * (row.up_bytes + row.down_bytes / share) for row in rows])
    return computing[:, None] + bits[:, None] / RATES_BPS


def crossings(rows: Sequence[Row], link: Link) -> list[tuple[float, float]]:
    """Where the fastest way becomes another: bits per second up, and milliseconds."""
    times = over_rates(rows, link)
    first = times.argmin(axis=0)
    return [(float(RATES_BPS[at]), float(times[:, at].min())) for at in np.flatnonzero(np.diff(first)) + 1]


def _latency(axes: Any, plan: Plan, link: Link) -> None:
    order = sorted(plan.rows, key=lambda row: row.ms)
    drawn = [row for row in order if row in order[:_SHOWN] or row is plan.rows[plan.best]]
    for row, times in zip(drawn, over_rates(drawn, link), strict=True):
        axes.plot(RATES_BPS / 1e6, times, label=_plain(row.name), linewidth=2.5 if row is plan.rows[plan.best] else 1.0)
    for bps, ms in crossings([row for row in drawn if not row.fails], link):
        axes.plot([bps / 1e6], [ms], marker="o", markersize=5, color="black")
        axes.annotate(
            f"{bps / 1e6:.3g}", (bps / 1e6, ms), textcoords="offset points", xytext=(4, 6), fontsize="x-small"
        )
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
        axes.annotate(_plain(row.name), (row.device_ms, max(row.up_bytes, 1.0) / 1e3), fontsize="xx-small")
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
        axes.set_title(_plain(f"cut after {shown(best.crossing)}{further}"), fontsize="small")
    axes.set(xlabel="node", ylabel="ms on the device")
    axes.legend(fontsize="x-small")


def _plain(text: str) -> str:
    """Text in which nothing is taken for a formula."""
    return text.replace("\\", "/").replace("$", r"\$")
