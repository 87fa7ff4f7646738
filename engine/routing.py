"""Recorded routing: which experts each position took in each layer, to measure with, or to give to an engine."""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import EngineError

FORMAT = "isthmus-routing-1"
MOST_BYTES = 1 << 32  # of a file, unpacked
_ARRAYS = ("chosen", "weights", "foreseen")
_AGAIN = "record it again: isthmus experts place BUNDLE --text FILE --save-routing FILE.npz"


@dataclass(frozen=True, slots=True)
class Routing:
    """Experts along a text.

    Attributes:
        chosen: int32 [positions, layers, top_k], by falling weight.
        weights: float32 [positions, layers, top_k], what the router gives them, also where experts count in full.
        foreseen: int32 [positions, layers, top_k], what was named for each layer one layer early; of the first layer,
            which nobody foresees, what it chose.
    """

    chosen: NDArray[np.int32]
    weights: NDArray[np.float32]
    foreseen: NDArray[np.int32]

    def __post_init__(self) -> None:
        if not self.chosen.ndim == 3 or not self.chosen.shape == self.weights.shape == self.foreseen.shape:
            raise EngineError("recorded routing has arrays of different shapes", "record it again")


@dataclass(frozen=True, slots=True)
class RoutingFile:
    """Recorded routing as it is kept, and whose it is.

    Attributes:
        model: the model's id, as its bundle says.
        n_experts: of a layer.
        text: what it was recorded along, for people.
    """

    routing: Routing
    model: str
    n_experts: int
    text: str = ""

    def save(self, path: Path) -> None:
        """Writes it as .npz: the three arrays, `model`, `n_experts`, `text` and `format`.

        Raises:
            OSError: it cannot be written; what stood there stands.
        """
        aside = path.with_name(f".{path.name[:50]}.{os.getpid()}.part")
        one = self.routing
        try:
            with aside.open("wb") as file:
                np.savez_compressed(
                    file,
                    chosen=one.chosen,
                    weights=one.weights,
                    foreseen=one.foreseen,
                    model=np.array(self.model),
                    n_experts=np.array(self.n_experts),
                    text=np.array(self.text),
                    format=np.array(FORMAT),
                )
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> RoutingFile:
        """Reads and checks one.

        Raises:
            EngineError: it cannot be read, is damaged, or is no recorded routing.
        """
        try:
            with zipfile.ZipFile(path) as packed:
                large = sum(one.file_size for one in packed.infolist()) > MOST_BYTES
            if large:
                raise EngineError(f"{path} unpacks to more than {MOST_BYTES >> 30} GiB", _AGAIN)
            with np.load(path, allow_pickle=False) as found:
                if str(found["format"]) != FORMAT:
                    raise EngineError(f"{path} is of the format {str(found['format'])[:40]!r}", _AGAIN)
                chosen, weights, foreseen = (found[name] for name in _ARRAYS)
                model, n_experts, text = str(found["model"]), int(found["n_experts"]), str(found["text"])
        except FileNotFoundError as error:
            raise EngineError(f"there is no file {path}", "name recorded routing, or a text with --text") from error
        except (
            OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, NotImplementedError, RuntimeError,
            zipfile.BadZipFile, zlib.error,
        ) as problem:  # fmt: skip
            raise EngineError(f"{path} is no recorded routing, or is damaged: {problem}", _AGAIN) from problem
        if not all(isinstance(one, np.ndarray) for one in (chosen, weights, foreseen)):
            raise EngineError(f"{path} is no recorded routing, or is damaged", _AGAIN)
        kinds = [one.dtype for one in (chosen, weights, foreseen)]
        if kinds != [np.int32, np.float32, np.int32]:
            raise EngineError(f"{path} holds {', '.join(map(str, kinds))}, not int32, float32 and int32", _AGAIN)
        routing = Routing(chosen, weights, foreseen)
        named = (chosen, foreseen)
        if not chosen.size or min(one.min() for one in named) < 0 or max(one.max() for one in named) >= n_experts:
            raise EngineError(f"{path} names experts that are none of {n_experts}, or no positions", _AGAIN)
        if not np.isfinite(weights).all():
            raise EngineError(f"{path} has weights that are not finite", _AGAIN)
        return cls(routing, model, n_experts, text)
