"""Keeps a device ready to go on without its cloud, in the time in which it waits for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

from isthmus.engine.sampling import Sampling
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import IsthmusError

LEAST, MOST = 4, 16  # positions that are worth a pass; in one, so that an answer is taken in soon
_MARGIN = 1.5  # times what a pass took, for the next
LOOK_S = 0.005  # between looks at whether the weights were looked over


class Ready(Protocol):
    """Who goes on without a cloud: the whole model, the layers before an exit with that, or a small model."""

    def held(self, log: Chain) -> int:
        """Leading positions of a log that it has KV of."""
        ...

    def advance(self, log: Chain, rows: int, anew: bool) -> bool:
        """Computes KV of up to `rows` more positions before the log's last; whether there were any.

        Args:
            anew: whether that may take KV from those who work with a cut.
        """
        ...

    def remembers(self, log: Chain, sampling: Sampling) -> bool:
        """Whether `sample` would cost nothing."""
        ...

    def sample(self, log: Chain, sampling: Sampling) -> int:
        """The token after the whole log."""
        ...


class Standby:
    """Who goes on, open, with KV for all but the last few tokens of the conversation.

    Args:
        speaker: gives who goes on.
        prefetch: starts to look over its weights; gives a cheap look at whether that is done.
        log: the conversation's.
        early: whether it is made ready while all goes well, its weights from now on; else once the cloud is silent.
    """

    def __init__(
        self, speaker: Callable[[], Ready], prefetch: Callable[[], Callable[[], bool]], log: Chain, early: bool
    ) -> None:
        self._speaker, self._prefetch, self._log, self._early = speaker, prefetch, log, early
        self._checked = prefetch() if early else None
        self._pass_s = self._sample_s = 0.0  # what a pass, and what the first token takes at most, usually
        self._failed = False

    def work(self, sampling: Sampling, begins: bool, anew: bool, left_s: float) -> float:
        """Does a slice of what is to be done; gives the seconds after which there may be more.

        Args:
            sampling: of the answer.
            begins: whether the cloud's first token is awaited, of whose time nothing should take any.
            anew: whether nobody works with a cut, so that what was computed with one may be computed again.
            left_s: seconds until this device goes on alone, unless the cloud is heard: its first token is to be ready.
        """
        if left_s > 0.0 and (begins or not self._early):
            return left_s
        self._checked = self._checked or self._prefetch()
        if not self._failed and not self._checked():
            return LOOK_S
        try:
            return math.inf if self._failed else self._work(sampling, anew, left_s)
        except IsthmusError:  # no memory, no room, damaged weights: then it goes on more slowly, if at all
            self._failed = True
            return math.inf

    def _work(self, sampling: Sampling, anew: bool, left_s: float) -> float:
        speaker = self._speaker()
        began, missing = time.perf_counter(), len(self._log) - 1 - speaker.held(self._log)
        before_s = self._sample_s + (self._pass_s if missing > 0 else 0.0)
        least = 1 if left_s <= before_s else LEAST  # nothing is left to be done with the token
        worth = missing > MOST or (missing >= least and left_s > self._pass_s)
        if worth and speaker.advance(self._log, min(missing, MOST), anew):
            self._pass_s = _MARGIN * (time.perf_counter() - began)
        elif missing > MOST or speaker.remembers(self._log, sampling):
            return math.inf
        elif left_s <= self._sample_s or (not self._sample_s and missing < LEAST):  # at ease, to know what it takes
            speaker.sample(self._log, sampling)
            self._sample_s = _MARGIN * (time.perf_counter() - began)
        else:
            return left_s - (before_s if left_s > before_s else self._sample_s)
        return 0.0
