"""How much of a network's answer is the same."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Agree = Literal["top1", "values"]
AGREES: tuple[Agree, ...] = ("top1", "values")
NEAR = 0.01  # of an output's largest magnitude, within which a value counts as the same


def share(mine: Any, whole: Any, agree: Agree) -> float:
    """How much of an output is the same.

    Args:
        mine, whole: arrays; what is none is compared by its text.
        agree: "top1" compares where each row is largest, "values" all values to within `NEAR`; whole numbers are
            compared as they are.
    """
    if not isinstance(whole, np.ndarray) or not isinstance(mine, np.ndarray):
        return float(repr(mine) == repr(whole))
    if mine.shape != whole.shape:
        return 0.0
    if not whole.size:
        return 1.0
    if whole.dtype.kind != "f":
        return float(np.mean(mine == whole))
    if agree == "top1" and whole.ndim and whole.shape[-1] > 1:
        return float(np.mean(mine.argmax(axis=-1) == whole.argmax(axis=-1)))
    off = np.abs(mine.astype(np.float64) - whole)
    return float(np.mean(off <= NEAR * np.abs(whole).max()))
