"""One graph in an onnxruntime session, its weights and inputs bound without copies."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.affinity import use_threads
from isthmus.engine.onnx_proto import Graph
from isthmus.protocol.errors import EngineError


def onnxruntime() -> Any:
    """The module `onnxruntime`.

    Raises:
        EngineError: it is not installed.
    """
    try:
        import onnxruntime as module
    except ImportError as error:
        raise EngineError("onnxruntime is not installed", "pip install onnxruntime") from error
    return module


class Session:
    """A graph made ready to run.

    Args:
        ort: the module that `onnxruntime` gives.
        threads: threads of a run, 0 for one per core; they stop spinning when a run ends.
    """

    def __init__(self, ort: Any, graph: Graph, threads: int) -> None:
        options = ort.SessionOptions()
        use_threads(options, threads)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4  # failures come back as exceptions
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.enable_cpu_mem_arena = False  # an arena would keep what repacking weights has freed
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        values = [ort.OrtValue.ortvalue_from_numpy(value) for value in graph.initializers.values()]
        if values:
            options.add_external_initializers(list(graph.initializers), values)
        self._session = ort.InferenceSession(graph.model(), options, providers=["CPUExecutionProvider"])
        self._bound = graph.bound
        _return_memory()

    def binding(self) -> Any:
        """An IOBinding with the weights bound."""
        binding = self._session.io_binding()
        for name, value in self._bound.items():
            bind_input(binding, name, value)
        return binding

    def run(
        self, binding: Any, feeds: Mapping[str, NDArray[np.generic]], result: str, out: NDArray[np.float32]
    ) -> None:
        """Runs with `feeds` (C-contiguous) bound on top, writing the output `result` into `out`."""
        for name, value in feeds.items():
            bind_input(binding, name, value)
        bind_output(binding, result, out)
        self._session.run_with_iobinding(binding)


def bind_input(binding: Any, name: str, value: NDArray[np.generic]) -> None:
    """Lets an input read an array, which must outlive the runs."""
    binding.bind_input(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)


def bind_output(binding: Any, name: str, value: NDArray[np.float32]) -> None:
    """Lets an output write into an array, which must outlive the runs."""
    binding.bind_output(name, "cpu", 0, np.float32, value.shape, value.ctypes.data)


def _return_memory() -> None:
    """Gives freed heap back to the system where the C library is glibc: repacking leaves as much as the weights."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
