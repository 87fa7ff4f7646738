"""A network in a `.tflite` file, which is measured and planned in one piece: LiteRT has no way to run half of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.engine.litert import LitertNetwork, Signature
from isthmus.protocol.errors import PlanError
from isthmus.split.feeds import closed, drawn, read_feeds, size_of
from isthmus.split.files import digest_of, open_regular
from isthmus.split.graph import Crossing
from isthmus.split.profile import Profile
from isthmus.split.timing import timed

SUFFIX = ".tflite"
WHOLE = "whole network"  # the one operator that a profile has
_MAGIC = slice(4, 8), b"TFL3"


class TfliteGraph:
    """A network of one node, as the planner knows graphs.

    Args:
        profile: of it, which has the names of what it takes and gives.
    """

    nodes: Sequence[object] = (None,)

    def __init__(self, profile: Profile) -> None:
        self.inputs = list(profile.inputs)
        self.outputs = [name for name in profile.tensors if name not in profile.inputs]
        self.tensors = [Crossing(name, -1, (0,)) for name in self.inputs]
        self.shared_weights: list[tuple[tuple[int, ...], int]] = []

    def made_by(self, name: str) -> int:
        """0 for an output, -1 for an input."""
        return 0 if name in self.outputs else -1

    def crossing(self, device: Collection[int]) -> list[str]:
        """Names that travel: all inputs, or nothing where the network runs on the device."""
        return [] if device else self.inputs


def is_tflite(path: Path) -> bool:
    """Whether a file calls itself one."""
    return path.suffix.lower() == SUFFIX


def digest(path: Path) -> str:
    """The sha256 by which profiles know a network.

    Raises:
        PlanError: it is no .tflite file.
        OSError: it cannot be read.
    """
    place, magic = _MAGIC
    with open_regular(path) as file:
        if file.read(place.stop)[place] != magic:
            raise PlanError(f"{path} is no .tflite file", "name a .tflite or .onnx model")
    return digest_of(path)


def measure(path: str, threads: int, shapes: Mapping[str, Sequence[int]], seconds: float, arrays: str = "") -> Any:
    """A network's profile, as plain data; see `profile.Profile`. Arguments are those of `onnx_measure.measure`.

    Raises:
        PlanError: it is no .tflite file, or its inputs do not fit.
        EngineError: LiteRT is missing, or cannot run it.
    """
    file = Path(path)
    known = digest(file)
    network = LitertNetwork(file, threads)
    feeds = given(network.inputs, shapes, arrays)
    whole_ms, first_ms = timed(partial(network.run, feeds), seconds)
    found = network.run(feeds)
    return {
        "model": known,
        "name": file.stem,
        "runtime": network.runtime,
        "threads": threads,
        "whole_ms": whole_ms,
        "first_ms": first_ms,
        "nodes_ms": [whole_ms],
        "ops": [WHOLE],
        "inputs": {name: size_of(value) for name, value in feeds.items()},
        "tensors": {name: size_of(value) for name, value in (*feeds.items(), *found.items())},
        "weights": [file.stat().st_size],
    }


def given(inputs: Sequence[Signature], shapes: Mapping[str, Sequence[int]], arrays: str) -> dict[str, Any]:
    """Inputs: those of a file, else random ones (whole numbers are 1).

    Raises:
        PlanError: an input's shape is open, or the file does not fit.
    """
    loaded = read_feeds(arrays, [one.name for one in inputs], shapes)
    generator = np.random.default_rng(0)
    found = {}
    for one in inputs:
        if one.dtype.kind not in "fiub":
            raise PlanError(f"input {one.name!r} is {one.dtype}", "only networks of numbers are measured")
        shape = list(shapes[one.name]) if one.name in shapes else None
        if one.name in loaded:
            found[one.name] = loaded[one.name]
        else:
            found[one.name] = drawn(one.dtype, shape or closed(one.name, one.shape), generator)
    return found
