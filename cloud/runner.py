"""Computes what the sessions of a model wait for, all of them in one step of the engine."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from isthmus.cloud.admission import SHORTEN, ServiceLimits, held_tokens
from isthmus.cloud.feed import take
from isthmus.cloud.metrics import Metrics
from isthmus.cloud.models import Model
from isthmus.cloud.registry import Registry
from isthmus.cloud.scheduler import Demand, Pick, step
from isthmus.cloud.session import Session
from isthmus.cloud.work import Refusal, Work
from isthmus.engine.part import Rows as EngineRows
from isthmus.protocol.errors import EngineError, OutOfBlocks
from isthmus.protocol.messages import Code

_log = logging.getLogger("isthmus.cloud")


class Runner:
    """See the module.

    Args:
        clock: seconds, monotonic; of receipts and deadlines.
        meanwhile: has the connections while the engine computes.
    """

    def __init__(
        self,
        registry: Registry,
        limits: ServiceLimits,
        metrics: Metrics,
        clock: Callable[[], float],
        meanwhile: AbstractContextManager[None],
    ) -> None:
        self._registry = registry
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._meanwhile = meanwhile
        # Times that a session is told to wait for KV before it is told that there is none: until well after idle
        # sessions have given theirs.
        self._max_refused = math.ceil(2e3 * limits.evict_after_s / limits.busy_retry_ms)

    def step(self, model: Model) -> None:
        """One step with the rows that the scheduler chooses, and the answers."""
        now_s = self._clock()
        for session in list(model.ready.values()):
            if late := session.expire(now_s):
                self._registry.answer(session, model, late)
        spared, overdrawn = self._registry.overdrawn(model, now_s)
        for session, problem, waiting_helps in overdrawn:
            session.refused += 1
            refusal = self._registry.busy(problem) if waiting_helps else Refusal(Code.KV_FULL, problem, SHORTEN)
            self._registry.answer(session, model, session.fail(refusal))
        for session in spared:
            self._registry.evict(session)
        n_layers = model.offer.n_layers
        demands = [
            Demand(number, session.principal, session.work[0].rows, n_layers - session.enter)
            for number, session in model.ready.items()
        ]
        if not demands:
            return
        model.schedule, picks = step(model.schedule, demands, self._limits)
        try:
            self._compute(model, picks)
        except OutOfBlocks:  # nothing was committed; the next turn tries again
            if self._reclaim(model, picks):
                return
            if (spare := self._registry.spare(model, now_s)) is not None:
                self._registry.evict(spare)
                self._reclaim(model, picks)
                return
            self._one_by_one(model, picks)
        except EngineError:
            self._one_by_one(model, picks)
        except Exception:  # a mistake in the engine must not end the service: one device's request would suffice
            _log.exception("a step failed")
            self._one_by_one(model, picks)

    def _compute(self, model: Model, picks: list[Pick]) -> None:
        rows = EngineRows()
        taken: list[tuple[Session, int, int, int]] = []
        now_s = self._clock()
        for pick in picks:
            session = model.ready[pick.session]
            work = session.work[0]
            if work.queue_us < 0:
                work.queue_us = int((now_s - work.received_s) * 1e6)
                self._metrics.queue_s.add(work.queue_us * 1e-6)
            n_tokens, n_hidden = take(session, pick.rows, rows)
            taken.append((session, pick.rows, n_tokens, n_hidden))
        begin_s = time.perf_counter()
        with self._meanwhile:
            result = model.part.step(rows)
        engine_s = time.perf_counter() - begin_s
        engine_us, ended_s = int(engine_s * 1e6), self._clock()
        at_token = at_hidden = 0
        for session, n_rows, n_tokens, n_hidden in taken:
            tokens = result.tokens[at_token : at_token + n_tokens]
            hidden = result.hidden[at_hidden : at_hidden + n_hidden]
            at_token += n_tokens
            at_hidden += n_hidden
            work, before = session.work[0], session.committed
            reply = session.commit(n_rows, tokens, hidden, engine_us)
            if tokens:
                self._timed(session, work, min(len(tokens), session.committed - before), ended_s)
            if model.context is not None:
                model.context.keep(session)
            peer = self._registry.peers.get(session.route)
            if peer is None:
                session.cancel()
            elif reply is not None:
                peer.send(reply)
                if peer.gone:
                    session.cancel()
            self._registry.settle(session, model, peer)
        metrics = self._metrics
        metrics.rows += len(rows)
        metrics.tokens += at_token
        metrics.step_s.add(engine_s)
        metrics.step_rows.add(len(rows))
        metrics.step_sequences.add(len(taken))

    def _timed(self, session: Session, work: Work, tokens: int, now_s: float) -> None:
        """Counts how soon tokens came."""
        mode = self._metrics.mode(session.mode)
        asks = work.max_tokens or work.prompt_end - work.position > self._limits.decode_rows
        if asks and not work.answered_s:
            mode.first_s.add(now_s - work.received_s)
        else:
            mode.token_s.add((now_s - (work.answered_s or work.received_s)) / max(1, tokens))
        work.answered_s = now_s

    def _reclaim(self, model: Model, picks: list[Pick]) -> int:
        """Takes memory for rows from what no session uses; for how many positions there was some."""
        if model.context is None:
            return 0
        needed = -model.part.free_tokens
        for pick in picks:
            start = model.ready[pick.session].work[0].start
            needed += held_tokens(start + pick.rows, 0, self._limits) - held_tokens(start, 0, self._limits)
        return model.context.reclaim(max(1, needed))  # 1: a block that others have, too, may have to be copied

    def _one_by_one(self, model: Model, picks: list[Pick]) -> None:
        """After a step failed as a whole: finds out whose rows it cannot take, and computes the others."""
        for pick in picks:
            session = model.ready.get(pick.session)
            if session is None:
                continue  # it was through before the step failed
            try:
                self._compute(model, [pick])
            except OutOfBlocks:
                self._registry.answer(session, model, session.fail(self._kv_refusal(model, session)))
            except EngineError as error:
                _log.warning("the engine refused rows: %s", error)
                self._registry.answer(session, model, session.fail(Refusal(Code.ENGINE, error.problem, error.remedy)))
            except Exception:
                _log.exception("rows failed")
                refusal = Refusal(Code.ENGINE, "the engine failed on these rows", "the cloud's log says why")
                self._registry.answer(session, model, session.fail(refusal))

    def _kv_refusal(self, model: Model, session: Session) -> Refusal:
        session.refused += 1
        alone = not any(other.committed for other in model.sessions if other is not session)
        if alone or session.refused > self._max_refused:
            return Refusal(Code.KV_FULL, f"the cloud's KV of {model.kv.max_tokens} positions is full", SHORTEN)
        return self._registry.busy("the cloud's KV is full")
