"""The token log of a conversation, and what is kept for its positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isthmus.edge.journal import Journal
from isthmus.edge.token import Source
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import ConversationFullError


class Conversation:
    """See the module.

    Args:
        room: positions that it may have.
        slides: whether a longer one goes on, its oldest positions out of sight.
        vocab: tokens of the model.

    Attributes:
        log: all tokens so far.
        journal: where it is written down, None for nowhere.
    """

    def __init__(self, room: int, slides: bool, vocab: int) -> None:
        self.log = Chain()
        self._vocab = vocab
        self._room, self._slides = room, slides
        self.journal: Journal | None = None
        self._keepers: list[Callable[[int], None]] = []

    def keep(self, cut: Callable[[int], None]) -> None:
        """Has `cut(length)` called before the log is cut back to that length."""
        self._keepers.append(cut)

    def replace(self, ids: list[int]) -> None:
        """Makes the log these tokens; what they have in common with it is kept.

        Raises:
            DeviceError: they are too many.
        """
        log = self.log.tokens
        common = next((i for i, (a, b) in enumerate(zip(log, ids, strict=False)) if a != b), min(len(log), len(ids)))
        self.check(len(ids))
        self.cut(common)
        self.extend(ids[common:])

    def extend(self, tokens: Sequence[int], source: Source | None = None) -> None:
        """Appends tokens: a prompt's, or an answer's and where they were computed."""
        self.log.extend(tokens)
        if self.journal is not None:
            self.journal.said(tokens, source)

    def cut(self, length: int) -> None:
        """Forgets everything from position `length` on."""
        if length < len(self.log):
            for cut in self._keepers:
                cut(length)
            self.log.truncate(length)
            if self.journal is not None:
                self.journal.cut(length)

    def check(self, length: int) -> None:
        """Refuses a length that there is no room for.

        Raises:
            ConversationFullError: so it is.
        """
        if length > self._room and not self._slides:
            raise ConversationFullError(
                f"the conversation has {length} tokens and there is room for {self._room}",
                "begin a new one, raise kv_tokens, or choose overflow='slide'",
            )

    def speaks(self, token: int) -> bool:
        """Whether the model has such a token."""
        return 0 <= token < self._vocab

    def remaining(self, wanted: int) -> int:
        """How many of so many more tokens there is room for."""
        return wanted if self._slides else min(wanted, self._room + 1 - len(self.log))
