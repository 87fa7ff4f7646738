"""What the engine needs of whoever holds the experts; the device implements it over its byte budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import IsthmusError
from isthmus.quant.packed import PackedMatrix

if TYPE_CHECKING:
    from isthmus.engine.binding import Workers
    from isthmus.engine.expert_table import ExpertTables
    from isthmus.engine.reader import Reader


@dataclass(frozen=True, slots=True)
class Expert:
    """The three matrices of one expert: gate and up [d_expert, d_model], down [d_model, d_expert]."""

    gate: PackedMatrix
    up: PackedMatrix
    down: PackedMatrix


class ExpertSource(Protocol):
    """Experts that come and go: the C engine asks its store for those that a step lacks, and computes the others.

    Attributes:
        tables: of all layers whose experts it has; parts that are opened with it compute with what stands there.
        store: the C engine's `im_store *`.
        reader: reads in the background while steps compute what is there.
        foresee: whether a step asks the next layer's router early, so that its experts can be read ahead.
        tolerance: float32 [layers, planes] of `Layers.tolerate`, from layer 0 on; None for all planes.
    """

    tables: ExpertTables
    store: Any
    reader: Reader
    foresee: bool
    tolerance: NDArray[np.float32] | None

    def attach(self, part: Any, workers: Workers) -> None:
        """A part is opened that computes with these experts.

        Args:
            part: the C engine's `im_part *`.
            workers: the threads that it runs on.

        Raises:
            EngineError: another part of these experts runs on other threads.
        """
        ...

    def failure(self, layer: int) -> IsthmusError:
        """Why a layer's experts did not come."""
        ...
