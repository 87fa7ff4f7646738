"""The sessions of a service: found, opened, forgotten, and evicted when there is no room."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from isthmus.cloud.admission import (
    Load,
    ServiceLimits,
    held_tokens,
    misfit,
    refusal,
    share_refusal,
    share_sessions,
    share_tokens,
)
from isthmus.cloud.metrics import Metrics
from isthmus.cloud.models import Model
from isthmus.cloud.peers import Peer
from isthmus.cloud.root import Root
from isthmus.cloud.session import Session
from isthmus.cloud.shape import Shape
from isthmus.cloud.work import Refusal, Reply
from isthmus.protocol.messages import Code, Open
from isthmus.protocol.offers import listed


class Registry:
    """See the module.

    Args:
        models: by model_id.
        peers: connections by route; the service's own mapping.

    Attributes:
        principals: how many are let in; the service keeps it up to date.
    """

    def __init__(
        self, models: Mapping[str, Model], peers: Mapping[bytes, Peer], limits: ServiceLimits, metrics: Metrics
    ) -> None:
        self.models = models
        self.peers = peers
        self._limits = limits
        self._metrics = metrics
        self._sessions: dict[bytes, tuple[Session, Model]] = {}
        self._numbers: dict[Session, int] = {}
        self._count = 0
        self.principals = 1

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, session: Session) -> bool:
        return session in self._numbers

    def __iter__(self) -> Iterator[tuple[Session, Model]]:
        return iter(list(self._sessions.values()))

    def model(self, model_id: str) -> Model:
        """The model of that id; empty stands for the only one.

        Raises:
            Refusal: there is none.
        """
        if not model_id and len(self.models) == 1:
            return next(iter(self.models.values()))
        model = self.models.get(model_id)
        if model is None:
            names = listed([model.offer for model in self.models.values()])
            if not model_id:
                problem = f"this cloud serves {len(self.models)} models: {names}"[:1000]
                raise Refusal(Code.UNKNOWN_MODEL, problem, "choose one with --model, by its id or a name of its own")
            raise Refusal(Code.UNKNOWN_MODEL, f"no model {model_id[:64]!r} here", f"this cloud serves {names}"[:1000])
        return model

    def find(self, peer: Peer, message: Any, principal: str) -> tuple[Session, Model]:
        """The session that a message's alias stands for on this connection.

        Raises:
            Refusal: none, or it is another principal's, or it went to another connection.
        """
        session = peer.aliases.get(message.alias)
        known = self._sessions.get(session.session_id) if session is not None else None
        if session is None or known is None or known[0] is not session or session.route != peer.route:
            raise Refusal(Code.UNKNOWN_SESSION, f"no session {message.alias} on this connection", "open it (again)")
        if session.principal != principal:
            raise Refusal(Code.NOT_ALLOWED, "this session belongs to another key", "open one of your own")
        return known

    def open(self, peer: Peer, message: Open, principal: str, now_s: float) -> tuple[Session, Model]:
        """The session that an Open asks for, old or new, on this connection from now on.

        Raises:
            Refusal: it cannot be had.
        """
        model = self.model(message.model_id)
        _check_offer(message, model)
        if (why := misfit(message.max_positions, message.window, self._share(model), self._limits)) is not None:
            raise Refusal(Code.KV_FULL, *why)
        most = 2 * self._share_sessions
        if len(peer.aliases) >= most and message.alias not in peer.aliases:
            peer.aliases = {alias: session for alias, session in peer.aliases.items() if session in self}
            if len(peer.aliases) >= most:
                raise self.busy("too many sessions on this connection")
        known = self._sessions.get(message.session)
        if known is not None and known[0].principal != principal:
            raise Refusal(Code.NOT_ALLOWED, "this session belongs to another key", "open one of your own")
        if known is not None:
            session, before = known
            if message.epoch < session.epoch:
                raise Refusal(Code.STALE_EPOCH, f"epoch {session.epoch} owns the session", "raise the epoch")
            old = self.peers.get(session.route)
            if old is not None and old is not peer:
                old.done(session.size_bytes)
            session.resume(message.epoch, peer.route, message.alias)
            if before is not model or session.enter != message.enter or session.window != message.window:
                self.forget(session)
                session = self._new_session(model, message, principal)
        else:
            self._admit(model, message, principal, now_s)
            session = self._new_session(model, message, principal)
        session.resume(message.epoch, peer.route, message.alias)
        self._begin(session, model, message, now_s)
        session.used_s = now_s
        peer.aliases[message.alias] = session
        return session, model

    def _begin(self, session: Session, model: Model, message: Open, now_s: float) -> None:
        """Gives a session the KV that is kept of what it is to begin with, if that is more than it has itself.

        Idle ones give way to what is on disk.
        """
        if (context := model.context) is None:
            return
        root, has = Root(session.principal, message.enter, message.source if message.enter else ""), len(session.chain)
        prefix = context.find(root, message.prefixes, session.window)
        if has:
            if session.work or len(prefix.chain) <= has or prefix.chain.at(has) != session.chain.head:
                return
            context.touch(session)
            session.forget(0)
        while context.lacks(prefix) and (spare := self.spare(model, now_s)) is not None:
            self.evict(spare)
        context.begin(session, prefix)

    def orphan(self, peer: Peer) -> None:
        """A connection is gone: what its sessions waited for is not wanted any more."""
        for session in peer.aliases.values():
            if session in self and session.route == peer.route:
                session.cancel()
                self.settle(session, self._sessions[session.session_id][1], None)

    def forget(self, session: Session) -> None:
        """Ends a session and frees its KV."""
        _, model = self._sessions.pop(session.session_id)
        model.ready.pop(self._numbers.pop(session), None)
        model.sessions.discard(session)
        session.cancel()
        peer = self.peers.get(session.route)
        if peer is not None and session.freed_bytes:
            peer.done(session.freed_bytes)
        if model.context is not None:
            model.context.touch(session)
        session.sequence.close()

    def settle(self, session: Session, model: Model, peer: Peer | None) -> None:
        """After a session changed: is there work, and credit to give back?"""
        number = self._numbers[session]
        if session.ready:
            model.ready[number] = session
        else:
            model.ready.pop(number, None)
        if session.freed_bytes:
            if peer is not None:
                peer.done(session.freed_bytes)
            session.freed_bytes = 0

    def answer(self, session: Session, model: Model, replies: Sequence[Reply]) -> None:
        """Sends replies where the session's device is now."""
        peer = self.peers.get(session.route)
        if peer is not None:
            for reply in replies:
                peer.send(reply)
        self.settle(session, model, peer)

    def spare(
        self, model: Model, now_s: float, asking: Session | None = None, taken: Collection[Session] = ()
    ) -> Session | None:
        """The session whose KV may go, None when there is none; its device sends it again when it needs it.

        That is the session that was idle longest. Where owners have shares it is one of the same owner, and if none is
        idle, the newest that itself waits for KV: several that want more than there is must not all wait for ever.

        Args:
            asking: the session that wants KV beyond its owner's share, None for one that wants what nobody has free.
            taken: sessions whose KV goes already, or that may go on.
        """
        own = [
            s
            for s in model.sessions
            if s.committed and s not in taken and (asking is None or s.principal == asking.principal)
        ]
        session = min((s for s in own if self._idle(s, now_s)), key=self._worth, default=None)
        if session is None and asking is not None:
            after = self._numbers[asking]
            stuck = (s for s in own if s.refused and self._numbers[s] > after)
            session = max(stuck, key=self._numbers.__getitem__, default=None)
        return session

    def evict(self, session: Session) -> None:
        """Takes a session's KV; what of it is kept for others, and for itself, goes when memory is needed."""
        _, model = self._sessions[session.session_id]
        if model.context is not None:
            model.context.touch(session)
        session.forget(0)
        self.settle(session, model, self.peers.get(session.route))
        self._metrics.sessions_evicted += 1

    def overdrawn(self, model: Model, now_s: float) -> tuple[list[Session], list[tuple[Session, str, bool]]]:
        """What keeps every principal within its share of the KV, first come, first served; changes nothing itself.

        Returns:
            sessions to evict, each sparing KV for another of the same principal, and sessions whose next request
            exceeds the share all the same, each with what is wrong and whether waiting helps.
        """
        share = self._share(model)
        spared: list[Session] = []
        refused: list[tuple[Session, str, bool]] = []
        granted: list[Session] = []
        if share == model.pool_tokens:
            return spared, refused
        held: dict[str, int] = {}
        for session in model.sessions:
            held[session.principal] = held.get(session.principal, 0) + self._held(session)
        for session in model.ready.values():
            principal, mine = session.principal, self._held(session)
            wanted = held_tokens(session.work[0].end, session.window, self._limits)
            if session in spared:
                refused.append((session, "another session of this key's owner comes first", True))
                continue
            others, sparing = held[principal] - mine, list[Session]()
            while (why := share_refusal(others, wanted, share)) is not None and why[1]:
                spare = self.spare(model, now_s, session, (*spared, *sparing, *granted))
                if spare is None:
                    break
                sparing.append(spare)
                others -= self._held(spare)
            if why is None:
                granted.append(session)
                spared += sparing
                held[principal] = others + wanted
            else:
                refused.append((session, *why))
        return spared, refused

    def busy(self, problem: str) -> Refusal:
        """The refusal of a cloud that is full for the moment."""
        return Refusal(Code.BUSY, problem, "try again in a moment", self._limits.busy_retry_ms)

    @property
    def _share_sessions(self) -> int:
        return share_sessions(self.principals, self._limits)

    def _share(self, model: Model) -> int:
        return share_tokens(model.pool_tokens, self.principals, self._limits)

    def _held(self, session: Session) -> int:
        return held_tokens(session.committed, session.window, self._limits)

    def _idle(self, session: Session, now_s: float) -> bool:
        """Whether it may go when others need the room: long unused, or its connection has ended."""
        if session.ready:
            return False
        peer = self.peers.get(session.route)
        return peer is None or peer.gone or now_s - session.used_s > self._limits.evict_after_s

    def _worth(self, session: Session) -> tuple[bool, float]:
        """Sorts who goes first: sessions whose connection has ended, then those unused for longest."""
        return session.route in self.peers, session.used_s

    def _admit(self, model: Model, message: Open, principal: str, now_s: float) -> None:
        idle = [s for s, _ in self._sessions.values() if self._idle(s, now_s)]
        own_idle = [s for s in idle if s.principal == principal]
        own_sessions = sum(1 for s, _ in self._sessions.values() if s.principal == principal)
        load = Load(
            sessions=len(self._sessions),
            own_sessions=own_sessions,
            own_idle_sessions=len(own_idle),
            idle_sessions=len(idle),
            share_sessions=self._share_sessions,
            free_tokens=model.part.free_tokens + (model.context.spare_tokens if model.context is not None else 0),
            idle_tokens=sum(self._held(s) for s in idle if s in model.sessions),
            share_tokens=self._share(model),
            own_tokens=sum(
                self._held(s) for s in model.sessions if s.principal == principal and not self._idle(s, now_s)
            ),
        )
        need = held_tokens(message.max_positions, message.window, self._limits)
        if (problem := refusal(load, self._limits, need)) is not None:
            raise self.busy(problem)
        crowded = own_sessions >= load.share_sessions
        if crowded or len(self._sessions) >= self._limits.max_sessions:
            self.forget(min(own_idle if crowded else idle, key=self._worth))
            self._metrics.sessions_evicted += 1

    def _new_session(self, model: Model, message: Open, principal: str) -> Session:
        offer = model.offer
        shape = Shape(
            offer.vocab_size,
            offer.d_model,
            offer.context_length,
            self._limits.max_waiting,
            self._limits.busy_retry_ms,
            model.channels.get(message.enter),
        )
        sequence = model.part.open(window=message.window)
        session = Session(message.session, principal, shape, sequence, enter=message.enter, window=message.window)
        self._sessions[message.session] = (session, model)
        self._count += 1
        self._numbers[session] = self._count
        model.sessions.add(session)
        self._metrics.sessions_opened += 1
        return session


def _check_offer(message: Open, model: Model) -> None:
    offer = model.offer
    if message.kv_format not in offer.kv_formats:
        raise Refusal(Code.UNSUPPORTED, f"KV format {message.kv_format!r}", f"use {', '.join(offer.kv_formats)}")
    if message.numerics and message.numerics != offer.numerics:
        raise Refusal(
            Code.UNSUPPORTED,
            f"the device counts on numerics {message.numerics}, this cloud has {offer.numerics}",
            "use the same engine on both sides, or do without exactness",
        )
    if not model.part.start <= message.enter < offer.n_layers:
        raise Refusal(
            Code.UNSUPPORTED,
            f"rows that enter at layer {message.enter}",
            f"this cloud holds layers {model.part.start} to {offer.n_layers - 1}",
        )
