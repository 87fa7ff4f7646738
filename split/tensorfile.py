"""The safetensors container: 8 bytes of header length, a JSON header, the tensors' bytes; mapped, never copied.

Our files pad the header so that data starts at a multiple of 4096, and order the tensors so that each stands at a
multiple of 64 bytes where its own size allows. Any safetensors reader opens them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import BundleError, IsthmusError, QuantError
from isthmus.quant.groups import shapes
from isthmus.quant.packed import PackedMatrix
from isthmus.split.files import open_regular

ALIGN = 4096
MAX_HEADER_BYTES = 64 << 20
MAX_DIMENSIONS = 8
# What JSON of another form than expected raises.
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, OverflowError)
DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # the upper half of an f32
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_TAGS = {dtype: tag for tag, dtype in DTYPES.items() if tag != "BF16"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor stands: `start` is an offset into the file."""

    tag: str
    shape: tuple[int, ...]
    start: int


class TensorFile:
    """A mapped safetensors file.

    Args:
        path: the file.
        error: the class of the errors raised.
        sha256: the hash that the file must have, in hex; it is taken of the mapped bytes, which are the ones used.
        sparse: whether little of it will be looked at, and nothing beside that shall be read.

    Attributes:
        data_start: offset of the first tensor's bytes, behind the header.
        tensors: by name.
        matrices: format, rows and columns of the packed matrices, by name.

    Raises:
        IsthmusError: the file is missing, truncated or altered, or its header does not fit its bytes.
    """

    def __init__(
        self, path: Path, error: type[IsthmusError] = BundleError, sha256: str | None = None, sparse: bool = False
    ) -> None:
        self.path = path
        self._error = error
        try:
            with open_regular(path) as file:
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as problem:
            raise error(f"cannot read {path}: {problem}", "check that the file is there and is not empty") from problem
        if sparse and hasattr(mmap, "MADV_RANDOM"):
            self.buffer.madvise(mmap.MADV_RANDOM)
        if sha256 is not None and hashlib.sha256(self.buffer).hexdigest() != sha256:
            raise error(
                f"{path} was altered: its sha256 is not the listed one", "remove it, and fetch or split the model again"
            )
        self.tensors, metadata = self._parse()
        self.metadata: dict[str, Any] = metadata
        self.matrices = self._parse_matrices()

    def _damaged(self, what: str) -> IsthmusError:
        return self._error(f"{self.path.name} is damaged or truncated: {what}", "fetch or write it again")

    def _parse(self) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
        size = len(self.buffer)
        if size < 8:
            raise self._damaged(f"{size} bytes")
        (length,) = struct.unpack_from("<Q", self.buffer)
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise self._damaged(f"its header claims {length} bytes of {size}")
        self.data_start = 8 + length
        try:
            header = json.loads(self.buffer[8 : 8 + length])
            metadata = header.pop("__metadata__", {})
            entries = {
                name: (
                    str(e["dtype"]),
                    tuple(int(n) for n in e["shape"]),
                    int(e["data_offsets"][0]),
                    int(e["data_offsets"][1]),
                )
                for name, e in header.items()
            }
        except _MALFORMED as problem:
            raise self._damaged("its header cannot be read") from problem
        tensors = {}
        for name, (tag, shape, begin, end) in entries.items():
            if tag not in DTYPES:
                raise self._error(
                    f"{name[:60]} in {self.path.name} has type {tag[:60]}", f"supported are {', '.join(DTYPES)}"
                )
            n = DTYPES[tag].itemsize
            for dimension in shape:
                n *= dimension
            if (
                len(shape) > MAX_DIMENSIONS
                or not all(0 <= d <= size for d in shape)
                or begin < 0
                or end - begin != n
                or 8 + length + end > size
            ):
                raise self._damaged(f"{name[:60]} of shape {str(shape)[:60]} stands at {begin}..{end}")
            tensors[name] = TensorInfo(tag, shape, 8 + length + begin)
        return tensors, metadata if isinstance(metadata, dict) else {}

    def _parse_matrices(self) -> dict[str, tuple[str, int, int]]:
        try:
            described = json.loads(self.metadata.get("matrices", "{}"))
            return {name: (str(m["format"]), int(m["rows"]), int(m["cols"])) for name, m in described.items()}
        except _MALFORMED as problem:
            raise self._damaged("its matrices are not described") from problem

    def array(self, name: str) -> NDArray[np.generic]:
        """A tensor as a read-only view of the mapped file; BF16 comes as u16.

        Raises:
            IsthmusError: there is none of that name.
        """
        info = self.tensors.get(name)
        if info is None:
            raise self._error(f"{self.path.name} has no tensor {name!r}", "it may be another model's; write it again")
        dtype = DTYPES[info.tag]
        count = 1
        for dimension in info.shape:
            count *= dimension
        return np.frombuffer(self.buffer, dtype, count, info.start).reshape(info.shape)

    def matrix(self, name: str) -> PackedMatrix:
        """A packed matrix, its arrays views of the mapped file.

        Raises:
            IsthmusError: there is none of that name, or its arrays do not fit its format.
        """
        if name not in self.matrices:
            raise self._error(f"{self.path.name} has no matrix {name!r}", "it may be another model's; write it again")
        format, rows, cols = self.matrices[name]
        if rows < 1 or cols < 1:
            raise self._damaged(f"matrix {name} has {rows} rows and {cols} columns")
        try:
            expected = shapes(format, rows, cols)
        except QuantError as problem:
            raise self._error(f"matrix {name!r}: {problem.problem}", "this version of isthmus is too old") from problem
        arrays = {part: self.array(f"{name}.{part}") for part in expected}
        for part, (dtype, shape) in expected.items():
            if arrays[part].dtype != dtype or arrays[part].shape != shape:
                raise self._damaged(f"{name}.{part} does not fit format {format}")
            if self.tensors[f"{name}.{part}"].start % _alignment(arrays[part].nbytes):
                raise self._damaged(f"{name}.{part} is not aligned")
        return PackedMatrix(format, rows, cols, arrays)

    def weights(self, but: Container[str] = ()) -> dict[str, PackedMatrix | NDArray[np.float32]]:
        """All matrices, and all tensors that belong to none, but those named."""
        found: dict[str, PackedMatrix | NDArray[np.float32]] = {name: self.matrix(name) for name in self.matrices}
        for name, info in self.tensors.items():
            if name.rpartition(".")[0] not in self.matrices and name not in but:
                if info.tag != "F32":
                    raise self._damaged(f"{name} is {info.tag}, not F32")
                found[name] = self.array(name).view(np.float32)
        return found


