"""The shares of a token that take the planes of an expert, and how many bits are read with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from isthmus.split.tolerance import NEVER

BITS = (0, 2, 4, 8)  # by planes
_HALVINGS = 40


def shares(off: NDArray[np.float64], least: float) -> NDArray[np.float32]:
    """The least share that takes each plane, float32 [layers, planes], ascending.

    Args:
        off: what experts are off by with some of their planes [layers, planes + 1]; see `tolerance_run.expert_errors`.
        least: error that two bits must take away.
    """
    cost = np.diff(BITS[: off.shape[1]]) / 2
    gain = off[:, :-1] - off[:, 1:]
    found = np.divide(least * cost, gain, out=np.zeros_like(gain), where=gain > 0)
    found[~(gain > 0) & (off[:, :1] > 0)] = NEVER
    ascending: NDArray[np.float32] = np.minimum(np.maximum.accumulate(found, axis=1), NEVER).astype(np.float32)
    return ascending


def mean_bits(weights: NDArray[np.float32], tolerance: NDArray[np.float32], bits: Sequence[float] = BITS) -> float:
    """Bits of the experts that a token is sent to, in the mean; layers without experts are left out.

    Args:
        weights: of recorded routing [positions, layers, top_k].
        tolerance: see `shares`.
        bits: of an expert by planes that are read of it.
    """
    there = weights.sum(axis=2, keepdims=True)
    held = there[0, :, 0] > 0
    planes = (weights[..., None] >= (tolerance[:, None] * there[..., None])).cumprod(axis=3).sum(axis=3)
    return float(np.array(bits)[planes[:, held]].mean())


def shares_within(off: NDArray[np.float64], weights: NDArray[np.float32], bits: float) -> NDArray[np.float32]:
    """The shares with which recorded routing reads at most so many bits in the mean, and hardly fewer.

    Args:
        off: see `shares`.
        weights: see `mean_bits`.
    """
    low, high = 0.0, NEVER  # which reads nothing
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = mean_bits(weights, shares(off, middle)) <= bits
        low, high = (low, middle) if enough else (middle, high)
    return shares(off, high)
