"""What n-grams would have drafted of an answer that is made in another way: seen for nothing, once it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isthmus.edge.drafts import NgramDrafts

DRAFTED = 4  # of a round


class Shadow:
    """Plays verify mode's rounds along a conversation.

    Args:
        checked: told how many were drafted and how many of them were right, for each round.
    """

    def __init__(self, checked: Callable[[int, int], None]) -> None:
        self._drafts, self._checked = NgramDrafts(), checked

    def learn(self, tokens: Sequence[int]) -> None:
        """The conversation stands at these tokens, and nothing is to be said of the new ones."""
        self._drafts.extend(tokens[len(self._drafts) :])

    def follow(self, tokens: Sequence[int]) -> None:
        """The conversation stands at these tokens, the new ones made by a model."""
        while (at := len(self._drafts)) < len(tokens):
            drafted = self._drafts.draft(DRAFTED)
            pairs = zip(drafted, tokens[at:], strict=False)
            taken = next((i for i, (guess, came) in enumerate(pairs) if guess != came), len(drafted))
            if at + taken >= len(tokens):
                return  # the round is not over
            self._checked(len(drafted), taken)
            self._drafts.extend(tokens[at : at + taken + 1])

    def truncate(self, length: int) -> None:
        """The conversation is cut back to `length` tokens."""
        self._drafts.truncate(min(length, len(self._drafts)))
