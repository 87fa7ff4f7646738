"""GGML's block types as row-major codes and scales, without loss; the layouts follow ggml's `ggml-common.h`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from isthmus.quant.rounding import Arrays

Raw = NDArray[np.uint8]  # rows of blocks [n, blocks * bytes of a block]


def _blocks(raw: Raw, size: int) -> Raw:
    return raw.reshape(len(raw), -1, size)


def _f16(part: Raw) -> NDArray[np.float16]:
    return np.ascontiguousarray(part).view(np.float16)[..., 0]


def _nibbles(packed: Raw) -> Raw:
    """[..., n] bytes -> [..., 2 n] codes, the low nibbles first."""
    out = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=out[..., : packed.shape[-1]])
    np.right_shift(packed, 4, out=out[..., packed.shape[-1] :])
    return out


def _float(dtype: type[np.generic]) -> Callable[[Raw], Arrays]:
    return lambda raw: {"w": np.ascontiguousarray(raw).view(dtype)}


def _q8_0(raw: Raw) -> Arrays:
    b = _blocks(raw, 34)
    return {"codes": (b[..., 2:] ^ np.uint8(0x80)).reshape(len(raw), -1), "scales": _f16(b[..., :2])}


def _q4_0(raw: Raw) -> Arrays:
    b = _blocks(raw, 18)
    return {"codes": _nibbles(b[..., 2:]).reshape(len(raw), -1), "scales": _f16(b[..., :2])}


def _q4_1(raw: Raw) -> Arrays:
    b = _blocks(raw, 20)
    codes = _nibbles(b[..., 4:]).reshape(len(raw), -1)
    return {"codes": codes, "scales": _f16(b[..., :2]), "mins": _f16(b[..., 2:4])}


def _q5_0(raw: Raw) -> Arrays:
    b = _blocks(raw, 22)
    fifth = np.unpackbits(b[..., 2:6], axis=-1, bitorder="little")
    codes = (_nibbles(b[..., 6:]) | (fifth << np.uint8(4))) + np.uint8(112)  # q - 16 about a zero of 128
    return {"codes": codes.reshape(len(raw), -1), "scales": _f16(b[..., :2])}


def _q4_k(raw: Raw) -> Arrays:
    b = _blocks(raw, 144)
    d, dmin = _f16(b[..., :2]).astype(np.float32), _f16(b[..., 2:4]).astype(np.float32)
    low, mid, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 0x30)], axis=-1)
    mins = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 0x30)], axis=-1)
    codes = _nibbles(b[..., 16:].reshape(*b.shape[:2], 4, 32))
    return {
        "codes": codes.reshape(len(raw), -1),
        "scales": (d[..., None] * scales.astype(np.float32)).reshape(len(raw), -1),
        "mins": -(dmin[..., None] * mins.astype(np.float32)).reshape(len(raw), -1),
    }


def _q6_k(raw: Raw) -> Arrays:
    b = _blocks(raw, 210)
    low = _nibbles(b[..., :128].reshape(*b.shape[:2], 2, 64)).reshape(*b.shape[:2], 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (b[..., 128:192].reshape(*b.shape[:2], 2, 1, 32) >> shifts) & np.uint8(3)
    codes = (low | (high << np.uint8(4))) + np.uint8(96)  # q - 32 about a zero of 128
    d = _f16(b[..., 208:]).astype(np.float32)[..., None]
    scales = d * np.ascontiguousarray(b[..., 192:208]).view(np.int8).astype(np.float32)
    return {"codes": codes.reshape(len(raw), -1), "scales": scales.reshape(len(raw), -1)}


# GGML type -> (our format, decoder)
LOSSLESS: Mapping[str, tuple[str, Callable[[Raw], Arrays]]] = {
    "F32": ("f32", _float(np.float32)),
    "F16": ("f16", _float(np.float16)),
    "BF16": ("bf16", _float(np.uint16)),
    "Q8_0": ("q8", _q8_0),
    "Q5_0": ("q8", _q5_0),
    "Q4_0": ("q4", _q4_0),
    "Q4_1": ("q4m", _q4_1),
    "Q4_K": ("q4x", _q4_k),
    "Q6_K": ("q8x", _q6_k),
}
