"""The second parts of networks that were cut: what devices ask of them, several requests as one where that is right."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from isthmus.cloud.metrics import Metrics
from isthmus.cloud.peers import Peer
from isthmus.cloud.work import Refusal
from isthmus.protocol.arrays import Array, GraphOffer, Shape, array_bytes, pack, unpack
from isthmus.protocol.errors import EngineError, ProtocolError, ServiceError
from isthmus.protocol.messages import Code, Fault, Infer, Inferred
from isthmus.protocol.pictures import names_picture, pillow
from isthmus.split.graph_manifest import CLOUD, GraphManifest, Named

_log = logging.getLogger("isthmus.cloud")
TOGETHER = 16  # requests that are run as one, at most
TOGETHER_BYTES = 32 << 20  # of their arrays
MAX_WAITING = 1024  # requests of all devices
LIMIT_S = 30.0  # of a run
UNCODED = 8  # times the largest message that its arrays may have bytes once they are decoded
_WARM, _TIMED = 2, 5  # runs when the service is started


class Runs(Protocol):
    """The second part of a network: a `GraphPart`, or what runs it elsewhere."""

    def run(self, arrays: Mapping[str, Array], wanted: Sequence[str] | None = None) -> Mapping[str, Any]:
        """Its outputs, by name."""
        ...


class _Asked(NamedTuple):
    peer: Peer
    message: Infer
    whole: int  # bytes of its arrays once they are decoded
    size: int
    received_s: float

    def arrays(self) -> list[Array]:
        """What it asks with."""
        return unpack(self.message.shapes, self.message.data, self.whole)

    @property
    def kind(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What it has in common with those that it can be run with."""
        return tuple((one.dtype, one.dims[1:]) for one in self.message.shapes)

    @property
    def rows(self) -> int | None:
        """Of all arrays; None where they differ."""
        sizes = {one.dims[0] if one.dims else -1 for one in self.message.shapes}
        return sizes.pop() if len(sizes) == 1 and -1 not in sizes else None


@dataclass(eq=False)
class Graph:
    """A network being served.

    Attributes:
        offer: what Welcome says of it.
        takes: what its part is given, in the order in which it travels.
        gives: names of the outputs that it makes, in the order in which they travel.
        pictures: whether pictures may come as files.
        waiting: requests.
    """

    offer: GraphOffer
    part: Runs
    takes: tuple[Named, ...]
    gives: tuple[str, ...]
    pictures: bool = False
    waiting: deque[_Asked] = field(default_factory=deque)


def serve_graph(manifest: GraphManifest, part: Runs, step_us: int = 0) -> Graph:
    """A network from its second part, which is open already."""
    gives = tuple(one.name for one in manifest.outputs if one.name not in manifest.kept)
    offer = GraphOffer(manifest.model_id, manifest.name, manifest.batches, step_us)
    pictures = names_picture(manifest.codec)
    if pictures:
        pillow()  # now, not when the first one comes
    return Graph(offer, part, manifest.crossing, gives, pictures)


def load_graph(folder: Path, *, threads: int = 0, slow_down: float = 1.0, part: Runs | None = None) -> Graph:
    """A network from its bundle's folder; its part is timed where all shapes are known.

    Args:
        part: runs it in place of the bundle's own.

    Raises:
        BundleError: no bundle of a network that was cut, or one without the cloud's part.
        EngineError: nothing runs it here.
    """
    from isthmus.split.graph_bundle import GraphBundle

    bundle = GraphBundle.open(folder)
    part = part or bundle.part(CLOUD, threads, slow_down, LIMIT_S)
    return serve_graph(bundle.manifest, part, _timed(part, bundle.manifest.crossing))


