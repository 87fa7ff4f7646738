"""Weights in groups of 32: quantize, pack and, as the kernels' oracle, dequantize. Formats stand in `packed.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import QuantError
from isthmus.quant import nested
from isthmus.quant.layout import blocks, groups, interleave_rows, read_lines, write_lines
from isthmus.quant.packed import FORMATS, GROUP, LANES, PackedMatrix
from isthmus.quant.rounding import Arrays, inverse, join_groups, round_to, signed_extreme, split_groups, to_f16

CHUNK = 1 << 20  # weights at a time, so that temporaries stay in cache

# array name -> (dtype, lines per group, width of a line); scales of q8x stand twice in a group
_CODES = {8: (np.uint8, 8, 64), 4: (np.uint8, 4, 64), 2: (np.uint8, 2, 64)}
_HALF = (np.float16, 1, LANES)
ARRAYS: Mapping[str, Mapping[str, tuple[type[np.generic], int, int]]] = {
    "f32": {"w": (np.float32, GROUP, LANES)},
    "f16": {"w": (np.float16, GROUP, LANES)},
    "bf16": {"w": (np.uint16, GROUP, LANES)},
    "q8": {"codes": _CODES[8], "scales": _HALF},
    "q8x": {"codes": _CODES[8], "scales": (np.float32, 2, LANES)},
    "q4": {"codes": _CODES[4], "scales": _HALF},
    "q4m": {"codes": _CODES[4], "scales": _HALF, "mins": _HALF},
    "q4x": {"codes": _CODES[4], "scales": (np.float32, 1, LANES), "mins": (np.float32, 1, LANES)},
    "n2": {"p0": _CODES[2], "s2": _HALF},
    "n4": {"p0": _CODES[2], "s2": _HALF, "p1": _CODES[2], "s4": _HALF},
    "n8": {"p0": _CODES[2], "s2": _HALF, "p1": _CODES[2], "s4": _HALF, "p2": _CODES[4]},
}
QUANTIZABLE = ("f32", "f16", "bf16", "q8", "q4", "q4m", "n2", "n4", "n8")


def shapes(format: str, rows: int, cols: int) -> dict[str, tuple[np.dtype[np.generic], tuple[int, int, int]]]:
    """The dtype and shape of each array of a matrix.

    Raises:
        QuantError: an unknown format.
    """
    if format not in ARRAYS:
        raise QuantError(f"weight format {format!r} is unknown", f"choose one of {', '.join(FORMATS)}")
    r, g = blocks(rows), groups(cols)
    return {name: (np.dtype(t), (r, lines * g, width)) for name, (t, lines, width) in ARRAYS[format].items()}


def empty(format: str, rows: int, cols: int) -> PackedMatrix:
    """A matrix of zeros to be filled with `write_rows`."""
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in shapes(format, rows, cols).items()}
    return PackedMatrix(format, rows, cols, arrays)


def chunks(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    """Row ranges [start, end) of about `CHUNK` weights, each starting at a multiple of 16."""
    step = max(LANES, CHUNK // max(cols, 1) // LANES * LANES)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _padded(values: NDArray[np.generic], rows: int, cols: int) -> NDArray[np.generic]:
    if values.shape == (rows, cols) and values.flags.c_contiguous:
        return values
    out = np.zeros((rows, cols), values.dtype)
    out[: values.shape[0], : values.shape[1]] = values
    return out


def write_rows(matrix: PackedMatrix, start: int, values: Mapping[str, NDArray[np.generic]]) -> None:
    """Fills rows [start, start + n) of a matrix from row-major arrays.

    Args:
        start: a multiple of 16; n is one too, unless these are the last rows.
        values: for each array of the format codes u8 [n, cols], one a byte (or w [n, cols]), or scales and mins
            [n, G] ([n, 2 G] for q8x).
    """
    first = start // LANES
    for name, (dtype, lines, width) in ARRAYS[matrix.format].items():
        n_blocks = blocks(len(values[name]))
        out = matrix.arrays[name][first : first + n_blocks]
        coded = width == 64
        n_cols = groups(matrix.cols) * (GROUP if coded or lines == GROUP else lines)
        rows = _padded(values[name].astype(dtype, copy=False), n_blocks * LANES, n_cols)
        if coded:
            write_lines(rows.view(np.uint8), lines, out.view(np.uint8))
        else:
            out[...] = interleave_rows(rows)


def pack(format: str, rows: int, cols: int, values: Mapping[str, NDArray[np.generic]]) -> PackedMatrix:
    """A packed matrix from row-major arrays (see `write_rows`), without rounding.

    Raises:
        QuantError: an unknown format, or an array that is missing or has another shape.
    """
    matrix = empty(format, rows, cols)
    for name, (_, lines, width) in ARRAYS[format].items():
        n_cols = cols if width == 64 or lines == GROUP else lines * groups(cols)
        if name not in values or values[name].shape != (rows, n_cols):
            found = values[name].shape if name in values else "missing"
            raise QuantError(f"{format} array {name!r} is {found}", f"it must have shape {(rows, n_cols)}")
    for start, end in chunks(rows, cols):
        write_rows(matrix, start, {name: array[start:end] for name, array in values.items()})
    return matrix


def unpack(matrix: PackedMatrix, start: int = 0, end: int | None = None) -> Arrays:
    """The row-major arrays of rows [start, end), start a multiple of 16; the inverse of `pack`."""
    end = matrix.rows if end is None else end
    first, last = start // LANES, blocks(end)
    out: Arrays = {}
    for name, (_, lines, width) in ARRAYS[matrix.format].items():
        part = matrix.arrays[name][first:last]
        if width == 64:
            out[name] = read_lines(np.ascontiguousarray(part).view(np.uint8), lines)[: end - start, : matrix.cols]
        else:
            rows = part.transpose(0, 2, 1).reshape(-1, part.shape[1])
            out[name] = rows[: end - start, : matrix.cols] if lines == GROUP else rows[: end - start]
    return out


def quantize(w: NDArray[np.float32], format: str) -> PackedMatrix:
    """Packs weights w [rows, cols] f32, rounding them to a format of `QUANTIZABLE`.

    q8 has scale absmax / 127; q4 is GGUF's Q4_0 (the weight of largest magnitude becomes code 0, value -8 s);
    q4m spans minimum to maximum; n2, n4 and n8 stand in `nested.py`. All scales are f16, rounded before the codes.

    Raises:
        QuantError: a format that cannot be quantized to, weights that are not finite, or scales beyond f16.
    """
    rows, cols = w.shape
    matrix = empty(format, rows, cols)
    for start, end in chunks(rows, cols):
        write_rows(matrix, start, encode_rows(w[start:end], format))
    return matrix


def encode_rows(w: NDArray[np.float32], format: str) -> Arrays:
    """The row-major arrays (see `write_rows`) of weights w [n, cols] f32, rounded as `quantize` does.

    Raises:
        QuantError: as `quantize`.
    """
    coders = {"q8": _q8, "q4": _q4, "q4m": _q4m, "n2": nested.encode, "n4": nested.encode, "n8": nested.encode}
    if format not in QUANTIZABLE:
        raise QuantError(f"cannot quantize to {format!r}", f"choose one of {', '.join(QUANTIZABLE)}")
    part = np.ascontiguousarray(w, np.float32)
    if not np.isfinite(part).all():
        raise QuantError("some weights are not finite", "the checkpoint is damaged")
    if format in coders:
        return coders[format](split_groups(part), part.shape[1])
    return {"w": round_to(part, format)}


def _q8(g: NDArray[np.float32], cols: int) -> Arrays:
    magnitude: NDArray[np.float32] = np.abs(signed_extreme(g))
    scales = to_f16(magnitude / np.float32(127))
    codes = np.clip(np.rint(g * inverse(scales)), -127, 127).astype(np.int8).view(np.uint8)
    return {"codes": join_groups(codes ^ np.uint8(0x80), cols), "scales": scales}


def _q4(g: NDArray[np.float32], cols: int) -> Arrays:
    scales = to_f16(signed_extreme(g) / np.float32(-8))
    codes = np.clip(g * inverse(scales) + np.float32(8.5), 0, 15).astype(np.uint8)
    return {"codes": join_groups(codes, cols), "scales": scales}


def _q4m(g: NDArray[np.float32], cols: int) -> Arrays:
    low = g.min(axis=2)
    mins = to_f16(low)
    scales = to_f16((g.max(axis=2) - low) / np.float32(15))
    codes = np.clip(np.rint((g - mins.astype(np.float32)[..., None]) * inverse(scales)), 0, 15).astype(np.uint8)
    return {"codes": join_groups(codes, cols), "scales": scales, "mins": mins}


def dequantize(matrix: PackedMatrix) -> NDArray[np.float32]:
    """The weights [rows, cols] f32 that a matrix stands for, each step rounded to f32 as `packed.py` writes it.

    Raises:
        QuantError: an unknown format.
    """
    if matrix.format not in ARRAYS:
        raise QuantError(f"weight format {matrix.format!r} is unknown", f"choose one of {', '.join(FORMATS)}")
    out = np.empty((matrix.rows, matrix.cols), np.float32)
    for start, end in chunks(matrix.rows, matrix.cols):
        out[start:end] = dequantize_rows(matrix, start, end)
    return out


def dequantize_rows(matrix: PackedMatrix, start: int, end: int) -> NDArray[np.float32]:
    """Rows [start, end) of `dequantize`, start a multiple of 16."""
    return decode_rows(matrix.format, unpack(matrix, start, end), matrix.cols)


def decode_rows(format: str, values: Mapping[str, NDArray[np.generic]], cols: int) -> NDArray[np.float32]:
    """Weights [n, cols] f32 from the row-major arrays of a format (see `write_rows`)."""
    if format in ("f32", "f16"):
        return values["w"].astype(np.float32)
    if format == "bf16":
        return (values["w"].astype(np.uint32) << np.uint32(16)).view(np.float32)
    if format in nested.WIDTHS:
        codes, scales, zero = nested.decode(format, values)
    else:
        zero = {"q8": 128.0, "q8x": 128.0, "q4": 8.0, "q4m": 0.0, "q4x": 0.0}[format]
        codes, scales = values["codes"].astype(np.uint8, copy=False), values["scales"].astype(np.float32)
    per = GROUP // (ARRAYS[format]["scales"][1] if "scales" in values else 1)
    w = codes.astype(np.float32)
    w -= np.float32(zero)
    w *= np.repeat(scales, per, axis=1)[:, :cols]
    if "mins" in values:
        w += np.repeat(values["mins"].astype(np.float32), per, axis=1)[:, :cols]
    return w
