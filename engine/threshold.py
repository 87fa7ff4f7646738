"""From which confidence on an exit is believed: one rule for what is measured and for what runs."""

from __future__ import annotations

import math

import numpy as np

NEVER = 1.0  # the threshold of an exit that never emits


def least(threshold: float) -> float:
    """The confidence, an f32, from which on an exit is believed at a threshold; at `NEVER` certainty is not enough."""
    return math.inf if threshold >= NEVER else float(np.float32(threshold))
