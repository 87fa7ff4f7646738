"""What experts cost: how many were in memory when they were wanted, and what was read meanwhile."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isthmus.edge.experts.store import ExpertStore


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """From the beginning until now.

    Attributes:
        budget_bytes, resident_bytes, most_bytes: what experts may take in memory, do, and did at most.
        taken: planes that steps took, by layer.
        in_memory: those of them that were in memory when their router named them.
        on_the_way: those of the rest that had been asked for ahead.
        foreseen: share of the experts named one layer early that were then chosen; None where nobody asked.
        read_bytes, reads: from flash.
        reading_seconds: in which at least one read was under way.
        withdrawn: reads ahead that were taken back before they began.
        read_ahead, taken_ahead: planes read ahead, and those of them that their layer took.
        dropped_bytes: of `read_bytes`, of reads ahead that were not finished, as their layer came and took others.
        direct: whether reads went past the page cache.
    """

    budget_bytes: int
    resident_bytes: int
    most_bytes: int
    taken: tuple[int, ...]
    in_memory: tuple[int, ...]
    on_the_way: tuple[int, ...]
    foreseen: float | None
    read_bytes: int
    reads: int
    reading_seconds: float
    withdrawn: int
    read_ahead: int
    taken_ahead: int
    dropped_bytes: int
    direct: bool

    @property
    def hit_rate(self) -> float:
        """Share of planes that were in memory when they were wanted."""
        return sum(self.in_memory) / max(1, sum(self.taken))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "hit_rate": self.hit_rate}

    @classmethod
    def of(cls, store: ExpertStore) -> ExpertReport:
        """Of a store that is open."""
        held, read = store.report(), store.reader.report()
        layers = [store.tables.layer(i).report() for i in range(store.n_layers)]
        sums = {key: np.array([sum(layer[key]) for layer in layers]) for key in ("taken", "missed", "late")}
        named = sum(layer["foreseen"] for layer in layers)
        return cls(
            budget_bytes=store.budget,
            resident_bytes=held.resident,
            most_bytes=held.most,
            taken=tuple(sums["taken"].tolist()),
            in_memory=tuple((sums["taken"] - sums["missed"]).tolist()),
            on_the_way=tuple(sums["late"].tolist()),
            foreseen=sum(layer["foreseen_right"] for layer in layers) / named if named else None,
            read_bytes=read.bytes,
            reads=read.reads,
            reading_seconds=read.busy,
            withdrawn=read.withdrawn,
            read_ahead=held.read_ahead,
            taken_ahead=held.taken_ahead,
            dropped_bytes=read.dropped,
            direct=store.direct,
        )
