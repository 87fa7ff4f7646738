"""What the engine asks of whoever holds the experts; the device implements it over its byte budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from isthmus.quant.packed import PackedMatrix


@dataclass(frozen=True, slots=True)
class Expert:
    """The three matrices of one expert: gate and up [d_expert, d_model], down [d_model, d_expert]."""

    gate: PackedMatrix
    up: PackedMatrix
    down: PackedMatrix


@dataclass(frozen=True, slots=True)
class Brought:
    """What `ExpertSource.bring` did.

    Attributes:
        experts: the experts that were asked for, by their number in the layer.
        evicted: (layer, expert) pairs whose memory may no longer be read.
    """

    experts: Mapping[int, Expert]
    evicted: Sequence[tuple[int, int]] = ()


class ExpertSource(Protocol):
    """Brings experts into memory when a step pauses at a router."""

    def bring(self, layer: int, experts: Sequence[int]) -> Brought:
        """Loads the missing experts of a layer; all of those already resident in it must stay."""
        ...
