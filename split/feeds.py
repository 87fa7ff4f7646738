"""Inputs of a network: out of a file, or random."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from isthmus.protocol.errors import PlanError
from isthmus.split.files import open_regular


def read_feeds(arrays: str, inputs: Collection[str], shapes: Collection[str] = ()) -> dict[str, Any]:
    """Arrays by the names of inputs.

    Args:
        arrays: a .npz file; "" for none.
        shapes: names of inputs for which a shape was given.

    Raises:
        PlanError: it is none, or has a name that is no input's.
    """
    loaded: dict[str, Any] = {}
    if arrays:
        try:
            with open_regular(Path(arrays)) as file, np.load(file, allow_pickle=False) as opened:
                loaded = {name: opened[name] for name in opened.files}
        except (OSError, ValueError, AttributeError, EOFError, BadZipFile, zlib.error, RuntimeError) as error:
            raise PlanError(f"{arrays} is no .npz file of plain arrays", "write it with numpy.savez") from error
    for name in (*loaded, *shapes):
        if name not in inputs:
            raise PlanError(f"the model has no input {name!r}", f"it has: {', '.join(inputs)}")
    return loaded


def drawn(dtype: Any, shape: Sequence[int], generator: np.random.Generator) -> Any:
    """An array of random values; of whole numbers, ones."""
    found = generator.standard_normal(shape) if np.dtype(dtype).kind == "f" else np.ones(shape)
    return found.astype(dtype)


def closed(name: str, shape: Sequence[int]) -> list[int]:
    """The dimensions of an input, of which those that are left open are below 1; a first one that is open is one.

    Raises:
        PlanError: another one is open.
    """
    dims = list(shape)
    if dims and dims[0] < 1:
        dims[0] = 1
    if any(one < 1 for one in dims):
        shown = ",".join(str(one) if one > 0 else "?" for one in dims)
        raise PlanError(f"input {name!r} has the open shape {shown}", f"give it: --shape {name}={shown}")
    return dims


def size_of(value: Any) -> list[Any]:
    """The type, shape and bytes of an array, as a `profile.TensorSize` is written; of what is none, nothing."""
    return [str(value.dtype), list(value.shape), int(value.nbytes)] if isinstance(value, np.ndarray) else []
