"""What a plane in memory is worth: planes of the least worth leave first."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.expert_table import ExpertTables

# From a step's number and the tables to a worth per plane, float32 [layers, experts, 3]. All planes of an expert that
# steps took alike are worth the same; planes are as large as what is saved by keeping them, so bytes do not enter.
Policy = Callable[[int, ExpertTables], NDArray[np.float32]]


def lru(step: int, tables: ExpertTables) -> NDArray[np.float32]:
    """Least recently used."""
    return tables.last.astype(np.float32)


def lfu(step: int, tables: ExpertTables) -> NDArray[np.float32]:
    """Least frequently used since the beginning."""
    return tables.count.astype(np.float32)


def lfru(step: int, tables: ExpertTables, half_life: float = 16.0) -> NDArray[np.float32]:
    """Least frequently used of late: uses count half after `half_life` steps (see `engine.native_layers.HALF_LIFE`)."""
    worth: NDArray[np.float32] = tables.rate * np.exp2((tables.last - step) * np.float32(1 / half_life))
    return worth


POLICIES: Mapping[str, Policy] = {"lru": lru, "lfu": lfu, "lfru": lfru}
