"""Nested weights: one matrix in three planes, readable with 2, 4 or 8 bits, each width with its own f16 scale.

q8 = floor(16 (w / s4 + 8.5)) clipped to 0..255, where s4 is Q4_0's scale; q4 = q8 >> 4 is Q4_0's own code;
q2 = q8 >> 6 stands for s2 (q2 - 1.625), s2 fitted by least squares. Plane 0 holds q2, plane 1 the next two bits,
plane 2 the last four.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import QuantError
from isthmus.quant.packed import FORMATS, PackedMatrix
from isthmus.quant.rounding import Arrays, inverse, join_groups, signed_extreme, to_f16

ZERO2, ZERO4, ZERO8 = 1.625, 8.0, 135.5
WIDTHS = ("n2", "n4", "n8")


def encode(g: NDArray[np.float32], cols: int) -> Arrays:
    """Planes and scales of weights g [n, G, 32], row-major: p0, p1, p2 u8 [n, cols]; s2, s4 f16 [n, G]."""
    s4 = to_f16(signed_extreme(g) / np.float32(-8))
    q8 = np.clip((g * inverse(s4) + np.float32(8.5)) * np.float32(16), 0, 255).astype(np.uint8)
    basis = (q8 >> 6).astype(np.float32) - np.float32(ZERO2)
    pad = g.shape[1] * g.shape[2] - cols
    if pad:
        basis[:, -1, g.shape[2] - pad :] = 0  # padded columns have no say in s2
    s2 = to_f16((g * basis).sum(axis=2) / np.maximum((basis * basis).sum(axis=2), np.float32(1e-9)))
    codes = join_groups(q8, cols)
    return {"p0": codes >> 6, "p1": (codes >> 4) & 3, "p2": codes & 15, "s2": s2, "s4": s4}


def decode(format: str, a: Mapping[str, NDArray[np.generic]]) -> tuple[NDArray[np.uint8], NDArray[np.float32], float]:
    """Codes u8 [n, cols], scales f32 [n, G] and zero of the width that `format` names."""
    p0: NDArray[np.uint8] = a["p0"].astype(np.uint8, copy=False)
    if format == "n2":
        return p0, a["s2"].astype(np.float32), ZERO2
    q4: NDArray[np.uint8] = (p0 << np.uint8(2)) | a["p1"].astype(np.uint8, copy=False)
    s4 = a["s4"].astype(np.float32)
    if format == "n4":
        return q4, s4, ZERO4
    return (q4 << np.uint8(4)) | a["p2"].astype(np.uint8, copy=False), s4 * np.float32(1 / 16), ZERO8


def view(matrix: PackedMatrix, format: str) -> PackedMatrix:
    """The same matrix read with fewer bits; its arrays are shared, nothing is copied.

    Raises:
        QuantError: the matrix is not nested, or holds fewer planes than asked for.
    """
    if matrix.format not in WIDTHS or format not in WIDTHS:
        raise QuantError(f"cannot view {matrix.format} as {format}", f"only {', '.join(WIDTHS)} are nested")
    if WIDTHS.index(format) > WIDTHS.index(matrix.format):
        raise QuantError(f"a matrix of {matrix.format} lacks the planes of {format}", "write it with more planes")
    arrays = {name: matrix.arrays[name] for name in FORMATS[format]}
    return PackedMatrix(format, matrix.rows, matrix.cols, arrays)
