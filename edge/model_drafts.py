"""Guesses by a model on this device: a small one of the same tokenizer, or the first layers with an exit."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple, Protocol

from isthmus.engine.sampling import GREEDY, Sampling
from isthmus.protocol.chain import Chain


class Said(NamedTuple):
    """What a model or an exit says comes next.

    Attributes:
        confidence: probability of its most likely token.
    """

    token: int
    confidence: float


class Speaker(Protocol):
    """Says what comes after a log."""

    def draft(self, log: Chain, sampling: Sampling) -> Said:
        """The token after the whole log."""
        ...

    def truncate(self, length: int) -> None:
        """The log is cut back to `length`, or goes on otherwise from there."""
        ...


class ModelDrafts:
    """Drafts what a speaker says, which is kept: going on from there costs nothing twice."""

    def __init__(self, speaker: Speaker) -> None:
        self._speaker, self._sampling = speaker, GREEDY
        self._log = Chain()
        self._odds = deque[float]()  # of the tokens at the log's end that were drafted and are not taken up yet

    def __len__(self) -> int:
        """Tokens that the drafts go on from."""
        return len(self._log) - len(self._odds)

    @property
    def pending(self) -> int:
        """Tokens that were drafted from there and are not taken up yet."""
        return len(self._odds)

    def speak(self, sampling: Sampling) -> None:
        """Samples so from now on; with the model's own noise on both sides the same token wins more often."""
        if sampling != self._sampling:
            self.truncate(len(self))
            self._sampling = sampling

    def extend(self, tokens: Iterable[int]) -> None:
        """The conversation goes on with these tokens."""
        for token in tokens:
            at = len(self)
            if self._odds and self._log.tokens[at] != token:
                self.truncate(at)
            if self._odds:
                self._odds.popleft()
            else:
                self._log.extend((token,))

    def truncate(self, length: int) -> None:
        """The conversation is cut back to `length` tokens."""
        if length < len(self._log):
            self._log.truncate(length)
            self._speaker.truncate(length)
        self._odds.clear()

    def draft(self, count: int) -> list[int]:
        """The next `count` tokens as the speaker has them."""
        at = len(self)
        while len(self._odds) < count:
            said = self._speaker.draft(self._log, self._sampling)
            self._log.extend((said.token,))
            self._odds.append(said.confidence)
        return self._log.tokens[at : at + count]

    def odds(self, count: int) -> float:
        """See `verify.Drafts`: as sure as the speaker is of them."""
        return math.prod(islice(self._odds, count))
