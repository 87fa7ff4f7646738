"""Tokens of a stream in their order, however their messages come."""

from __future__ import annotations

from collections.abc import Iterator

from isthmus.protocol import messages as m


class Stream:
    """What came of a Generate so far.

    Args:
        position: of the first token that it will give.
    """

    def __init__(self, position: int) -> None:
        self._position = position
        self._early: dict[int, m.Tokens] = {}

    def take(self, message: m.Tokens) -> Iterator[tuple[list[int], m.Tokens]]:
        """Takes a message in.

        Yields:
            Tokens that are next, and the message that brought them; none that came before.
        """
        self._early[message.position] = message
        while self._early:
            first = self._early[min(self._early)]
            if first.position > self._position:
                return
            del self._early[first.position]
            fresh = first.tokens[self._position - first.position :]
            self._position += len(fresh)
            if fresh or first.done:
                yield fresh, first
            if first.done:
                self._early.clear()
