"""An expert's planes: the bit planes of its three matrices, side by side, as they are read from a disk and evicted.

Matrices of one nested format have a plane for each of its widths, which needs those before it; all others have one,
which is all of them. Each plane is a run of whole pages: gate's arrays, up's, then down's, each at a multiple of 64
bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isthmus.quant.groups import shapes
from isthmus.quant.nested import WIDTHS
from isthmus.quant.packed import FORMATS, PackedMatrix

PAGE = 4096
ALIGN = 64
MATRICES = ("gate", "up", "down")
MAX_PLANES = 3
_NESTED = (("p0", "s2"), ("p1", "s4"), ("p2",))

Formats = tuple[str, str, str]  # of gate, up and down


@dataclass(frozen=True, slots=True)
class Field:
    """Where an array of a matrix stands in a plane.

    Attributes:
        matrix: one of `MATRICES`.
        array: its name in the format.
        offset, nbytes: within the plane.
    """

    matrix: str
    array: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plane:
    """A plane's fields and its bytes, a multiple of `PAGE`."""

    fields: tuple[Field, ...]
    nbytes: int


def n_planes(formats: Formats) -> int:
    """How many planes matrices of these formats have."""
    return WIDTHS.index(formats[0]) + 1 if formats[0] in WIDTHS and len(set(formats)) == 1 else 1


def expert_planes(formats: Formats, d_model: int, d_expert: int) -> tuple[Plane, ...]:
    """The planes of an expert whose gate and up are [d_expert, d_model] and whose down is [d_model, d_expert].

    Raises:
        QuantError: an unknown format.
    """
    sizes = (d_expert, d_model), (d_expert, d_model), (d_model, d_expert)
    described = [shapes(format, *size) for format, size in zip(formats, sizes, strict=True)]
    found = []
    for names in _arrays(formats):
        fields, at = list[Field](), 0
        for matrix, format, arrays in zip(MATRICES, formats, described, strict=True):
            for name in names or FORMATS[format]:
                dtype, (blocks, lines, width) = arrays[name]
                nbytes = dtype.itemsize * blocks * lines * width
                fields.append(Field(matrix, name, at, nbytes))
                at += -(-nbytes // ALIGN) * ALIGN
        found.append(Plane(tuple(fields), -(-at // PAGE) * PAGE))
    return tuple(found)


def _arrays(formats: Formats) -> Sequence[tuple[str, ...] | None]:
    """The arrays of each plane; None for all that a format has."""
    planes = n_planes(formats)
    return [None] if (planes == 1 and formats[0] not in WIDTHS) or len(set(formats)) > 1 else _NESTED[:planes]


def plane_bytes(plane: Plane, matrices: Mapping[str, PackedMatrix]) -> bytes:
    """The bytes of a plane of an expert.

    Args:
        matrices: its gate, up and down.
    """
    out = bytearray(plane.nbytes)
    for field in plane.fields:
        out[field.offset : field.offset + field.nbytes] = matrices[field.matrix].arrays[field.array].tobytes()
    return bytes(out)
