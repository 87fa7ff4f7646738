"""KV blocks of a native part that stay when their sequence goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.protocol.errors import EngineError

if TYPE_CHECKING:
    from isthmus.engine.kv import KvPool
    from isthmus.engine.native_part import NativePart


class NativeBlock:
    """See `engine.part.KvBlock`.

    Attributes:
        blocks: in the pool of each of the part's chained layers.
    """

    __slots__ = ("_part", "blocks")

    def __init__(self, part: NativePart, blocks: list[int]) -> None:
        """The pools count it as a user already."""
        self._part: NativePart | None = part
        self.blocks = blocks

    @property
    def in_use(self) -> bool:
        """Whether a sequence uses it, too."""
        with self._open().lock:
            return any(pool.users[block] > 1 for pool, block in self._each())

    def data(self, enter: int = 0) -> bytes:
        """The bytes of the part's layers from `enter` on."""
        part = self._open()
        with part.lock:
            return b"".join(
                pool.memory[block, skipped:].tobytes()
                for (pool, block), skipped in zip(self._each(), part.skipped_bytes(enter), strict=True)
            )

    def close(self) -> None:
        """Gives it back; may be called twice."""
        if (part := self._part) is not None:
            with part.lock:
                for pool, block in self._each():
                    pool.give(block)
                self._part = None

    def shown(self, part: NativePart) -> list[int]:
        """Its place in the pool of each of that part's layers.

        Raises:
            EngineError: it is closed, or another part's.
        """
        if self._open() is not part:
            raise EngineError("a KV block of another part", "take it where it was lent")
        return self.blocks

    def _open(self) -> NativePart:
        if self._part is None:
            raise EngineError("the KV block is closed", "lend it again")
        return self._part

    def _each(self) -> list[tuple[KvPool, int]]:
        return list(zip(self._open().pools, self.blocks, strict=True))
