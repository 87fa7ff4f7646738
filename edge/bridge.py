"""What a device says by itself while its cloud is silent: guesses, to be confirmed or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from isthmus.edge.token import Source
from isthmus.engine.sampling import Sampling
from isthmus.protocol.chain import Chain

Speak = Callable[[Chain, Sampling], int]
SOON = 8  # tokens, which are wanted soon: a link that is back by then has not lost much


class Bridge:
    """See the module.

    Args:
        speak: gives the token after a whole log.
        source: what it is.
        log: the conversation's, which holds confirmed tokens only.
        deeper: speaks after the first `SOON` tokens, more slowly to begin with and better; None for nobody.
    """

    def __init__(
        self, speak: Speak, source: Source, log: Chain, sampling: Sampling, deeper: Speak | None = None
    ) -> None:
        self.source: Source = source
        self._speak, self._log, self._sampling, self._deeper = speak, log, sampling, deeper
        self._told = Chain()
        self._said = 0

    def say(self) -> int:
        """One more token.

        Raises:
            IsthmusError: there is no room for it, or its weights cannot be read.
        """
        if self._told.common(self._log) < len(self._log):
            self._told.follow(self._log, len(self._log))
            self._said = 0
        if self._deeper is not None and self._said >= SOON:
            self._speak, self.source, self._deeper = self._deeper, "device", None
        self._said += 1
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
