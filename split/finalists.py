"""The finalists of a plan, timed as the models that would really run: fused, each side's nodes together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
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
from isthmus.split.onnx_stages import stages
from isthmus.split.plan import Way
from isthmus.split.profile import Profile, TensorSize
from isthmus.split.timing import timed, timed_in_turns

SECONDS = 0.4  # for each side of each finalist


@dataclass(frozen=True, slots=True)
class Fused:
    """What a way's parts take, in milliseconds.

    Attributes:
        stages_ms: of the device, up to each exit, and of what it does behind the last.
    """

    stages_ms: tuple[float, ...]
    cloud_ms: float


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

    def fused(self, ways: Iterable[Way]) -> dict[Way, Fused]:
        """What parts take; ways that are of one piece, or whose parts the runtime does not run by themselves, are left
        out.
        """
        found = {}
        for way in ways:
            with suppress(PlanError):
                found[way] = self._timed(*way)
        return found

    @property
    def faster(self) -> tuple[float, float]:
        """How many times longer the model takes where the device, and the cloud, was profiled than it takes here."""
        return self._scale(self._device), self._scale(self._cloud)

    def _timed(self, nodes: tuple[int, ...], exits: tuple[str, ...]) -> Fused:
        whole = bool(exits) and len(nodes) == len(self._graph.nodes)
        halves = None if whole else self._graph.halves(nodes)
        values = dict(self._feeds)
        graph = self._graph
        here = graph.part(nodes, graph.inputs, graph.outputs) if halves is None else halves.device
        parts = stages(here, exits)
        runs = [self._run(part, self._device, values) for part in parts]
        if halves is not None:
            runs.append(self._run(halves.cloud, self._cloud, values))
        took = iter(timed_in_turns([run for run in runs if run is not None], self._seconds))
        ms = [next(took)[0] if run is not None else 0.0 for run in runs]
        cloud_ms = ms.pop() * self._scale(self._cloud) if halves is not None else 0.0
        return Fused(tuple(one * self._scale(self._device) for one in ms), cloud_ms)

    def _run(
        self, part: onnx.ModelProto | None, profile: Profile, values: dict[str, Any]
    ) -> Callable[[], object] | None:
        """A run of a part on what is known; `values` learn what it gives."""
        if part is None:
            return None
        running = self._loaded(part, profile)
        feeds = {one.name: values[one.name] for one in running.get_inputs()}
        values |= dict(zip([one.name for one in running.get_outputs()], outputs(running, feeds), strict=True))
        return partial(outputs, running, feeds)

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
