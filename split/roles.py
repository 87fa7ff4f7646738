"""The weights of a layer by role, and the shapes that a configuration gives them; checked where they come in."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig
from isthmus.protocol.errors import IsthmusError
from isthmus.quant.packed import PackedMatrix

EXPERTS = "experts."  # what the roles of experts' matrices begin with
Weights = Mapping[str, PackedMatrix | NDArray[np.float32]]


def matrix_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's packed matrices."""
    d, queries, keys = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    found = {"q": (queries, d), "k": (keys, d), "v": (keys, d), "o": (d, queries)}
    experts = config.experts
    for prefix in [f"experts.{e}." for e in range(experts.n_experts)] if experts else [""]:
        hidden = experts.d_expert if experts else config.d_ff
        found |= {f"{prefix}gate": (hidden, d), f"{prefix}up": (hidden, d), f"{prefix}down": (d, hidden)}
    return found


def array_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's float32 arrays: norms, biases, the router."""
    found: dict[str, tuple[int, ...]] = {"attn_norm": (config.d_model,), "ffn_norm": (config.d_model,)}
    if config.qkv_bias:
        keys = config.n_kv_heads * config.head_dim
        found |= {"q_bias": (config.n_heads * config.head_dim,), "k_bias": (keys,), "v_bias": (keys,)}
    if config.qk_norm:
        found |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.experts:
        found["router"] = (config.experts.n_experts, config.d_model)
    return found


def check_layer(
    config: DecoderConfig, index: int, weights: Weights, error: type[IsthmusError], *, experts: bool = True
) -> None:
    """Compares a layer with its configuration.

    Args:
        experts: whether it comes with its experts.

    Raises:
        IsthmusError: of class `error`, if a weight is missing, of another shape, or unknown.
    """
    matrices, arrays = matrix_shapes(config), array_shapes(config)
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
