"""Tokens of a stream in their order, however their messages come."""

from __future__ import annotations

from collections.abc import Iterator

from isthmus.edge import nonsense
from isthmus.protocol import messages as m


class Stream:
    """What came of a Generate so far.

    Args:
        since: position of the first token that any stream of this epoch gave; what comes from before the request's own
            is of an earlier one.
    """

    def __init__(self, request: m.Generate, since: int) -> None:
        self._since = since
        self._first = self._position = request.position + len(request.tokens)
        self._end = self._first + request.max_tokens
        self._stop, self._stopped = frozenset(request.stop), False
        self._early: dict[int, m.Tokens] = {}

    @property
    def told(self) -> int:
        """Positions up to the last token that was taken."""
        return self._position

    @property
    def wants(self) -> bool:
        """Whether there are tokens to come."""
        return self._position < self._end and not self._stopped

    def late(self, message: m.Tokens) -> bool:
        """Whether it may be of an earlier stream, which ended before this one's first token."""
        at, after = message.position, message.position + len(message.tokens)
        return self._since <= at < self._first and after <= self._first

    def nonsense(self, message: m.Tokens) -> str:
        """What is wrong with a message that is not late; empty when nothing is."""
        return nonsense.of_tokens(message, self._first, self._end)

    def take(self, message: m.Tokens) -> Iterator[tuple[list[int], m.Tokens]]:
        """Takes a message in.

        Yields:
            Tokens that are next, and the message that brought them; none that came before.
        """
        if message.tokens or message.done:
            self._early[message.position] = message
        while self._early:
            first = self._early[min(self._early)]
            if first.position > self._position:
                return
            del self._early[first.position]
            fresh = first.tokens[self._position - first.position :]
            self._position += len(fresh)
            self._stopped = bool(fresh) and fresh[-1] in self._stop
            if fresh or first.done:
                yield fresh, first
            if first.done:
                self._early.clear()
