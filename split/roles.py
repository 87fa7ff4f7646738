"""The weights of a layer by role, checked against its configuration where they come in."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig
from isthmus.engine.shapes import array_shapes, matrix_shapes
from isthmus.protocol.errors import IsthmusError
from isthmus.quant.packed import PackedMatrix

__all__ = ["EXPERTS", "Weights", "array_shapes", "check_layer", "matrix_shapes"]

EXPERTS = "experts."  # what the roles of experts' matrices begin with
Weights = Mapping[str, PackedMatrix | NDArray[np.float32]]


def check_layer(
    config: DecoderConfig, index: int, weights: Weights, error: type[IsthmusError], *, experts: bool = True
) -> None:
    """Compares a layer with its configuration.

    Args:
        experts: whether it comes with its experts.

    Raises:
        IsthmusError: of class `error`, if a weight is missing, of another shape, or unknown.
    """
    matrices, arrays = matrix_shapes(config, index), array_shapes(config, index)
    if not experts:
        matrices = {name: shape for name, shape in matrices.items() if not name.startswith(EXPERTS)}
    for name in weights:
        if name not in matrices and name not in arrays:
            raise error(f"layer {index} holds an unknown weight {name!r}", "it may be of another version or model")
    for name, shape in [*matrices.items(), *arrays.items()]:
        value = weights.get(name)
        if isinstance(value, PackedMatrix):
            found: tuple[int, ...] | str = (value.rows, value.cols) if name in matrices else "a packed matrix"
        elif value is None:
            found = "missing"
        else:
            found = value.shape if name in arrays else "an array"
        if found != shape:
            raise error(f"{name!r} of layer {index} is {found}, not {shape}", "the configuration is another model's")
