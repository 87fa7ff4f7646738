"""A model of the shape of OLMoE-1B-7B (Muennighoff et al., 2409.02060) with random weights: for speed alone.

Experts are nested: their first two planes are 4 bits. Few distinct ones stand in the files over and over, which no
reader can tell.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig, ExpertsConfig
from isthmus.quant.groups import shapes
from isthmus.quant.packed import PackedMatrix
from isthmus.split.bundle import Bundle
from isthmus.split.manifest import TokenizerEntry, expert_file
from isthmus.split.writer import write_bundle

LAYERS, EXPERTS, ACTIVE, D_MODEL, D_EXPERT, VOCAB = 16, 64, 8, 2048, 1024, 50304
DISTINCT = 5
CONFIG = DecoderConfig(
    family="olmoe",
    n_layers=LAYERS,
    d_model=D_MODEL,
    n_heads=16,
    n_kv_heads=16,
    head_dim=128,
    d_ff=D_EXPERT,
    vocab_size=VOCAB,
    context_length=4096,
    norm_eps=1e-5,
    rope_inv_freq=tuple(float(10000.0 ** (-2 * i / 128)) for i in range(64)),
    qk_norm_whole=True,
    experts=ExpertsConfig(EXPERTS, ACTIVE, D_EXPERT, renormalize=False),
)


class Random:
    """A `WeightSource` of that shape."""

    config = CONFIG

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        sizes = {"gate": (D_EXPERT, D_MODEL), "up": (D_EXPERT, D_MODEL), "down": (D_MODEL, D_EXPERT)}
        self._experts = [{name: self._matrix("n8", *size) for name, size in sizes.items()} for _ in range(DISTINCT)]
        self._embedding, self._head = self._matrix("q4", VOCAB, D_MODEL), self._matrix("q4", VOCAB, D_MODEL)

    def _matrix(self, format: str, rows: int, cols: int) -> PackedMatrix:
        """Random codes under scales that keep activations at about their size."""
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, (dtype, shape) in shapes(format, rows, cols).items():
            if dtype == np.uint8:
                arrays[name] = self._rng.integers(0, 256, shape, dtype=np.uint8)
            else:
                arrays[name] = np.full(shape, 0.2 * cols**-0.5, dtype)
        return PackedMatrix(format, rows, cols, arrays)

    def embedding(self) -> PackedMatrix:
        """See `WeightSource`."""
        return self._embedding

    def head(self) -> PackedMatrix:
        """See `WeightSource`."""
        return self._head

    def final_norm(self) -> NDArray[np.float32]:
        """See `WeightSource`."""
        return np.ones(D_MODEL, np.float32)

    def layer(self, index: int) -> Mapping[str, PackedMatrix | NDArray[np.float32]]:
        """See `WeightSource`."""
        found: dict[str, PackedMatrix | NDArray[np.float32]] = {
            name: np.ones(D_MODEL, np.float32) for name in ("attn_norm", "ffn_norm", "q_norm", "k_norm")
        }
        found |= {name: self._matrix("q4", D_MODEL, D_MODEL) for name in "qkvo"}
        found["router"] = self._rng.standard_normal((EXPERTS, D_MODEL)).astype(np.float32)
        for expert in range(EXPERTS):
            matrices = self._experts[(7 * expert + index) % DISTINCT]
            found |= {f"experts.{expert}.{name}": matrix for name, matrix in matrices.items()}
        return found


def make(folder: Path) -> Bundle:
    """Writes the bundle, 7.5 GB, and sees to it that the page cache holds nothing of its experts."""
    entry = TokenizerEntry()
    write_bundle(folder, Random(), name="OLMoE's shape", weights="n8", tokenizer=b"{}", entry=entry, force=True)
    for layer in range(LAYERS):
        with (folder / expert_file(layer)).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Bundle.open(folder)
