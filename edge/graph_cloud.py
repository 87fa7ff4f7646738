"""What a device asks a cloud about the rest of a network, and what it hears."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from isthmus.edge.graph_stats import GraphStats
from isthmus.edge.link import Wire
from isthmus.edge.opening import Opening
from isthmus.protocol.arrays import Array, pack, unpack
from isthmus.protocol.errors import LinkError, ProtocolError, ServiceError
from isthmus.protocol.messages import Fault, Infer, Inferred, Message, Welcome
from isthmus.split.graph_manifest import GraphManifest

LOOK_S = 0.05  # between two looks at whether a probe was answered


class GraphCloud:
    """Requests over one connection, each with a number.

    Args:
        opening: has connected.
        manifest: of the network's bundle.
        codec: in which what travels is sent, "" for as it is.
        slow_down: of the device that codes it.
        clock: seconds, monotonic.

    Attributes:
        wire: the connection.
        where: the cloud, for people.
        welcomes: that have come: another one means that what was under way is lost.
        late: the last request, as long as it is not answered; else 0.
        asked_s: when the last one was sent, by the clock.
    """

    def __init__(
        self, opening: Opening, manifest: GraphManifest, codec: str, slow_down: float, clock: Callable[[], float]
    ) -> None:
        assert opening.wire is not None
        self.wire: Wire = opening.wire
        self.where, self._absent = opening.where, opening.absent
        self.welcomes = self.late = 0
        self.asked_s = 0.0
        self._manifest, self._codec, self._slow_down, self._clock = manifest, codec, slow_down, clock
        self._welcome = self.wire.welcome
        self._asked = 0
        self._awaited = set[int]()
        self._news = dict[int, Inferred | Fault]()

    def meet(self, waits_ms: float) -> None:
        """Has the cloud's Welcome, and is up.

        Args:
            waits_ms: how long it is waited for.

        Raises:
            LinkError: it does not answer in that time, or refuses this device.
            ServiceError: it serves other networks.
        """
        if self._absent is not None:
            raise self._absent
        until = self._clock() + waits_ms * 1e-3
        while self.receive(0.0) is not None:
            pass  # what has come since the last time: a Welcome of another cloud, or late answers
        while self._welcome is None or not self.wire.up:
            left_s = until - self._clock()
            self.receive(left_s)
            if (self._welcome is None or not self.wire.up) and (left_s <= 0 or self.wire.failure is not None):
                problem = f"{self.where} does not answer"
                raise self.wire.failure or LinkError(problem, "check that `isthmus serve` runs there")
        if not self._serves(self._welcome):
            self.wire.probe()  # a cloud that was started again since it said so does not know this device
            asked_s = self._clock()
            while (left_s := until - self._clock()) > 0 and not self._serves(self._welcome):
                self.receive(min(left_s, LOOK_S))
                if self.wire.probed is not None and self.wire.probed[1] >= asked_s:
                    break  # it is the same one
        if not self._serves(self._welcome):
            names = ", ".join(offer.name for offer in self._welcome.graphs) or "no network"
            raise ServiceError(f"{self.where} serves {names}, not this bundle", "serve the same bundle there")

    def _serves(self, welcome: Welcome) -> bool:
        return any(offer.model_id == self._manifest.model_id for offer in welcome.graphs)

    def ask(self, known: Mapping[str, Array], patience_ms: float, stats: GraphStats) -> int:
        """Sends a request for the rest, which has met its cloud; gives the request's number.

        Args:
            known: what has been computed so far, by name.
            patience_ms: after which nobody waits for the answer.
            stats: in which its bytes are put down.

        Raises:
            LinkError, ProtocolError: it is more than the cloud takes at once.
        """
        self._asked += 1
        began = time.perf_counter()
        shapes, data = pack([known[one.name] for one in self._manifest.crossing], self._codec)
        if self._slow_down > 1.0:
            time.sleep((self._slow_down - 1.0) * (time.perf_counter() - began))
        assert self._welcome is not None
        most = self._welcome.limits.max_message_bytes
        if len(data) > most:
            problem = f"{len(data) / 1e6:.1f} MB would travel, and the cloud takes {most / 1e6:.1f} at once"
            raise LinkError(problem, "cut the network where less travels, or give it a smaller input")
        self.late, self.asked_s = self._asked, self._clock()
        self.wire.send(Infer(self._asked, self._manifest.model_id, shapes, data, math.ceil(patience_ms)))
        stats.bytes_up += len(data)
        return self._asked

    def heard(self, request: int, wait_s: float) -> Inferred | Fault | Welcome | None:
        """What comes in that time about a request, or a Welcome that says that it has to be asked again.

        Raises:
            LinkError: as `receive`.
        """
        until = self._clock() + wait_s
        while True:
            message = self.receive(until - self._clock())
            if isinstance(message, Inferred | Fault) and message.request == request:
                return message
            if isinstance(message, Fault) and not message.request and message.alias is None:
                return message
            if isinstance(message, Welcome):
                return message
            if message is None and self._clock() >= until:
                return None

    def receive(self, wait_s: float) -> Message | None:
        """One message, if one comes in that time.

        Raises:
            LinkError: the cloud refuses this device, or speaks nonsense.
        """
        try:
            message = self.wire.receive(max(0.0, wait_s) * 1e3)
        except LinkError:
            raise
        except ProtocolError as error:
            raise LinkError(f"{self.where} answers nonsense: {error.problem}", error.remedy) from error
        if isinstance(message, Welcome):
            self._welcome, self.late = message, 0  # what was under way is lost
            self.welcomes += 1
        elif isinstance(message, Inferred | Fault):
            self.late = 0 if message.request == self.late else self.late
            if message.request in self._awaited:
                self._news.setdefault(message.request, message)
        return message

    def taken(self, news: Inferred, stats: GraphStats) -> dict[str, Array]:
        """The outputs that an answer holds, by name; what it took is put down in `stats`.

        Raises:
            LinkError: it is no answer to what was asked.
        """
        wanted = [one for one in self._manifest.outputs if one.name not in self._manifest.kept]
        try:
            found = unpack(news.shapes, news.data)
        except ProtocolError as error:
            raise LinkError(f"{self.where} answers nonsense: {error.problem}", error.remedy) from error
        if len(found) != len(wanted) or not all(
            one.fits(array.dtype.name, array.shape) for one, array in zip(wanted, found, strict=True)
        ):
            problem = f"{self.where} answers nonsense: other arrays than asked for"
            raise LinkError(problem, "use the same bundle on both sides")
        stats.where, stats.together, stats.bytes_down = "cloud", news.together, stats.bytes_down + len(news.data)
        stats.cloud_ms, stats.queue_ms = news.engine_us * 1e-3, news.queue_us * 1e-3
        return {one.name: array.copy() for one, array in zip(wanted, found, strict=True)}

    # -- requests that are not waited for at once

    def awaits(self, request: int) -> None:
        """Keeps what comes about a request until it is fetched."""
        self._awaited.add(request)

    def came(self, request: int) -> bool:
        """Whether something has come about it.

        Raises:
            LinkError: as `receive`.
        """
        while self.receive(0.0) is not None:
            pass
        return request in self._news

    def news(self, request: int) -> Inferred | Fault | None:
        """What came about it first, given once; None as long as nothing has."""
        return self._news.pop(request, None)

    def forget(self, request: int | None = None) -> None:
        """Keeps nothing more about a request; None is for all."""
        for one in [request] if request is not None else list(self._awaited):
            self._awaited.discard(one)
            self._news.pop(one, None)
