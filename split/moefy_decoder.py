"""A dense decoder in PyTorch, layer by layer, as its conversion into a mixture of experts needs it: states and logits.

Weights come from any `WeightSource` and stay as they are; products are made in bfloat16 where the processor does that
faster, sums and norms in float32.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from isthmus.engine.config import DecoderConfig
from isthmus.engine.part import WeightSource
from isthmus.quant.groups import dequantize
from isthmus.quant.packed import PackedMatrix
from isthmus.split.roles import Weights

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h


def fast_dtype() -> torch.dtype:
    """The number format in which this processor multiplies matrices fastest: bfloat16 with tiles, else float32."""
    try:
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    except AttributeError:  # of older versions
        return torch.float32


def keep_freed_memory() -> None:
    """Has the C library keep what is freed: giving back and taking large tensors anew costs a quarter of the time."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc's
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)


def as_tensor(weight: object) -> Tensor:
    """A weight in float32."""
    values = dequantize(weight) if isinstance(weight, PackedMatrix) else np.asarray(weight)
    return torch.from_numpy(np.array(values, np.float32))


class Feed:
    """The gated feed-forward network of one layer in float32.

    Attributes:
        gate, up: [d_ff, d_model].
        down: [d_model, d_ff].
    """

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self.gate, self.up, self.down = gate, up, down

    def hidden(self, normed: Tensor, dtype: torch.dtype) -> Tensor:
        """What its neurons give, [.., d_ff], of normalized states [.., d_model]."""
        x = normed.to(dtype)
        return functional.silu(x @ self.gate.to(dtype).T) * (x @ self.up.to(dtype).T)

    def added(self, normed: Tensor, dtype: torch.dtype) -> Tensor:
        """What it adds to the states, [.., d_model] f32."""
        return (self.hidden(normed, dtype) @ self.down.to(dtype).T).float()

    def parts(self, count: int) -> list[Feed]:
        """Networks of equal size, whose sum it is."""
        gates, ups, downs = self.gate.chunk(count), self.up.chunk(count), self.down.chunk(count, dim=1)
        return [Feed(*three) for three in zip(gates, ups, downs, strict=True)]

    def ordered(self, order: Tensor) -> Feed:
        """The same network with its neurons in another order."""
        return Feed(self.gate[order].contiguous(), self.up[order].contiguous(), self.down[:, order].contiguous())


class Layer:
    """One layer: its attention, its norms and its feed-forward network."""

    def __init__(self, config: DecoderConfig, index: int, weights: Weights, dtype: torch.dtype) -> None:
        self._config, self._window, self._dtype = config, config.window(index), dtype
        self._plain = {name: as_tensor(value) for name, value in weights.items() if not isinstance(value, PackedMatrix)}
        self._matrices = {name: as_tensor(weights[name]).to(dtype) for name in ("q", "k", "v", "o")}
        self.ffn_norm = self._plain["ffn_norm"]
        self.feed = Feed(*(as_tensor(weights[name]) for name in ("gate", "up", "down")))

    def attended(self, x: Tensor) -> Tensor:
        """States [batch, n, d_model] f32 after the layer's attention."""
        config, (batch, length, _) = self._config, x.shape
        y = functional.rms_norm(x, x.shape[-1:], self._plain["attn_norm"], config.norm_eps).to(self._dtype)
        q, k, v = (self._heads(y, name) for name in ("q", "k", "v"))  # [batch, n_kv_heads, group, n, head_dim]
        # Written out: the backward pass of PyTorch's own attention takes twice as long on short samples.
        scores = q @ k.transpose(-1, -2) * config.head_dim**-0.5 + self._mask(length)
        out = (scores.softmax(-1) @ v).permute(0, 3, 1, 2, 4).reshape(batch, length, -1)
        mixed = out @ self._matrices["o"].T
        found: Tensor = x + mixed.float()
        return found

    def normed(self, attended: Tensor) -> Tensor:
        """What the feed-forward network reads."""
        return functional.rms_norm(attended, attended.shape[-1:], self.ffn_norm, self._config.norm_eps)

    def fed(self, normed: Tensor) -> Tensor:
        """What the dense network adds to the states."""
        return self.feed.added(normed, self._dtype)

    def _heads(self, y: Tensor, name: str) -> Tensor:
        config, found = self._config, y @ self._matrices[name].T
        if config.qkv_bias:
            found = found + self._plain[f"{name}_bias"].to(found.dtype)
        found = found.view(*y.shape[:2], config.n_kv_heads, -1, config.head_dim).permute(0, 2, 3, 1, 4)
        if name == "v":
            return found
        found = found.float()
        if config.qk_norm:
            found = functional.rms_norm(found, found.shape[-1:], self._plain[f"{name}_norm"], config.norm_eps)
        angles = torch.arange(y.shape[1], dtype=torch.float32)[:, None] * torch.tensor(config.rope_inv_freq)
        cos, sin = angles.cos() * config.rope_scale, angles.sin() * config.rope_scale
        a, b = found.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(self._dtype)

    def _mask(self, length: int) -> Tensor:
        """What is added to scores [n, n]: minus infinity where a position is not seen."""
        apart = torch.arange(length)[:, None] - torch.arange(length)[None]
        seen = (apart >= 0) & (apart < (self._window or length))
        return torch.zeros(length, length, dtype=self._dtype).masked_fill(~seen, -torch.inf)


class Decoder:
    """All of a dense model.

    Args:
        dtype: in which matrices are multiplied.
    """

    def __init__(self, source: WeightSource, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.dtype = source.config, dtype
        self._embedding = as_tensor(source.embedding())
        self._norm = as_tensor(source.final_norm())
        tied = source.config.tied
        self.head = (self._embedding if tied else as_tensor(source.head())).to(dtype)
        self.layers = [
            Layer(source.config, index, source.layer(index), dtype) for index in range(source.config.n_layers)
        ]

    def embedded(self, tokens: Tensor) -> Tensor:
        """States before the first layer, [batch, n, d_model] f32."""
        return functional.embedding(tokens, self._embedding)

    def logits(self, x: Tensor) -> Tensor:
        """Of states after the last layer, [.., vocab_size]."""
        return self.normed(x) @ self.head.T

    def normed(self, x: Tensor) -> Tensor:
        """What the head takes."""
        return functional.rms_norm(x, x.shape[-1:], self._norm, self.config.norm_eps).to(self.dtype)

    def last(self, tokens: Tensor) -> Tensor:
        """The dense model's states after the last layer, [batch, n, d_model] f32."""
        x = self.embedded(tokens)
        for layer in self.layers:
            x = layer.attended(x)
            x = x + layer.fed(layer.normed(x))
        return x