class Graphs:
    """All networks of a service, and what is asked of them.

    Args:
        max_message_bytes: of an answer.
        max_waiting: requests of one connection that wait.
        retry_ms: what a device is told to wait when too many requests wait.
        clock: seconds, monotonic; of receipts and deadlines.

    Raises:
        ServiceError: one network twice.
    """

    def __init__(
        self,
        graphs: Sequence[Graph],
        metrics: Metrics,
        *,
        max_message_bytes: int,
        max_waiting: int,
        retry_ms: int,
        clock: Callable[[], float],
    ) -> None:
        self._graphs = {graph.offer.model_id: graph for graph in graphs}
        if len(self._graphs) < len(graphs):
            raise ServiceError("the same network twice", "name each bundle once")
        self._metrics, self._clock = metrics, clock
        self._most_bytes, self._max_waiting, self._retry_ms = max_message_bytes, max_waiting, retry_ms
        self._most_whole = UNCODED * max_message_bytes

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def offers(self) -> tuple[GraphOffer, ...]:
        """What Welcome says."""
        return tuple(graph.offer for graph in self._graphs.values())

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(len(graph.waiting) for graph in self._graphs.values())

    @property
    def ready(self) -> bool:
        """Whether a request waits."""
        return any(graph.waiting for graph in self._graphs.values())

    def ask(self, peer: Peer, message: Infer, size: int, now_s: float) -> None:
        """Takes a request in.

        Raises:
            Refusal: there is no such network here, its arrays are others, or too many requests wait.
            ProtocolError: the arrays are none.
        """
        graph = self._graphs.get(message.model_id)
        if graph is None:
            names = ", ".join(graph.offer.name for graph in self._graphs.values()) or "no network"
            problem = f"this cloud serves {names}, not {message.model_id[:12]}"
            raise Refusal(Code.UNKNOWN_MODEL, problem, "use the same bundle on both sides")
        mine = sum(one.peer is peer for each in self._graphs.values() for one in each.waiting)
        if mine >= self._max_waiting or self.waiting >= MAX_WAITING:
            raise Refusal(Code.BUSY, f"{max(mine, self.waiting)} requests wait already", "later", self._retry_ms)
        _check(message.shapes, graph.takes)
        if not graph.pictures and any(names_picture(one.codec) for one in message.shapes):
            raise Refusal(Code.UNSUPPORTED, "no picture travels for this network", "send arrays as they are")
        whole = array_bytes(message.shapes)
        if whole > self._most_whole:
            raise Refusal(
                Code.UNSUPPORTED, f"arrays of {whole} bytes", f"ask for fewer rows: {self._most_whole} at most"
            )
        graph.waiting.append(_Asked(peer, message, whole, size, now_s))

    def step(self, meanwhile: AbstractContextManager[None]) -> None:
        """Runs the oldest request of each network, and what can be run with it, and answers."""
        for graph in self._graphs.values():
            if asked := self._together(graph):
                self._run(graph, asked, meanwhile)

    def _together(self, graph: Graph) -> list[_Asked]:
        found, kept, size = list[_Asked](), deque[_Asked](), 0
        while graph.waiting:
            one = graph.waiting.popleft()
            waited_ms = (self._clock() - one.received_s) * 1e3
            if one.peer.gone:
                continue
            if one.message.budget_ms and waited_ms > one.message.budget_ms:
                self._refuse(one, Refusal(Code.DEADLINE, f"it waited for {waited_ms:.0f} ms"))
                continue
            fits = not found or (
                graph.offer.batches
                and one.rows is not None
                and found[0].rows is not None
                and one.kind == found[0].kind
                and len(found) < TOGETHER
                and size + one.whole <= TOGETHER_BYTES
            )
            if not fits:
                kept.append(one)
                continue
            found.append(one)
            size += one.whole
            if not graph.offer.batches:
                break
        graph.waiting.extendleft(reversed(kept))
        return found

    def _run(self, graph: Graph, asked: list[_Asked], meanwhile: AbstractContextManager[None]) -> None:
        began_s = self._clock()
        try:
            with meanwhile:
                answers, engine_us = _computed(graph, asked)
        except Exception as error:  # what one device sends must not end the service
            if len(asked) > 1:  # nor spoil what others get: halves, down to the one that does
                self._run(graph, asked[: len(asked) // 2], meanwhile)
                self._run(graph, asked[len(asked) // 2 :], meanwhile)
                return
            if isinstance(error, EngineError):
                refusal = Refusal(Code.ENGINE, error.problem, error.remedy)
            elif isinstance(error, ProtocolError):
                refusal = Refusal(Code.BAD_MESSAGE, error.problem, error.remedy)
            else:
                _log.exception("a network failed")
                refusal = Refusal(Code.ENGINE, "the network failed on this", "the cloud's log says why")
            self._refuse(asked[0], refusal)
            return
        self._metrics.step_s.add(engine_us * 1e-6)
        self._metrics.step_rows.add(len(asked))
        self._metrics.step_sequences.add(len(asked))
        for one, arrays in zip(asked, answers, strict=True):
            queue_us = int((began_s - one.received_s) * 1e6)
            self._metrics.queue_s.add(queue_us * 1e-6)
            try:
                shapes, data = pack(arrays)
            except (ProtocolError, AttributeError) as error:  # what is no array has no type
                self._refuse(one, Refusal(Code.ENGINE, f"the network gives what cannot travel: {error}"))
                continue
            if len(data) > self._most_bytes:
                problem = f"the answer has {len(data)} bytes; one message holds {self._most_bytes}"
                self._refuse(one, Refusal(Code.UNSUPPORTED, problem, "cut the network later, or ask for fewer rows"))
                continue
            one.peer.done(one.size)
            one.peer.send(Inferred(one.message.request, shapes, data, engine_us, max(0, queue_us), len(asked)))

    def _refuse(self, one: _Asked, error: Refusal) -> None:
        one.peer.done(one.size)
        told = error.problem[:1000], error.remedy[:1000], error.retry_ms
        one.peer.send(Fault(Code(error.code), *told, request=one.message.request))


def _computed(graph: Graph, asked: Sequence[_Asked]) -> tuple[list[list[Array]], int]:
    """The outputs for each request, and the engine's microseconds for all of them."""
    names, all_ = [one.name for one in graph.takes], [one.arrays() for one in asked]
    given = all_[0] if len(asked) == 1 else [np.concatenate(arrays) for arrays in zip(*all_, strict=True)]
    began = time.perf_counter()
    found = graph.part.run(dict(zip(names, given, strict=True)), graph.gives)
    engine_us = int((time.perf_counter() - began) * 1e6)
    if len(asked) == 1:
        return [[found[name] for name in graph.gives]], engine_us
    ends = np.cumsum([one.rows for one in asked]).tolist()
    if any(not found[name].ndim or len(found[name]) != ends[-1] for name in graph.gives):
        raise EngineError(f"{graph.offer.name} gives another number of rows than it was given")
    parts = [np.split(found[name], ends[:-1]) for name in graph.gives]
    return [[part[at] for part in parts] for at in range(len(asked))], engine_us


def _check(shapes: Sequence[Shape], takes: Sequence[Named]) -> None:
    """Raises a Refusal where arrays are not those that are taken."""
    if len(shapes) != len(takes):
        raise Refusal(Code.BAD_MESSAGE, f"{len(shapes)} arrays travelled, not {len(takes)}", "use the same bundle")
    for shape, one in zip(shapes, takes, strict=True):
        if not one.fits(shape.dtype, shape.dims):
            problem = f"{one.name[:200]!r} came as {shape.dtype} {list(shape.dims)}, not {one.text}"
            raise Refusal(Code.BAD_MESSAGE, problem, "use the same bundle on both sides")


def _timed(part: Runs, takes: Sequence[Named]) -> int:
    """Microseconds of a run on zeros, the best of some; 0 where a shape is open behind its first size."""
    if any(size is None for one in takes for size in one.shape[1:]):
        return 0
    zeros = {one.name: np.zeros([1 if size is None else size for size in one.shape], one.dtype) for one in takes}
    best = float("inf")
    try:
        for run in range(_WARM + _TIMED):
            began = time.perf_counter()
            part.run(zeros)
            if run >= _WARM:
                best = min(best, time.perf_counter() - began)
    except EngineError as error:
        _log.info("%s is not timed on zeros: %s", takes[0].name, error.problem)
        return 0
    return int(best * 1e6)
