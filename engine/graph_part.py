"""A part of a network that is no decoder: an ONNX file, run by onnxruntime."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.affinity import use_threads
from isthmus.engine.onnx_session import onnxruntime
from isthmus.engine.slow import check_slow_down
from isthmus.engine.watchdog import WATCHDOG
from isthmus.protocol.errors import EngineError, first_line

Arrays = Mapping[str, NDArray[np.generic]]


class GraphPart:
    """See the module; arrays in, arrays out, nothing is kept.

    Args:
        path: of a file that was checked; weights that lie beside it are read from there.
        threads: of a run, 0 for one per core; they stop spinning when it ends.
        slow_down: pretends to be a weaker machine by waiting in proportion to what it computes; 1 for none.
        limit_s: seconds after which a run is given up, 0 for none: inputs may say how often a loop turns.

    Attributes:
        inputs, outputs: names.

    Raises:
        EngineError: onnxruntime is missing, or cannot run the file.
    """

    def __init__(self, path: Path, threads: int = 0, slow_down: float = 1.0, limit_s: float = 0.0) -> None:
        check_slow_down(slow_down)
        ort, options = onnxruntime(), part_options()
        use_threads(options, threads)
        options.log_severity_level = 4  # failures come back as exceptions
        self._path, self._slow_down, self._limit_s, self._new_run = path, slow_down, limit_s, ort.RunOptions
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's errors share no public class
            raise EngineError(f"onnxruntime cannot run {path}: {first_line(error)}", "split the model again") from error
        self.inputs: tuple[str, ...] = tuple(one.name for one in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(one.name for one in self._session.get_outputs())

    def run(self, arrays: Arrays, wanted: Sequence[str] | None = None) -> dict[str, NDArray[np.generic]]:
        """The outputs, or those that are wanted; arrays that are no input are left out.

        Raises:
            EngineError: an input is absent, or does not fit.
        """
        absent = [name for name in self.inputs if name not in arrays]
        if absent:
            raise EngineError(f"the input {absent[0]!r} is absent", f"give {', '.join(self.inputs)}")
        names = list(self.outputs if wanted is None else wanted)
        began, run = time.perf_counter(), self._new_run()
        watched = WATCHDOG.begin(run, self._limit_s) if self._limit_s else 0
        try:
            found: list[Any] = self._session.run(names, {name: arrays[name] for name in self.inputs}, run)
        except Exception as error:
            if self._limit_s and time.perf_counter() - began >= self._limit_s:
                problem = f"{self._path.name} was given up after {self._limit_s:g} s"
                raise EngineError(problem, "give it less to compute") from error
            raise EngineError(f"{self._path.name} cannot be run on that: {first_line(error)}", _SHAPES) from error
        finally:
            if watched:
                WATCHDOG.end(watched)
        for name, value in zip(names, found, strict=True):
            if not isinstance(value, np.ndarray) or value.dtype.hasobject:
                raise EngineError(f"{self._path.name} gives {name!r}, which is no array of numbers", _SHAPES)
        if self._slow_down > 1.0:
            time.sleep((self._slow_down - 1.0) * (time.perf_counter() - began))
        return dict(zip(names, found, strict=True))


def part_options() -> Any:
    """What a part's `SessionOptions` have beside its threads: also for who measures what a part will take."""
    options = onnxruntime().SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.enable_mem_pattern = False  # one would be kept for each shape that was ever seen
    return options


_SHAPES = "give arrays of the types and shapes that `isthmus inspect` shows"
