"""Pictures of plans, as a PNG or as one page of HTML that has the table and the verdict, too, and fetches nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.protocol.errors import EngineError
from isthmus.split.files import write_whole

KINDS = (".png", ".html", ".htm")  # of a picture's file
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
<p>{% block over %}{% endblock %}</p>
{% block table %}{% endblock %}
{{ picture | safe }}
</body></html>
"""


def write_picture(path: Path, figure: Any, plan: Any, blocks: str) -> None:
    """Writes a figure as a PNG, or a page where the file's name ends in .html.

    Args:
        figure: of matplotlib.
        plan: has a `name` and a `verdict`.
        blocks: of the page, a Jinja template that fills "over" and "table".

    Raises:
        EngineError: the file cannot be written.
    """
    from matplotlib import rc_context

    page, drawn = path.suffix.lower() != KINDS[0], io.BytesIO()
    if not page:
        figure.suptitle(plain(f"{plan.name}: {plan.verdict}"), fontsize="small", wrap=True)
    figure.tight_layout()
    if page:
        with rc_context({"svg.hashsalt": "isthmus"}):
            figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
        data = _page(plan, blocks, drawn.getvalue().decode()).encode()
    else:
        figure.savefig(drawn, format="png", metadata={"Software": None})
        data = drawn.getvalue()
    try:
        write_whole(path, data)
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error.strerror}", "choose another file") from error


def _page(plan: Any, blocks: str, svg: str) -> str:
    from jinja2 import DictLoader, Environment

    loader = DictLoader({"page": PAGE, "plan": '{% extends "page" %}' + blocks})
    return (
        Environment(autoescape=True, loader=loader)
        .get_template("plan")
        .render(plan=plan, picture=svg[svg.index("<svg") :])
    )


def plain(text: str) -> str:
    """Text in which nothing is taken for a formula."""
    return text.replace("\\", "/").replace("$", r"\$")


def new_figure(panels: int) -> tuple[Any, Any]:
    """A figure with so many panels below each other, and these."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 11), dpi=120)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(panels)


def switches(times: Any) -> list[int]:
    """Where another line becomes the lowest: the first points at which it is, of [lines, points]."""
    return [int(at) + 1 for at in np.flatnonzero(np.diff(times.argmin(axis=0)))]


def mark(axes: Any, at: float, lowest: float, text: str) -> None:
    """Marks where two lines cross."""
    axes.plot([at], [lowest], marker="o", markersize=5, color="black")
    axes.annotate(text, (at, lowest), textcoords="offset points", xytext=(4, 6), fontsize="x-small")
