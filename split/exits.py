"""An exit's head as the engine runs it: a linear map, one more decoder layer, and the model's own output head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig
from isthmus.engine.part import WeightSource
from isthmus.protocol.errors import BundleError
from isthmus.quant.packed import PackedMatrix
from isthmus.split.roles import Weights, check_layer


class ExitSource:
    """A `WeightSource` with one layer, the exit that stands before the model's layer of the same number.

        part = open_part(ExitSource(bundle, 20, weights), 20, 21)
        part.step(Rows().hidden(sequence, position, states, enter=20))

    Args:
        model: what the exit belongs to.
        layer: before which it stands.
        weights: a layer's matrices and norms, with `input` [d_model, d_model] and `final_norm` [d_model]; the width of
            the feed-forward network is its own, everything else the model's.

    Raises:
        BundleError: the weights are not of this model's shapes.
    """

    def __init__(self, model: WeightSource, layer: int, weights: Weights) -> None:
        shape, width = model.config, model.config.d_model
        if not 0 < layer < shape.n_layers:
            raise BundleError(f"an exit before layer {layer}", f"choose 1..{shape.n_layers - 1}")
        self._model, self._index = model, layer
        self._layer = {name: value for name, value in weights.items() if name != "final_norm"}
        gate, norm, first = weights.get("gate"), weights.get("final_norm"), weights.get("input")
        if not isinstance(norm, np.ndarray) or norm.shape != (width,):
            raise BundleError(f"the exit before layer {layer} has no final_norm [{width}]", "train it again")
        if not isinstance(first, PackedMatrix) or (first.rows, first.cols) != (width, width):
            raise BundleError(f"the exit before layer {layer} has no input [{width}, {width}]", "train it again")
        self._norm = norm
        self._config = replace(
            shape,
            n_layers=layer + 1,
            d_ff=gate.rows if isinstance(gate, PackedMatrix) else shape.d_ff,
            qkv_bias=False,
            qk_norm=False,
            windows=(),
            experts=None,
            tied=False,
        )
        check_layer(self._config, layer, {n: w for n, w in self._layer.items() if n != "input"}, BundleError)

    @property
    def config(self) -> DecoderConfig:
        return self._config

    def embedding(self) -> PackedMatrix:
        """See `WeightSource`."""
        return self._model.embedding()

    def layer(self, index: int) -> Weights:
        """See `WeightSource`.

        Raises:
            BundleError: another layer than the exit's.
        """
        if index != self._index:
            raise BundleError(f"an exit has no layer {index}", f"open it as layers [{self._index}, {self._index + 1})")
        return self._layer

    def final_norm(self) -> NDArray[np.float32]:
        """See `WeightSource`."""
        return self._norm

    def head(self) -> PackedMatrix:
        """See `WeightSource`."""
        return self._model.head()
