"""What did not go as asked, in words."""

from __future__ import annotations

import logging

from isthmus.edge.token import Stats

_log = logging.getLogger("isthmus.edge")


class Notes:
    """The notes of a device; they stand in the stats of the answer that they are about.

    Attributes:
        stats: of that answer.
    """

    def __init__(self) -> None:
        self.stats = Stats()
        self._lasting: list[str] = []
        self._waiting = ""

    def begin(self, stats: Stats) -> None:
        """Another answer begins, with nothing to say about it."""
        self.stats = stats
        self._lasting, self._waiting = [], ""

    def add(self, note: str) -> None:
        """Something that stays true of this answer."""
        self._lasting.append(note)
        self.waited()

    def waits(self, note: str) -> None:
        """What the device waits for, until it has waited."""
        self._waiting = note
        self._show()
        _log.warning(note)

    def waited(self) -> None:
        """It goes on."""
        self._waiting = ""
        self._show()

    def _show(self) -> None:
        self.stats.note = "; ".join(filter(None, (*self._lasting, self._waiting)))
