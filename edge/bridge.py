"""What a device says by itself while its cloud is silent: guesses, to be confirmed or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from isthmus.edge.token import Source
from isthmus.engine.sampling import Sampling
from isthmus.protocol.chain import Chain

Speak = Callable[[Chain, Sampling], int]


class Bridge:
    """See the module.

    Args:
        speak: gives the token after a whole log.
        source: what it is.
        log: the conversation's, which holds confirmed tokens only.
    """

    def __init__(self, speak: Speak, source: Source, log: Chain, sampling: Sampling) -> None:
        self.source: Source = source
        self._speak, self._log, self._sampling = speak, log, sampling
        self._told = Chain()

    def say(self) -> int:
        """One more token.

        Raises:
            IsthmusError: there is no room for it, or its weights cannot be read.
        """
        if self._told.common(self._log) < len(self._log):
            self._told.follow(self._log, len(self._log))
        token = self._speak(self._told, self._sampling)
        self._told.extend((token,))
        return token


class Retold:
    """A `verify.Drafts` out of what was said already."""

    def __init__(self, tokens: list[int]) -> None:
        self._said, self._log = tokens, list[int]()

    def __len__(self) -> int:
        return len(self._log)

    def extend(self, tokens: Iterable[int]) -> None:
        """The conversation goes on."""
        self._log.extend(tokens)

    def truncate(self, length: int) -> None:
        """It is cut back to `length` tokens."""
        del self._log[length:]

    def draft(self, count: int) -> list[int]:
        """Up to `count` next tokens: what was said there, as long as all before it stands."""
        at = len(self._log)
        return self._said[at : at + count] if self._said[:at] == self._log else []

    def odds(self, count: int) -> float:
        """See `verify.Drafts`: they were said already, and cost nothing."""
        return 1.0
