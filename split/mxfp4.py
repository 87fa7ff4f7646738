"""MXFP4: groups of 32 four-bit floats with a power of two each (OCP Microscaling Formats 1.0), as gpt-oss ships it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

BLOCKS, SCALES = "_blocks", "_scales"  # ends of the two tensors that make one
_HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int16)  # the magnitudes of E2M1, doubled
_DOUBLED = np.concatenate([_HALVES, -_HALVES])
_EXACT = (104, 143)  # exponents whose scale, halved, is a float16


def decode(blocks: NDArray[np.uint8], exponents: NDArray[np.uint8]) -> tuple[str, Mapping[str, NDArray[np.generic]]]:
    """Rows as 8-bit weights (see `quant.groups.write_rows`), which is exact; as floats where a scale is extreme.

    Args:
        blocks: [n, groups, 16], the first of two numbers in the low bits.
        exponents: [n, groups], 127 for 1.
    """
    nibbles = np.stack([blocks & 15, blocks >> 4], -1).reshape(len(blocks), -1)
    doubled = _DOUBLED[nibbles]  # [n, 32 groups]
    if _EXACT[0] <= int(exponents.min(initial=127)) and int(exponents.max(initial=127)) <= _EXACT[1]:
        scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - 128).astype(np.float16)
        return "q8", {"codes": (doubled + 128).astype(np.uint8), "scales": scales}
    powers = np.repeat(exponents.astype(np.int32) - 128, 32, axis=1)
    return "dequantized", {"w": np.ldexp(doubled.astype(np.float32), powers).astype(np.float32)}
