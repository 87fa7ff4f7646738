"""A network that was cut: its first part on this device, the rest in a cloud, or all of it here."""

from __future__ import annotations

import logging
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
from isthmus.edge.graph_cloud import GraphCloud
from isthmus.edge.graph_pace import FIRST_MS, MOST_LOOK_S, GraphPace
from isthmus.edge.graph_stats import GraphStats
from isthmus.edge.link import Wire
from isthmus.edge.opening import Opening
from isthmus.engine.certainty import certainty
from isthmus.protocol.arrays import Array
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
from isthmus.protocol.messages import Code, Fault, Inferred, Welcome
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
        self._pace, self._met = GraphPace(self._able), False
        opening = Opening(cloud if mode != "local" else None, self._timeouts, wire, clock, lambda _: None)
        if mode != "local":
            opening.connect(keys, encrypted, mode)
        self._cloud: GraphCloud | None = None
        if opening.wire is not None:
            self._cloud = GraphCloud(opening, self._manifest, self.codec, slow_down, clock)
        elif not self._able:
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
        known = self._first(given, stats)
        if not stats.exit:
            began = time.perf_counter()
            known |= self._finished(known, stats)
            stats.rest_ms = (time.perf_counter() - began) * 1e3
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
        under = deque[_UnderWay]()
        try:
            for arrays in chain(inputs, [None]):  # and then what is still under way
                if arrays is not None:
                    under.append(self._begun(arrays, depth))
                while under and (arrays is None or len(under) > depth or self._came(under[0])):
                    known, self.stats = self._ended(under.popleft(), depth)
                    yield self._outputs(known)
        finally:
            if self._cloud is not None:
                self._cloud.forget()

    def close(self) -> None:
        """Ends the connection; may be called twice."""
        if self._cloud is not None:
            self._cloud.wire.close()

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
        cloud = self._cloud
        try:
            if cloud is not None and not here:
                self._meet(cloud)
                one.request = cloud.ask(one.known, depth * self._patience_ms, one.stats)
                one.welcomes = cloud.welcomes
                one.asked_s = one.asked_s or self._clock()
                cloud.awaits(one.request)
                cloud.wire.probe()
                return
        except (LinkError, ServiceError, ProtocolError) as error:
            self._alone(one.stats, error)
        one.known |= self._here(one.known)

    def _came(self, one: _UnderWay) -> bool:
        """Whether nothing is waited for."""
        try:
            return self._cloud is None or self._cloud.came(one.request) or not one.request
        except LinkError:
            return True  # who ends it finds what is wrong

    def _ended(self, one: _UnderWay, depth: int) -> tuple[dict[str, Array], GraphStats]:
        """All that is known of an input in the end."""
        cloud = self._cloud
        while one.request and cloud is not None:
            now, news = self._clock(), cloud.news(one.request)
            until = one.asked_s + depth * self._patience_ms * 1e-3
            try:
                if isinstance(news, Inferred):
                    one.known |= cloud.taken(news, one.stats)
                    break
                if isinstance(news, Fault) and news.code is not Code.BUSY:
                    raise ServiceError(f"{cloud.where} refused: {news.problem}", news.remedy)
                if now >= until or self._gone(cloud, one.began_s):
                    raise cloud.wire.failure or LinkError(f"{cloud.where} did not answer in time", "check the link")
                if isinstance(news, Fault):  # it is busy: later
                    cloud.receive(min(max(news.retry_ms * 1e-3, LEAST_RETRY_S), until - now))
                elif one.welcomes == cloud.welcomes:
                    cloud.receive(min(until - now, 0.25))
                    continue
            except (LinkError, ServiceError) as error:
                self._alone(one.stats, error)
                one.known |= self._here(one.known)
                break
            cloud.forget(one.request)  # what was under way is lost
            one.request = 0
            self._request(one, depth)
        if cloud is not None:
            cloud.forget(one.request)
        one.stats.rest_ms = (self._clock() - one.began_s) * 1e3 - one.stats.device_ms
        return one.known, one.stats

    def _alone(self, stats: GraphStats, error: IsthmusError) -> None:
        """Raises an error where this device cannot, or may not, go on without the cloud; else notes it."""
        if self._mode == "split" or not self._able:
            raise error
        self._pace.missed(self._clock())
        stats.note = f"went on alone: {error.problem}"

    def _finished(self, known: Mapping[str, Array], stats: GraphStats) -> Mapping[str, Array]:
        """The outputs that the second part makes."""
        cloud = self._cloud
        if cloud is None:
            return self._here(known)
        try:
            self._meet(cloud)
            place = "there" if self._mode == "split" else self._pace.place(self._clock())
            if place == "both" and cloud.late and self._clock() - cloud.asked_s < MOST_LOOK_S:
                place = self._pace.usual  # the link has more than it can carry already
            if place == "there":
                return self._there(cloud, known, stats)
            request = cloud.ask(known, self._patience_ms, stats) if place == "both" else 0
        except (LinkError, ServiceError, ProtocolError) as error:
            self._alone(stats, error)
            return self._here(known)
        found = self._here(known)
        return self._raced(cloud, request, stats) or found if request else found

    def _here(self, known: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._rest is None:
            self._rest = self.bundle.part(CLOUD, self._threads, self._slow_down, RUN_S)
        began = self._clock()
        found = self._rest.run(known)
        self._pace.here((self._clock() - began) * 1e3)
        return found

    def _raced(self, cloud: GraphCloud, request: int, stats: GraphStats) -> Mapping[str, Array] | None:
        """What the cloud says, if its answer was there before this device's own."""
        found = None
        try:
            news = cloud.heard(request, 0.0)
            if isinstance(news, Inferred):
                found = cloud.taken(news, stats)
        except (LinkError, ProtocolError) as error:
            stats.note = f"went on alone: {error.problem}"
        self._pace.raced(self._clock(), found is not None)
        return found

    def _there(self, cloud: GraphCloud, known: Mapping[str, Array], stats: GraphStats) -> Mapping[str, Array]:
        waits = self._mode == "split" or not self._able
        sent_s = self._clock()  # what coding takes is a part of the cloud's way
        request = cloud.ask(known, self._patience_ms, stats)
        until = sent_s + self._patience_ms * 1e-3
        cloud.wire.probe()
        while (now := self._clock()) < until:
            news = cloud.heard(request, min(until - now, 0.25))
            if isinstance(news, Inferred):
                found = cloud.taken(news, stats)
                self._pace.there((self._clock() - sent_s) * 1e3)
                return found
            if isinstance(news, Fault):
                if not waits or news.code is not Code.BUSY:
                    raise ServiceError(f"{cloud.where} refused: {news.problem}", news.remedy)
                cloud.heard(0, min(max(news.retry_ms * 1e-3, LEAST_RETRY_S), until - now))
            if isinstance(news, Welcome | Fault):
                request = cloud.ask(known, self._patience_ms, stats)
            elif self._gone(cloud, sent_s):
                break
        problem = f"{cloud.where} did not answer in time"
        raise cloud.wire.failure or LinkError(problem, "check the link, or use mode='auto'")

    def _gone(self, cloud: GraphCloud, since_s: float) -> bool:
        """Whether there has been no connection, and no sign of life, for as long as this device is patient."""
        silent_s = self._clock() - max(cloud.wire.heard_s, since_s)
        return not cloud.wire.up and silent_s > self._timeouts.give_up_ms * 1e-3

    def _meet(self, cloud: GraphCloud) -> None:
        """Has the cloud's Welcome; where it is not needed, it is waited for once."""
        waits_ms = float(self._timeouts.connect_ms)
        if self._mode != "split" and self._able:
            waits_ms = 0.0 if self._met else min(waits_ms, FIRST_MS)
        self._met = True
        cloud.meet(waits_ms)

    @property
    def _patience_ms(self) -> float:
        """How long an answer is waited for."""
        waits = self._mode == "split" or not self._able
        return float(self._timeouts.progress_ms) if waits else self._pace.patience_ms

    # -- inputs

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
