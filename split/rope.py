"""Inverse frequencies of rotary positions, in float32, step by step as `transformers` computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import ModelError

Params = Mapping[str, Any]
Frequencies = tuple[NDArray[np.float32], float]  # [head_dim / 2], factor on cosine and sine


def rope_frequencies(head_dim: int, theta: float, context_length: int, params: Params) -> Frequencies:
    """Inverse frequencies [head_dim / 2] f32 and the factor on cosine and sine.

    Args:
        theta: base of the frequencies.
        context_length: the model's positions (`max_position_embeddings`).
        params: `rope_parameters` or `rope_scaling` of a config.json; may be empty.

    Raises:
        ModelError: an unsupported rope type, or a missing parameter.
    """
    kind = str(params.get("rope_type") or params.get("type") or "default")
    if kind not in SCALINGS:
        raise ModelError(f"rope type {kind!r} is not supported", f"supported are {', '.join(SCALINGS)}")
    if float(params.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("rotary positions on a part of each head are not supported", "choose another model")
    try:
        with np.errstate(all="ignore"):
            frequencies, scale = SCALINGS[kind](plain(head_dim, theta), theta, context_length, params)
        if not (np.isfinite(frequencies).all() and math.isfinite(scale)):
            raise ValueError("the frequencies are not finite")
        return frequencies, scale
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(
            f"rope type {kind!r} has a missing or invalid parameter: {error}", "mend config.json"
        ) from error


def short_frequencies(
    head_dim: int, theta: float, context_length: int, params: Params
) -> tuple[NDArray[np.float32], float, int]:
    """Inverse frequencies [head_dim / 2] f32, their factor, and the positions they are made for, of a "longrope" whose
    short and long factors come with factors on cosine and sine of their own (Phi-3.5-MoE). Long factors take over
    beyond those positions, and would change all keys before.

    Raises:
        ModelError: a parameter is missing or of another size.
    """
    try:
        original, scale = int(params["original_max_position_embeddings"]), float(params["short_mscale"])
        factors = np.asarray(params["short_factor"], np.float32)
        if factors.shape != (head_dim // 2,) or not (factors > 0).all():
            raise ValueError(f"short_factor has the shape {factors.shape}")
        return plain(head_dim, theta) / factors, scale, min(original, context_length)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        problem = f"rope type 'longrope' has a missing or invalid parameter: {error}"
        raise ModelError(problem, "mend config.json") from error


def plain(head_dim: int, theta: float) -> NDArray[np.float32]:
    """theta ** (-2 i / head_dim) for i in [0, head_dim / 2), as f32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: NDArray[np.float32] = np.float32(1) / np.power(np.float32(theta), exponents)
    return frequencies


def _default(inverse: NDArray[np.float32], theta: float, context: int, params: Params) -> Frequencies:
    return inverse, 1.0


def _linear(inverse: NDArray[np.float32], theta: float, context: int, params: Params) -> Frequencies:
    """All positions divided by a factor (position interpolation, Chen et al. 2023)."""
    return inverse / np.float32(params["factor"]), 1.0


def _llama3(inverse: NDArray[np.float32], theta: float, context: int, params: Params) -> Frequencies:
    """Low frequencies divided by a factor, high ones kept, those between interpolated (Llama 3.1)."""
    factor, original = float(params["factor"]), float(params["original_max_position_embeddings"])
    low, high = float(params["low_freq_factor"]), float(params["high_freq_factor"])
    wavelength = np.float32(2 * math.pi) / inverse
    slow = np.where(wavelength > np.float32(original / low), inverse / np.float32(factor), inverse)
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    between = (np.float32(1) - smooth) * slow / np.float32(factor) + smooth * slow
    medium = ~(wavelength < np.float32(original / high)) & ~(wavelength > np.float32(original / low))
    return np.where(medium, between, slow).astype(np.float32), 1.0


def _yarn(inverse: NDArray[np.float32], theta: float, context: int, params: Params) -> Frequencies:
    """A ramp between interpolated and original frequencies, and a larger attention factor (Peng et al. 2023)."""
    dim = 2 * len(inverse)
    original = float(params.get("original_max_position_embeddings") or context)
    factor = float(params["factor"]) if params.get("factor") is not None else context / original

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    attention = params.get("attention_factor")
    if attention is None:
        one, other = float(params.get("mscale") or 0), float(params.get("mscale_all_dim") or 0)
        attention = magnitude(factor, one) / magnitude(factor, other) if one and other else magnitude(factor)

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(float(params.get("beta_fast") or 32))
    high = dimension(float(params.get("beta_slow") or 1))
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    steps = np.arange(dim // 2, dtype=np.float32)
    ramp = np.clip((steps - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)
    kept = np.float32(1) - ramp
    return (inverse / np.float32(factor)) * (np.float32(1) - kept) + inverse * kept, float(attention)


SCALINGS: Mapping[str, Callable[[NDArray[np.float32], float, int, Params], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
