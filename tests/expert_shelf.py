"""A source of experts for tests: copies of a model's, few at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from isthmus.engine.expert_table import ExpertTables
from isthmus.engine.experts import Expert, Wanted
from isthmus.protocol.errors import IsthmusError
from isthmus.quant.packed import PackedMatrix
from tests.random_model import RandomModel


class Shelf:
    """An `ExpertSource` that holds `room` experts; those that leave are overwritten, so that stale reads show."""

    reader = None

    def __init__(self, model: RandomModel, room: int) -> None:
        self.model, self.room, self.foresee = model, room, False
        self.tables = ExpertTables(model.config, 0, model.config.n_layers)
        formats = [
            cast(PackedMatrix, model.layer(model.config.n_layers - 1)[f"experts.0.{name}"]).format
            for name in ("gate", "up", "down")
        ]
        for layer in range(model.config.n_layers):
            self.tables.layer(layer).shape((formats[0], formats[1], formats[2]))
        self.held: dict[tuple[int, int], Expert] = {}
        self.asked: list[tuple[int, list[int]]] = []

    def expert(self, layer: int, index: int) -> Expert:
        """A copy of an expert's matrices."""
        matrices = []
        for name in ("gate", "up", "down"):
            m = cast(PackedMatrix, self.model.layer(layer)[f"experts.{index}.{name}"])
            matrices.append(PackedMatrix(m.format, m.rows, m.cols, {k: a.copy() for k, a in m.arrays.items()}))
        return Expert(*matrices)

    def want(self, step: int, layer: int, wanted: Sequence[Wanted], foreseen: Sequence[Wanted]) -> None:
        self.asked.append((layer, [one.expert for one in wanted]))
        for one in wanted:
            assert (layer, one.expert) not in self.held
            idle = [key for key in self.held if not self.tables.layer(key[0]).wanted[key[1]]]
            if len(self.held) >= self.room:
                if not idle:
                    return
                self.evict(*idle[0])
            self.held[layer, one.expert] = expert = self.expert(layer, one.expert)
            self.tables.layer(layer).place(one.expert, expert)

    def evict(self, layer: int, index: int) -> None:
        gone = self.held.pop((layer, index))
        self.tables.layer(layer).evict(index)
        for matrix in (gone.gate, gone.up, gone.down):
            for array in matrix.arrays.values():
                array.view(np.uint8)[...] = 0x7E

    def failure(self) -> IsthmusError:
        raise AssertionError("nothing is read")
