"""Drafted here, checked in the cloud: exactly the text that the cloud's model would have written by itself."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from isthmus.edge.events import Answered, Verified
from isthmus.edge.link import Link, Restart
from isthmus.edge.model_drafts import ModelDrafts
from isthmus.edge.pace import Pace
from isthmus.edge.runners import TOKENS_LANE, known, sampler
from isthmus.edge.token import Source
from isthmus.engine.sampling import Sampling
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import DeviceError, OutOfBlocks

_HASH_BYTES = 4  # of a draft's prefix: enough, since a wrong draft can only be refused


class Drafts(Protocol):
    """Guesses at what comes next in a conversation that it is told."""

    def __len__(self) -> int: ...

    def extend(self, tokens: Iterable[int]) -> None:
        """The conversation goes on."""
        ...

    def truncate(self, length: int) -> None:
        """It is cut back to `length` tokens."""
        ...

    def draft(self, count: int) -> list[int]:
        """Up to `count` next tokens.

        Raises:
            DeviceError, OutOfBlocks: there is no room left to compute them.
        """
        ...

    def odds(self, count: int) -> float | None:
        """How sure who drafts is that the next `count` drafts, made already, are all right; None if it is not told."""
        ...


@dataclass(slots=True)
class _Block:
    """Rows or guesses that the cloud was asked about.

    Attributes:
        position: of the first.
        end: after the last.
        guessed: from here on they are guesses.
        odds: that all of these are right, if those before them are.
    """

    position: int
    end: int
    guessed: int
    sent_s: float
    odds: float = 1.0


class VerifyRunner:
    """See the module.

    The log goes up once; then blocks of guesses, each beginning with a token that is known to be right or that an
    earlier block leads to. With a depth above 1 the device drafts on while blocks are under way, and what was built
    on a wrong guess is dropped on both sides.

    Args:
        drafts: whose conversation may be any; it is brought to the log.
        pace: how much to draft.
        eos: tokens after which nothing is drafted.

    Attributes:
        source: of the token given last: "verified" was drafted here, "cloud" is the cloud's own.
        by_model: whether a model on this device drafts.
        drafted, accepted: guesses that were checked, and that were right.
        drafts, drafting_s: guesses that were made, each counted once, and the time that took.
    """

    source: Source = "cloud"

    def __init__(
        self, link: Link, log: Chain, sampling: Sampling, eos: Sequence[int], drafts: Drafts, pace: Pace | None = None
    ) -> None:
        self._link, self._log, self._eos, self._drafts = link, log, frozenset(eos), drafts
        self._pace = pace or Pace()
        self.by_model = isinstance(drafts, ModelDrafts)
        self._sampler = sampler(sampling)
        self._lane = link.session.lane(TOKENS_LANE, 0)
        self._ready: deque[tuple[int, Source]] = deque()
        self._flight: deque[_Block] = deque()
        self._early: dict[int, Answered | Verified] = {}  # that overtook the answer to an earlier block
        self._told = Chain()  # the log, what is known to follow, and guesses
        self._spent = False  # whether there is no room left to draft in
        self._sure = 0  # leading tokens of it that are known to be right
        self._sent = 0  # leading tokens of it that went up
        self._found: int | None = None
        self._running = False
        self.drafted = self.accepted = self.drafts = 0
        self.drafting_s = 0.0

    def next(self, remaining: int) -> int:
        """See `Runner`."""
        goal = len(self._log) + remaining
        while True:
            try:
                if not self._running:
                    if self._ready:
                        break
                    self._begin()
                if self.by_model or not self._ready:
                    self._hear(wait=False)  # all that has come, before more is drafted, which takes time
                sent = self._ask(goal)
                if self._ready:
                    break
                self._hear(wait=not sent)
            except Restart:
                self._land()
                self._running = False
        token, self.source = self._ready.popleft()
        return token

    def ready(self) -> bool:
        """See `Runner`."""
        return bool(self._ready)

    def reused(self) -> int:
        """See `Runner`."""
        return self._found if self._found is not None else known(self._lane, self._log)

    def stop(self) -> None:
        """See `Runner`."""
        self._drafts.truncate(min(len(self._drafts), len(self._log)))
        self._land()
        self._ready.clear()
        self._running = False
        self._link.cancel(self._lane)

    def _begin(self) -> None:
        """Sends what the cloud lacks of the log, and asks for the token after it."""
        log, lane = self._log, self._lane
        at = self._link.align(lane, len(log) - 1)
        self._found = at if self._found is None else self._found
        self._flight.append(_Block(at, len(log), len(log), time.perf_counter()))
        while at < len(log):
            ids = log.tokens[at : at + self._link.max_rows]
            want = m.WANT_SAMPLE if at + len(ids) == len(log) else m.WANT_NONE
            if want:
                self._flight[0].position = at
            self._link.rows(lane, m.Rows(lane.alias, lane.epoch, at, log.at(at), ids, want=want, sampler=self._sampler))
            at += len(ids)
        self._told = log.copy()
        self._sure = self._sent = len(log)
        self._drafts.truncate(min(len(self._drafts), len(log)))
        self._drafts.extend(log.tokens[len(self._drafts) :])
        self._running = True

    def _ask(self, goal: int) -> bool:
        """Sends one more block if that is worth it; whether it did, or has something to hear first.

        Args:
            goal: tokens that the log will have at most.
        """
        told, flight, pace = self._told, self._flight, self._pace
        room = goal - 1 - self._sent  # the last token wanted is the answer to the one before it
        known = told.tokens[self._sent :]  # the cloud's own word, which no block has carried yet
        if flight and (len(flight) >= pace.depth or math.prod(block.odds for block in flight) < pace.floor):
            return False
        if room < len(known) or (known and known[-1] in self._eos):
            return False
        most = min(pace.length(idle=not flight), room - len(known), m.MAX_DRAFT - len(known))
        guesses = self._guessed(most)
        if guesses is None:
            return True
        if not known and not guesses:
            return False
        now = time.perf_counter()
        at, lane = self._sent, self._lane
        draft = m.Draft(lane.alias, lane.epoch, at, told.at(at)[:_HASH_BYTES], known + guesses)
        self._link.draft(lane, draft, told.at(at))
        odds = self._drafts.odds(len(guesses))
        told.extend(guesses)
        self._drafts.extend(guesses)
        flight.append(_Block(at, len(told), at + len(known), now, pace.odds(len(guesses), odds)))
        self._sent = len(told)
        return True

    def _hear(self, *, wait: bool) -> None:
        """Learns of all that has come; where there is nothing, waits for the next if it is asked to."""
        while (news := self._link.verdict(self._lane, wait=wait)) is not None:
            wait = False
            self._early[news.position] = news
            while self._flight and (first := self._early.pop(self._flight[0].position, None)):
                self._learn(first)

    def _learn(self, news: Answered | Verified) -> None:
        block = self._flight.popleft()
        told, token = self._told, news.tokens[0] if isinstance(news, Answered) else news.token
        right = block.end if isinstance(news, Answered) else news.position + news.accepted
        goes_on = right >= block.end and token in told.tokens[right : right + 1]  # else the rest was not judged
        if isinstance(news, Verified):
            self._count(block, news, right, goes_on)
        self._ready.extend((known, "verified") for known in told.tokens[self._sure : right])
        if not goes_on:
            if right < len(told):
                self._link.session.void(self._lane, right)
                self._land()
                told.truncate(right)
                self._drafts.truncate(right)
            told.extend((token,))
            self._drafts.extend((token,))
            self._sent = right
        self._ready.append((token, "verified" if goes_on else "cloud"))
        self._sure = right + 1

    def _land(self) -> None:
        """Nothing that is under way counts any more."""
        self._flight.clear()
        self._early.clear()

    def _count(self, block: _Block, news: Verified, right: int, goes_on: bool) -> None:
        """Guesses were checked; the first of a block that follows another was checked by that one's answer."""
        hits = max(0, right - max(block.guessed, self._sure))
        missed = len(self._told) > right and not goes_on
        self.drafted += hits + (goes_on or missed)
        self.accepted += hits + goes_on
        took_s = time.perf_counter() - block.sent_s
        self._pace.answered(
            hits + (goes_on or missed), hits + goes_on, block.end - block.position, took_s, news.engine_us * 1e-6
        )

    def _guessed(self, most: int) -> list[int] | None:
        """Up to `most` guesses, none any more when who drafts has no room left for its KV; None when news came of
        blocks under way, which may make them vain. What a model drafted until then is not drafted again.
        """
        if most <= 0 or self._spent:
            return []
        drafts, began = self._drafts, time.perf_counter()
        known = drafts.pending if isinstance(drafts, ModelDrafts) else 0
        made = 0
        try:
            if isinstance(drafts, ModelDrafts) and self._flight:
                for count in range(known + 1, most + 1):
                    made = len(drafts.draft(count)) - known
                    if self._link.look():
                        return None
            guesses = drafts.draft(most)
            made = max(0, len(guesses) - known)
            self._pace.drafted(made, time.perf_counter() - began)
            return self._before_eos(guesses)
        except (DeviceError, OutOfBlocks):
            self._spent = True
            return []
        finally:
            self.drafts += made
            self.drafting_s += time.perf_counter() - began

    def _before_eos(self, guesses: list[int]) -> list[int]:
        """Nothing follows the end: the model's own word on it is the answer to the token before."""
        ended = next((i for i, token in enumerate(guesses) if token in self._eos), len(guesses))
        return guesses[:ended]
