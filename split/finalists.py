"""The finalists of a plan, timed as the models that would really run: fused, each side's nodes together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from isthmus.engine.graph_part import part_options
from isthmus.protocol.errors import PlanError
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_measure import outputs, session
from isthmus.split.profile import Profile, TensorSize
from isthmus.split.timing import timed, timed_in_turns

SECONDS = 0.4  # for each side of each finalist
Nodes = tuple[int, ...]


class Finalists:
    """What parts of a model take, on this machine and by it on the two that were profiled.

    A profile of another machine is scaled: what a part takes there is to what it takes here as the whole model is.

    Args:
        file: of the model; its external weights lie beside it.
        feeds: inputs to run it on.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        file: Path,
        device: Profile,
        cloud: Profile,
        feeds: Mapping[str, Any],
        seconds: float = SECONDS,
    ) -> None:
        self._graph, self._file, self._feeds, self._seconds = graph, file, feeds, seconds
        self._device, self._cloud = device, cloud
        graph.learn([_info(name, size) for name, size in {**device.inputs, **device.tensors}.items()])
        self._here: dict[int, float] = {}

    def fused(self, ways: Iterable[Nodes]) -> dict[Nodes, tuple[float, float]]:
        """Milliseconds of the device's and of the cloud's part, by the nodes on the device; ways that are no cut, or
        whose parts the runtime does not run by themselves, are left out.
        """
        found = {}
        for nodes in ways:
            with suppress(PlanError):
                found[nodes] = self._both(nodes)
        return found

    @property
    def faster(self) -> tuple[float, float]:
        """How many times longer the model takes where the device, and the cloud, was profiled than it takes here."""
        return self._scale(self._device), self._scale(self._cloud)

    def _both(self, nodes: Nodes) -> tuple[float, float]:
        halves = self._graph.halves(nodes)
        first = self._loaded(halves.device, self._device)
        feeds = {one.name: self._feeds[one.name] for one in first.get_inputs()}
        runs = [partial(outputs, first, feeds)]
        values = dict(zip([one.name for one in first.get_outputs()], outputs(first, feeds), strict=True))
        second = self._loaded(halves.cloud, self._cloud)
        values = {**self._feeds, **values}
        feeds = {one.name: values[one.name] for one in second.get_inputs()}
        runs.append(partial(outputs, second, feeds))
        (device_ms, _), (cloud_ms, _) = timed_in_turns(runs, self._seconds)
        return device_ms * self._scale(self._device), cloud_ms * self._scale(self._cloud)

    def _loaded(self, part: onnx.ModelProto, profile: Profile) -> ort.InferenceSession:
        return session(part, self._file, _threads(profile), part_options())

    def _scale(self, profile: Profile) -> float:
        """How many times longer the whole model took where it was profiled than it takes here."""
        threads = _threads(profile)
        if threads not in self._here:
            whole = session(self._graph.model, self._file, threads)
            self._here[threads], _ = timed(partial(outputs, whole, self._feeds), self._seconds)
        return profile.whole_ms / self._here[threads]


def _threads(profile: Profile) -> int:
    """As many as the profile's machine took, of those that are here."""
    return min(profile.threads, os.cpu_count() or 1)


def _info(name: str, size: TensorSize) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(size.dtype))
    return onnx.helper.make_tensor_value_info(name, kind, list(size.shape))
