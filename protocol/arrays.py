"""How named arrays travel: types and shapes in the message, the bytes of all of them one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Final

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from isthmus.protocol import features
from isthmus.protocol.errors import ProtocolError
from isthmus.protocol.fields import U32, Micros, Name

DTYPES: Final = (
    "float32",
    "float16",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)
MAX_ARRAYS: Final = 256
MAX_DIMS: Final = 16
MOST_BYTES: Final = 64 << 20

Array = NDArray[np.generic]


class Shape(Struct, array_like=True, frozen=True):
    """An array without its bytes.

    Attributes:
        dtype: one of `DTYPES`; values are little-endian, those of bool are 0 or 1.
        codec: how its bytes travel, as `protocol.features` has it.
        size: its bytes where a codec is named, else 0: type and sizes tell.
    """

    dtype: Annotated[str, Meta(max_length=16)]
    dims: Annotated[tuple[U32, ...], Meta(max_length=MAX_DIMS)]
    codec: Annotated[str, Meta(max_length=16)] = ""
    size: U32 = 0


Shapes = Annotated[tuple[Shape, ...], Meta(max_length=MAX_ARRAYS)]


class GraphOffer(Struct, array_like=True, frozen=True):
    """A cut network whose second part this cloud runs.

    Attributes:
        model_id: hex, names the files of both parts and what travels between them.
        name: for people.
        batches: whether several requests are run as one.
        step_us: of one request, microseconds, as measured when the service was started; 0 when it is not told.
    """

    model_id: Name
    name: Name
    batches: bool = False
    step_us: Micros = 0


def pack(arrays: Sequence[Array], codec: str = "") -> tuple[tuple[Shape, ...], bytes]:
    """Arrays as they travel.

    Args:
        codec: of those that it applies to; the others travel as they are.

    Raises:
        ProtocolError: too many, one of another type, or values that the codec cannot carry.
    """
    if len(arrays) > MAX_ARRAYS:
        raise ProtocolError(f"{len(arrays)} arrays", f"at most {MAX_ARRAYS} travel together")
    shapes, parts = list[Shape](), list[bytes]()
    for array in arrays:
        if array.dtype.name not in DTYPES or array.ndim > MAX_DIMS:
            raise ProtocolError(f"an array of type {array.dtype} with {array.ndim} dimensions", "it cannot travel")
        used = features.applies(codec, array.dtype, array.shape)
        if used not in features.LOSSLESS and not np.isfinite(array).all():
            used = ""  # a mask of -inf, say
        part = features.encode(array, used)
        shapes.append(Shape(array.dtype.name, array.shape, used, len(part) if used else 0))
        parts.append(part)
    return tuple(shapes), b"".join(parts)


def array_bytes(shapes: Sequence[Shape]) -> int:
    """Bytes of arrays once they are decoded.

    Raises:
        ProtocolError: a type that does not travel.
    """
    for shape in shapes:
        if shape.dtype not in DTYPES:
            raise ProtocolError(f"an array of type {shape.dtype!r}", f"use one of {', '.join(DTYPES)}")
    return sum(math.prod(one.dims) * np.dtype(one.dtype).itemsize for one in shapes)


def unpack(shapes: Sequence[Shape], data: bytes, most_bytes: int = MOST_BYTES) -> list[Array]:
    """The arrays; most may not be written to.

    Args:
        most_bytes: of all that travelled in a codec, as arrays.

    Raises:
        ProtocolError: a type that does not travel, another number of bytes than the shapes need, or arrays that are no
            such codec's or too large.
    """
    sizes = [shape.size if shape.codec else array_bytes([shape]) for shape in shapes]
    whole = array_bytes([shape for shape in shapes if shape.codec])
    if sum(sizes) != len(data):
        raise ProtocolError(f"{len(data)} bytes for arrays that need {sum(sizes)}", "send all of their bytes, in order")
    if whole > most_bytes:
        raise ProtocolError(f"arrays of {whole} bytes, coded in {len(data)}", f"send at most {most_bytes}")
    found, at = list[Array](), 0
    for shape, size in zip(shapes, sizes, strict=True):
        part = memoryview(data)[at : at + size]
        try:
            array = features.decode(part, shape.codec, np.dtype(shape.dtype), shape.dims)
        except ValueError as error:  # empty, with sizes that no array can have
            raise ProtocolError(f"an array of the shape {list(shape.dims)}", "it is too large") from error
        if shape.dtype == "bool" and (array.view(np.uint8) > 1).any():
            raise ProtocolError("an array of bool holds another byte than 0 and 1", "the sender's array is broken")
        found.append(array)
        at += size
    return found
