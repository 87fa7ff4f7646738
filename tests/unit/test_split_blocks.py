"""GGML blocks against the gguf package's own decoders: the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.quant.groups import decode_rows, dequantize, pack
from isthmus.split.ggml_blocks import LOSSLESS

gguf = pytest.importorskip("gguf")
ROWS, COLS = 37, 512


def random_blocks(name: str) -> np.ndarray:
    """Random bytes whose scales are finite."""
    rng = np.random.default_rng(5)
    per, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    if per == 1:
        values = rng.standard_normal((ROWS, COLS)).astype(np.float16 if name == "F16" else np.float32)
        raw = values.view(np.uint8)
        return raw.reshape(ROWS, COLS, 4)[..., 2:].reshape(ROWS, -1).copy() if name == "BF16" else raw
    raw = rng.integers(0, 256, (ROWS, COLS // per, size), dtype=np.uint8)
    for at in {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(name, (0,)):
        raw[..., at : at + 2] = rng.standard_normal((ROWS, COLS // per, 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(ROWS, -1)


@pytest.mark.parametrize("name", LOSSLESS)
def test_kept_blocks_are_the_same_bits(name: str) -> None:
    raw = random_blocks(name)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).astype(np.float32)
    format, decode = LOSSLESS[name]
    assert np.array_equal(decode_rows(format, decode(raw), COLS).view(np.uint32), expected.view(np.uint32))
    packed = pack(format, ROWS, COLS, decode(raw))
    assert np.array_equal(dequantize(packed).view(np.uint32), expected.view(np.uint32))
