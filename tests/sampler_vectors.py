"""The sampler's vectors, which tests/vectors/make_sampler.py wrote: settings, logits, and what is chosen from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.sampling import Sampling

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "sampler.json").read_text())


def vector_logits(case: dict[str, Any]) -> NDArray[np.float32]:
    """The logits of a case, by the formula that the vectors' maker states."""
    x, words = case["start"], []
    for _ in range(case["vocab"]):
        x = (1664525 * x + 1013904223) % 2**32
        words.append((x >> 8 >> case["drop"] << case["drop"]) - 2**23)
    return np.float32(case["scale"]) * np.array(words, np.float32) * np.float32(2.0**-23)


def vector_settings(case: dict[str, Any]) -> Sampling:
    """The settings of a case."""
    return Sampling(case["temperature"], case["top_k"], case["top_p"], int(case["seed"]), case["stream"])
