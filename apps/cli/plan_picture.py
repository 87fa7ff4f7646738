"""A plan as a picture: latency against the uplink's rate, device time against bytes, and which nodes run where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.protocol.errors import EngineError
from isthmus.split.link import Link
from isthmus.split.plan import Plan, Row
from isthmus.split.profile import Profile

RATES_BPS = np.geomspace(1e4, 1e9, 400)
_DEVICE, _CLOUD = "C0", "C1"
_SHOWN = 10  # ways with a line of their own


def draw(path: Path, plan: Plan, device: Profile, link: Link) -> None:
    """Writes a PNG.

    Args:
        device: the device's profile.
        link: which the plan was made for; both of its rates change together in the first panel.

    Raises:
        EngineError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 11), dpi=120)
    FigureCanvasAgg(figure)
    latency, pareto, nodes = figure.subplots(3)
    _latency(latency, plan, link)
    _pareto(pareto, plan)
    _nodes(nodes, plan.rows[plan.best], device)
    figure.suptitle(_plain(f"{plan.name}: {plan.verdict}"), fontsize="small", wrap=True)
    figure.tight_layout()
    try:
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error.strerror}", "choose another file") from error


def over_rates(rows: Sequence[Row], link: Link) -> Any:
    """Milliseconds of each row at each of `RATES_BPS` up, [rows, rates]; the downlink changes in proportion."""
    rate = link.rate()
    share = rate.down_bps / rate.up_bps
    trips = np.array([0.0 if row.kind == "device" else link.trip_ms for row in rows])
    computing = np.array([row.device_ms + row.cloud_ms for row in rows]) + trips
    bits = np.array([0.0 if row.kind == "device" else 8e3 * (row.up_bytes + row.down_bytes / share) for row in rows])
    return computing[:, None] + bits[:, None] / RATES_BPS


def crossings(rows: Sequence[Row], link: Link) -> list[tuple[float, float]]:
    """Where the fastest way becomes another: bits per second up, and milliseconds."""
    times = over_rates(rows, link)
    first = times.argmin(axis=0)
    return [(float(RATES_BPS[at]), float(times[:, at].min())) for at in np.flatnonzero(np.diff(first)) + 1]


def _latency(axes: Any, plan: Plan, link: Link) -> None:
    shown = sorted(plan.rows, key=lambda row: row.expected_ms)[:_SHOWN]
    for row, times in zip(shown, over_rates(shown, link), strict=True):
        axes.plot(RATES_BPS / 1e6, times, label=_plain(row.name), linewidth=2.5 if row is plan.rows[plan.best] else 1.0)
    for bps, ms in crossings(shown, link):
        axes.plot([bps / 1e6], [ms], marker="o", markersize=5, color="black")
        axes.annotate(
            f"{bps / 1e6:.3g}", (bps / 1e6, ms), textcoords="offset points", xytext=(4, 6), fontsize="x-small"
        )
    axes.axvline(link.rate().up_bps / 1e6, color="gray", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="uplink, Mbit/s (dotted: this link)", ylabel="ms an input")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="xx-small")


def _pareto(axes: Any, plan: Plan) -> None:
    for at, row in enumerate(plan.rows):
        best = at == plan.best
        axes.plot(
            [row.device_ms], [max(row.up_bytes, 1.0) / 1e3], marker="*" if best else "o", markersize=11 if best else 5
        )
        axes.annotate(_plain(row.name), (row.device_ms, max(row.up_bytes, 1.0) / 1e3), fontsize="xx-small")
    axes.set(yscale="log", xlabel="ms on the device", ylabel="kB up (0.001: none)")
    axes.grid(alpha=0.3)


def _nodes(axes: Any, best: Row, device: Profile) -> None:
    here = set(best.device)
    for side, color, chosen in (
        ("device", _DEVICE, [at for at in range(len(device.nodes_ms)) if at in here]),
        ("cloud", _CLOUD, [at for at in range(len(device.nodes_ms)) if at not in here]),
    ):
        if chosen:
            axes.bar(chosen, [device.nodes_ms[at] for at in chosen], width=1.0, color=color, label=f"on the {side}")
    axes.set(xlabel="node", ylabel="ms on the device")
    axes.legend(fontsize="x-small")


def _plain(text: str) -> str:
    """Text in which nothing is taken for a formula."""
    return text.replace("\\", "/").replace("$", r"\$")
