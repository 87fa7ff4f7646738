"""The pinned tables of layers' experts: which of their planes are in memory, and where, as the C engine sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.binding import FORMAT_IDS, Memory, native
from isthmus.engine.config import DecoderConfig
from isthmus.engine.experts import Expert
from isthmus.protocol.errors import EngineError
from isthmus.quant.planes import MATRICES, MAX_PLANES, Formats, expert_planes, n_planes

# Words of 8 bytes in C's im_matrix and im_expert, and where pointers stand in them; words of 4 bytes in im_use.
_MATRIX, _EXPERT, _USE = 7, 25, 10
_POINTERS = {"codes": 2, "p1": 3, "p2": 4, "scales": 5, "mins": 6}
_OF_ARRAY = {"w": "codes", "p0": "codes", "s4": "scales", "s2": "mins"}
_LEADING = np.array([0, 1, 0, 2, 0, 1, 0, 3], np.int32)  # planes 0.. that are there, by the bits of those that are


class ExpertTables:
    """Those of layers [start, end), side by side in memory; arrays have a row for each layer and a column an expert.

    Attributes:
        present: int32, bit p says that plane p is in memory; below 0 where reading one failed.
        asked: int32, leading planes that are in memory or expected there.
        last: int32 [layers, experts, 3], the step that took each plane last.
        count: int32 [layers, experts, 3], how many steps did.
        rate: float32 [layers, experts, 3], the same with less weight the longer ago, as of `last`.
        wanted: int32, planes that the step under way has still to compute.
        n_experts: of a layer.
        cells, uses: of the C engine.
    """

    def __init__(self, config: DecoderConfig, start: int, end: int) -> None:
        assert config.experts is not None
        ffi, layers, n = native().ffi, end - start, config.experts.n_experts
        self.start, self.end = start, end
        memory = Memory()
        cells, use = memory.keep(ffi.new("im_expert[]", layers * n)), memory.keep(ffi.new("im_use[]", layers * n))
        traffic = memory.keep(ffi.new("im_traffic[]", layers))
        assert (ffi.sizeof("im_expert"), ffi.sizeof("im_matrix")) == (8 * _EXPERT, 8 * _MATRIX)
        assert ffi.sizeof("im_use") == 4 * _USE
        words = np.frombuffer(ffi.buffer(cells), np.uint64).reshape(layers, n, _EXPERT)
        states = np.frombuffer(ffi.buffer(cells), np.int32).reshape(layers, n, 2 * _EXPERT)
        counted = np.frombuffer(ffi.buffer(use), np.int32).reshape(layers, n, _USE)
        self.present, self.asked = states[..., -2], states[..., -1]
        self.last, self.count, self.wanted = counted[..., 0:3], counted[..., 3:6], counted[..., 9]
        self.rate = counted.view(np.float32)[..., 6:9]
        self._memory, self.cells, self.uses, self.n_experts = memory, cells, use, n
        self._tables = [
            ExpertTable(config, start + i, words[i], cells + i * n, use + i * n, traffic + i, self)
            for i in range(layers)
        ]

    def layer(self, index: int) -> ExpertTable:
        """The table of a layer.

        Raises:
            EngineError: it has none.
        """
        if not self.start <= index < self.end:
            raise EngineError(f"there is no table of layer {index}'s experts", f"they have [{self.start}, {self.end})")
        return self._tables[index - self.start]

    def ready(self) -> NDArray[np.int32]:
        """Leading planes in memory; 0 where reading failed."""
        found: NDArray[np.int32] = _LEADING[np.maximum(self.present, 0)]
        return found


class ExpertTable:
    """One layer's row of `ExpertTables`, whose arrays it has without the layers' axis.

    Attributes:
        layer: its number in the model.
        n_experts, n_planes: how many, and how many planes each has.
        cells, use, traffic: of the C engine.
    """

    def __init__(
        self, config: DecoderConfig, layer: int, words: NDArray[np.uint64], cells: Any, use: Any, traffic: Any,
        tables: ExpertTables,
    ) -> None:  # fmt: skip
        assert config.experts is not None
        self.layer, self.n_experts, self.n_planes = layer, config.experts.n_experts, 1
        self.cells, self.use, self.traffic = cells, use, traffic
        self._config, self._words = config, words
        at = layer - tables.start
        self.present, self.asked, self.wanted = tables.present[at], tables.asked[at], tables.wanted[at]
        self._tables = tables  # whose memory this is
        self._fields: list[NDArray[np.int32]] = []
        self._held: list[Memory] = []

    def shape(self, formats: Formats) -> None:
        """Says which formats the matrices of all experts have, before any is expected."""
        config, experts = self._config, self._config.experts
        assert experts is not None
        self.n_planes = n_planes(formats)
        for i in range(self.n_experts):
            for name, format, size in zip(MATRICES, formats, self._sizes(), strict=True):
                matrix = getattr(self.cells[i], name)
                matrix.format, (matrix.rows, matrix.cols) = FORMAT_IDS[format], size
        self._fields = [
            np.array(
                [
                    (_MATRIX * MATRICES.index(f.matrix) + _POINTERS[_pointer(formats, f.array)], f.offset)
                    for f in plane.fields
                ],
                np.int32,
            )
            for plane in expert_planes(formats, config.d_model, experts.d_expert)
        ]

    def fields(self, plane: int) -> NDArray[np.int32]:
        """What an expert's matrices point to in a plane: [n, 2], a word of C's im_expert and an offset in the plane."""
        return self._fields[plane]

    def place(self, index: int, expert: Expert) -> None:
        """Puts an expert into the table, to stay there.

        Raises:
            EngineError: no such expert, or a matrix of another shape.
        """
        if not 0 <= index < self.n_experts:
            raise EngineError(f"layer {self.layer} has no expert {index}", "check the expert source")
        memory = Memory()
        for name, shape in zip(MATRICES, self._sizes(), strict=True):
            matrix = getattr(expert, name)
            if (matrix.rows, matrix.cols) != shape:
                raise EngineError(
                    f"{name!r} of expert {index} in layer {self.layer} is {matrix.rows} x {matrix.cols}, "
                    f"not {shape[0]} x {shape[1]}"
                )
            memory.matrix(getattr(self.cells[index], name), matrix)
        self._held.append(memory)
        self.n_planes = max(self.n_planes, n_planes((expert.gate.format, expert.up.format, expert.down.format)))
        self.present[index], self.asked[index] = (1 << MAX_PLANES) - 1, MAX_PLANES

    def report(self) -> dict[str, Any]:
        """What steps took of this layer so far, by plane: taken, missed (not in memory) and late (under way); and how
        many experts were foreseen, and were so rightly."""
        t = self.traffic
        planes = range(self.n_planes)
        found: dict[str, Any] = {name: [getattr(t, name)[p] for p in planes] for name in ("taken", "missed", "late")}
        return found | {"foreseen": t.foreseen, "foreseen_right": t.foreseen_right}

    def count_anew(self) -> None:
        """Forgets what steps took so far; what is in memory stays there."""
        native().ffi.memmove(self.traffic, bytes(native().ffi.sizeof("im_traffic")), native().ffi.sizeof("im_traffic"))

    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        experts, d = self._config.experts, self._config.d_model
        assert experts is not None
        return (experts.d_expert, d), (experts.d_expert, d), (d, experts.d_expert)


def _pointer(formats: Formats, array: str) -> str:
    return "scales" if array == "s2" and "n2" in formats else _OF_ARRAY.get(array, array)