def tag_of(dtype: np.dtype[Any]) -> str:
    """The container's name of a type of numbers."""
    return _TAGS[dtype]


def _alignment(nbytes: int) -> int:
    """The largest power of two, up to 64, that divides a tensor's size: what it needs and what it leaves behind."""
    return min(64, nbytes & -nbytes) or 64


def encode(
    weights: Mapping[str, PackedMatrix | NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a file that holds packed matrices and arrays, piece by piece.

    Args:
        metadata: kept beside what describes the matrices.
    """
    matrices: dict[str, dict[str, str | int]] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in weights.items():
        if isinstance(value, PackedMatrix):
            matrices[name] = {"format": value.format, "rows": value.rows, "cols": value.cols}
            arrays |= {f"{name}.{part}": array for part, array in value.arrays.items()}
        else:
            arrays[name] = value
    ordered = sorted(arrays.items(), key=lambda item: -_alignment(item[1].nbytes))
    described = {**(metadata or {}), "format": "isthmus", "matrices": json.dumps(matrices)}
    header: dict[str, Any] = {"__metadata__": described}
    at = 0
    for name, array in ordered:
        offsets = [at, at + array.nbytes]
        header[name] = {"dtype": _TAGS[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    yield struct.pack("<Q", len(text)) + text
    for _, array in ordered:
        yield np.ascontiguousarray(array).data.cast("B")
