"""Nested weights read at fewer bits: a view of the same memory, whose upper planes are never touched."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig
from isthmus.engine.head import head_tokens
from isthmus.engine.part import WeightSource
from isthmus.protocol.errors import EngineError
from isthmus.quant.nested import view
from isthmus.quant.packed import PackedMatrix


class Narrowed:
    """A `WeightSource` whose nested layer matrices are read at 2 or 4 bits; everything else passes through.

    Raises:
        EngineError: `bits` is neither 2, 4 nor 8, or a layer has no nested matrix.
    """

    def __init__(self, source: WeightSource, bits: int) -> None:
        if bits not in (2, 4, 8):
            raise EngineError(f"{bits} bits", "nested weights are read at 2, 4 or 8")
        self._source, self._format = source, f"n{bits}"

    @property
    def config(self) -> DecoderConfig:
        """The source's configuration."""
        return self._source.config

    def embedding(self) -> PackedMatrix:
        """The source's embedding."""
        return self._source.embedding()

    def layer(self, index: int) -> Mapping[str, PackedMatrix | NDArray[np.float32]]:
        """The layer's weights, the nested ones narrowed."""
        weights = self._source.layer(index)
        nested = {n: w for n, w in weights.items() if isinstance(w, PackedMatrix) and w.format in ("n4", "n8")}
        if not nested:
            raise EngineError(f"layer {index} has no nested weights", "split the model with --format nested")
        return {**weights, **{name: view(matrix, self._format) for name, matrix in nested.items()}}

    def final_norm(self) -> NDArray[np.float32]:
        """The source's last norm."""
        return self._source.final_norm()

    def head(self) -> PackedMatrix:
        """The source's output head."""
        return self._source.head()

    def head_tokens(self) -> NDArray[np.int32] | None:
        """The tokens of the source's output head."""
        return head_tokens(self._source)
