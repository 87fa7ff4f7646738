"""The tokens that were sampled along a session's log, so that what was answered once can be answered again."""

from __future__ import annotations

from isthmus.protocol.messages import GREEDY, Sampler

_UNKNOWN = -1


class Samples:
    """What was sampled after each committed position, all with one sampler.

    Attributes:
        sampler: with which; another one forgets what the former gave.
    """

    def __init__(self) -> None:
        self.sampler = GREEDY
        self._tokens: list[int] = []

    def extend(self, rows: int, tokens: list[int], sampler: Sampler) -> None:
        """Adds `rows` positions; `tokens` were sampled after the last of them."""
        if tokens and sampler != self.sampler:
            self.sampler = sampler
            self._tokens = [_UNKNOWN] * len(self._tokens)
        self._tokens += [_UNKNOWN] * (rows - len(tokens)) + tokens

    def after(self, position: int, sampler: Sampler | None = None) -> int | None:
        """The token that was sampled after a position; None when none was, with this sampler."""
        if not 0 <= position < len(self._tokens) or (sampler is not None and sampler != self.sampler):
            return None
        token = self._tokens[position]
        return None if token == _UNKNOWN else token

    def between(self, start: int, end: int, sampler: Sampler) -> list[int] | None:
        """The tokens sampled after positions [start, end); None when one is missing."""
        tokens = self._tokens[start:end] if sampler == self.sampler else []
        return None if len(tokens) < end - start or _UNKNOWN in tokens else tokens

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on."""
        del self._tokens[length:]
