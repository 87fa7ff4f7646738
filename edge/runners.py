"""Ways to the next token. Each leaves the log alone: the caller appends what it got."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.edge.lane import Lane
from isthmus.edge.link import Link, Restart
from isthmus.edge.local import LocalPart
from isthmus.edge.token import Source
from isthmus.engine.sampling import Sampling
from isthmus.protocol import messages as m
from isthmus.protocol import tensors
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import ConversationFullError

TOKENS_LANE, HIDDEN_LANE = 1, 2


class Runner(Protocol):
    """Computes the token that follows the log."""

    source: Source

    def next(self, remaining: int) -> int:
        """The next token.

        Args:
            remaining: tokens that will be asked for at most, this one included.

        Raises:
            LinkError: the cloud is gone.
            ConversationFullError: no room is left for it.
            ServiceError: the cloud refuses.
            Silent: the cloud shows no sign of life (where `Link.hush` is set); ask again later.
            GaveUp: the controller has found a better way than to wait.
        """
        ...

    def ready(self) -> bool:
        """Whether the next token is here already."""
        ...

    def reused(self) -> int:
        """Leading positions of the log that need not be computed again: before the first token as far as is known."""
        ...

    def stop(self) -> None:
        """No further token is wanted."""
        ...


class LocalRunner:
    """The whole model on this device."""

    source: Source = "device"

    def __init__(self, part: LocalPart, log: Chain, sampling: Sampling) -> None:
        self._part, self._log, self._sampling = part, log, sampling
        self._found: int | None = None  # positions that were held before the first token

    def next(self, remaining: int) -> int:
        """See `Runner`."""
        self._found = self.reused()
        return self._part.sample(self._log, self._sampling)

    def ready(self) -> bool:
        """See `Runner`."""
        return False

    def reused(self) -> int:
        """See `Runner`."""
        if self._found is not None:
            return self._found
        return min(self._part.held(self._log), len(self._log) - 1)

    def stop(self) -> None:
        """See `Runner`."""


class StreamRunner:
    """The whole model in the cloud: the prompt goes up, tokens come down as fast as they are made."""

    source: Source = "cloud"

    def __init__(self, link: Link, log: Chain, sampling: Sampling, eos: Sequence[int]) -> None:
        self._link, self._log, self._eos = link, log, tuple(eos)
        self._sampler = sampler(sampling)
        self._lane = link.session.lane(TOKENS_LANE, 0)
        self._ready: deque[int] = deque()
        self._found: int | None = None
        self._running = False

    def next(self, remaining: int) -> int:
        """See `Runner`."""
        while not self._ready:
            try:
                if not self._running:
                    self._begin(remaining)
                news = self._link.stream(self._lane)
            except Restart:
                self._running = False
                continue
            self._ready.extend(news.tokens)
            if news.done:
                self._running = False
                if news.reason == "full":
                    raise ConversationFullError(
                        "the conversation is full in the cloud", "begin a new one, or choose overflow='slide'"
                    )
        return self._ready.popleft()

    def ready(self) -> bool:
        """See `Runner`."""
        return bool(self._ready)

    def reused(self) -> int:
        """See `Runner`."""
        return self._found if self._found is not None else known(self._lane, self._log)

    def stop(self) -> None:
        """See `Runner`."""
        self._link.cancel(self._lane)
        self._running = False

    def _begin(self, remaining: int) -> None:
        log, lane = self._log, self._lane
        start = self._link.align(lane, len(log) - 1)
        self._found = start if self._found is None else self._found
        self._link.generate(
            lane,
            m.Generate(
                lane.alias, lane.epoch, start, log.at(start), log.tokens[start:], remaining, self._sampler, self._eos
            ),
        )
        self._running = True


class SplitRunner:
    """Layers [0, cut) on this device, the rest in the cloud: one hidden state up for each token."""

    source: Source = "split"

    def __init__(self, part: LocalPart, link: Link, log: Chain, sampling: Sampling, cut: int, codec: str) -> None:
        self._part, self._link, self._log, self._cut, self._codec = part, link, log, cut, codec
        self._sampler = sampler(sampling)
        self._lane = link.session.lane(HIDDEN_LANE, cut, codec)
        self._found: int | None = None
        self._asked: int | None = None  # position of the rows whose answer has not come

    def next(self, remaining: int) -> int:
        """See `Runner`."""
        while True:
            try:
                asked = self._ask() if self._asked is None else self._asked
                tokens = self._link.answer(self._lane, asked)
            except Restart:
                self._asked = None
                continue
            self._asked = None
            return tokens[0]

    def ready(self) -> bool:
        """See `Runner`."""
        return False

    def reused(self) -> int:
        """See `Runner`."""
        if self._found is not None:
            return self._found
        return min(known(self._lane, self._log), self._part.held(self._log, self._cut))

    def stop(self) -> None:
        """See `Runner`."""
        self._link.cancel(self._lane)
        self._asked = None

    def _ask(self) -> int:
        link, log = self._link, self._log
        at = start = link.align(self._lane, len(log) - 1)
        self._found = min(start, self._part.held(log, self._cut)) if self._found is None else self._found
        for at, hidden in self._part.hidden(log, start, self._cut, link.max_rows):
            self._asked = at
            self._send(at, hidden, m.WANT_SAMPLE if at + len(hidden) == len(log) else m.WANT_NONE)
        return at

    def _send(self, at: int, hidden: NDArray[np.float32], want: int) -> None:
        lane, log = self._lane, self._log
        tensor = tensors.encode(hidden, self._codec, plain=1 if at == 0 else 0)
        ids = log.tokens[at : at + len(hidden)]
        self._link.rows(lane, m.Rows(lane.alias, lane.epoch, at, log.at(at), ids, tensor, want, self._sampler))


def known(lane: Lane, log: Chain) -> int:
    """Leading positions of the log, without its last, that the cloud is known to hold."""
    lane.check(log)
    return min(lane.agreed, len(log) - 1)


def sampler(sampling: Sampling) -> m.Sampler:
    """The sampler's settings as they travel."""
    return m.Sampler(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, sampling.stream)
