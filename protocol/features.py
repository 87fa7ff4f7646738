"""How the arrays of a cut network travel: as they are, without loss in fewer bytes, or as nearest steps of a scale.

All numbers are little-endian. A codec's name:

    ""       the array's bytes
    zstd     the first bytes of all values, then the second ones and so on, as one Zstandard frame
    f16      values as float16
    intN     N from 2 to 8 by halves, as int4.5: values are the nearest of up to 2^N equal steps, entropy-coded
    unit     values are the nearest whole numbers, entropy-coded: of what was scaled so that a step of 1 is right
    jpegN, webpN, webp-lossless   a picture, as `protocol.pictures` has it

intN and unit are a u8 (the number of levels - 1), the value of level 0 and the step as f32, the frequency of each
level, and a stream of `protocol.rans`. A frequency is written as LEB128; a 0 is followed by a byte that says how many
further levels have none. value = level 0's value + level * step, two roundings in f32. Where 0 lies within the scale,
it is one of its levels, exactly. An array without values has no bytes.

The sender chooses the scale: here, what lies within four standard deviations of the mean; what lies outside becomes
the scale's end. Rare levels cost bits only where they occur, so that a wide scale is cheap. That of unit is made of
whole numbers: of all between the least and the most, or of every second, third, ... where those would be more than 256.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol import rans
from isthmus.protocol.errors import ProtocolError
from isthmus.protocol.pictures import decode_picture, encode_picture, is_picture, names_picture

LOSSLESS: Final = ("", "zstd")
STEPS: Final = tuple(f"int{half / 2:g}" for half in range(16, 3, -1))
UNIT: Final = "unit"
FEATURE_CODECS: Final = (*LOSSLESS, "f16", *STEPS, UNIT)
TINY: Final = 1e-30  # smaller steps are none
WIDTH: Final = 4.0  # standard deviations on each side of the mean
_HEAD: Final = struct.Struct("<Bff")
_ZSTD_LEVEL: Final = 3
_BROKEN: Final = "the sender's result is broken or truncated"
Array = NDArray[np.generic]


def is_codec(name: str) -> bool:
    """Whether there is a codec of that name."""
    return name in FEATURE_CODECS or names_picture(name)


def applies(codec: str, dtype: np.dtype[Any], dims: Sequence[int]) -> str:
    """The codec that an array travels in where this one is wished for: steps are for real numbers, files for
    pictures.
    """
    fits = is_picture(dtype, dims) if names_picture(codec) else codec in LOSSLESS or dtype.kind == "f"
    return codec if fits else ""


def encode(array: Array, codec: str) -> bytes:
    """An array's bytes on the wire.

    Args:
        array: one that `applies` names this codec for.

    Raises:
        ProtocolError: unknown codec, or a value that is not finite (or not in range) and cannot be coded.
    """
    if not is_codec(codec):
        raise ProtocolError(f"the codec is {codec[:40]!r}", f"use one of {', '.join(FEATURE_CODECS[1:])}")
    if names_picture(codec):
        return encode_picture(array, codec)
    if codec == "":
        return _little(array).tobytes()
    if codec == "zstd":
        plain = _little(array)
        planes = np.frombuffer(plain.tobytes(), np.uint8).reshape(-1, plain.dtype.itemsize)
        return bytes(_zstd().ZstdCompressor(level=_ZSTD_LEVEL).compress(planes.T.tobytes()))
    if codec == "f16":
        with np.errstate(over="ignore", invalid="ignore"):
            halves = array.astype("<f2")
        if not np.isfinite(halves).all():
            raise ProtocolError("a value is not finite in float16", "use another codec")
        return halves.tobytes()
    return _encode_steps(array, codec)


def decode(data: memoryview, codec: str, dtype: np.dtype[Any], dims: Sequence[int]) -> Array:
    """The array of a type and shape that `encode` has coded; may be read-only.

    Raises:
        ProtocolError: unknown codec, or not what it writes.
    """
    count = math.prod(dims)
    if not is_codec(codec) or applies(codec, dtype, dims) != codec:
        raise ProtocolError(f"an array of {dtype} in the codec {codec[:40]!r}", "use one that fits its type")
    if names_picture(codec):
        return decode_picture(data, codec, dims)
    if codec == "zstd":
        data = _plain(data, count * dtype.itemsize)
        planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, count)
        found: Array = np.frombuffer(planes.T.tobytes(), dtype.newbyteorder("<"))
    elif codec in STEPS or codec == UNIT:
        found = _decode_steps(data, count)
        if dtype.itemsize < found.itemsize and found.size and np.abs(found).max() > float(np.finfo(dtype).max):
            raise ProtocolError(f"a value does not fit into {dtype}", _BROKEN)
        found = found.astype(dtype, copy=False)
    else:
        wire = np.dtype("<f2") if codec == "f16" else dtype.newbyteorder("<")
        if len(data) != count * wire.itemsize:
            raise ProtocolError(f"{len(data)} bytes for {count} values of {wire}", _BROKEN)
        found = np.frombuffer(data, wire)
        if codec == "f16":
            if not np.isfinite(found).all():
                raise ProtocolError("a value is not finite in float16", _BROKEN)
            found = found.astype(dtype)
        elif not found.flags.aligned:
            found = found.copy()
    return found.reshape(dims)


def _encode_steps(array: Array, codec: str) -> bytes:
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, np.float32).reshape(-1)
    if not values.size:
        return b""
    low, step, levels = _whole_numbers(values) if codec == UNIT else _scale(values, round(2 ** float(codec[3:])))
    codes, counts = _quantized(values, low, step, levels)
    table = rans.frequencies(counts)
    return _HEAD.pack(levels - 1, low, step) + _written(table) + rans.encode(codes, table)


def _decode_steps(data: memoryview, count: int) -> NDArray[np.float32]:
    if not count:
        if len(data):
            raise ProtocolError(f"{len(data)} bytes for an array without values", _BROKEN)
        return np.empty(0, np.float32)
    if len(data) < _HEAD.size:
        raise ProtocolError(f"{len(data)} bytes for {count} coded values", _BROKEN)
    last, low, step = _HEAD.unpack_from(data)
    most = low + last * step
    if not (math.isfinite(low) and step >= 0.0 and abs(most) <= float(np.finfo(np.float32).max)):
        raise ProtocolError(f"a scale from {low:g} in steps of {step:g}", _BROKEN)
    table, at = _read(data, _HEAD.size, last + 1)
    codes = rans.decode(data[at:], table, count)
    module = rans.native()
    if module is None:
        scale = np.float32(low) + np.arange(last + 1, dtype=np.float32) * np.float32(step)
        return scale.astype(np.float32)[codes]
    values, ffi = np.empty(count, np.float32), module.ffi
    module.lib.ir_restore(
        ffi.from_buffer("uint8_t[]", codes),
        count,
        low,
        step,
        last + 1,
        ffi.from_buffer("float[]", values, require_writable=True),
    )
    return values


def _scale(values: NDArray[np.float32], levels: int) -> tuple[float, float, int]:
    """Level 0's value, the step, and how many levels are used."""
    least, most = float(values.min()), float(values.max())
    mean = float(values.mean(dtype=np.float64))
    spread = WIDTH * float(np.sqrt(max(0.0, float(np.square(values, dtype=np.float64).mean()) - mean * mean)))
    if not math.isfinite(mean + spread):
        raise ProtocolError("a value is not finite", "only finite values can be coded in steps")
    begin, end = max(least, mean - spread), min(most, mean + spread)
    step = float(np.float32((end - begin) / (levels - 1)))
    if not step > TINY:
        return begin, 0.0, 1
    if begin < 0.0 < end:  # 0 is frequent: it stays exact
        step = float(np.float32((end - begin) / max(1.0, levels - 1.5)))
        begin = -step * round(-begin / step)
    low = float(np.float32(begin))
    return low, step, min(levels, math.floor((end - low) / step + 0.5) + 1)


