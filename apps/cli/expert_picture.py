"""A picture of the experts in memory over time: which of each layer are there, and which were wanted and were not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isthmus.apps.cli.expert_view import View
from isthmus.apps.cli.picture import plain
from isthmus.protocol.errors import EngineError

ABSENT, HELD, HIT, MISS = range(4)
COLORS = ("#ffffff", "#c6dbef", "#2171b5", "#d62728")
MEANING = ("not in memory", "in memory", "hit", "miss")


def states(view: View) -> NDArray[np.uint8]:
    """What each expert is at each token: uint8 [layers * experts, positions] of ABSENT, HELD, HIT and MISS."""
    resident, hits = view.cache.resident, view.cache.hits
    found = np.where(resident, HELD, ABSENT).astype(np.uint8)  # [positions, layers, experts]
    np.put_along_axis(found, view.routing.chosen.astype(np.int64), np.where(hits, HIT, MISS).astype(np.uint8), axis=2)
    positions, layers, experts = found.shape
    return np.ascontiguousarray(found.transpose(1, 2, 0).reshape(layers * experts, positions))


def draw(path: Path, view: View) -> None:
    """Writes a PNG; the same view gives the same picture.

    Raises:
        EngineError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cells, layers, n = states(view), len(view.layers), view.n_experts
    figure = Figure(figsize=(12, min(40.0, max(6.0, cells.shape[0] / 80))), dpi=120)
    FigureCanvasAgg(figure)
    bars, picture = figure.subplots(1, 2, sharey=True, width_ratios=(1, 5))
    picture.imshow(
        cells, aspect="auto", interpolation="nearest", cmap=ListedColormap(COLORS), vmin=0, vmax=len(COLORS) - 1
    )
    middles = np.arange(layers) * n + n / 2 - 0.5
    for edge in np.arange(1, layers) * n - 0.5:
        picture.axhline(edge, color="black", linewidth=0.4)
    bars.barh(middles, 100 * view.cache.by_layer(view.warm), height=0.8 * n, color=COLORS[HIT])
    bars.set(xlabel="hits, %", xlim=(0, 100), ylabel="layer")
    bars.set_yticks(middles, [str(layer) for layer in view.layers], fontsize="x-small")
    picture.set(xlabel="token")
    meant = [Patch(facecolor=c, edgecolor="gray", label=text) for c, text in zip(COLORS, MEANING, strict=True)]
    picture.legend(handles=meant, fontsize="x-small", loc="lower right", ncols=len(COLORS), bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(
        plain(
            f"{view.name}: experts in {view.settings.mb:.1f} MB, {view.share:.1%} of them; "
            f"{view.policies['lfru']:.0%} hits (LFRU, nothing read ahead)"
        ),
        fontsize="medium",
    )
    figure.tight_layout()
    try:
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error.strerror}", "choose another file") from error
