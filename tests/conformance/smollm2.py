"""The real model's file, and its numbers as the gguf package reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.split.fetch import find
from isthmus.split.gguf_file import GgufTensor

gguf = pytest.importorskip("gguf", reason="gguf reads the file for the reference; pip install gguf")

HEAD_DIM = 64


def smollm2() -> Path:
    """The file; a skip where it was not fetched."""
    found = find("smollm2")
    if found is None:
        pytest.skip("the model is not in the cache folder: run 'isthmus fetch smollm2' first")
    return found


def values(tensor: GgufTensor) -> NDArray[np.float32]:
    """A tensor's numbers; GGUF rotates neighbours in rows of q and k, here as elsewhere halves of a head are."""
    found = gguf.quants.dequantize(tensor.raw, gguf.GGMLQuantizationType(tensor.type_id)).reshape(tensor.shape)
    if "attn_q." in tensor.name or "attn_k." in tensor.name:
        found = found.reshape(-1, HEAD_DIM // 2, 2, found.shape[-1]).swapaxes(1, 2).reshape(found.shape)
    return np.array(found, np.float32)
