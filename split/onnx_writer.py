"""The parts of an ONNX model as files: whole nodes, and the weights that they use.

Weights that lay beside the model lie beside each part that uses them; they are copied piece by piece and never held.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from isthmus.protocol.errors import PlanError
from isthmus.split.files import open_regular
from isthmus.split.onnx_file import MOST_BYTES, external, tensors_of

ALIGN = 4096  # of a weight's place in its file, so that it can be mapped
_PIECE = 8 << 20


def write_part(part: onnx.ModelProto, source: Path, target: Path) -> list[Path]:
    """Writes one part; all files that it has.

    Args:
        part: of the model in `source`; its external weights are changed to lie beside `target`.

    Raises:
        PlanError: a weight is not where the model says.
        OSError: something cannot be read or written.
    """
    outside = [one for one in tensors_of(part) if one.data_location == onnx.TensorProto.EXTERNAL]
    files = [target]
    if outside:
        weights = target.with_suffix(".weights")
        files.append(weights)
        with weights.open("wb") as written:
            for tensor in outside:
                place = external(tensor, source.parent)
                written.write(bytes(-written.tell() % ALIGN))
                start = written.tell()
                for piece in _pieces(place.file, place.offset, place.length):
                    written.write(piece)
                del tensor.external_data[:]
                for key, value in (("location", weights.name), ("offset", start), ("length", place.length)):
                    entry = tensor.external_data.add()
                    entry.key, entry.value = key, str(value)
    if part.ByteSize() > MOST_BYTES:
        raise PlanError(f"{target.name} would be larger than an ONNX file can be", "export its weights beside it")
    target.write_bytes(part.SerializeToString(deterministic=True))
    return files


def _pieces(file: Path, offset: int, length: int) -> Iterator[bytes]:
    with open_regular(file) as opened:
        opened.seek(offset)
        while length > 0:
            piece = opened.read(min(length, _PIECE))
            if not piece:
                raise PlanError(f"{file.name} ends too soon", "the file is truncated: copy it again")
            length -= len(piece)
            yield piece
