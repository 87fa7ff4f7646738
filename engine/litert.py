"""A network in a `.tflite` file, whole, run by LiteRT."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import EngineError, first_line


class Signature(NamedTuple):
    """An input or an output.

    Attributes:
        shape: with -1 for dimensions that are left open.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def litert() -> tuple[Any, str]:
    """The class `Interpreter`, and what it is: LiteRT, or tflite-runtime where that is all there is.

    Raises:
        EngineError: neither is installed.
    """
    from importlib.metadata import version

    try:
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter, f"LiteRT {version('ai-edge-litert')}"
    except ImportError:
        pass
    try:
        from tflite_runtime.interpreter import Interpreter
    except ImportError as error:
        raise EngineError("LiteRT is not installed", "pip install 'isthmus[litert]'") from error
    return Interpreter, f"tflite-runtime {version('tflite-runtime')}"


class LitertNetwork:
    """See the module; arrays in, arrays out.

    Args:
        threads: of a run, 0 for one per core.

    Attributes:
        inputs, outputs: in the file's order; a name that comes again is numbered.
        runtime: what runs it.

    Raises:
        EngineError: LiteRT is missing, or cannot run the file.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        interpreter, self.runtime = litert()
        self._name = path.name
        try:
            self._interpreter = interpreter(model_path=str(path), num_threads=threads or os.cpu_count() or 1)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError, TypeError) as error:
            raise EngineError(f"LiteRT cannot run {path.name}: {first_line(error)}", "export it again") from error
        self._given, self._made = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self.inputs, self.outputs = _signatures(self._given), _signatures(self._made)
        self._shapes = [tuple(detail["shape"].tolist()) for detail in self._given]  # as tensors lie in memory now

    def run(self, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """The outputs.

        Raises:
            EngineError: an input is absent, or does not fit.
        """
        runs = self._interpreter
        try:
            for at, one in enumerate(self.inputs):
                if one.name not in arrays:
                    raise EngineError(f"the input {one.name!r} is absent", _give(self.inputs))
                if self._shapes[at] != arrays[one.name].shape:
                    runs.resize_tensor_input(self._given[at]["index"], arrays[one.name].shape, strict=True)
                    runs.allocate_tensors()
                    self._shapes[at] = arrays[one.name].shape
            for one, detail in zip(self.inputs, self._given, strict=True):
                runs.set_tensor(detail["index"], arrays[one.name])
            runs.invoke()
            found = [runs.get_tensor(detail["index"]) for detail in self._made]
        except (ValueError, RuntimeError) as error:
            raise EngineError(f"{self._name} cannot be run on that: {first_line(error)}", _give(self.inputs)) from error
        return {one.name: array for one, array in zip(self.outputs, found, strict=True)}


def _signatures(details: list[dict[str, Any]]) -> tuple[Signature, ...]:
    seen: Counter[str] = Counter()
    found = []
    for detail in details:
        name = str(detail["name"])
        seen[name] += 1
        open_shape = detail.get("shape_signature", detail["shape"])
        shape = open_shape if len(open_shape) == len(detail["shape"]) else detail["shape"]
        called = name if seen[name] == 1 else f"{name} ({seen[name]})"
        found.append(Signature(called, np.dtype(detail["dtype"]), tuple(int(one) for one in shape)))
    return tuple(found)


def _give(inputs: tuple[Signature, ...]) -> str:
    return "give " + ", ".join(f"{one.name} {one.dtype.name} {list(one.shape)}" for one in inputs)