def _whole_numbers(values: NDArray[np.float32]) -> tuple[float, float, int]:
    """See `_scale`; 0 is a level wherever it lies within."""
    least, most = float(values.min()), float(values.max())
    if not math.isfinite(most - least):
        raise ProtocolError("a value is not finite", "only finite values can be coded in steps")
    step = max(1.0, math.ceil((most - least) / (rans.MAX_SYMBOLS - 2)))
    low = step * math.floor(least / step + 0.5)
    return low, step, min(rans.MAX_SYMBOLS, math.floor((most - low) / step + 0.5) + 1)


def _quantized(
    values: NDArray[np.float32], low: float, step: float, levels: int
) -> tuple[rans.Codes, NDArray[np.int64]]:
    """Levels of values [n], and how often each occurs: [levels]."""
    inverse = float(np.float32(1.0 / step)) if step > 0.0 else 0.0
    module = rans.native()
    if module is None:
        with np.errstate(over="ignore", invalid="ignore"):
            places = (values - np.float32(low)) * np.float32(inverse)
        places = np.fmin(np.fmax(places, np.float32(0.0)), np.float32(levels - 1))
        codes = np.rint(places).astype(np.uint8)
        return codes, np.bincount(codes, minlength=levels).astype(np.int64)
    codes, counts, ffi = np.empty(len(values), np.uint8), np.zeros(levels, np.int64), module.ffi
    wrong = module.lib.ir_quantize(
        ffi.from_buffer("float[]", values),
        len(values),
        low,
        inverse,
        levels,
        ffi.from_buffer("uint8_t[]", codes),
        ffi.from_buffer("int64_t[]", counts),
    )
    if wrong:
        raise ProtocolError("a value is not finite", "only finite values can be coded in steps")
    return codes, counts


