"""A decoder of random weights in any format, as a `WeightSource` that needs neither files nor other packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig, ExpertsConfig
from isthmus.engine.shapes import array_shapes, matrix_shapes
from isthmus.quant.groups import QUANTIZABLE, pack, quantize
from isthmus.quant.packed import PackedMatrix


def random_matrix(format: str, rows: int, cols: int, rng: np.random.Generator) -> PackedMatrix:
    """Weights of about 1 / sqrt(cols); the formats that only checkpoints have are packed from random codes."""
    if format in QUANTIZABLE:
        return quantize((rng.standard_normal((rows, cols)) * cols**-0.5).astype(np.float32), format)
    groups, bits = -(-cols // 32), 8 if format == "q8x" else 4
    scales = rng.uniform(0.5, 1, (rows, groups * (2 if bits == 8 else 1))) * 4 * cols**-0.5 / 2**bits
    codes = rng.integers(0, 2**bits, (rows, cols)).astype(np.uint8)
    arrays: dict[str, NDArray[Any]] = {"codes": codes, "scales": scales.astype(np.float32)}
    if bits == 4:
        arrays["mins"] = (scales * -7.5).astype(np.float32)
    return pack(format, rows, cols, arrays)


def random_config(
    *,
    n_layers: int = 3,
    d_model: int = 72,
    n_heads: int = 6,
    n_kv_heads: int = 2,
    head_dim: int = 20,
    d_ff: int = 40,
    windows: tuple[int, ...] = (),
    full: bool = True,
    experts: ExpertsConfig | None = None,
) -> DecoderConfig:
    """Sizes that fit neither lanes nor groups; `full` adds biases and norms of q and k."""
    return DecoderConfig(
        family="random",
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=d_ff,
        vocab_size=101,
        context_length=1024,
        norm_eps=1e-5,
        rope_inv_freq=tuple(float(1000.0 ** (-2 * i / head_dim)) for i in range(head_dim // 2)),
        qkv_bias=full,
        qk_norm=full,
        windows=windows,
        tied=True,
        experts=experts,
    )


class RandomModel:
    """A `WeightSource`; the router and vectors are float32, all matrices have one format."""

    def __init__(self, format: str = "f32", config: DecoderConfig | None = None, seed: int = 0) -> None:
        self._config = c = config or random_config()
        rng = np.random.default_rng(seed)
        self._embedding = random_matrix(format, c.vocab_size, c.d_model, rng)
        self._norm = rng.uniform(0.5, 1.5, c.d_model).astype(np.float32)
        self.layers = [self._layer(index, format, rng) for index in range(c.n_layers)]

    def _layer(
        self, index: int, format: str, rng: np.random.Generator
    ) -> dict[str, PackedMatrix | NDArray[np.float32]]:
        layer: dict[str, PackedMatrix | NDArray[np.float32]] = {
            name: random_matrix(format, *shape, rng) for name, shape in matrix_shapes(self._config, index).items()
        }
        for name, size in array_shapes(self._config, index).items():
            values = rng.standard_normal(size) if name == "router" else rng.uniform(0.5, 1.5, size)
            layer[name] = values.astype(np.float32)
        return layer

    @property
    def config(self) -> DecoderConfig:
        return self._config

    def embedding(self) -> PackedMatrix:
        return self._embedding

    def head(self) -> PackedMatrix:
        return self._embedding

    def final_norm(self) -> NDArray[np.float32]:
        return self._norm

    def layer(self, index: int) -> Mapping[str, PackedMatrix | NDArray[np.float32]]:
        return self.layers[index]
