"""A request that waits for the engine, and what it gave so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.sampling import GREEDY as ENGINE_GREEDY
from isthmus.engine.sampling import Sampling
from isthmus.protocol.messages import GREEDY, Fault, Opened, Result, Sampler, Tokens, Verdict

Reply = Result | Tokens | Verdict | Fault | Opened


class Refusal(Exception):
    """A request that is refused; becomes a Fault.

    Args:
        code: a `messages.Code`.
        problem, remedy: for people.
        retry_ms: when to try again, 0 for never as it stands.
    """

    def __init__(self, code: int, problem: str, remedy: str = "", retry_ms: int = 0) -> None:
        super().__init__(problem)
        self.code, self.problem, self.remedy, self.retry_ms = code, problem, remedy, retry_ms


@dataclass(slots=True)
class Work:
    """Rows or a stream of one session.

    Attributes:
        position: of the request's first row, as the device named it.
        prompt_end: after the last row that the device named.
        start, end: rows that are still to be computed; a stream's `end` grows with every token.
        want: bits as in `messages.Rows`.
        hidden: [prompt_end - hidden_at, d_model] f32, or None for tokens.
        hidden_at: position of the first row of `hidden`.
        max_tokens: of a stream; 0 for rows.
        stop: token ids that end a stream.
        tokens: sampled so far.
        states: hidden states given so far, each [n, d_model] f32.
        received_s, deadline_s: on the service's clock.
        answered_s: when it gave a token last, 0 for never.
        size_bytes: credit to give back when it is done.
        drafted: its tokens from `position` on are guesses; what is not right of them is taken back.
        firm: of drafted tokens those that stand whatever the model says, as bits.
        lazy: nobody waits for it.
    """

    position: int
    prompt_end: int
    start: int
    end: int
    want: int
    want_all: bool
    sampler: Sampler
    sampling: Sampling
    received_s: float
    hidden: NDArray[np.float32] | None = None
    hidden_at: int = 0
    max_tokens: int = 0
    stop: frozenset[int] = frozenset()
    deadline_s: float = math.inf
    size_bytes: int = 0
    tokens: list[int] = field(default_factory=list)
    states: list[NDArray[np.float32]] = field(default_factory=list)
    engine_us: int = 0
    queue_us: int = -1
    drafted: bool = False
    lazy: bool = False
    firm: int = 0
    answered_s: float = 0.0

    @property
    def rows(self) -> int:
        """Rows that could be computed next."""
        return self.end - self.start

    def unasked(self, length: int) -> bool:
        """Forgets what it asks, and rows from `length` on; whether rows are left that were sent ahead."""
        end = min(length, self.end if self.lazy else self.position)
        if end <= self.start:
            return False
        if self.hidden is not None:
            self.hidden = self.hidden[: end - self.hidden_at]
        self.position, self.prompt_end, self.end = self.start, end, end
        self.want, self.want_all, self.tokens, self.states = 0, False, [], []
        self.deadline_s, self.queue_us, self.drafted, self.lazy, self.firm = math.inf, -1, False, True, 0
        return True

    def join(self, after: Work) -> None:
        """Goes on with the rows that follow, in one pass, and answers what they ask."""
        if self.hidden is not None and after.hidden is not None:
            self.hidden = np.concatenate([self.hidden[self.start - self.hidden_at :], after.hidden])
            self.hidden_at = self.start
        self.position, self.prompt_end, self.end = after.position, after.prompt_end, after.end
        self.want, self.want_all, self.sampler, self.sampling = (
            after.want,
            after.want_all,
            after.sampler,
            after.sampling,
        )
        self.received_s, self.deadline_s = after.received_s, after.deadline_s
        self.size_bytes += after.size_bytes
        self.drafted, self.lazy, self.firm = after.drafted, after.lazy, after.firm


def sampling_of(sampler: Sampler) -> Sampling:
    """A request's sampler as the engine takes it."""
    if sampler == GREEDY:
        return ENGINE_GREEDY
    return Sampling(sampler.temperature, sampler.top_k, sampler.top_p, sampler.seed, sampler.stream)
