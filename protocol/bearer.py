"""Bearer tokens of people's HTTP clients: a list of their hashes, and whose each is.

The file holds one `sha256:HEX OWNER` a line, so that who reads it can do nothing with it. A token has 256 random bits:
no salt and no slow hash make it harder to guess.
"""

from __future__ import annotations

import re
import secrets
from hashlib import sha256
from pathlib import Path

from isthmus.protocol.owners import OwnerList, check_owner

TOKENS = "tokens"  # file name of the list inside a keys folder
_PREFIX, _BYTES = "isk-", 32
_HASH = re.compile(r"sha256:[0-9a-f]{64}")


class TokenList(OwnerList):
    """The tokens that an HTTP port lets in, and whose they are. Edits of the file count from the next `refresh`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _HASH, "sha256")

    def owner(self, token: str) -> str | None:
        """Whose token it is, or None when it is not on the list."""
        return self.principal(_hash(token))

    def issue(self, name: str) -> str:
        """Makes a token, puts its hash on the list and writes the file. The token itself is kept nowhere.

        Raises:
            ProtocolError: no name, or the file cannot be written.
        """
        token = _PREFIX + secrets.token_urlsafe(_BYTES)
        self.put(_hash(token), check_owner(name))
        return token

    def withdraw(self, token_or_name: str) -> int:
        """Takes a token, its hash, or all tokens of an owner off the list and writes the file; how many.

        Raises:
            ProtocolError: the file cannot be written.
        """
        return self.revoke(_hash(token_or_name) if token_or_name.startswith(_PREFIX) else token_or_name)


def _hash(token: str) -> str:
    return f"sha256:{sha256(token.encode('utf-8', 'surrogateescape')).hexdigest()}"
