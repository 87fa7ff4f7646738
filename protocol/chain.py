"""The chain of hashes that names a prefix of tokens; both sides of a session keep one."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from isthmus.protocol.fields import HASH_BYTES

ROOT = bytes(HASH_BYTES)
BLOCK = 16  # tokens: prefixes of so many, twice as many and so on are what a cloud may hold
NAME_BYTES = 8  # of a hash, that ask for a prefix; the answer brings all of them


def extend(prefix: bytes, token: int) -> bytes:
    """The hash of a prefix with one more token: BLAKE2b-128 of (hash, token as 4 bytes little-endian)."""
    return blake2b(prefix + token.to_bytes(4, "little"), digest_size=HASH_BYTES).digest()


class Chain:
    """A log of tokens with the hash of each of its prefixes.

    Attributes:
        tokens: the log; read it, but change it through the methods only.
    """

    __slots__ = ("_hashes", "tokens")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._hashes = [ROOT]
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def head(self) -> bytes:
        """Hash of the whole log."""
        return self._hashes[-1]

    def at(self, length: int) -> bytes:
        """Hash of the first `length` tokens, 0 <= length <= len(self)."""
        return self._hashes[length]

    def names(self, length: int) -> bytes:
        """The first `NAME_BYTES` of the hash of each whole block's prefix within the first `length` tokens."""
        return b"".join(self._hashes[end][:NAME_BYTES] for end in range(BLOCK, length + 1, BLOCK))

    def common(self, other: Chain) -> int:
        """How many leading tokens both logs have in common."""
        low, high = 0, min(len(self), len(other))
        if self._hashes[high] == other._hashes[high]:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            if self._hashes[middle] == other._hashes[middle]:
                low = middle
            else:
                high = middle
        return low

    def copy(self) -> Chain:
        """Another log with the same tokens."""
        twin = Chain()
        twin.tokens, twin._hashes = self.tokens.copy(), self._hashes.copy()
        return twin

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens."""
        head = self._hashes[-1]
        for token in tokens:
            head = extend(head, token)
            self._hashes.append(head)
            self.tokens.append(token)

    def follow(self, other: Chain, end: int) -> None:
        """Becomes the first `end` tokens of another log; costs what they do not have in common."""
        kept = min(self.common(other), end)
        self.truncate(kept)
        self.tokens += other.tokens[kept:end]
        self._hashes += other._hashes[kept + 1 : end + 1]

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        del self.tokens[length:]
        del self._hashes[length + 1 :]
