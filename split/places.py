"""Where a weight stands in a checkpoint's tensors: some share a tensor, and some lie there in another order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig, LatentConfig


class Place(NamedTuple):
    """A weight's tensor and which of its rows are the weight's.

    Attributes:
        tensor: its name; "{e}" in it stands for an expert's number.
        entry: the expert's entry of the first dimension, where experts share a tensor.
        part, parts: which of so many equal parts of the rows, where matrices share them.
        interleaved: whether the parts take turns row by row, or follow each other.
        transposed: whether the tensor's columns are the weight's rows.
    """

    tensor: str
    entry: int | None = None
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    transposed: bool = False

    def of_expert(self, expert: int) -> Place:
        """The same of one expert."""
        if "{e}" in self.tensor:
            return self._replace(tensor=self.tensor.format(e=expert))
        return self._replace(entry=expert)

    def rows(self, count: int) -> NDArray[np.int64]:
        """For each of the weight's `count` rows its row in the tensor, or in the expert's entry of it."""
        own = np.arange(count)
        return own * self.parts + self.part if self.interleaved else own + self.part * count


def half_rotated_rows(rows: int, head_dim: int) -> NDArray[np.int64]:
    """For each row of q or k in Hugging Face order its row in a GGUF of architecture `llama`, which interleaves
    the halves of a head."""
    return np.arange(rows).reshape(-1, head_dim // 2, 2).transpose(0, 2, 1).reshape(-1)


def latent_rows(config: DecoderConfig, latent: LatentConfig, role: str) -> NDArray[np.int64] | None:
    """For each row of a matrix of latent attention its row in DeepSeek's tensors, None for the same order. They
    interleave the halves of what is rotated, and keep the maps to keys and to values together, head by head."""
    heads, plain, rotated = config.n_heads, latent.d_plain, latent.d_rotated
    if role in ("q", "latent"):
        before, count = (plain, heads) if role == "q" else (latent.kv_rank, 1)
        order = np.concatenate([np.arange(before), before + half_rotated_rows(rotated, rotated)])
        rows: NDArray[np.int64] = (np.arange(count)[:, None] * (before + rotated) + order).reshape(-1)
        return rows
    if role in ("k_up", "v_up"):
        own = np.arange(plain) if role == "k_up" else plain + np.arange(latent.d_value)
        return (np.arange(heads)[:, None] * (plain + latent.d_value) + own).reshape(-1)
    return None


def turned(values: NDArray[np.generic], block: int) -> NDArray[np.generic]:
    """Blocks of rows [n * block, cols] transposed one by one: [n * cols, block]."""
    cols = values.shape[1]
    return np.ascontiguousarray(values.reshape(-1, block, cols).transpose(0, 2, 1)).reshape(-1, block)
