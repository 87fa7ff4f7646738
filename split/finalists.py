"""The finalists of a plan, timed as the models that would really run: fused, each side's nodes together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from isthmus.engine.binding import default_threads
from isthmus.engine.graph_part import part_options
from isthmus.protocol.arrays import pack, unpack
from isthmus.protocol.errors import PlanError, ProtocolError
from isthmus.protocol.features import is_codec
from isthmus.protocol.pictures import decode_picture, encode_picture
from isthmus.split.onnx_graph import Halves, OnnxGraph, within
from isthmus.split.onnx_measure import outputs, session
from isthmus.split.onnx_picture import pictured
from isthmus.split.onnx_stages import stages
from isthmus.split.onnx_transform import transformed
from isthmus.split.pictures import Picture, Preprocess
from isthmus.split.plan import Row
from isthmus.split.profile import Profile, TensorSize
from isthmus.split.timing import timed, timed_in_turns

SECONDS = 0.4  # for each side of each finalist
SITTINGS = 6  # of the whole model, at most
NEAR, FAR = 1.15, 1.5  # times as long as another: the same; what somebody else on this machine may be the reason of


Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Fused:
    """What a way's parts take, in milliseconds.

    Attributes:
        stages_ms: of the device, up to each exit, and of what it does behind the last.
    """

    stages_ms: tuple[float, ...]
    cloud_ms: float
    edge_ms: float = 0.0


class Finalists:
    """What parts of a model take, on this machine and by it on the two that were profiled.

    A profile of another machine is scaled: what a part takes there is to what it takes here as the whole model is.

    Args:
        file: of the model; its external weights lie beside it.
        feeds: inputs to run it on.
        edge: a server's between them, where there is one.
        how, shown: what is done with pictures, and the one that `feeds` were made of.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        file: Path,
        device: Profile,
        cloud: Profile,
        feeds: Mapping[str, Any],
        how: Preprocess | None = None,
        shown: Picture | None = None,
        seconds: float = SECONDS,
        edge: Profile | None = None,
    ) -> None:
        self._graph, self._file, self._feeds, self._seconds = graph, file, feeds, seconds
        self._device, self._edge, self._cloud, self._how, self._shown = device, edge, cloud, how, shown
        graph.learn([_info(name, size) for name, size in {**device.inputs, **device.tensors}.items()])
        self._here: dict[int, float] = {}

    def timed(self, row: Row) -> Fused | None:
        """What a row's parts take, what travels being coded and decoded; None for one that has no parts.

        Raises:
            PlanError: the runtime does not run them by themselves, or what is between them cannot travel.
        """
        if (row.kind == "device" and not row.leaves) or (row.kind == "image" and self._shown is None):
            return None
        try:
            return self._picture(row.codec) if row.kind == "image" else self._parts(row)
        except ProtocolError as error:
            raise PlanError(error.problem, error.remedy) from error

    @property
    def faster(self) -> tuple[float, float]:
        """How many times longer the model takes where the device, and the cloud, was profiled than it takes here."""
        return self._scale(self._device), self._scale(self._cloud)

    def _parts(self, row: Row) -> Fused:
        graph, values, codec = self._graph, dict(self._feeds), row.codec if is_codec(row.codec) else ""
        exits, cloud, crossing = row.way[1], None, tuple[str, ...]()
        if row.kind == "device":
            here = graph.part(row.device, graph.inputs, graph.outputs)
        else:
            halves = graph.halves(row.device) if row.device else graph.handed_over()
            if row.three:
                return self._three(row, halves)
            halves = transformed(halves, row.transforms)
            there_ = self._edge if row.edge and self._edge is not None else self._cloud
            here, cloud, crossing = halves.device, self._loaded(halves.cloud, there_), halves.crossing
        parts = [self._run(part, values) for part in stages(here, exits)]
        if cloud is None:
            return self._fused(parts, None)
        travels = [values[name] for name in crossing]
        shapes, data = pack(travels, codec)

        def there() -> None:
            came = dict(zip(crossing, unpack(shapes, data, 1 << 31), strict=True))
            outputs(cloud, {one.name: came[one.name] for one in cloud.get_inputs()})

        found = self._fused([*parts[:-1], _both(parts[-1], lambda: pack(travels, codec))], there)
        if not row.edge or self._edge is None:
            return found
        edge_ms = found.cloud_ms / self._scale(self._cloud) * self._scale(self._edge)
        return Fused(found.stages_ms, 0.0, edge_ms)

    def _three(self, row: Row, halves: Halves) -> Fused:
        """Of a device, an edge server and a cloud."""
        assert self._edge is not None
        values, inner = dict(self._feeds), OnnxGraph(halves.cloud)
        second = inner.halves(within(row.device, row.edge))
        first = self._run(halves.device, values) if row.device else _nothing
        runs = [run for part in (second.device, second.cloud) if (run := self._run(part, values)) is not None]
        took = [ms for ms, _ in timed_in_turns([first or _nothing, *runs], self._seconds)]
        scales = [self._scale(profile) for profile in (self._device, self._edge, self._cloud)]
        device_ms, edge_ms, cloud_ms = (ms * scale for ms, scale in zip(took, scales, strict=True))
        return Fused((device_ms,), cloud_ms, edge_ms)

    def _picture(self, codec: str) -> Fused:
        assert self._how is not None and self._shown is not None
        whole, left = pictured(self._graph.model, self._how)
        cloud, picture = self._loaded(whole, self._cloud), left.array(self._shown)
        data = memoryview(encode_picture(picture, codec))
        rest = {one.name: self._feeds[one.name] for one in cloud.get_inputs() if one.name != left.input}

        def there() -> None:
            outputs(cloud, {**rest, left.input: decode_picture(data, codec, picture.shape)})

        return self._fused([lambda: encode_picture(picture, codec)], there)

    def _fused(self, here: Sequence[Run | None], there: Run | None) -> Fused:
        runs = [run for run in (*here, there) if run is not None]
        took = iter(timed_in_turns(runs, self._seconds))
        stages_ms = [next(took)[0] * self._scale(self._device) if run is not None else 0.0 for run in here]
        cloud_ms = next(took)[0] * self._scale(self._cloud) if there is not None else 0.0
        return Fused(tuple(stages_ms), cloud_ms)

    def _run(self, part: onnx.ModelProto | None, values: dict[str, Any]) -> Run | None:
        """A run of a part of the device's on what is known; `values` learn what it gives."""
        if part is None:
            return None
        running = self._loaded(part, self._device)
        feeds = {one.name: values[one.name] for one in running.get_inputs()}
        values |= dict(zip([one.name for one in running.get_outputs()], outputs(running, feeds), strict=True))
        return partial(outputs, running, feeds)

    def _loaded(self, part: onnx.ModelProto, profile: Profile) -> ort.InferenceSession:
        return session(part, self._file, _threads(profile), part_options())

    def _scale(self, profile: Profile) -> float:
        """How many times longer the whole model took where it was profiled than it takes here."""
        threads = _threads(profile)
        if threads not in self._here:
            whole = session(self._graph.model, self._file, threads, part_options())
            sittings = list[float]()  # all rows hang on them: the best, once two of them agree, or all were had
            while len(sittings) < SITTINGS and not _agree(sittings, profile.whole_ms):
                sittings.append(timed(partial(outputs, whole, self._feeds), self._seconds)[0])
            self._here[threads] = min(sittings)
        return profile.whole_ms / self._here[threads]


def _agree(sittings: Sequence[float], known_ms: float) -> bool:
    """Whether the two best of some times are near each other, and none of many times what is known of the machine."""
    best, *others = sorted(sittings)[:2] or [np.inf]
    return bool(others) and others[0] < NEAR * best and (best < FAR * known_ms or len(sittings) >= SITTINGS // 2)


def _nothing() -> None:
    """What a device does that only hands on."""


def _both(first: Run | None, then: Run) -> Run:
    """One run after the other."""

    def both() -> None:
        if first is not None:
            first()
        then()

    return both


def _threads(profile: Profile) -> int:
    """As many as the profile's machine took, of those that are here."""
    return min(profile.threads, default_threads())


def _info(name: str, size: TensorSize) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(size.dtype))
    return onnx.helper.make_tensor_value_info(name, kind, list(size.shape))
