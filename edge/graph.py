"""A network that was cut: its first part on this device, the rest in a cloud, or all of it here."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike

from isthmus.edge.events import Timeouts
from isthmus.edge.graph_pace import FIRST_MS, MOST_LOOK_S, GraphPace
from isthmus.edge.graph_stats import GraphStats
from isthmus.edge.link import Wire
from isthmus.edge.opening import Opening
from isthmus.engine.certainty import certainty
from isthmus.protocol.arrays import Array, pack, unpack
from isthmus.protocol.errors import (
    BundleError,
    DeviceError,
    IsthmusError,
    LinkError,
    PlanError,
    ProtocolError,
    ServiceError,
)
from isthmus.protocol.features import FEATURE_CODECS, UNIT, is_codec
from isthmus.protocol.messages import Code, Fault, Infer, Inferred, Message, Welcome
from isthmus.protocol.pictures import names_picture, pillow
from isthmus.split.bundle import AGAIN
from isthmus.split.graph_bundle import GraphBundle
from isthmus.split.graph_manifest import CLOUD, Named

if TYPE_CHECKING:
    from isthmus.engine.graph_part import GraphPart
    from isthmus.protocol.keys import DeviceKeys

GraphMode = Literal["auto", "split", "local"]
MODES: tuple[GraphMode, ...] = ("auto", "split", "local")
LEAST_RETRY_S = 0.05  # until a busy cloud is asked again
RUN_S = 120.0  # after which a part that is run here is given up
_log = logging.getLogger("isthmus.edge")


@dataclass(slots=True)
class _UnderWay:
    """An input in a pipeline.

    Attributes:
        known: what is known of it.
        began_s, asked_s: when, by the device's clock, and when the cloud was first asked.
        request: to the cloud, 0 for none.
        welcomes: that had come then: another one means that it was lost.
    """

    known: dict[str, Array]
    stats: GraphStats
    began_s: float
    asked_s: float = 0.0
    request: int = 0
    welcomes: int = 0


class GraphDevice:
    """Runs a network that `isthmus split MODEL.onnx --plan` has cut; used by one thread.

    In "auto" the rest is run where it lately took less time: here or in the cloud, whose answers count only if they
    come in time. Without a cloud, or when it falls silent, all is run here. "split" insists on the cloud, "local" on
    this device.

    Args:
        bundle: its folder, or the bundle.
        cloud: its address; None runs all of it here.
        keys, encrypted: as in `Device`.
        threads: of the engine, 0 for one per core.
        slow_down: pretends to be a weaker device, as declared; 1 for none.
        codec: in which what travels is sent, as `protocol.features` has it ("raw" for as it is); None for the bundle's.
        exits: whether an inference ends at an exit of the bundle that is sure.

    Attributes:
        stats: of the last inference.
        codec: in which what travels is sent, "" for as it is.

    Raises:
        BundleError: no such bundle, or one that was altered or lacks a part.
        DeviceError: an unknown mode, or one that needs a cloud.
        PlanError: a part cannot be run within limits, and no cloud could do without.
        LinkError: the cloud cannot be reached, in "split".
    """

    def __init__(
        self,
        bundle: str | Path | GraphBundle,
        cloud: str | None = None,
        *,
        mode: GraphMode = "auto",
        keys: str | Path | DeviceKeys | None = None,
        encrypted: bool = True,
        threads: int = 0,
        slow_down: float = 1.0,
        codec: str | None = None,
        exits: bool = True,
        timeouts: Timeouts | None = None,
        wire: Wire | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if mode not in MODES:
            raise DeviceError(f"the mode is {mode!r}", f"choose one of {', '.join(MODES)}")
        if mode == "split" and cloud is None and wire is None:
            raise DeviceError("split mode needs a cloud", "name one with cloud='HOST:PORT'")
        self.bundle = bundle if isinstance(bundle, GraphBundle) else GraphBundle.open(bundle)
        self.stats = GraphStats()
        self._manifest, self._mode, self._clock = self.bundle.manifest, mode, clock
        self.codec = self._manifest.codec if codec is None else "" if codec == "raw" else codec
        if not is_codec(self.codec):
            raise DeviceError(f"the codec is {self.codec!r}", f"choose one of raw, {', '.join(FEATURE_CODECS[1:-1])}")
        if names_picture(self.codec):
            if not names_picture(self._manifest.codec):
                raise DeviceError(f"the codec is {self.codec!r}, and this bundle takes no picture", "leave --codec out")
            pillow()
        if self.codec == UNIT != self._manifest.codec:
            raise DeviceError("the codec is 'unit', and this bundle has no transform for it", "leave --codec out")
        self._threads, self._slow_down = threads, slow_down
        self._timeouts = timeouts or Timeouts()
        self._stages = [
            (self.bundle.part(file, threads, slow_down, RUN_S) if file else None, exit if exits else None)
            for file, exit in self._manifest.stages
        ]
        known = {one.name for one in self._manifest.inputs}
        for part, exit in self._stages:
            known |= set(part.outputs) if part is not None else set()
            if exit is not None and exit.output not in known:
                raise BundleError(f"{self.bundle.path} does not make {exit.output!r} before it ends there", AGAIN)
        self._rest: GraphPart | None = None
        self._able = self.bundle.has(CLOUD)
        if self._able and mode != "split":
            try:
                self.bundle.try_part(CLOUD)  # not when the cloud is gone and its part is needed
            except PlanError as error:
                if mode == "local" or (cloud is None and wire is None):
                    raise
                self._able = False
                _log.warning("cannot go on without the cloud: %s", error.problem)
        self._pace = GraphPace(self._able)
        self._asked, self._met = 0, False
        self._late, self._asked_s = 0, 0.0  # the last request, as long as it is not answered, and when it was sent
        self._awaited, self._news = set[int](), dict[int, Inferred | Fault]()  # of a pipeline
        self._welcomes = 0
        opening = Opening(cloud if mode != "local" else None, self._timeouts, wire, clock, lambda _: None)
        self._where = opening.where
        if mode != "local":
            opening.connect(keys, encrypted, mode)
        self._wire, self._absent = opening.wire, opening.absent
        self._welcome = self._wire.welcome if self._wire is not None else None
        if self._wire is None and not self._able:
            raise DeviceError(f"{self.bundle.path} holds the device's part only", "name a cloud, or copy the rest, too")

    def infer(self, arrays: Mapping[str, ArrayLike] | ArrayLike) -> dict[str, Array]:
        """The network's outputs by their names; those that are known at an exit that is sure.

        Args:
            arrays: inputs by their names; of a network with one input, that alone.

        Raises:
            DeviceError: an input is absent, or is none that the network takes.
            EngineError: it cannot be run on that.
            LinkError, ServiceError: the cloud is silent, or refuses, and nothing else can run the rest.
        """
        given = self._inputs(arrays)
        stats = self.stats = GraphStats()
        before = self._bytes
        known = self._first(given, stats)
        if not stats.exit:
            began = time.perf_counter()
            known |= self._finished(known, stats)
            stats.rest_ms = (time.perf_counter() - began) * 1e3
        stats.bytes_up, stats.bytes_down = (now - then for now, then in zip(self._bytes, before, strict=True))
        return self._outputs(known)

    def stream(
        self, inputs: Iterable[Mapping[str, ArrayLike] | ArrayLike], depth: int = 4
    ) -> Iterator[dict[str, Array]]:
        """The outputs for one input after the other, as `infer` gives them, in a pipeline.

        While the cloud runs the rest for some inputs, the first part runs here for the next ones, so that the slower
        side's time counts, and no round trip. In "auto" the rest is run here where the cloud does not answer. `stats`
        is of the outputs that were given last.

        Args:
            inputs: as for `infer`.
            depth: inputs that may be under way in the cloud, from 1 on.

        Raises:
            DeviceError, EngineError, LinkError, ServiceError: as `infer`; or the depth is none.
        """
        if type(depth) is not int or depth < 1:
            raise DeviceError(f"the depth is {depth!r}", "give a whole number from 1 on")
        under, before = deque[_UnderWay](), self._bytes
        try:
            for arrays in chain(inputs, [None]):  # and then what is still under way
                if arrays is not None:
                    under.append(self._begun(arrays, depth))
                while under and (arrays is None or len(under) > depth or self._came(under[0])):
                    known, stats = self._ended(under.popleft(), depth)
                    stats.bytes_up, stats.bytes_down = (
                        now - then for now, then in zip(self._bytes, before, strict=True)
                    )
                    before, self.stats = self._bytes, stats
                    yield self._outputs(known)
        finally:
            self._awaited.clear()
            self._news.clear()

    def close(self) -> None:
        """Ends the connection; may be called twice."""
        if self._wire is not None:
            self._wire.close()

    def __enter__(self) -> GraphDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the first part

    def _first(self, given: Mapping[str, Array], stats: GraphStats) -> dict[str, Array]:
        """What is known after the first part, or at an exit that is sure."""
        began, known = time.perf_counter(), dict(given)
        for part, exit in self._stages:
            known |= part.run(known) if part is not None else {}
            if exit is not None and certainty(known[exit.output], exit.probabilities) >= exit.confidence:
                stats.exit = exit.output
                break
        stats.device_ms = (time.perf_counter() - began) * 1e3
        return known

    def _outputs(self, known: Mapping[str, Array]) -> dict[str, Array]:
        return {one.name: known[one.name] for one in self._manifest.outputs if one.name in known}

    @property
    def _bytes(self) -> tuple[int, int]:
        """Payload up and down so far."""
        return (self._wire.bytes_up, self._wire.bytes_down) if self._wire is not None else (0, 0)

    # -- the rest

    def _begun(self, arrays: Mapping[str, ArrayLike] | ArrayLike, depth: int) -> _UnderWay:
        """The first part, and a request about the rest, if there is one."""
        one = _UnderWay(self._inputs(arrays), GraphStats(), self._clock())
        one.known = self._first(one.known, one.stats)
        if not one.stats.exit:
            self._request(one, depth)
        return one

    def _request(self, one: _UnderWay, depth: int) -> None:
        """Asks the cloud, or runs the rest here where it is not there."""
        here = self._mode != "split" and self._pace.place(self._clock()) == "here"  # it took less there of late
        try:
            if self._wire is not None and not here:
                self._meet(self._wire)
                one.request, one.welcomes = self._ask(self._wire, one.known, depth * self._patience_ms), self._welcomes
                one.asked_s = one.asked_s or self._clock()
                self._awaited.add(one.request)
                self._wire.probe()
                return
        except (LinkError, ServiceError, ProtocolError) as error:
            self._alone(one, error)
        one.known |= self._here(one.known)

    def _came(self, one: _UnderWay) -> bool:
        """Whether nothing is waited for."""
        while self._wire is not None and self._receive(self._wire, 0.0) is not None:
            pass
        return not one.request or one.request in self._news

    def _ended(self, one: _UnderWay, depth: int) -> tuple[dict[str, Array], GraphStats]:
        """All that is known of an input in the end."""
        while one.request and self._wire is not None:
            now, news = self._clock(), self._news.pop(one.request, None)
            until = one.asked_s + depth * self._patience_ms * 1e-3
            try:
                if isinstance(news, Inferred):
                    one.known |= self._taken(news, one.stats)
                    break
                if isinstance(news, Fault) and news.code is not Code.BUSY:
                    raise ServiceError(f"{self._where} refused: {news.problem}", news.remedy)
                gone = (
                    not self._wire.up and now - max(self._wire.heard_s, one.began_s) > self._timeouts.give_up_ms / 1e3
                )
                if now >= until or gone:
                    raise self._wire.failure or LinkError(f"{self._where} did not answer in time", "check the link")
            except (LinkError, ServiceError) as error:
                self._alone(one, error)
                one.known |= self._here(one.known)
                break
            if isinstance(news, Fault):  # it is busy: later
                self._receive(self._wire, min(max(news.retry_ms * 1e-3, LEAST_RETRY_S), until - now))
            if isinstance(news, Fault) or one.welcomes < self._welcomes:  # what was under way is lost
                self._awaited.discard(one.request)
                one.request = 0
                self._request(one, depth)
            elif news is None:
                self._receive(self._wire, min(until - now, 0.25))
        self._awaited.discard(one.request)
        one.stats.rest_ms = (self._clock() - one.began_s) * 1e3 - one.stats.device_ms
        return one.known, one.stats

    def _alone(self, one: _UnderWay, error: IsthmusError) -> None:
        """Raises an error where this device cannot, or may not, go on without the cloud; else notes it."""
        if self._mode == "split" or not self._able:
            raise error
        self._pace.missed(self._clock())
        one.stats.note = f"went on alone: {error.problem}"

    def _finished(self, known: Mapping[str, Array], stats: GraphStats) -> Mapping[str, Array]:
        """The outputs that the second part makes."""
        wire = self._wire
        if wire is None:
            return self._here(known)
        try:
            self._meet(wire)
            place = "there" if self._mode == "split" else self._pace.place(self._clock())
            if place == "both" and self._late and self._clock() - self._asked_s < MOST_LOOK_S:
                place = self._pace.usual  # the link has more than it can carry already
            if place == "there":
                return self._there(wire, known, stats)
            request = self._ask(wire, known) if place == "both" else 0
        except (LinkError, ServiceError, ProtocolError) as error:
            if self._mode == "split" or not self._able:
                raise
            self._pace.missed(self._clock())
            stats.note = f"went on alone: {error.problem}"
            return self._here(known)
        found = self._here(known)
        return self._raced(wire, request, stats) or found if request else found

    def _here(self, known: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._rest is None:
            self._rest = self.bundle.part(CLOUD, self._threads, self._slow_down, RUN_S)
        began = self._clock()
        found = self._rest.run(known)
        self._pace.here((self._clock() - began) * 1e3)
        return found

    def _raced(self, wire: Wire, request: int, stats: GraphStats) -> Mapping[str, Array] | None:
        """What the cloud says, if its answer was there before this device's own."""
        found = None
        try:
            news = self._heard(wire, request, 0.0)
            if isinstance(news, Inferred):
                found = self._taken(news, stats)
        except (LinkError, ProtocolError) as error:
            stats.note = f"went on alone: {error.problem}"
        self._pace.raced(self._clock(), found is not None)
        return found

    def _there(self, wire: Wire, known: Mapping[str, Array], stats: GraphStats) -> Mapping[str, Array]:
        waits = self._mode == "split" or not self._able
        sent_s, request = self._clock(), self._ask(wire, known)  # what coding takes is a part of the cloud's way
        until = sent_s + self._patience_ms * 1e-3
        wire.probe()
        while (now := self._clock()) < until:
            news = self._heard(wire, request, min(until - now, 0.25))
            if isinstance(news, Inferred):
                found = self._taken(news, stats)
                self._pace.there((self._clock() - sent_s) * 1e3)
                return found
            if isinstance(news, Fault):
                if not waits or news.code is not Code.BUSY:
                    raise ServiceError(f"{self._where} refused: {news.problem}", news.remedy)
                self._heard(wire, 0, min(max(news.retry_ms * 1e-3, LEAST_RETRY_S), until - now))
            if isinstance(news, Welcome | Fault):
                request = self._ask(wire, known)
            elif not wire.up and now - max(wire.heard_s, sent_s) > self._timeouts.give_up_ms * 1e-3:
                break
        raise wire.failure or LinkError(f"{self._where} did not answer in time", "check the link, or use mode='auto'")

    @property
    def _patience_ms(self) -> float:
        """How long an answer is waited for."""
        waits = self._mode == "split" or not self._able
        return float(self._timeouts.progress_ms) if waits else self._pace.patience_ms

    # -- messages

    def _meet(self, wire: Wire) -> None:
        """Has the cloud's Welcome; the first time it is waited for."""
        if self._absent is not None:
            raise self._absent
        waits_ms = float(self._timeouts.connect_ms)
        if self._mode != "split" and self._able:
            waits_ms = 0 if self._met else min(waits_ms, FIRST_MS)
        self._met = True
        until = self._clock() + waits_ms * 1e-3
        while self._receive(wire, 0.0) is not None:
            pass  # what has come since the last time: a Welcome of another cloud, or late answers
        while self._welcome is None or not wire.up:
            left_s = until - self._clock()
            self._receive(wire, left_s)
            if (self._welcome is None or not wire.up) and (left_s <= 0 or wire.failure is not None):
                problem = f"{self._where} does not answer"
                raise wire.failure or LinkError(problem, "check that `isthmus serve` runs there")
        graphs = self._welcome.graphs
        if all(offer.model_id != self._manifest.model_id for offer in graphs):
            names = ", ".join(offer.name for offer in graphs) or "no network"
            raise ServiceError(f"{self._where} serves {names}, not this bundle", "serve the same bundle there")

    def _ask(self, wire: Wire, known: Mapping[str, Array], patience_ms: float | None = None) -> int:
        self._asked += 1
        began = time.perf_counter()
        shapes, data = pack([known[one.name] for one in self._manifest.crossing], self.codec)
        if self._slow_down > 1.0:
            time.sleep((self._slow_down - 1.0) * (time.perf_counter() - began))
        assert self._welcome is not None
        most = self._welcome.limits.max_message_bytes
        if len(data) > most:
            problem = f"{len(data) / 1e6:.1f} MB would travel, and the cloud takes {most / 1e6:.1f} at once"
            raise LinkError(problem, "cut the network where less travels, or give it a smaller input")
        self._late, self._asked_s = self._asked, self._clock()
        budget_ms = math.ceil(self._patience_ms if patience_ms is None else patience_ms)
        wire.send(Infer(self._asked, self._manifest.model_id, shapes, data, budget_ms))
        return self._asked

    def _heard(self, wire: Wire, request: int, wait_s: float) -> Inferred | Fault | Welcome | None:
        """What comes in that time about a request, or a Welcome that says that it has to be asked again."""
        until = self._clock() + wait_s
        while True:
            message = self._receive(wire, until - self._clock())
            if isinstance(message, Inferred | Fault) and message.request == request:
                return message
            if isinstance(message, Fault) and not message.request and message.alias is None:
                return message
            if isinstance(message, Welcome):
                return message
            if message is None and self._clock() >= until:
                return None

    def _receive(self, wire: Wire, wait_s: float) -> Message | None:
        message = wire.receive(max(0.0, wait_s) * 1e3)
        if isinstance(message, Welcome):
            self._welcome, self._late = message, 0  # what was under way is lost
            self._welcomes += 1
        elif isinstance(message, Inferred | Fault):
            self._late = 0 if message.request == self._late else self._late
            if message.request in self._awaited:
                self._news[message.request] = message
        return message

    def _taken(self, news: Inferred, stats: GraphStats) -> Mapping[str, Array]:
        wanted = [one for one in self._manifest.outputs if one.name not in self._manifest.kept]
        try:
            found = unpack(news.shapes, news.data)
        except ProtocolError as error:
            raise LinkError(f"{self._where} answers nonsense: {error.problem}", error.remedy) from error
        if len(found) != len(wanted) or not all(
            one.fits(array.dtype.name, array.shape) for one, array in zip(wanted, found, strict=True)
        ):
            problem = f"{self._where} answers nonsense: other arrays than asked for"
            raise LinkError(problem, "use the same bundle on both sides")
        stats.where, stats.together = "cloud", news.together
        stats.cloud_ms, stats.queue_ms = news.engine_us * 1e-3, news.queue_us * 1e-3
        return {one.name: array.copy() for one, array in zip(wanted, found, strict=True)}

    def _inputs(self, arrays: Mapping[str, ArrayLike] | ArrayLike) -> dict[str, Array]:
        inputs = self._manifest.inputs
        if not isinstance(arrays, Mapping):
            if len(inputs) != 1:
                names = ", ".join(one.name for one in inputs)
                raise DeviceError(f"the network has {len(inputs)} inputs", f"give them by their names: {names}")
            arrays = {inputs[0].name: arrays}
        for name in arrays:
            if name not in {one.name for one in inputs}:
                raise DeviceError(f"the network has no input {name!r}", f"give {', '.join(one.name for one in inputs)}")
        return {one.name: _fitted(one, arrays) for one in inputs}


def _fitted(one: Named, arrays: Mapping[str, ArrayLike]) -> Array:
    """An input as the network takes it; a number of another width is rounded to its type."""
    if one.name not in arrays:
        raise DeviceError(f"the input {one.name!r} is absent", f"give {one.text}")
    found, wanted = np.asarray(arrays[one.name]), np.dtype(one.dtype)
    if np.can_cast(found.dtype, wanted, "same_kind"):
        cast = found.astype(wanted, copy=False)
        if wanted.kind == "f" or np.array_equal(cast, found):  # a whole number is not rounded
            found = cast
    if found.dtype != wanted or not one.fits(one.dtype, found.shape):
        raise DeviceError(f"the input {one.name!r} is {found.dtype} {list(found.shape)}", f"give {one.text}")
    return found
