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
        sent_bytes: that go up in each round, with nobody waiting for them.
        up_bytes, down_bytes: of a question, and of its answer.
        cloud_ms: of the cloud's engine for a question.
        streamed: whether the cloud goes on unasked, so that only the first token waits for a trip.
        prompt_bytes, prompt_ms, cloud_prompt_ms: of the prompt: what is sent of it, and what it takes on the device and
            in the cloud.
    """

    tokens: float = 1.0
    device_ms: float = 0.0
    asks: float = 0.0
    sent_bytes: float = 0.0
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
        token: of each token, in the mean: without what the prompt takes first.
    """

    first: Times
    total: Times
    token: Times


def replayed(
    way: Rounds,
    link: Link,
    tokens: int,
    load: float = 0.0,
    others_ms: float = 0.0,
    at_ms: Times | None = None,
    seed: int = 0,
) -> Taken:
    """What answers take.

    Args:
        tokens: of an answer.
        load: the share of the cloud's time that others take, from 0 to below 1, by steps of `others_ms`.
        at_ms: moments of the link's traces at which answers begin; None for `ANSWERS` of all.
    """
    generator = np.random.default_rng(seed)
    period_ms = max((one.period_ms for one in (link.up, link.down) if isinstance(one, Trace)), default=1)
    starts = generator.uniform(0.0, period_ms, ANSWERS) if at_ms is None else np.asarray(at_ms, float)
    answers = len(starts)
    half_ms, at, ready, sent, came = link.trip_ms / 2, starts + way.prompt_ms, starts, starts, starts
    begun = at
    if way.asks or way.sent_bytes:  # the cloud has the prompt
        sent = passed(link.up, starts, way.prompt_bytes)
        waited = waits(load, others_ms, generator, answers)
        ready = np.maximum(sent, at) + half_ms + waited + way.cloud_prompt_ms
        begun = ready + half_ms if way.streamed else np.maximum(at, ready - half_ms)
    first, before, rounds = at, at, max(1.0, tokens / way.tokens)
    for number in range(int(np.ceil(rounds))):
        before, at = at, at + way.device_ms
        if way.sent_bytes:
            sent = passed(link.up, np.maximum(sent, at), way.sent_bytes)
        if way.asks:
            there = passed(link.up, np.maximum(sent, at), way.up_bytes) + half_ms
            begins = ready if way.streamed else np.maximum(ready, there)
            done = begins + waits(load, others_ms, generator, answers) + way.cloud_ms
            down = passed(link.down, np.maximum(came, done), way.down_bytes)
            back = np.maximum(at, down + half_ms)
            asked = way.asks >= 1.0 or generator.uniform(size=answers) < way.asks
            ready, came, at = np.where(asked, done, ready), np.where(asked, down, came), np.where(asked, back, at)
        if not number:
            first = at
    last = before + (at - before) * (1.0 - (np.ceil(rounds) - rounds))  # of the last round only a part may be wanted
    return Taken(first - starts, last - starts, np.maximum(last - begun, 0.0) / tokens)
