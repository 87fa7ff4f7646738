"""The finalists of a plan, timed as the models that would really run: fused, each side's nodes together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx

from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_measure import drawn, outputs, session, timed
from isthmus.split.profile import Profile, TensorSize

SECONDS = 0.4  # for each side of each finalist
Nodes = tuple[int, ...]


class Finalists:
    """What parts of a model take, on this machine and by it on the two that were profiled.

    A profile of another machine is scaled: what a part takes there is to what it takes here as the whole model is.

    Args:
        file: of the model; its external weights lie beside it.
    """

    def __init__(self, graph: OnnxGraph, file: Path, device: Profile, cloud: Profile, seconds: float = SECONDS) -> None:
        self._graph, self._file, self._seconds = graph, file, seconds
        self._device, self._cloud = device, cloud
        graph.learn([_info(name, size) for name, size in {**device.inputs, **device.tensors}.items()])
        chance = np.random.default_rng(0)
        self._feeds = {name: drawn(size.dtype, size.shape, chance) for name, size in device.inputs.items()}
        self._here: dict[int, float] = {}

    def fused(self, ways: Iterable[Nodes]) -> dict[Nodes, tuple[float, float]]:
        """Milliseconds of the device's and of the cloud's part, by the nodes on the device.

        Raises:
            PlanError: the runtime cannot run a part (which operator, and where).
        """
        found = {}
        for nodes in ways:
            here, there = set(nodes), [at for at in range(len(self._graph.nodes)) if at not in set(nodes)]
            if here and there:
                found[nodes] = self._both(nodes, there)
        return found

    def _both(self, here: Nodes, there: list[int]) -> tuple[float, float]:
        graph, inputs = self._graph, self._graph.inputs
        crossing = graph.crossing(here)
        made = [name for name in crossing if name not in inputs]
        kept = [name for name in graph.outputs if graph.made_by(name) in set(here) and name not in made]
        used = {name for at in here for name in graph.needs[at]}
        given = [name for name in inputs if name in used]
        device = graph.part(here, given, [*made, *kept])
        feeds = {name: self._feeds[name] for name in given}
        running = session(device, self._file, self._device.threads)
        device_ms, _ = timed(running, feeds, self._seconds)
        values = dict(zip([*made, *kept], outputs(running, feeds), strict=True))
        cloud = graph.part(there, crossing, [name for name in graph.outputs if graph.made_by(name) in set(there)])
        feeds = {name: values[name] if name in values else self._feeds[name] for name in crossing}
        cloud_ms, _ = timed(session(cloud, self._file, self._cloud.threads), feeds, self._seconds)
        return device_ms * self._scale(self._device), cloud_ms * self._scale(self._cloud)

    def _scale(self, profile: Profile) -> float:
        """How many times longer the whole model took where it was profiled than it takes here."""
        if profile.threads not in self._here:
            whole = session(self._graph.model, self._file, profile.threads)
            self._here[profile.threads], _ = timed(whole, self._feeds, self._seconds)
        return profile.whole_ms / self._here[profile.threads]


def _info(name: str, size: TensorSize) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(size.dtype))
    return onnx.helper.make_tensor_value_info(name, kind, list(size.shape))
