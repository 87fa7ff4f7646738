"""Paged KV: blocks of 16 positions in one pool per part, shared between sequences until one of them writes.

A block holds, layer by layer and KV head by head, K [head_dim][16] and V [16][head_dim], float16 or float32, with
head_dim padded to 16. One block is one unit of sharing, copying and spilling.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig
from isthmus.engine.part import KV_BLOCK, KvConfig
from isthmus.protocol.errors import EngineError, OutOfBlocks

BYTES = {"f16": 2, "f32": 4}


def block_bytes(config: DecoderConfig, layers: int, kv: KvConfig) -> int:
    """Bytes of one block of `layers` layers.

    Raises:
        EngineError: the KV format is unknown.
    """
    if kv.format not in BYTES:
        raise EngineError(f"the KV format is {kv.format!r}", "choose f16 or f32")
    head_dim = -(-config.head_dim // 16) * 16
    return layers * config.n_kv_heads * 2 * KV_BLOCK * head_dim * BYTES[kv.format]


class KvPool:
    """The blocks of one part; memory is touched only when a block is first used.

    Attributes:
        memory: [n_blocks, block_bytes] u8, rows aligned to 64 bytes.
    """

    def __init__(self, config: DecoderConfig, layers: int, kv: KvConfig) -> None:
        if kv.max_tokens < 1:
            raise EngineError(f"the KV cache holds {kv.max_tokens} tokens", "give it room for at least one")
        size, self.n_blocks = block_bytes(config, layers, kv), -(-kv.max_tokens // KV_BLOCK)
        try:
            raw = np.empty(self.n_blocks * size + 64, np.uint8)
        except MemoryError as error:
            raise EngineError(f"no memory for {kv.max_tokens} tokens of KV", "ask for fewer (kv_tokens)") from error
        offset = -raw.ctypes.data % 64
        self.memory: NDArray[np.uint8] = raw[offset : offset + self.n_blocks * size].reshape(self.n_blocks, size)
        self._free = list(range(self.n_blocks - 1, -1, -1))
        self.users = [0] * self.n_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody uses."""
        return len(self._free)

    def take(self) -> int:
        """A block for one user.

        Raises:
            OutOfBlocks: all are in use.
        """
        if not self._free:
            raise OutOfBlocks(
                f"the KV cache is full ({self.n_blocks * KV_BLOCK} tokens)",
                "close a session, shorten the prompt, raise kv_tokens, or choose a sliding window",
            )
        block = self._free.pop()
        self.users[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more user of a block."""
        self.users[block] += 1

    def give(self, block: int) -> None:
        """One user fewer; the last one frees the block."""
        self.users[block] -= 1
        if not self.users[block]:
            self._free.append(block)


class BlockTable:
    """Which block holds which positions of a sequence, in one pool.

    Attributes:
        blocks: [capacity] i32, block of positions 16 i .. 16 i + 15; -1 where a sliding window let go.
        count: entries in use.
        sinks: the first so many blocks are never let go.
        dropped: entries [sinks, dropped) were let go.
    """

    __slots__ = ("blocks", "count", "dropped", "pool", "sinks")

    def __init__(self, pool: KvPool, capacity: int = 64, sinks: int = 0) -> None:
        self.pool = pool
        self.sinks = sinks
        self.blocks: NDArray[np.int32] = np.full(capacity, -1, np.int32)
        self.count = 0
        self.dropped = 0

    def writable(self, start: int, end: int) -> bool:
        """Takes or copies blocks so that positions [start, end) belong to this table alone; True if any changed."""
        first, last = start // KV_BLOCK, (end - 1) // KV_BLOCK
        if last < self.count and all(self.pool.users[self.blocks[i]] == 1 for i in range(first, last + 1)):
            return False
        if last >= len(self.blocks):
            self.blocks = np.concatenate([self.blocks, np.full(max(last + 1, len(self.blocks)), -1, np.int32)])
        for i in range(first, min(last + 1, self.count)):
            block = int(self.blocks[i])
            if self.pool.users[block] > 1:
                copy = self.pool.take()
                self.pool.memory[copy] = self.pool.memory[block]
                self.pool.give(block)
                self.blocks[i] = copy
        while self.count <= last:
            self.blocks[self.count] = self.pool.take()
            self.count += 1
        return True

    def drop_before(self, position: int) -> None:
        """Gives back the blocks whose positions all lie before `position`, but for the sinks."""
        while (self.dropped + 1) * KV_BLOCK <= position and self.dropped < self.count:
            if self.dropped >= self.sinks:
                self.pool.give(int(self.blocks[self.dropped]))
                self.blocks[self.dropped] = -1
            self.dropped += 1

    def truncate(self, length: int) -> None:
        """Gives back the blocks that only hold positions from `length` on."""
        keep = -(-length // KV_BLOCK)
        while self.count > keep:
            self.count -= 1
            block = int(self.blocks[self.count])
            if block >= 0:
                self.pool.give(block)
            self.blocks[self.count] = -1
        self.dropped = min(self.dropped, self.count)

    def begin(self, blocks: Sequence[int]) -> None:
        """Becomes one more user of blocks, as the first of an empty table."""
        for block in blocks:
            self.pool.share(block)
        self.count = len(blocks)
        if self.count > len(self.blocks):
            self.blocks = np.full(self.count, -1, np.int32)
        self.blocks[: self.count] = blocks

    def fork(self) -> BlockTable:
        """Another table of the same blocks."""
        other = BlockTable(self.pool, len(self.blocks), self.sinks)
        other.blocks[:] = self.blocks
        other.count, other.dropped = self.count, self.dropped
        for block in self.blocks[: self.count].tolist():
            if block >= 0:
                self.pool.share(block)
        return other


class Forecast:
    """What tables will take from a pool, span after span, foreseen without touching anything.

    Attributes:
        least: the fewest free blocks on the way; below 0 the pool is too small.
    """

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._free = self.least = pool.free_blocks
        self._users: dict[int, int] = {}  # of blocks that lose some
        self._tables: dict[int, tuple[int, int, set[int]]] = {}  # count, dropped, entries that are new or copied

    def take(self, table: BlockTable, start: int, end: int, keep: int) -> None:
        """Foresees `drop_before(keep)` and then `writable(start, end)`."""
        count, dropped, own = self._tables.get(id(table), (table.count, table.dropped, set()))
        while (dropped + 1) * KV_BLOCK <= keep and dropped < count:
            if dropped in own:
                self._free += dropped >= table.sinks
            elif dropped >= table.sinks:
                self._give(int(table.blocks[dropped]))
            dropped += 1
        for i in range(start // KV_BLOCK, (end - 1) // KV_BLOCK + 1):
            if i < count:
                block = int(table.blocks[i])
                if i in own or self._users.get(block, self._pool.users[block]) == 1:
                    continue
                self._give(block)
            self._free -= 1
            own.add(i)
        self._tables[id(table)] = max(count, (end - 1) // KV_BLOCK + 1), dropped, own
        self.least = min(self.least, self._free)

    def _give(self, block: int) -> None:
        self._users[block] = self._users.get(block, self._pool.users[block]) - 1
        self._free += not self._users[block]
