"""How hidden states travel: f32, f16, int8 with a scale for each row, or entropy-coded steps.

All numbers are little-endian. f32 and f16 are the rows one after the other. int8 is `plain` rows in f16, then a f32
scale for each other row (its largest magnitude / 127), then those rows' int8 codes; value = code * scale.

ecsqN (entropy-coded scalar quantization) is `plain` rows in f16, then for each other row its step as the upper half of
a f32, then the u16 length of each such row's stream but the last, then the streams of `protocol.entropy`. Rows are
independent; value = code * step + the channel's mean, two roundings in f32. The step is about 1/N of the row's
spread in a middling channel, the same for all channels: as equal errors cost the least, wider channels take more bits
instead. A channel's parameter is `ChannelStats.spreads(N)`; without statistics means are 0 and spreads 1.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.channels import ChannelStats
from isthmus.protocol.entropy import MAX_CODE, RowCoder, max_bytes
from isthmus.protocol.errors import ProtocolError
from isthmus.protocol.fields import MAX_ROWS
from isthmus.protocol.messages import Tensor

CODECS: Final = ("f32", "f16", "int8")
ENTROPY_CODECS: Final = tuple(f"ecsq{steps}" for steps in (2, 3, 4, 5, 6, 7, 8, 12, 16, 32))
MAX_WIDTH: Final = 65_536
ENTROPY_MAX_WIDTH: Final = 16_383  # a row's stream has less than 2^16 bytes
_F16_MAX: Final = 65_504.0
_SCALE_MAX: Final = 2.0e36  # times 127 is still a float32
_TINY: Final = 1.0e-30  # smaller rows are coded as zeros
_STEP_MAX: Final = 1.0e27  # times a code is still a float32
_DEVIATIONS: Final = 1.2533141373155003  # sqrt(pi / 2): a standard over a mean absolute deviation
_DOT_VALUES: Final = 8192  # more would wake the BLAS library's threads
_F32, _F16, _U16 = np.dtype("<f4"), np.dtype("<f2"), np.dtype("<u2")

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("isthmus needs a little-endian machine")


def coded_bytes(codec: str, rows: int, width: int, plain: int = 0) -> int:
    """Bytes of a coded [rows, width] tensor; of the entropy-coded ones the most that there can be.

    Raises:
        ProtocolError: unknown codec.
    """
    if codec == "f16":
        return rows * width * 2
    if codec == "f32":
        return rows * width * 4
    if codec == "int8":
        return plain * width * 2 + (rows - plain) * (width + 4)
    _steps(codec)
    return plain * width * 2 + (rows - plain) * (4 + max_bytes(width))


def encode(hidden: NDArray[np.float32], codec: str, *, plain: int = 0, stats: ChannelStats | None = None) -> Tensor:
    """Codes hidden states.

    Args:
        hidden: [rows, width] f32.
        codec: one of `CODECS` or `ENTROPY_CODECS`.
        plain: leading rows to keep in f16 under a lossy codec; the first position of a sequence wants it, since its
            activations are huge. f32 and f16 ignore it.
        stats: of the boundary, [width], for the entropy-coded ones; others ignore them.

    Raises:
        ProtocolError: unknown codec, statistics of another width, or a value that is not finite (or not in range).
    """
    rows, width = hidden.shape
    if codec == "f16":
        return Tensor("f16", (rows, width), 0, _halves(hidden))
    if codec == "f32":
        return Tensor("f32", (rows, width), 0, np.ascontiguousarray(hidden, _F32).tobytes())
    if codec != "int8":
        return _encode_steps(hidden, codec, min(plain, rows), stats)
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


def decode(
    tensor: Tensor, width: int, *, stats: ChannelStats | None = None, max_rows: int = MAX_ROWS
) -> NDArray[np.float32]:
    """The hidden states [rows, width] f32 of a coded tensor; may be read-only.

    Args:
        width: the d_model that the tensor must have.
        stats: of the boundary; used where the tensor names them.

    Raises:
        ProtocolError: the shape, codec or length does not fit, a value is not finite, or the tensor names statistics
            other than these.
    """
    shape, data, plain = tensor.shape, tensor.data, tensor.plain
    if len(shape) != 2 or shape[1] != width or not 1 <= shape[0] <= max_rows or width > MAX_WIDTH:
        raise ProtocolError(f"tensor shape is {list(shape)}", f"send [1..{max_rows}, {width}]")
    rows = shape[0]
    if plain > rows or (plain and tensor.codec in ("f32", "f16")):
        raise ProtocolError(f"{plain} plain rows of {rows} under codec {tensor.codec[:16]!r}")
    if tensor.codec not in CODECS:
        return _decode_steps(tensor, rows, width, stats)
    if tensor.stats:
        raise ProtocolError(f"a tensor in {tensor.codec} names channel statistics", "leave them out")
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


def _steps(codec: str) -> int:
    """N of ecsqN."""
    if codec not in ENTROPY_CODECS:
        raise ProtocolError(f"tensor codec is {codec!r}", f"use one of {', '.join(CODECS + ENTROPY_CODECS)}")
    return int(codec[4:])


def _encode_steps(hidden: NDArray[np.float32], codec: str, plain: int, stats: ChannelStats | None) -> Tensor:
    steps, (rows, width) = _steps(codec), hidden.shape
    coder = _coder(steps, width, stats)
    head, digest = _halves(hidden[:plain]) if plain else b"", stats.digest if stats else b""
    if plain == rows:
        return Tensor(codec, (rows, width), plain, head, digest)
    rest = hidden[plain:]
    if stats:
        rest = rest - stats.mean
        size = np.abs(rest)
        typical = (size * stats.inverse).sum(axis=1)  # [rows - plain]
    else:
        size = np.abs(rest)
        typical = size.sum(axis=1)
    largest = size.max(axis=1)
    if not float(largest.max()) < _STEP_MAX:
        raise ProtocolError("a hidden state is not finite", "the engine's result is broken; do not send it")
    unit = stats.unit if stats else 1.0
    step = np.maximum(typical * np.float32(unit * _DEVIATIONS / (steps * width)), largest * np.float32(1.0 / MAX_CODE))
    halves = (step.astype(_F32).view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)  # upwards, to keep codes small
    step = (halves << np.uint32(16)).view(_F32)
    codes = rest * (1.0 / np.maximum(step, _TINY))[:, None]
    streams = [coder.encode(row) for row in np.rint(codes).astype(np.int64)]
    lengths = np.array([len(stream) for stream in streams[:-1]], _U16)
    data = b"".join((head, halves.astype(_U16).tobytes(), lengths.tobytes(), *streams))
    return Tensor(codec, (rows, width), plain, data, digest)


def _decode_steps(tensor: Tensor, rows: int, width: int, stats: ChannelStats | None) -> NDArray[np.float32]:
    steps, data, plain = _steps(tensor.codec), memoryview(tensor.data), tensor.plain
    if not tensor.stats:
        stats = None
    elif stats is None or stats.digest != tensor.stats:
        raise ProtocolError(
            f"a tensor was coded with the channel statistics {tensor.stats.hex()}"
            + (f", not {stats.digest.hex()}" if stats else ", and there are none here"),
            "use the same bundle on both sides, or the codec f16",
        )
    coder = _coder(steps, width, stats)
    coded, at = rows - plain, plain * width * 2
    begin = at + 2 * coded + 2 * max(0, coded - 1)  # of the streams
    if len(data) < begin + coded * ((width + 7) // 8):  # a code has at least one bit
        raise ProtocolError(f"{len(data)} bytes for a [{rows}, {width}] tensor in {tensor.codec}", "it is truncated")
    lengths = np.frombuffer(data, _U16, max(0, coded - 1), at + 2 * coded)
    ends = [begin, *(begin + np.cumsum(lengths, dtype=np.int64)).tolist(), len(data)][: coded + 1]
    if ends[-1] != len(data) or (coded and ends[-2] > len(data)):
        raise ProtocolError(f"{len(data)} bytes for a [{rows}, {width}] tensor in {tensor.codec}", "rows are cut")
    hidden = np.empty((rows, width), np.float32)
    if plain:
        hidden[:plain] = np.frombuffer(data, _F16, plain * width).reshape(plain, width)
        _check(hidden[:plain])
    step = (np.frombuffer(data, _U16, coded, at).astype(np.uint32) << np.uint32(16)).view(_F32)
    if coded and not (float(step.max()) < _STEP_MAX and float(step.min()) >= 0.0):
        raise ProtocolError("a step is negative or not finite", "the device's result is broken")
    for index in range(coded):
        row = hidden[plain + index]
        np.multiply(coder.decode(data[ends[index] : ends[index + 1]]), step[index], out=row, dtype=np.float32)
        if stats:
            row += stats.mean
    return hidden


def _coder(steps: int, width: int, stats: ChannelStats | None) -> RowCoder:
    if width > ENTROPY_MAX_WIDTH:
        raise ProtocolError(f"rows are {width} wide", f"the entropy-coded codecs take {ENTROPY_MAX_WIDTH} at most")
    if stats is None:
        stats = _plain_stats(width)
    elif stats.width != width:
        raise ProtocolError(f"channel statistics for {stats.width} channels, rows of {width}", "use the same model's")
    return stats.coder(steps)


@lru_cache(maxsize=16)
def _plain_stats(width: int) -> ChannelStats:
    return ChannelStats(np.zeros(width, np.float32), np.ones(width, np.float32))


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
