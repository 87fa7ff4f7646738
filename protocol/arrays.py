"""How named arrays travel: types and shapes in the message, the bytes of all of them one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Final

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

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

Array = NDArray[np.generic]


class Shape(Struct, array_like=True, frozen=True):
    """An array without its bytes.

    Attributes:
        dtype: one of `DTYPES`; values are little-endian, those of bool are 0 or 1.
    """

    dtype: Annotated[str, Meta(max_length=16)]
    dims: Annotated[tuple[U32, ...], Meta(max_length=MAX_DIMS)]


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


def pack(arrays: Sequence[Array]) -> tuple[tuple[Shape, ...], bytes]:
    """Arrays as they travel.

    Raises:
        ProtocolError: too many, or one of another type.
    """
    if len(arrays) > MAX_ARRAYS:
        raise ProtocolError(f"{len(arrays)} arrays", f"at most {MAX_ARRAYS} travel together")
    shapes = []
    for array in arrays:
        if array.dtype.name not in DTYPES or array.ndim > MAX_DIMS:
            raise ProtocolError(f"an array of type {array.dtype} with {array.ndim} dimensions", "it cannot travel")
        shapes.append(Shape(array.dtype.name, array.shape))
    return tuple(shapes), b"".join(np.asarray(one, _little(one.dtype)).tobytes() for one in arrays)


def unpack(shapes: Sequence[Shape], data: bytes) -> list[Array]:
    """The arrays; most may not be written to.

    Raises:
        ProtocolError: a type that does not travel, or another number of bytes than the shapes need.
    """
    sizes = []
    for shape in shapes:
        if shape.dtype not in DTYPES:
            raise ProtocolError(f"an array of type {shape.dtype!r}", f"use one of {', '.join(DTYPES)}")
        sizes.append(math.prod(shape.dims) * np.dtype(shape.dtype).itemsize)
    if sum(sizes) != len(data):
        raise ProtocolError(f"{len(data)} bytes for arrays that need {sum(sizes)}", "send all of their bytes, in order")
    found, at = list[Array](), 0
    for shape, size in zip(shapes, sizes, strict=True):
        kind = np.dtype(shape.dtype)
        part = memoryview(data)[at : at + size]
        if kind == np.bool_ and bytes(part).translate(None, b"\0\1"):
            raise ProtocolError("an array of bool holds another byte than 0 and 1", "the sender's array is broken")
        try:
            array = np.frombuffer(part, _little(kind)).reshape(shape.dims)
        except ValueError as error:  # empty, with sizes that no array can have
            raise ProtocolError(f"an array of the shape {list(shape.dims)}", "it is too large") from error
        found.append(array if array.flags.aligned else array.copy())
        at += size
    return found


def _little(kind: np.dtype[np.generic]) -> np.dtype[np.generic]:
    return kind.newbyteorder("<")
