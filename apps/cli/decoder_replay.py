"""What an answer of a language model takes again and again: over a link that changes, in a cloud that others use, too.

Answers begin at random moments of the link's trace; see `split.replay` for what a trace lets through and what others
in the cloud cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from isthmus.split.link import Link
from isthmus.split.replay import Times, passed, waits
from isthmus.split.traces import Trace

ANSWERS = 400


@dataclass(frozen=True, slots=True)
class Rounds:
    """A way of working, as rounds: the device computes, may ask the cloud, and then has some tokens.

    Attributes:
        tokens: that a round yields, in the mean.
        device_ms: that a round takes before it asks.
        asks: the share of rounds that ask.
        up_bytes, down_bytes: of a question, and of its answer.
        cloud_ms: of the cloud's engine for a question.
        streamed: whether the cloud goes on unasked, so that only the first token waits for a trip.
        prompt_bytes, prompt_ms, cloud_prompt_ms: of the prompt: what is sent of it, and what it takes on the device and
            in the cloud.
    """

    tokens: float = 1.0
    device_ms: float = 0.0
    asks: float = 0.0
    up_bytes: float = 0.0
    down_bytes: float = 0.0
    cloud_ms: float = 0.0
    streamed: bool = False
    prompt_bytes: float = 0.0
    prompt_ms: float = 0.0
    cloud_prompt_ms: float = 0.0

    def device_total_ms(self, tokens: int) -> float:
        """What the device computes for an answer."""
        return self.prompt_ms + self.device_ms * tokens / self.tokens

    def cloud_total_ms(self, tokens: int) -> float:
        """What the cloud computes for an answer."""
        return self.cloud_prompt_ms + self.asks * self.cloud_ms * tokens / self.tokens


class Taken(NamedTuple):
    """Milliseconds of each answer.

    Attributes:
        first: until its first token.
        total: until its last.
        token: of each token after the first, in the mean.
    """

    first: Times
    total: Times
    token: Times


def replayed(way: Rounds, link: Link, tokens: int, load: float = 0.0, answers: int = ANSWERS, seed: int = 0) -> Taken:
    """What so many answers take.

    Args:
        tokens: of an answer.
        load: the share of the cloud's time that others take, from 0 to below 1.
    """
    generator = np.random.default_rng(seed)
    period_ms = max((one.period_ms for one in (link.up, link.down) if isinstance(one, Trace)), default=1)
    starts = generator.uniform(0.0, period_ms, answers)
    half_ms, at, ready = link.trip_ms / 2, starts + way.prompt_ms, starts
    if way.asks:  # the cloud has the prompt
        there = np.maximum(passed(link.up, starts, way.prompt_bytes), at)
        ready = there + half_ms + waits(load, way.cloud_prompt_ms, generator, answers) + way.cloud_prompt_ms
    first, before, rounds = at, at, max(1.0, tokens / way.tokens)
    for number in range(int(np.ceil(rounds))):
        before, at = at, at + way.device_ms
        if way.asks:
            came = ready if way.streamed else np.maximum(ready, passed(link.up, at, way.up_bytes) + half_ms)
            done = came + waits(load, way.cloud_ms, generator, answers) + way.cloud_ms
            back = np.maximum(at, passed(link.down, done, way.down_bytes) + half_ms)
            asked = way.asks >= 1.0 or generator.uniform(size=answers) < way.asks
            ready, at = np.where(asked, done, ready), np.where(asked, back, at)
        if not number:
            first = at
    last = before + (at - before) * (1.0 - (np.ceil(rounds) - rounds))  # of the last round only a part may be wanted
    total = last - starts
    return Taken(first - starts, total, (total - (first - starts)) / (tokens - 1) if tokens > 1 else total)
