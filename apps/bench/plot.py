"""Tokens per second against round trip, one line for each way to share a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from isthmus.protocol.errors import EngineError

_MARKERS, _STYLES = "osD^v<>P*X", ("-", "--", ":")  # each way has a pair of its own


def check_drawing(path: Path, kinds: Sequence[str] = (".png",)) -> None:
    """Refuses before anything is measured what could not be drawn.

    Args:
        kinds: how the file's name may end.

    Raises:
        EngineError: matplotlib is not installed, there is no such folder, something else than a file is there, or the
            name ends otherwise.
    """
    if find_spec("matplotlib") is None:
        raise EngineError("drawing needs matplotlib", "pip install matplotlib, or leave --plot out")
    if not path.parent.is_dir():
        raise EngineError(f"there is no folder {path.parent}", "make it, or choose another file")
    if not path.name or (path.exists() and not path.is_file()):
        raise EngineError(f"{str(path)!r} is no file that could be replaced", "choose another file with --plot")
    if path.suffix.lower() not in kinds:
        raise EngineError(f"--plot is {str(path)!r}", f"name a file that ends in {' or '.join(kinds)}")


def draw(
    path: Path,
    trips: Sequence[float],
    speeds: Mapping[str, Sequence[float]],
    title: str = "",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a PNG; the same figures give the same picture.

    Args:
        trips: round trips in ms.
        speeds: tokens per second at each of them, by way.
        metadata: text to keep in the file.

    Raises:
        EngineError: matplotlib is not installed, or the file cannot be written.
    """
    check_drawing(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (way, values) in enumerate(speeds.items()):
        again, mark = divmod(index, len(_MARKERS))
        style = _STYLES[again % len(_STYLES)]
        axes.plot(trips, values, marker=_MARKERS[mark], markersize=5, color=f"C{mark}", linestyle=style, label=way)
    axes.set(xlabel="round trip, ms", ylabel="tokens per second", xscale="log", yscale="log", title=title)
    axes.set_xticks(trips, [f"{trip:g}" for trip in trips], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", handlelength=4)
    figure.tight_layout()
    try:
        figure.savefig(path, format="png", metadata={"Software": None, **(metadata or {})})
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error.strerror}", "choose another file") from error
