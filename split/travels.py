"""What travels at a cut, for each of some inputs, and how often the network answers as before when it is coded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.protocol import features
from isthmus.protocol.arrays import DTYPES, pack, unpack
from isthmus.protocol.errors import PlanError, ProtocolError
from isthmus.split.agreement import Agree, share
from isthmus.split.graph_exits import NONE, Leaving
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_measure import outputs, session
from isthmus.split.transform import Transform

MOST = 1 << 31  # bytes of arrays: what is too much for a message the plan says
PART_BYTES = 25  # in the message, of one more tensor
Nodes = tuple[int, ...]
Feeds = Mapping[str, Any]
Came = list[list[Any]]  # what travelled, of each input, as it came out
Costs = tuple[float, float, float]  # bytes of an input, ms to encode it, ms to decode it


class Travels:
    """See the module.

    Args:
        file: of the model, beside which weights may lie.
        nodes: those on the device.
        inputs, answers: what the network takes, and what all of it answers.
        agree: see `agreement.share`.
        leaving: where inputs leave before anything travels; their answers count, too.

    Attributes:
        names: of the tensors.
        arrays: the tensors, of each input that gets as far.
        plain_bytes: of an input as it is.

    Raises:
        PlanError: no cut, or no input gets as far.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        file: Path,
        nodes: Nodes,
        inputs: Sequence[Feeds],
        answers: Sequence[Sequence[Any]],
        agree: Agree,
        leaving: Leaving = NONE,
    ) -> None:
        self._graph, self._answers, self._agree, self._leaving = graph, answers, agree, leaving
        self._asking = [at for at in range(len(inputs)) if leaving.asks(at)]
        if not self._asking:
            raise PlanError("every input leaves at an exit", "raise its confidence")
        halves = graph.halves(nodes)
        first, self._second = session(halves.device, file, 0), session(halves.cloud, file, 0)
        self.names = [one.name for one in self._second.get_inputs()]
        self.arrays, self._kept = list[list[Any]](), list[Feeds]()
        for feeds in (inputs[at] for at in self._asking):
            made = dict(zip([one.name for one in first.get_outputs()], _ran(first, feeds), strict=True))
            self.arrays.append([_array(name, {**feeds, **made}[name]) for name in self.names])
            self._kept.append({name: made[name] for name in halves.kept if name in made})
        self._gives = [one.name for one in self._second.get_outputs()]
        self.plain_bytes = float(np.mean([sum(one.nbytes for one in arrays) for arrays in self.arrays]))

    @property
    def plain_agreement(self) -> float:
        """With what travels as it is: what exits change."""
        return 1.0 - self._leaving.lost() / len(self._answers)

    def agreement(self, came: Sequence[Sequence[Any]], least: float = 0.0) -> float:
        """The share of answers that stay the same when this came out; 0 as soon as fewer than `least` can."""
        lost, most = self._leaving.lost(), (1.0 - least) * len(self._answers)
        for at, arrays, own in zip(self._asking, came, self._kept, strict=True):
            made = _ran(self._second, dict(zip(self.names, arrays, strict=True)))
            told = {**own, **dict(zip(self._gives, made, strict=True))}
            mine = [told.get(name) for name in self._graph.outputs]
            lost += 1.0 - same(self._graph, mine, self._answers[at], self._agree)
            if lost > most + 1e-9:
                return 0.0  # too many have changed
        return 1.0 - lost / len(self._answers)

    def coded(self, codec: str) -> tuple[Costs, Came] | None:
        """What a codec costs on average, and what comes out; None where it cannot carry this."""
        sizes, encode_s, decode_s, came = list[int](), list[float](), list[float](), Came()
        for arrays in self.arrays:
            began = time.perf_counter()
            try:
                shapes, data = pack(arrays, codec)
            except ProtocolError:
                return None
            encoded = time.perf_counter()
            came.append(list(unpack(shapes, data, MOST)))
            decode_s.append(time.perf_counter() - encoded)
            encode_s.append(encoded - began)
            sizes.append(len(data))
        return (float(np.mean(sizes)), float(np.median(encode_s)) * 1e3, float(np.median(decode_s)) * 1e3), came

    def transformed(self, transforms: Mapping[int, Transform]) -> tuple[Costs, Came]:
        """See `coded`; for tensors by their place, transformed.

        Raises:
            ProtocolError: it is more than a message takes.
        """
        sizes, encode_s, decode_s, came = list[int](), list[float](), list[float](), Came()
        for arrays in self.arrays:
            began = time.perf_counter()
            split = [transforms[at].split(one) if at in transforms else [one] for at, one in enumerate(arrays)]
            shapes, data = pack([part for parts in split for part in parts], features.UNIT)
            encoded = time.perf_counter()
            back: Iterator[Any] = iter(unpack(shapes, data))
            parts = [[next(back) for _ in one] for one in split]
            came.append([transforms[at].joined(one) if at in transforms else one[0] for at, one in enumerate(parts)])
            decode_s.append(time.perf_counter() - encoded)
            encode_s.append(encoded - began)
            sizes.append(len(data) + PART_BYTES * (len(shapes) - len(arrays)))
        return (float(np.mean(sizes)), float(np.median(encode_s)) * 1e3, float(np.median(decode_s)) * 1e3), came


def same(graph: OnnxGraph, mine: Sequence[Any], whole: Sequence[Any], agree: Agree) -> float:
    """The share of an input's answers that are the same: of the output that fares worst."""
    pairs = zip(graph.outputs, mine, whole, strict=True)
    return min((share(a, b, agree) for name, a, b in pairs if name not in graph.inputs), default=1.0)


def _array(name: str, value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.name not in DTYPES:
        raise PlanError(f"{name!r} is no array of numbers, which could travel", "cut it elsewhere")
    return value


def _ran(running: Any, feeds: Feeds) -> list[Any]:
    try:
        return list(outputs(running, {one.name: feeds[one.name] for one in running.get_inputs()}))
    except KeyError as error:
        raise PlanError(f"a part needs {error}, which nothing makes", "choose another way") from error
