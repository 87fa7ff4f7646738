"""Rounding of weights: floats to f16 and bf16, and what the group formats share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import QuantError
from isthmus.quant.packed import GROUP

Arrays = dict[str, NDArray[Any]]


def round_to(w: NDArray[np.float32], format: str) -> NDArray[np.generic]:
    """w as f32, f16, or bf16 (u16, to nearest, ties to even).

    Raises:
        QuantError: a weight beyond f16's range.
    """
    if format == "f32":
        return w
    if format == "f16":
        return to_f16(w)
    bits = w.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def split_groups(w: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, cols] -> [n, G, 32]; padded columns repeat the last one, which leaves minimum and maximum alone."""
    pad = -w.shape[1] % GROUP
    if pad:
        w = np.pad(w, ((0, 0), (0, pad)), mode="edge")
    return w.reshape(len(w), -1, GROUP)


def join_groups(codes: NDArray[np.uint8], cols: int) -> NDArray[np.uint8]:
    """[n, G, 32] -> [n, cols]."""
    return codes.reshape(len(codes), -1)[:, :cols]


def to_f16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """values in f16.

    Raises:
        QuantError: a value beyond f16's range.
    """
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise QuantError(f"a value of {np.abs(values).max():.3g} exceeds f16", "choose format f32 or bf16")
    return half


def inverse(scales: NDArray[np.float16]) -> NDArray[np.float32]:
    """1 / scale in f32, 0 for 0; [n, G] -> [n, G, 1]."""
    wide = scales.astype(np.float32)[..., None]
    return np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0)


def signed_extreme(g: NDArray[np.float32]) -> NDArray[np.float32]:
    """The value of largest magnitude of each group, [n, G, 32] -> [n, G]; the negative one when two tie."""
    high, low = g.max(axis=2), g.min(axis=2)
    extreme: NDArray[np.float32] = np.where(high > -low, high, low)
    return extreme
