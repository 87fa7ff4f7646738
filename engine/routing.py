"""Recorded routing: which experts each position took in each layer, to measure with, or to give to an engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import EngineError


@dataclass(frozen=True, slots=True)
class Routing:
    """Experts along a text.

    Attributes:
        chosen: int32 [positions, layers, top_k], by falling weight.
        weights: float32 [positions, layers, top_k], what the router gives them, also where experts count in full.
        foreseen: int32 [positions, layers, top_k], what was named for each layer one layer early; of the first layer,
            which nobody foresees, what it chose.
    """

    chosen: NDArray[np.int32]
    weights: NDArray[np.float32]
    foreseen: NDArray[np.int32]

    def __post_init__(self) -> None:
        if not self.chosen.ndim == 3 or not self.chosen.shape == self.weights.shape == self.foreseen.shape:
            raise EngineError("recorded routing has arrays of different shapes", "record it again")
