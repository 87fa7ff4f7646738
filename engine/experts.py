"""What the engine asks of whoever holds the experts; the device implements it over its byte budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from isthmus.protocol.errors import IsthmusError
from isthmus.quant.packed import PackedMatrix

if TYPE_CHECKING:
    from isthmus.engine.expert_table import ExpertTables
    from isthmus.engine.reader import Reader


@dataclass(frozen=True, slots=True)
class Expert:
    """The three matrices of one expert: gate and up [d_expert, d_model], down [d_model, d_expert]."""

    gate: PackedMatrix
    up: PackedMatrix
    down: PackedMatrix


class Wanted(NamedTuple):
    """An expert that a layer needs.

    Attributes:
        expert: its number in the layer.
        planes: how many of its leading planes.
        rows: how many rows take it.
    """

    expert: int
    planes: int
    rows: int


class ExpertSource(Protocol):
    """Brings experts into the engine's tables when a step pauses at a router.

    Attributes:
        tables: of all layers whose experts it has; parts that are opened with it compute with what stands there.
        foresee: whether a step asks the next layer's router early.
        reader: reads in the background while steps compute what is there; None where `want` itself waits.
    """

    tables: ExpertTables
    foresee: bool
    reader: Reader | None

    def want(self, step: int, layer: int, wanted: Sequence[Wanted], foreseen: Sequence[Wanted]) -> None:
        """Sees to it that the engine can go on.

        Args:
            step: how many there were, this one included.
            layer: the layer under way. What its table's `wanted` names must stay in memory.
            wanted: what it lacks, that of the largest weights first. At least one of them is in the table, or expected
                there, on return. What is left out is asked for again when all others are computed.
            foreseen: what the layer behind it will probably lack, the likeliest first; for nothing but reading ahead.
        """
        ...

    def failure(self) -> IsthmusError:
        """Why what was expected did not come."""
        ...
