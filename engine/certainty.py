"""How sure a network is of what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def certainty(output: NDArray[Any], probabilities: bool) -> float:
    """The probability of what is likeliest, in the row that is least sure; 0 where that is no number.

    Args:
        output: classes along the last dimension, [..., classes].
        probabilities: whether it has them; else their logarithms, up to a constant of each row.
    """
    if not output.size or not output.ndim:
        return 0.0
    values = output.astype(np.float64)
    if not probabilities:
        with np.errstate(invalid="ignore"):
            values = np.exp(values - values.max(axis=-1, keepdims=True))
            values /= values.sum(axis=-1, keepdims=True)
    least = float(values.max(axis=-1).min())
    return least if np.isfinite(least) else 0.0
