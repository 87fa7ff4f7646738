"""The GGUF container, versions 2 and 3: metadata as Python values, tensors as views of the mapped file.

The `gguf` package's own reader makes an array object of every string: 4 s for a vocabulary of 49,152, 0.1 s here.
Its block decoders are what unusual tensor types go through.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import ModelError
from isthmus.split.files import open_regular

# GGML type id -> (name, weights in a block, bytes of a block)
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MAX_COUNT = 1 << 28
MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor: its GGML type, its shape (rows before columns) and its bytes u8 [..., bytes of a row]."""

    name: str
    type_id: int
    type: str
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]


class GgufFile:
    """A mapped GGUF file.

    Attributes:
        fields: the metadata; arrays of numbers are numpy arrays, of strings lists.
        tensors: by name.

    Raises:
        ModelError: the file is missing, truncated, no GGUF, of another version or in several pieces.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path}: {error}", "check that the file is there and is not empty") from error
        if self._buffer[:4] != b"GGUF":
            raise ModelError(f"{path} is no GGUF file", "give a .gguf file, or a folder with config.json")
        self._at = 4
        try:
            self.fields, self.tensors = self._parse()
        except (struct.error, ValueError, TypeError, IndexError, RecursionError, OverflowError) as error:
            raise ModelError(f"{path} is damaged or truncated: {error}", "fetch it again") from error

    def _read(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._buffer, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _count(self) -> int:
        n: int = self._read("Q")
        if n > min(MAX_COUNT, len(self._buffer)):
            raise ValueError(f"a count of {n}")
        return n

    def _string(self) -> str:
        n = self._count()
        if self._at + n > len(self._buffer):
            raise ValueError(f"a string of {n} bytes")
        text = self._buffer[self._at : self._at + n].decode("utf-8", "replace")
        self._at += n
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, n = self._read("I"), self._count()
            if inner not in _SCALARS:
                return [self._value(inner) for _ in range(n)]
            values = np.frombuffer(self._buffer, np.dtype("<" + _SCALARS[inner]), n, self._at)
            self._at += values.nbytes
            return values
        if kind not in _SCALARS:
            raise ValueError(f"metadata of type {kind}")
        return self._read(_SCALARS[kind])

    def _parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        version = self._read("I")
        if version not in (2, 3):
            raise ModelError(f"{self.path} has GGUF version {version}", "convert it to version 3, little-endian")
        n_tensors, n_fields = self._count(), self._count()
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            name = self._string()
            fields[name] = self._value(self._read("I"))
        if int(fields.get("split.count", 1)) > 1:
            raise ModelError(f"{self.path} is one of several pieces", "merge them with: llama-gguf-split --merge")
        entries = []
        for _ in range(n_tensors):
            name = self._string()
            n_dims = self._read("I")
            if n_dims > MAX_DIMENSIONS:
                raise ValueError(f"tensor {name[:60]} of {n_dims} dimensions")
            dims = [self._read("Q") for _ in range(n_dims)]
            entries.append((name, tuple(reversed(dims)), self._read("I"), self._read("Q")))
        alignment = int(fields.get("general.alignment", 32))
        if alignment < 1:
            raise ValueError(f"an alignment of {alignment}")
        data = -(-self._at // alignment) * alignment
        return fields, {name: self._tensor(name, shape, kind, data + at) for name, shape, kind, at in entries}

    def _tensor(self, name: str, shape: tuple[int, ...], type_id: int, at: int) -> GgufTensor:
        type_name, per, size = TYPES.get(type_id) or _unusual(type_id)
        if not shape or shape[-1] % per or min(shape) < 1:
            raise ValueError(f"tensor {name} of shape {shape} in blocks of {per}")
        row = shape[-1] // per * size
        count = row
        for dimension in shape[:-1]:
            count *= dimension
        if at + count > len(self._buffer):
            raise ValueError(f"tensor {name} ends beyond the file")
        raw = np.frombuffer(self._buffer, np.uint8, count, at).reshape(*shape[:-1], row)
        return GgufTensor(name, type_id, type_name, shape, raw)


def _unusual(type_id: int) -> tuple[str, int, int]:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise ModelError(f"GGML type {type_id} needs the gguf package", "pip install gguf") from error
    kind = GGMLQuantizationType(type_id)
    per, size = GGML_QUANT_SIZES[kind]
    return kind.name, per, size
