"""One session of one principal: requests in, rows for the engine and replies out. No sockets and no clock.

The log holds the tokens of all positions that are computed or promised to be; `committed` of them have their KV in the
engine. Whatever lies within the log may be sent again and is answered from it. The epoch is a fencing number: lower
ones are refused, a higher one voids what waits.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

from isthmus.cloud import drafting, refusals, replies, streaming
from isthmus.cloud.root import Root
from isthmus.cloud.samples import Samples
from isthmus.cloud.shape import Shape
from isthmus.cloud.work import Refusal, Reply, Work, sampling_of
from isthmus.engine.part import KvBlock, Sequence
from isthmus.engine.sampling import GREEDY as ENGINE_GREEDY
from isthmus.protocol.chain import BLOCK, Chain
from isthmus.protocol.messages import (
    GREEDY,
    WANT_HIDDEN,
    WANT_NONE,
    WANT_SAMPLE,
    Code,
    Draft,
    Fill,
    Generate,
    Rows,
    Tensor,
    Truncate,
)

LAZY_ROWS = 64  # that wait for something to go with: more at once are no cheaper


class Session:
    """See the module.

    Args:
        session_id: 16 bytes.
        principal: whose it is.
        sequence: its KV.
        enter: layer before which rows enter.

    Attributes:
        committed: positions whose KV the engine holds.
        work: requests that wait, in order; the engine computes the first.
        route, alias: connection to answer on.
        samples: tokens sampled along the log.
        root: under which its blocks are kept for others, None where they are not.
        kept: blocks that are.
        freed_bytes: credit of requests that are done, to be given back.
        refused: times in a row that there was no KV for it.
        mode: in which its device works, as its last request shows.
    """

    def __init__(
        self, session_id: bytes, principal: str, shape: Shape, sequence: Sequence, *, enter: int = 0, window: int = 0
    ) -> None:
        self.session_id = session_id
        self.principal = principal
        self.shape = shape
        self.sequence = sequence
        self.enter = enter
        self.window = window
        self.epoch = 0
        self.alias = 0
        self.route = b""
        self.used_s = 0.0
        self.committed = 0
        self.chain = Chain()
        self.work: deque[Work] = deque()
        self.root: Root | None = None
        self.kept = 0
        self.freed_bytes = 0
        self.refused = 0
        self.mode = ""
        self.samples = Samples()
        self._unbilled_us = 0  # engine time of rows that nobody waited for; the next answer names it

    @property
    def ready(self) -> bool:
        """Whether there is work for the engine now."""
        return any(not work.lazy or work.rows >= LAZY_ROWS for work in self.work)

    @property
    def asked(self) -> bool:
        """Whether somebody waits for an answer."""
        return any(not work.lazy for work in self.work)

    @property
    def held(self) -> int:
        """Positions that need not be sent again: those in the engine, and rows after them that were sent ahead."""
        held = self.committed
        for work in self.work:
            if not work.lazy:
                break
            held = work.end
        return held

    @property
    def size_bytes(self) -> int:
        """Credit that is to be given back when all is done."""
        return self.freed_bytes + sum(work.size_bytes for work in self.work)

    # Requests

    def resume(self, epoch: int, route: bytes, alias: int) -> None:
        """A device opens the session (again): answers go there from now on.

        Raises:
            Refusal: a higher epoch owns the session.
        """
        if epoch < self.epoch:
            raise refusals.stale(epoch, self.epoch)
        if epoch > self.epoch:
            self.cancel()
        if route != self.route:  # bytes that came on another connection give this one no credit
            self.freed_bytes = 0
            for work in self.work:
                work.size_bytes = 0
        self.epoch, self.route, self.alias = epoch, route, alias

    def begin(self, chain: Chain, blocks: list[KvBlock]) -> None:
        """Takes over a text whose KV others computed. It is empty, and nothing waits."""
        self.sequence.adopt(blocks, self.enter)
        self.chain, self.committed, self.kept = chain, len(chain), len(blocks)
        self.samples.extend(len(chain), [], GREEDY)

    def rows(self, message: Rows, now_s: float, size_bytes: int = 0) -> Reply | None:
        """Takes rows in; the reply when the log knows it, else None and there is work.

        Raises:
            Refusal: they do not fit.
        """
        self._fence(message.epoch)
        tokens, hidden = message.tokens, message.hidden
        if not tokens or message.want & ~(WANT_HIDDEN | WANT_SAMPLE):
            raise Refusal(Code.BAD_MESSAGE, f"{len(tokens)} rows that want {message.want}", "send rows; want is 0..5")
        self.shape.check_states(tokens, hidden, self.enter)
        new_at = self._match(message.position, message.prefix_hash, tokens)
        end = message.position + len(tokens)
        if new_at == end:
            reply = self._replay(message, end)
            if reply is not None or self._waits(message.position, end):
                return reply
            self._rewind(message.position, end)
            new_at = message.position
        elif message.want_all and message.want and new_at > message.position:
            raise refusals.diverged("rows that want all overlap the log")
        self._room()
        states = None
        if hidden is not None:
            states = self._states(hidden)[new_at - message.position :]
        self.chain.extend(tokens[new_at - message.position :])
        self._add(
            Work(
                message.position,
                end,
                new_at,
                end,
                message.want,
                message.want_all,
                message.sampler,
                sampling_of(message.sampler),
                now_s,
                states,
                new_at,
                deadline_s=now_s + message.budget_ms * 1e-3 if message.budget_ms else math.inf,
                size_bytes=size_bytes,
            )
        )
        return None

    def generate(self, message: Generate, now_s: float, size_bytes: int = 0) -> Reply | None:
        """Starts a stream; the reply holds what the log knows of it, and there is work unless that is all.

        Raises:
            Refusal: it does not fit.
        """
        self._fence(message.epoch)
        if self.enter:
            raise Refusal(Code.UNSUPPORTED, f"this session's rows enter at layer {self.enter}", "open one with enter 0")
        end = message.position + len(message.tokens)
        if not message.max_tokens or not end:
            raise Refusal(Code.BAD_MESSAGE, "nothing to generate, or nothing to begin with", "send a prompt")
        for work in self.work:
            if work.max_tokens and work.position == message.position and work.prompt_end == end:
                return replies.progress(self, work)
        new_at = self._match(message.position, message.prefix_hash, message.tokens)
        if self.work and new_at == end:
            raise refusals.busy("an earlier request is not done yet", self.shape.busy_retry_ms)
        self._room()
        work = Work(
            message.position,
            end,
            new_at,
            end,
            WANT_SAMPLE,
            False,
            message.sampler,
            sampling_of(message.sampler),
            now_s,
            max_tokens=message.max_tokens,
            stop=frozenset(message.stop),
            deadline_s=now_s + message.budget_ms * 1e-3 if message.budget_ms else math.inf,
            size_bytes=size_bytes,
        )
        reply = None
        if new_at == end:
            done = streaming.relive(self, work)
            reply = replies.progress(self, work, done) if work.tokens else None
            if done:
                self.freed_bytes += size_bytes
                return reply
        else:
            self.chain.extend(message.tokens[new_at - message.position :])
        self.work.append(work)
        return reply

    def fill(self, message: Fill, now_s: float, size_bytes: int = 0) -> None:
        """Takes rows in that wait for the next question; what is stale or known is dropped.

        Raises:
            Refusal: they do not fit.
        """
        self._fence(message.epoch)
        self.shape.check_states(message.tokens, message.hidden, self.enter)
        if message.position <= len(self.chain) and self._stale_prefix(message.position, message.prefix_hash):
            return
        at = self._match(message.position, self.chain.at(min(message.position, len(self.chain))), message.tokens)
        end = message.position + len(message.tokens)
        if at == end:
            return
        self._room(drafted=True)
        states = None
        if message.hidden is not None:
            states = self._states(message.hidden)[at - message.position :]
        self.chain.extend(message.tokens[at - message.position :])
        asks = (WANT_NONE, False, GREEDY, ENGINE_GREEDY, now_s)
        self._add(Work(message.position, end, at, end, *asks, states, at, size_bytes=size_bytes, lazy=True))

    def draft(self, message: Draft, now_s: float, size_bytes: int = 0) -> Reply | None:
        """Takes a block of guesses in; the reply when the log knows it, else None: there is work, or it was stale.

        Raises:
            Refusal: it does not fit.
        """
        self._fence(message.epoch)
        position, tokens, known = message.position, message.tokens, len(self.chain)
        self.shape.check_states(tokens, message.hidden, self.enter)
        if not position or position > known:
            raise Refusal(Code.GAP, f"a draft starts at {position} and the log ends at {known}", "send Rows first")
        if self._stale_prefix(position, message.prefix_hash):
            return None
        if position < known:
            return drafting.judged_before(self, position, tokens)
        work = self.work[-1] if self.work else None
        if work is not None and not work.lazy and (work.max_tokens or not work.want & WANT_SAMPLE):
            raise refusals.busy("an earlier request is not done yet", self.shape.busy_retry_ms)
        first = self.samples.after(position - 1, message.sampler) if work is None else None
        if work is None and not self.enter and first != tokens[0]:
            if first is None:
                raise Refusal(Code.GAP, f"nothing was sampled after position {position - 1}", "send Rows first")
            return None
        end = position + len(tokens)
        self.shape.check(tokens, end, self.window)
        self._room(drafted=True)
        sampler = message.sampler or (self.samples.sampler if work is None or work.lazy else work.sampler)
        states = None if message.hidden is None else self._states(message.hidden)
        self.chain.extend(tokens)
        self._add(
            Work(
                position,
                end,
                position,
                end,
                WANT_SAMPLE,
                True,
                sampler,
                sampling_of(sampler),
                now_s,
                states,
                position,
                size_bytes=size_bytes,
                drafted=True,
                firm=message.firm,
            )
        )
        return None

    def truncate(self, message: Truncate) -> Reply:
        """Forgets positions and raises the epoch; a repetition changes nothing.

        Raises:
            Refusal: a higher epoch owns the session.
        """
        if message.epoch < self.epoch:
            raise refusals.stale(message.epoch, self.epoch)
        if message.epoch > self.epoch:
            self.cancel()
            self.epoch = message.epoch
            self.forget(message.length)
        return replies.result(self, message.length, [])

    def cancel(self) -> list[Reply]:
        """Drops all work but rows that were sent ahead; streams get their last Tokens."""
        ended: list[Reply] = [replies.tokens(self, work, [], "cancelled") for work in self.work if work.max_tokens]
        self._drop_asked(len(self.chain))
        return ended

    def forget(self, length: int) -> None:
        """Drops all work but rows that were sent ahead, and positions from `length` on."""
        self._drop_asked(length)
        if length < self.committed:
            self.sequence.truncate(length)
            self.committed = length
            self.kept = min(self.kept, length // BLOCK)
            self.chain.truncate(length)
            self.samples.truncate(length)

    # The engine's side

    def commit(self, rows: int, tokens: list[int], hidden: NDArray[np.float32], engine_us: int) -> Reply | None:
        """Takes in what `take`n rows gave.

        Args:
            tokens: sampled, as many as `take` said.
            hidden: [n, d_model] f32, as many as `take` said.
        """
        work = self.work[0]
        rows = min(rows, work.end - work.start)
        self.refused = 0
        work.engine_us += engine_us + self._unbilled_us
        self._unbilled_us = 0
        if work.drafted and work.start + rows > work.position:
            return drafting.checked(self, work, rows, tokens)
        self.committed += rows
        work.start += rows
        self.samples.extend(rows, tokens, work.sampler)
        if len(hidden):
            work.states.append(hidden)
        if work.max_tokens:
            return streaming.streamed(self, work, tokens)
        work.tokens += tokens
        if work.start < work.end:
            return None
        self.work.popleft()
        self.freed_bytes += work.size_bytes
        if tokens:
            self.follow(tokens[-1])
        if work.lazy:
            self._unbilled_us = work.engine_us
            return None
        return replies.result(self, work.position, work.tokens, work)

    def follow(self, token: int) -> None:
        """Drops what builds on another token than the one that follows the committed log."""
        if self.work and not self.work[0].drafted:
            return
        if self.chain.tokens[self.committed : self.committed + 1] != [token]:
            self._drop_work()
            self.chain.truncate(self.committed)

    def fail(self, refusal: Refusal) -> list[Reply]:
        """Drops all work with a Fault for each request; the log keeps what is committed."""
        if self.sequence.length != self.committed:
            self.sequence.truncate(self.committed)
        faults: list[Reply] = [replies.fault(self, refusal, work.position) for work in self.work]
        self._drop_work()
        return faults

    def expire(self, now_s: float) -> list[Reply]:
        """Ends the first request whose time is up, and those that build on it."""
        late = next((index for index, work in enumerate(self.work) if now_s >= work.deadline_s), None)
        if late is None:
            return []
        refusal = Refusal(Code.DEADLINE, "the time allowed ran out", "allow more, or go on locally")
        ended: list[Reply] = []
        for index, work in enumerate(self.work):
            if index == late and work.max_tokens:
                ended.append(replies.tokens(self, work, [], "deadline"))
            elif index >= late:
                ended.append(replies.fault(self, refusal, work.position))
        self._drop_work(late)
        return ended

    # Inside

    def _fence(self, epoch: int) -> None:
        if epoch < self.epoch:
            raise refusals.stale(epoch, self.epoch)
        if epoch > self.epoch:
            raise Refusal(
                Code.STALE_EPOCH, f"epoch {epoch} was never opened, {self.epoch} was", "send Open or Truncate first"
            )

    def _states(self, hidden: Tensor) -> NDArray[np.float32]:
        if self.root is not None and not self.root.source.endswith(f"/{hidden.codec}"):
            self.root = None  # its KV is not what the device said that it would be
        return self.shape.states(hidden)

    def _match(self, position: int, prefix_hash: bytes, tokens: list[int]) -> int:
        """Holds tokens against the log; the position from which on they are new."""
        known = len(self.chain)
        if position > known:
            raise Refusal(Code.GAP, f"rows start at {position} and the log ends at {known}", f"send from {known} on")
        if self.chain.at(position) != prefix_hash:
            raise refusals.diverged(f"another prefix before position {position}")
        end = position + len(tokens)
        new_at = min(known, end)
        if self.chain.tokens[position:new_at] != tokens[: new_at - position]:
            raise refusals.diverged(f"other tokens between {position} and {new_at}")
        self.shape.check(tokens, end, self.window)
        return new_at

    def _replay(self, message: Rows, end: int) -> Reply | None:
        if end > (self.committed if message.want else self.held) or message.want & WANT_HIDDEN:
            return None
        tokens: list[int] | None = []
        if message.want & WANT_SAMPLE:
            start = message.position if message.want_all else end - 1
            tokens = self.samples.between(start, end, message.sampler)
        return None if tokens is None else replies.result(self, message.position, tokens)

    def _add(self, work: Work) -> None:
        """Adds work at the end, or to the lazy rows there."""
        last = self.work[-1] if self.work else None
        if last is not None and last.lazy and (last.rows < LAZY_ROWS or not work.lazy):
            last.join(work)
        else:
            self.work.append(work)

    def _stale_prefix(self, position: int, prefix_hash: bytes) -> bool:
        """Whether rows build on something that the log does not say (any more)."""
        return position <= len(self.chain) and not self.chain.at(position).startswith(prefix_hash)

    def _waits(self, position: int, end: int) -> bool:
        """Whether exactly these rows wait already, so that the answer will come."""
        asked = (work for work in self.work if not (work.max_tokens or work.lazy))
        return any(work.position == position and work.prompt_end == end for work in asked)

    def _rewind(self, position: int, end: int) -> None:
        """Makes room to compute the log's last rows once more, for another sampler or for their hidden states."""
        if self.asked:
            raise refusals.busy("an earlier request is not done yet", self.shape.busy_retry_ms)
        if end < self.committed:
            raise refusals.diverged(f"the answer at {end} is not in the log, and later positions build on it")
        self.forget(position)

    def _room(self, drafted: bool = False) -> None:
        if self.work and self.work[-1].drafted and not drafted:
            raise refusals.busy("drafts wait to be checked", self.shape.busy_retry_ms)
        if len(self.work) >= self.shape.max_waiting:
            raise refusals.busy(f"{len(self.work)} requests of this session wait already", self.shape.busy_retry_ms)

    def _drop_asked(self, length: int) -> None:
        """Drops all work but rows before `length` that were sent ahead."""
        kept = 0
        for work in self.work:
            end = work.end
            kept += (left := work.unasked(length))
            if not left or work.end < end:
                break
        self._drop_work(kept)
        self.chain.truncate(self.held)

    def _drop_work(self, first: int = 0) -> None:
        while len(self.work) > first:
            work = self.work.pop()
            self.freed_bytes += work.size_bytes
            self.chain.truncate(max(work.start, self.committed))
