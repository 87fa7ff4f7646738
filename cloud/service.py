"""The service: one thread that receives, schedules, computes and answers; a second one attends while it computes."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from isthmus.cloud import replies
from isthmus.cloud.admission import ServiceLimits
from isthmus.cloud.attendant import Attendant
from isthmus.cloud.bulk import Bulk
from isthmus.cloud.graphs import Graph, Graphs
from isthmus.cloud.metrics import Gauge, Metrics
from isthmus.cloud.models import Model
from isthmus.cloud.modes import mode_of
from isthmus.cloud.peers import Peer, ServerTransport
from isthmus.cloud.registry import Registry
from isthmus.cloud.runner import Runner
from isthmus.cloud.work import Refusal
from isthmus.engine.part import KV_BLOCK
from isthmus.protocol.errors import IsthmusError, ProtocolError, ServiceError
from isthmus.protocol.keys import AllowList
from isthmus.protocol.limits import LIMITS, LinkLimits
from isthmus.protocol.messages import (
    CAN_VERIFY,
    MIN_VERSION,
    VERSION,
    Bye,
    Cancel,
    Close,
    Code,
    Draft,
    Fault,
    Fill,
    Generate,
    GetManifest,
    GetRange,
    Hello,
    Infer,
    Limits,
    Message,
    Offer,
    Open,
    Ping,
    Pong,
    Rows,
    Truncate,
    Welcome,
    agree,
    decode,
)
from isthmus.protocol.transport import Incoming

_log = logging.getLogger("isthmus.cloud")
_MESSAGES_A_TURN = 64
_LETTERS, _LETTERS_BYTES = 4096, 1 << 28  # that are read during a step; more waits in the queues of the connections
_RANGES_A_TURN = 8
_CHORES_S = 0.05
_REFRESH_S = 1.0
_BYE_S = 0.1
_EXPELLED = ("this device's key is not allowed any more", "ask the cloud's owner to run: isthmus keys allow")
_LOCAL = "local"  # principal of connections in the clear, which only this machine can make


Computed = Rows | Generate | Draft | Fill


class Letter(NamedTuple):
    """A message for a session, its sender let in, its size in bytes and the time it was received."""

    peer: Peer
    message: Message
    principal: str
    size: int
    now_s: float


class Service:
    """Serves models to devices.

    Args:
        models: what is served; closed with the service.
        graphs: networks that were cut, whose second parts are served, too.
        transport: where devices connect; closed with the service.
        allowed: whose keys are whose; None when the transport is in the clear.
        clock: seconds, monotonic.

    Raises:
        ServiceError: a model twice.
    """

    def __init__(
        self,
        models: Sequence[Model],
        transport: ServerTransport,
        allowed: AllowList | None = None,
        *,
        limits: ServiceLimits | None = None,
        link_limits: LinkLimits = LIMITS,
        clock: Callable[[], float] = time.monotonic,
        graphs: Sequence[Graph] = (),
    ) -> None:
        self.models = {model.offer.model_id: model for model in models}
        if len(self.models) < len(models):
            raise ServiceError("the same model twice", "name each bundle once")
        self.limits = limits or ServiceLimits()
        self.metrics = Metrics()
        self._transport = transport
        self._allowed = allowed
        self._link_limits = link_limits
        self._clock = clock
        self._peers: dict[bytes, Peer] = {}
        self._registry = Registry(self.models, self._peers, self.limits, self.metrics)
        bounds = {"max_message_bytes": link_limits.max_message_bytes, "max_waiting": self.limits.max_waiting}
        self._graphs = Graphs(graphs, self.metrics, **bounds, retry_ms=self.limits.busy_retry_ms, clock=clock)
        self._count_principals()
        self._letters: deque[Letter] = deque()  # that came during a step
        self._attendant = Attendant(self._attend, transport.stirs)
        for model in models:
            if not self.limits.context_s:
                model.context = None
            elif model.context is not None and model.context.spill is not None:
                model.context.spill.meanwhile = self._attendant
        self._runner = Runner(self._registry, self.limits, self.metrics, clock, self._attendant)
        self._bulk = Bulk(self._registry, self.limits.max_ranges, self._attendant, self._refuse)
        self._stop_asked = False
        self._stop_s = self.limits.stop_ms * 1e-3
        self._closed = False
        self._chores_at_s = self._refresh_at_s = 0.0
        self._handlers: dict[type, Callable[[Peer, Any, str, int, float], None]] = {
            Open: self._open,
            **dict.fromkeys((Rows, Generate, Draft, Fill), self._rows),
            Cancel: self._cancel,
            Close: self._close_session,
            Truncate: self._truncate,
            GetManifest: self._bulk.manifest,
            GetRange: self._bulk.ask,
            Infer: self._infer,
        }

    @property
    def address(self) -> str:
        """Where it listens, with the real port."""
        return self._transport.address

    def run(self) -> None:
        """Serves until `stop`, then finishes what is under way within the limits and closes."""
        try:
            self._attendant.start()
            while not self._stop_asked:
                self.turn(100.0)
            self._say_bye()
            began_s = self._clock()
            # A connection that closes takes unread messages with it, so devices get a moment to read the Bye.
            while (passed_s := self._clock() - began_s) < _BYE_S or (self._busy() and passed_s < self._stop_s):
                self.turn(10.0)
        finally:
            self.close()

    def stop(self) -> None:
        """Asks `run` to end; from any thread or signal handler."""
        self._stop_asked = True

    def close(self) -> None:
        """Closes transport and models at once; `run` calls it."""
        if self._closed:
            return
        self._closed = True
        self._attendant.close()
        self._transport.close()
        for model in self.models.values():
            model.close()

    def health(self) -> dict[str, Any]:
        """What /health answers."""
        return {
            "status": "stopping" if self._stop_asked else "ok",
            "version": VERSION,
            "models": [one.name for one in self._offers] + [one.name for one in self._graphs.offers],
            "sessions": len(self._registry),
            "connections": len(self._peers),
        }

    def turn(self, timeout_ms: float) -> None:
        """One round: receives what is there (waits only when idle), computes one step of each model, answers."""
        self._transport.poll(0.0 if self._letters or self._bulk.waits or self._busy() else timeout_ms)
        if not self._letters:  # of them, none is overtaken
            self._take_in()
        stepped = False
        for model in self.models.values():
            if model.ready:
                self._runner.step(model)
                stepped = True
        if self._graphs.ready:
            self._graphs.step(self._attendant)
            stepped = True
        self._bulk.send(1 if stepped else _RANGES_A_TURN)
        for _ in range(min(_MESSAGES_A_TURN, len(self._letters))):
            self._dispatch(*self._letters.popleft())
        now_s = self._clock()
        if now_s >= self._chores_at_s:
            self._chores_at_s = now_s + _CHORES_S
            self._chores(now_s)

    # Receiving

    def _take_in(self) -> None:
        for _ in range(_MESSAGES_A_TURN):
            incoming = self._transport.recv()
            if incoming is None:
                break
            if (letter := self._receive(incoming)) is not None:
                self._dispatch(*letter)

    def _attend(self) -> bool:
        """What is done while the engine computes: devices are greeted and hear that the cloud is there; the rest waits.

        Nothing that a step could be about is changed. Gives whether there may be more to do.
        """
        self._transport.poll(0.0)
        room = _LETTERS_BYTES - sum(letter.size for letter in self._letters)
        for _ in range(_MESSAGES_A_TURN):
            if room <= 0 or len(self._letters) >= _LETTERS or (incoming := self._transport.recv()) is None:
                return False
            if (letter := self._receive(incoming)) is not None:
                self._letters.append(letter)
                room -= letter.size
        return True

    def _receive(self, incoming: Incoming) -> Letter | None:
        """Reads a message, and answers what concerns the connection alone."""
        route, key, frames = incoming
        now_s = self._clock()
        size = sum(map(len, frames))
        self.metrics.messages += 1
        self.metrics.bytes_in += size
        peer = self._peers.get(route)
        try:
            message = decode(frames)
        except ProtocolError as error:
            self.metrics.malformed += 1
            self._tell(route, Fault(Code.BAD_MESSAGE, error.problem[:1000], error.remedy))
            if peer is not None:
                peer.took(size)
                peer.done(size)
            return None
        principal = _LOCAL if self._allowed is None else self._allowed.principal(key)
        if principal is None:
            self._tell(route, Fault(Code.NOT_ALLOWED, *_EXPELLED))
        elif type(message) is Hello:
            self._hello(route, message, key, principal, now_s)
        elif peer is None:
            self._tell(route, Fault(Code.VERSION, "there was no Hello on this connection", "connect again"))
        else:
            peer.heard_s = now_s
            if not peer.took(size):
                peer.done(size)
                self._refuse(peer, message, Refusal(Code.BAD_MESSAGE, "more bytes under way than credit was given"))
            elif type(message) in self._handlers:
                return Letter(peer, message, principal, size, now_s)
            else:
                if type(message) is Ping:
                    peer.send(Pong(message.sent_us, bytes(message.wanted)))
                peer.done(size)
        return None

    def _dispatch(self, peer: Peer, message: Message, principal: str, size: int, now_s: float) -> None:
        if peer.gone:  # it left, or was expelled, while this waited
            return
        try:
            self._handlers[type(message)](peer, message, principal, size, now_s)
        except Refusal as error:
            peer.done(size)
            self._refuse(peer, message, error)
        except ProtocolError as error:
            peer.done(size)
            self.metrics.malformed += 1
            self._refuse(peer, message, Refusal(Code.BAD_MESSAGE, error.problem, error.remedy))
        except IsthmusError as error:
            peer.done(size)
            self._refuse(peer, message, Refusal(Code.ENGINE, error.problem, error.remedy))
        except Exception:  # a mistake of ours is this device's bad luck, not everybody's
            _log.exception("a %s failed", type(message).__name__)
            peer.done(size)
            self._refuse(peer, message, Refusal(Code.ENGINE, "the cloud failed on this", "its log says why"))

    def _hello(self, route: bytes, message: Hello, key: str, principal: str, now_s: float) -> None:
        version = agree(message.version, message.min_version)
        if version is None:
            problem = f"this cloud speaks protocol versions {MIN_VERSION} to {VERSION}, the device {message.version}"
            older = "device" if message.version < MIN_VERSION else "cloud"
            self._tell(route, Fault(Code.VERSION, problem, f"update isthmus on the {older}"))
            return
        peer = self._peers.get(route)
        if peer is None:
            if len(self._peers) >= self.limits.max_peers:
                retry_ms = self.limits.busy_retry_ms
                self._tell(route, Fault(Code.BUSY, "this cloud has all connections it takes", "later", retry_ms))
                return
            peer = self._peers[route] = Peer(
                route,
                self._transport,
                self.metrics,
                credit_bytes=self._link_limits.credit_bytes + self._link_limits.max_message_bytes,
                max_outbox_bytes=self.limits.max_outbox_bytes,
                key=key,
                name=principal,
            )
            _log.info("%s joined (%s)", principal, ascii(message.agent))
        peer.heard_s = now_s
        link = self._link_limits
        limits = Limits(link.max_message_bytes, link.credit_bytes, link.heartbeat_ms, link.max_rows)
        peer.send(Welcome(version, MIN_VERSION, (CAN_VERIFY,), self._offers, limits, self._graphs.offers))

    def _open(self, peer: Peer, message: Open, principal: str, size: int, now_s: float) -> None:
        self._only_while_running()
        session, model = self._registry.open(peer, message, principal, now_s)
        peer.done(size)
        self._registry.settle(session, model, peer)
        peer.send(replies.opened(session, model.offer.numerics, model.kv.format, self.limits.idle_s))

    def _rows(
        self, peer: Peer, message: Rows | Generate | Draft | Fill, principal: str, size: int, now_s: float
    ) -> None:
        session, model = self._registry.find(peer, message, principal)
        self._only_while_running()
        session.used_s = now_s
        session.mode = mode_of(message, session.enter, session.mode)
        mode = self.metrics.mode(session.mode)
        mode.requests += 1
        mode.bytes_in += size
        before, reply = session.size_bytes, None
        if isinstance(message, Rows):
            if len(message.tokens) > self._link_limits.max_rows:
                raise Refusal(Code.BAD_MESSAGE, f"{len(message.tokens)} rows", f"at most {self._link_limits.max_rows}")
            reply = session.rows(message, now_s, size)
        elif isinstance(message, Draft):
            reply = session.draft(message, now_s, size)
        elif isinstance(message, Fill):
            session.fill(message, now_s, size)
        else:
            reply = session.generate(message, now_s, size)
        if session.size_bytes == before:
            peer.done(size)  # answered from the log, or waiting already
        if reply is not None:
            peer.send(reply)
        self._registry.settle(session, model, peer)

    def _infer(self, peer: Peer, message: Infer, principal: str, size: int, now_s: float) -> None:
        self._only_while_running()
        self._graphs.ask(peer, message, size, now_s)

    def _cancel(self, peer: Peer, message: Cancel, principal: str, size: int, now_s: float) -> None:
        session, model = self._registry.find(peer, message, principal)
        peer.done(size)
        if message.epoch == session.epoch:
            self._registry.answer(session, model, session.cancel())

    def _truncate(self, peer: Peer, message: Truncate, principal: str, size: int, now_s: float) -> None:
        session, model = self._registry.find(peer, message, principal)
        session.used_s = now_s
        reply = session.truncate(message)
        peer.done(size)
        self._registry.settle(session, model, peer)
        peer.send(reply)

    def _close_session(self, peer: Peer, message: Close, principal: str, size: int, now_s: float) -> None:
        peer.done(size)
        session = peer.aliases.get(message.alias)
        if session is not None and session.route == peer.route and message.epoch >= session.epoch:
            self._registry.forget(session)
            del peer.aliases[message.alias]

    # Odds and ends

    def _busy(self) -> bool:
        return self._graphs.ready or any(model.ready for model in self.models.values())

    @property
    def _offers(self) -> tuple[Offer, ...]:
        return tuple(model.offer for model in self.models.values())

    def _only_while_running(self) -> None:
        if self._stop_asked:
            raise Refusal(Code.CLOSING, "this cloud is stopping", "go on locally, or use another cloud")

    def _refuse(self, peer: Peer, message: Any, error: Refusal) -> None:
        alias, epoch = getattr(message, "alias", None), getattr(message, "epoch", 0)
        fault = Fault(Code(error.code), error.problem[:1000], error.remedy[:1000], error.retry_ms, alias, epoch)
        fault.position, fault.request = getattr(message, "position", 0), getattr(message, "request", 0)
        session = peer.aliases.get(alias) if alias is not None else None
        if session is not None and session in self._registry:
            fault.committed = session.committed
            fault.prefix_hash = session.chain.at(session.committed)
        peer.send(fault)

    def _tell(self, route: bytes, fault: Fault) -> None:
        """Answers a connection that has no peer; nothing is kept when it does not listen."""
        Peer(route, self._transport, self.metrics, credit_bytes=1, max_outbox_bytes=1).send(fault)

    def _say_bye(self) -> None:
        for peer in self._peers.values():
            peer.send(Bye(self.limits.stop_ms, "this cloud is stopping"))

    def _chores(self, now_s: float) -> None:
        self._transport.poll(0.0)  # a spinning poll may never have looked at who wants in
        for route in self._transport.lost():
            if (peer := self._peers.get(route)) is not None:
                self._drop(peer)
                _log.info("%s left", peer.name)
        for session, _ in self._registry:
            if not session.ready and now_s - session.used_s > self.limits.idle_s:
                self._registry.forget(session)
                self.metrics.sessions_expired += 1
        for peer in list(self._peers.values()):
            if peer.outbox:
                peer.flush()
            if peer.gone or now_s - peer.heard_s > self.limits.idle_s:
                self.metrics.peers_dropped += 1
                self._drop(peer)
                _log.info("%s left", peer.name)
        if now_s >= self._refresh_at_s:
            self._refresh_at_s = now_s + _REFRESH_S
            self._refresh()

    def _drop(self, peer: Peer) -> None:
        del self._peers[peer.route]
        peer.gone = True
        peer.ranges.clear()
        self._registry.orphan(peer)

    def _refresh(self) -> None:
        if self._allowed is not None:
            try:
                if self._allowed.refresh():
                    self._expel(self._count_principals())
            except ProtocolError as error:
                _log.warning("%s", error)
        contexts = [model.context for model in self.models.values() if model.context is not None]
        for context in contexts:
            context.refresh(self._clock(), self.limits.context_s)
        self.metrics.prefix_asked = sum(context.asked_tokens for context in contexts)
        self.metrics.prefix_found = sum(context.found_tokens for context in contexts)
        waiting = sum(len(session.work) for session, _ in self._registry) + self._graphs.waiting
        free = sum(model.part.free_tokens for model in self.models.values()) // KV_BLOCK
        spare = sum(context.spare_tokens for context in contexts) // KV_BLOCK
        whole = sum(model.pool_tokens for model in self.models.values()) // KV_BLOCK
        blocks = {"free": free, "spare": spare, "held": whole - free - spare}
        self.metrics.gauges = {
            "sessions": Gauge("Sessions", {"": len(self._registry)}),
            "connections": Gauge("Devices that are connected", {"": len(self._peers)}),
            "waiting_requests": Gauge("Requests that wait for the engine, or are computed", {"": waiting}),
            "kv_blocks": Gauge("Blocks of KV: free, kept for others, or of sessions", blocks, "state"),
        }

    def _count_principals(self) -> set[str]:
        """Who is let in; each may hold a share of the KV."""
        names = {_LOCAL} if self._allowed is None else self._allowed.principals()
        self._registry.principals = len(names)
        return names

    def _expel(self, principals: set[str]) -> None:
        """The list changed: sessions and connections of those who are not on it any more end, streams included."""
        assert self._allowed is not None
        _log.info("%d principals are allowed now", len(principals))
        for session, _ in self._registry:
            if session.principal not in principals:
                self._registry.forget(session)
        for model in self.models.values():
            if model.context is not None:
                model.context.expel(principals)
        for peer in list(self._peers.values()):
            if self._allowed.principal(peer.key) is None:
                peer.send(Fault(Code.NOT_ALLOWED, *_EXPELLED))
                self._drop(peer)
                _log.info("%s is expelled: its key is not allowed any more", peer.name)
