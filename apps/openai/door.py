"""Who may ask: the owners of tokens, or whoever is on this machine where there are none."""

from __future__ import annotations

import logging

from isthmus.protocol.bearer import TokenList
from isthmus.protocol.errors import ProtocolError

LOCAL = "local"  # owner of requests without a token
_log = logging.getLogger("isthmus.openai")


class Door:
    """See the module.

    Args:
        tokens: the list.
        open: whether requests without a token are let in, until there is a token.
    """

    def __init__(self, tokens: TokenList, open: bool) -> None:
        self._tokens, self.open = tokens, open and not tokens.entries()

    def owner(self, token: str) -> str | None:
        """Whose a token is; an empty one stands for none."""
        if self.open:
            return LOCAL
        if (found := self._tokens.owner(token)) is None and token:
            self.refresh()  # it may be a new one
            found = self._tokens.owner(token)
        return found

    def owners(self) -> set[str] | None:
        """Whose tokens are good now; None for whoever comes."""
        return None if self.open else {name for _, name in self._tokens.entries()}

    def refresh(self) -> None:
        """Reads the list again if it changed; the one before stays in force where it cannot be read."""
        try:
            self._tokens.refresh()
        except ProtocolError as error:
            _log.warning("%s", error)
        self.open = self.open and not self._tokens.entries()
