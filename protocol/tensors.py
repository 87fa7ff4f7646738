"""How hidden states travel: f32, f16, or int8 with a scale for each row.

All numbers are little-endian. f32 and f16 are the rows one after the other. int8 is `plain` rows in f16, then a f32
scale for each other row (its largest magnitude / 127), then those rows' int8 codes; value = code * scale.
"""

from __future__ import annotations

import sys
from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import ProtocolError
from isthmus.protocol.fields import MAX_ROWS
from isthmus.protocol.messages import Tensor

CODECS: Final = ("f32", "f16", "int8")
MAX_WIDTH: Final = 65_536
_F16_MAX: Final = 65_504.0
_SCALE_MAX: Final = 2.0e36  # times 127 is still a float32
_TINY: Final = 1.0e-30  # smaller rows are coded as zeros
_DOT_VALUES: Final = 8192  # more would wake the BLAS library's threads
_F32, _F16 = np.dtype("<f4"), np.dtype("<f2")

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("isthmus needs a little-endian machine")


def coded_bytes(codec: str, rows: int, width: int, plain: int = 0) -> int:
    """Bytes of a coded [rows, width] tensor.

    Raises:
        ProtocolError: unknown codec.
    """
    if codec == "f16":
        return rows * width * 2
    if codec == "f32":
        return rows * width * 4
    if codec == "int8":
        return plain * width * 2 + (rows - plain) * (width + 4)
    raise ProtocolError(f"tensor codec is {codec!r}", f"use one of {', '.join(CODECS)}")


def encode(hidden: NDArray[np.float32], codec: str, *, plain: int = 0) -> Tensor:
    """Codes hidden states.

    Args:
        hidden: [rows, width] f32.
        codec: one of `CODECS`.
        plain: leading rows to keep in f16 under int8; the first position of a sequence wants it, since its
            activations are huge. Other codecs ignore it.

    Raises:
        ProtocolError: unknown codec, or a value that is not finite (or not in range for f16).
    """
    rows, width = hidden.shape
    if codec == "f16":
        return Tensor("f16", (rows, width), 0, _halves(hidden))
    if codec == "f32":
        return Tensor("f32", (rows, width), 0, np.ascontiguousarray(hidden, _F32).tobytes())
    if codec != "int8":
        raise ProtocolError(f"tensor codec is {codec!r}", f"use one of {', '.join(CODECS)}")
    plain = min(plain, rows)
    head = _halves(hidden[:plain]) if plain else b""
    if plain == rows:
        return Tensor("int8", (rows, width), plain, head)
    rest = hidden[plain:]
    largest = np.abs(rest).max(axis=1)  # [rows - plain] f32
    if not float(largest.max()) < _SCALE_MAX:
        raise ProtocolError("a hidden state is not finite", "the engine's result is broken; do not send it")
    if len(largest) == 1:
        peak = float(largest[0])
        codes = rest * np.float32(127.0 / peak if peak > _TINY else 0.0)
    else:
        codes = rest * np.divide(127.0, largest, out=np.zeros_like(largest), where=largest > _TINY)[:, None]
    np.rint(codes, out=codes)
    scale = largest * np.float32(1.0 / 127.0)
    return Tensor("int8", (rows, width), plain, head + scale.tobytes() + codes.astype(np.int8).tobytes())


def decode(tensor: Tensor, width: int, *, max_rows: int = MAX_ROWS) -> NDArray[np.float32]:
    """The hidden states [rows, width] f32 of a coded tensor; may be read-only.

    Args:
        width: the d_model that the tensor must have.

    Raises:
        ProtocolError: the shape, codec or length does not fit, or a value is not finite.
    """
    shape, data, plain = tensor.shape, tensor.data, tensor.plain
    if len(shape) != 2 or shape[1] != width or not 1 <= shape[0] <= max_rows or width > MAX_WIDTH:
        raise ProtocolError(f"tensor shape is {list(shape)}", f"send [1..{max_rows}, {width}]")
    rows = shape[0]
    if plain > rows or (plain and tensor.codec != "int8"):
        raise ProtocolError(f"{plain} plain rows of {rows} under codec {tensor.codec[:16]!r}")
    if len(data) != coded_bytes(tensor.codec, rows, width, plain):
        raise ProtocolError(
            f"{len(data)} bytes for a [{rows}, {width}] tensor in {tensor.codec}",
            f"send {coded_bytes(tensor.codec, rows, width, plain)}",
        )
    if tensor.codec == "f32":
        hidden = np.frombuffer(data, _F32).reshape(rows, width)
    elif tensor.codec == "f16":
        hidden = np.frombuffer(data, _F16).astype(np.float32).reshape(rows, width)
    else:
        coded = rows - plain
        hidden = np.empty((rows, width), np.float32)
        hidden[:plain] = np.frombuffer(data, _F16, plain * width).reshape(plain, width)
        scale = np.frombuffer(data, _F32, coded, plain * width * 2)
        codes = np.frombuffer(data, np.int8, coded * width, plain * width * 2 + coded * 4).reshape(coded, width)
        if coded and not (float(scale.max()) < _SCALE_MAX and float(scale.min()) >= 0.0):
            raise ProtocolError("an int8 scale is negative or not finite", "the device's result is broken")
        np.multiply(codes, scale[:, None], out=hidden[plain:], dtype=np.float32)
        if plain:
            _check(hidden[:plain])
        return hidden
    _check(hidden)
    return hidden


def _small(hidden: NDArray[np.float32], limit: float) -> bool:
    """Whether a small tensor's values surely lie within +-limit; one dot product is the cheapest proof."""
    if hidden.size > _DOT_VALUES:
        return False
    return float(np.vdot(hidden, hidden)) < limit * limit  # unlike dot, vdot overflows without a warning


def _check(hidden: NDArray[np.float32]) -> None:
    if not _small(hidden, 1e18) and not np.isfinite(hidden).all():
        raise ProtocolError("a hidden state is not finite", "the device's result is broken")


def _halves(hidden: NDArray[np.float32]) -> bytes:
    if _small(hidden, _F16_MAX):
        return hidden.astype(_F16).tobytes()
    with np.errstate(over="ignore", invalid="ignore"):
        halves = hidden.astype(_F16)
    if not np.isfinite(halves).all():
        raise ProtocolError(
            "a hidden state is not finite in f16", f"values must lie within +-{_F16_MAX:.0f}; use the codec f32"
        )
    return halves.tobytes()
