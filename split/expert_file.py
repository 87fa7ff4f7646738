"""The file of one layer's experts: a safetensors file whose tensors stand in the order in which they are read.

Experts follow each other as records of whole pages. A record is an expert's planes in order (see `quant.planes`), so
that the leading planes of an expert are one run of bytes, which a device reads past the page cache. The header names a
CRC-32C for each plane; bundle.json has the sha256 of the whole file. Tensors named `gap.N` fill pages.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from isthmus.engine.config import DecoderConfig
from isthmus.engine.reader import crc32c
from isthmus.protocol.errors import BundleError, ModelError, QuantError
from isthmus.quant.nested import WIDTHS
from isthmus.quant.packed import PackedMatrix
from isthmus.quant.planes import MATRICES, PAGE, Formats, Plane, expert_planes, n_planes, plane_bytes
from isthmus.split.roles import Weights
from isthmus.split.tensorfile import TensorFile, tag_of

GAP = "gap."
AGAIN = "remove it, and fetch or split the model again"


@dataclass(frozen=True, slots=True)
class Records:
    """Where a file's experts stand.

    Attributes:
        path: of the file.
        start: offset of the first expert's first plane.
        n_experts: how many records there are.
        formats: of every expert's gate, up and down.
        planes: of each record.
        checksums: CRC-32C of each plane of each expert.
    """

    path: Path
    start: int
    n_experts: int
    formats: Formats
    planes: tuple[Plane, ...]
    checksums: tuple[tuple[int, ...], ...]

    @property
    def record_bytes(self) -> int:
        """Bytes of an expert."""
        return sum(plane.nbytes for plane in self.planes)

    @property
    def plane_sizes(self) -> tuple[int, ...]:
        """Bytes of each plane."""
        return tuple(plane.nbytes for plane in self.planes)

    def formats_of(self, planes: int) -> Formats:
        """The formats of an expert's matrices with only its leading planes."""
        if planes == len(self.planes):
            return self.formats
        return WIDTHS[planes - 1], WIDTHS[planes - 1], WIDTHS[planes - 1]

    def offset(self, expert: int, plane: int) -> int:
        """Where a plane begins."""
        return self.start + expert * self.record_bytes + sum(self.plane_sizes[:plane])

    @classmethod
    def open(cls, path: Path, config: DecoderConfig, header: str) -> Records:
        """Reads a file's header; no expert is read.

        Args:
            header: the sha256 that it must have.

        Raises:
            BundleError: the file is missing or truncated, its header is another one, or describes something else.
        """
        file = TensorFile(path, sparse=True)
        experts, name = config.experts, path.name
        assert experts is not None
        if hashlib.sha256(file.buffer[: file.data_start]).hexdigest() != header:
            raise BundleError(f"{name} was altered, or is another model's or layer's: its header is another one", AGAIN)
        try:
            described = json.loads(file.metadata["experts"])
            formats = tuple(file.matrices[f"experts.0.{matrix}"][0] for matrix in MATRICES)
            checksums = tuple(tuple(int(sum) for sum in sums) for sums in described["crc32c"])
            planes = expert_planes((formats[0], formats[1], formats[2]), config.d_model, experts.d_expert)
            start = file.tensors[f"experts.0.gate.{planes[0].fields[0].array}"].start
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError, QuantError) as problem:
            raise BundleError(f"{name} does not describe its experts: {problem}", AGAIN) from problem
        found = cls(path, start, experts.n_experts, (formats[0], formats[1], formats[2]), planes, checksums)
        fits = all(len(sums) == len(planes) and all(0 <= one < 1 << 32 for one in sums) for sums in checksums)
        if len(checksums) != experts.n_experts or not fits:
            raise BundleError(f"{name} holds no {experts.n_experts} experts of {len(planes)} planes", AGAIN)
        if start % PAGE or len(file.buffer) < start + experts.n_experts * found.record_bytes:
            raise BundleError(f"{name} is truncated: it ends within an expert", AGAIN)
        for expert in range(experts.n_experts):
            for index, plane in enumerate(planes):
                at = found.offset(expert, index)
                for field in plane.fields:
                    info = file.tensors.get(f"experts.{expert}.{field.matrix}.{field.array}")
                    if info is None or info.start != at + field.offset:
                        what = f"{field.matrix}.{field.array} of expert {expert}"
                        raise BundleError(f"{name} has no {what} in its place", AGAIN)
        return found


def encode_experts(weights: Weights, config: DecoderConfig) -> Iterator[bytes]:
    """The bytes of a file that holds a layer's experts, piece by piece.

    Raises:
        ModelError: an expert is missing, or they have different formats.
    """
    experts = config.experts
    assert experts is not None
    every = [_expert(weights, index) for index in range(experts.n_experts)]
    formats = every[0]["gate"].format, every[0]["up"].format, every[0]["down"].format
    for index, matrices in enumerate(every):
        if tuple(matrix.format for matrix in matrices.values()) != formats:
            raise ModelError(f"expert {index} has other formats than expert 0", "choose one for all with --weights")
    planes = expert_planes(formats, config.d_model, experts.d_expert)
    data = [[plane_bytes(plane, matrices) for plane in planes] for matrices in every]
    header: dict[str, object] = {}
    described = {
        f"experts.{e}.{name}": {"format": m.format, "rows": m.rows, "cols": m.cols}
        for e, matrices in enumerate(every)
        for name, m in matrices.items()
    }
    checksums = [[crc32c(plane) for plane in record] for record in data]
    header["__metadata__"] = {
        "format": "isthmus",
        "matrices": json.dumps(described),
        "experts": json.dumps({"planes": n_planes(formats), "crc32c": checksums}),
    }
    at = 0
    for e, matrices in enumerate(every):
        for plane in planes:
            at = _describe(header, plane, f"experts.{e}.", matrices, at)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    yield struct.pack("<Q", len(text)) + text
    for record in data:
        yield from record


def _expert(weights: Weights, index: int) -> dict[str, PackedMatrix]:
    found = {}
    for name in MATRICES:
        matrix = weights.get(f"experts.{index}.{name}")
        if not isinstance(matrix, PackedMatrix):
            raise ModelError(f"the checkpoint lacks {name!r} of expert {index}", "fetch the model again")
        found[name] = matrix
    return found


def _describe(
    header: dict[str, object], plane: Plane, prefix: str, matrices: Mapping[str, PackedMatrix], start: int
) -> int:
    """Enters a plane's tensors and gaps, which follow each other without a hole; returns where the next one starts."""
    at = start

    def gap(to: int) -> None:
        if to > at:
            header[f"{GAP}{at}"] = {"dtype": "U8", "shape": [to - at], "data_offsets": [at, to]}

    for field in plane.fields:
        array = matrices[field.matrix].arrays[field.array]
        begin = start + field.offset
        gap(begin)
        at = begin + field.nbytes
        header[f"{prefix}{field.matrix}.{field.array}"] = {
            "dtype": tag_of(array.dtype), "shape": list(array.shape), "data_offsets": [begin, at]
        }  # fmt: skip
    gap(start + plane.nbytes)
    return start + plane.nbytes
