"""Between row-major codes and the interleaved lines of `packed.py`; four codes of one row travel as one u32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from isthmus.quant.packed import GROUP, LANES


def blocks(rows: int) -> int:
    """R: blocks of 16 rows, the last one padded."""
    return -(-rows // LANES)


def groups(cols: int) -> int:
    """G: groups of 32 columns, the last one padded."""
    return -(-cols // GROUP)


def interleave_rows(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """[16 R, n] -> [R, n, 16], a view."""
    return values.reshape(-1, LANES, values.shape[1]).transpose(0, 2, 1)


def write_lines(codes: NDArray[np.uint8], bits: int, out: NDArray[np.uint8]) -> None:
    """Interleaves codes [16 R, 32 G] of `bits` (2, 4 or 8) each into lines out [R, bits G, 64]."""
    per = 8 // bits
    words: NDArray[np.uint32] = codes.view(np.uint32)
    vecs = words.reshape(-1, LANES, words.shape[1]).transpose(0, 2, 1)  # [R, 8 G, 16]
    vecs = vecs.reshape(vecs.shape[0], -1, per, LANES) if per > 1 else vecs[:, :, None, :]
    lines = out.view(np.uint32)  # [R, bits G, 16]
    lines[...] = vecs[:, :, 0]
    for place in range(1, per):
        lines |= vecs[:, :, place] << np.uint32(place * bits)


def read_lines(lines: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The codes [16 R, 32 G] in lines [R, bits G, 64]; the inverse of `write_lines`."""
    per = 8 // bits
    words = lines.view(np.uint32)  # [R, bits G, 16]
    n_blocks, n_lines, _ = words.shape
    codes = np.empty((n_blocks * LANES, n_lines * per), np.uint32)
    rows = codes.reshape(n_blocks, LANES, n_lines, per).transpose(0, 2, 1, 3)  # [R, lines, 16, per]
    mask = np.uint32(0x01010101 * ((1 << bits) - 1))
    for place in range(per):
        rows[..., place] = (words >> np.uint32(place * bits)) & mask
    return codes.view(np.uint8)
