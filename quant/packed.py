"""Packed weight matrices: the layout that every kernel of the engine reads.

One layout serves all instruction sets. Rows (output channels) stand in blocks of 16, columns (inputs) in groups
of 32; both are padded with zeros. `vec` below is 64 bytes: 16 rows x 4 consecutive columns of one code each, the
unit that a 512-bit dot product consumes. R = padded rows / 16, G = padded columns / 32.

| format | arrays | value of a weight |
|---|---|---|
| f32  | w f32 [R, 32 G, 16] | w |
| f16  | w f16 [R, 32 G, 16] | w |
| bf16 | w u16 [R, 32 G, 16] (upper half of an f32) | w |
| q8   | codes u8 [R, 8 G, 64], scales f16 [R, G, 16] | s (q - 128) |
| q8x  | codes u8 [R, 8 G, 64], scales f32 [R, 2 G, 16] (one for 16 columns) | s (q - 128) |
| q4   | codes u8 [R, 4 G, 64], scales f16 [R, G, 16] | s (q - 8) |
| q4m  | codes u8 [R, 4 G, 64], scales and mins f16 [R, G, 16] | s q + m |
| q4x  | codes u8 [R, 4 G, 64], scales and mins f32 [R, G, 16] | s q + m |
| n2   | p0 u8 [R, 2 G, 64], s2 f16 [R, G, 16] | s2 (q - 1.625), q of 2 bits |
| n4   | n2's and p1 u8 [R, 2 G, 64], s4 f16 [R, G, 16] | s4 (q - 8), q of 4 bits |
| n8   | n4's and p2 u8 [R, 4 G, 64] | s4 / 16 (q - 135.5), q of 8 bits |

A group of 32 columns is 8 vecs, vec v = columns 4v..4v+3. In `codes` of 8 bits line v is vec v. In 4-bit lines,
line j holds vec 2j in the low nibbles and 2j+1 in the high ones. In 2-bit planes, line j holds vecs 4j..4j+3 in
bits 0-1, 2-3, 4-5, 6-7. The byte of a line for row r and column c is 4 (r % 16) + c % 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LANES = 16
GROUP = 32

FORMATS: Mapping[str, tuple[str, ...]] = {
    "f32": ("w",),
    "f16": ("w",),
    "bf16": ("w",),
    "q8": ("codes", "scales"),
    "q8x": ("codes", "scales"),
    "q4": ("codes", "scales"),
    "q4m": ("codes", "scales", "mins"),
    "q4x": ("codes", "scales", "mins"),
    "n2": ("p0", "s2"),
    "n4": ("p0", "s2", "p1", "s4"),
    "n8": ("p0", "s2", "p1", "s4", "p2"),
}


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A weight matrix [rows, cols] in one of `FORMATS`.

    Attributes:
        format: a key of `FORMATS`.
        rows: output channels before padding.
        cols: input channels before padding.
        arrays: the arrays that the format names, C-contiguous (they may be memory-mapped and read-only).
    """

    format: str
    rows: int
    cols: int
    arrays: Mapping[str, NDArray[np.generic]]

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the matrix reads."""
        return sum(a.nbytes for a in self.arrays.values())