def _written(table: rans.Frequencies) -> bytes:
    """Frequencies as they travel."""
    found, at, shares = bytearray(), 0, table.tolist()
    while at < len(shares):
        share = shares[at]
        at += 1
        if not share:
            begin = at
            while at < len(shares) and not shares[at]:
                at += 1
            found += bytes((0, at - begin))
        elif share < 0x80:
            found.append(share)
        else:
            found += bytes((share & 0x7F | 0x80, share >> 7))
    return bytes(found)


def _read(data: memoryview, at: int, levels: int) -> tuple[rans.Frequencies, int]:
    """Frequencies [levels], and where they end."""
    found = list[int]()
    try:
        while len(found) < levels:
            share = data[at]
            at += 1
            if share & 0x80:
                share, at = share & 0x7F | data[at] << 7, at + 1
            found.append(share)
            if not share:
                found += [0] * data[at]
                at += 1
    except IndexError as error:
        raise ProtocolError("the frequencies of coded values are cut off", _BROKEN) from error
    if len(found) > levels:
        raise ProtocolError(f"frequencies of {len(found)} levels, not {levels}", _BROKEN)
    if max(found) > rans.TOTAL:
        raise ProtocolError(f"a frequency of {max(found)}, where all together are {rans.TOTAL}", _BROKEN)
    return np.array(found, np.uint16), at


def _little(array: Array) -> Array:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def _plain(data: memoryview, size: int) -> memoryview:
    """What a Zstandard frame holds, which must be so many bytes."""
    zstd = _zstd()
    try:
        told = zstd.frame_content_size(data)
        if told != size:
            raise ProtocolError(f"a Zstandard frame of {told} bytes, not {size}", _BROKEN)
        return memoryview(zstd.ZstdDecompressor().decompress(data, max_output_size=size))
    except zstd.ZstdError as error:
        raise ProtocolError(f"no Zstandard frame: {error}", _BROKEN) from error


def _zstd() -> Any:
    import zstandard

    return zstandard
