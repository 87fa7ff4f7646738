"""A placement of experts as it is kept: for a device, which of them its memory holds first."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import EngineError

VERSION = 1
MOST_BYTES = 1 << 26  # of a file
_AGAIN = "make it again: isthmus experts place BUNDLE -o FILE"


class Placement(msgspec.Struct, frozen=True):
    """Where the experts of a model stand.

    Attributes:
        model: its id; `name` is for people.
        kind: over a device's memory, flash and a cloud, or over workers.
        places: their names; of a device the first is its memory.
        stands: the number of each expert's place, by layer; empty for layers without experts.
        uses: share of tokens that take each expert, along the text that it was made for.
        figures: what it costs, for people and programs that compare.
    """

    model: str
    name: str
    kind: Literal["device", "workers"]
    places: tuple[str, ...]
    stands: tuple[tuple[int, ...], ...]
    uses: tuple[tuple[float, ...], ...]
    figures: dict[str, Any] = msgspec.field(default_factory=dict)
    format: Literal["isthmus-placement"] = "isthmus-placement"
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise EngineError(f"the placement is of version {self.version}, not {VERSION}", _AGAIN)
        if [len(row) for row in self.stands] != [len(row) for row in self.uses]:
            raise EngineError("the placement has other experts than uses of them", _AGAIN)
        if not all(0 <= place < len(self.places) for row in self.stands for place in row):
            raise EngineError(f"the placement names places that are none of its {len(self.places)}", _AGAIN)
        if not all(0 <= share <= 1 for row in self.uses for share in row):
            raise EngineError("the placement has shares of tokens that are none", _AGAIN)

    @property
    def memory(self) -> list[NDArray[np.int64]]:
        """For each layer the experts that a device's memory holds, the least used first."""
        found = []
        for stands, uses in zip(self.stands, self.uses, strict=True):
            held = np.flatnonzero(np.array(stands, np.int64) == 0)
            found.append(held[np.argsort(np.array(uses)[held], kind="stable")])
        return found

    def encoded(self) -> bytes:
        """As JSON, for people to read as well."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    @classmethod
    def load(cls, path: Path) -> Placement:
        """Reads and checks one.

        Raises:
            EngineError: it cannot be read, or is no placement.
        """
        try:
            if path.exists() and not path.is_file():
                raise EngineError(f"{path} is no file", "name a placement's file")
            if path.is_file() and path.stat().st_size > MOST_BYTES:
                raise EngineError(f"{path} is too large for a placement", _AGAIN)
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise EngineError(f"{path} cannot be read: {error.strerror}", "name a placement's file") from error
        except RecursionError as error:
            raise EngineError(f"{path} is no placement: it is nested too deep", _AGAIN) from error
        except msgspec.DecodeError as error:
            if isinstance(error.__cause__, EngineError):
                raise EngineError(f"{path}: {error.__cause__.problem}", error.__cause__.remedy) from error
            raise EngineError(f"{path} is no placement: {error}", _AGAIN) from error
