"""Guesses at what comes next, for a model to check: what followed the last time that the text ended like this."""

from __future__ import annotations

from collections.abc import Iterable


class NgramDrafts:
    """Drafts by the n-grams of the conversation itself (prompt lookup decoding); costs next to nothing.

    Args:
        longest, shortest: tokens of an n-gram; a longer one that is known goes before a shorter one.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._tokens: list[int] = []
        self._followed: dict[tuple[int, ...], list[int]] = {}  # positions of what came after an n-gram, ascending

    def __len__(self) -> int:
        """Tokens that it has learned from."""
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Learns from the tokens that the conversation goes on with."""
        for token in tokens:
            for key in self._keys(self._tokens):
                self._followed.setdefault(key, []).append(len(self._tokens))
            self._tokens.append(token)

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        while len(self._tokens) > length:
            self._tokens.pop()
            for key in self._keys(self._tokens):
                positions = self._followed[key]
                positions.pop()
                if not positions:
                    del self._followed[key]

    def draft(self, count: int) -> list[int]:
        """Up to `count` tokens; fewer, or none, where the text ends like nothing before."""
        context = self._tokens[-self._lengths.start :] if self._lengths else []
        drafted: list[int] = []
        while len(drafted) < count:
            known = next((self._followed[key] for key in self._keys(context) if key in self._followed), None)
            if known is None:
                break
            token = self._tokens[known[-1]]
            drafted.append(token)
            context.append(token)
        return drafted

    def odds(self, count: int) -> None:
        """See `verify.Drafts`: that is not known."""

    def _keys(self, tokens: list[int]) -> list[tuple[int, ...]]:
        """The n-grams that tokens end with, the longest first."""
        return [tuple(tokens[-n:]) for n in self._lengths if n <= len(tokens)]
