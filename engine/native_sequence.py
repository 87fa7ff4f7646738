"""A sequence of a native part: which positions its layers hold, and in which blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from isthmus.engine.kv import BlockTable
from isthmus.engine.native_block import NativeBlock
from isthmus.engine.part import KV_BLOCK, KV_SLACK, KvBlock, Span
from isthmus.protocol.errors import EngineError

if TYPE_CHECKING:
    from isthmus.engine.native_part import NativePart


class NativeSequence:
    """A sequence of a native part; see `engine.part.Sequence`."""

    __slots__ = ("base", "filled", "going", "high", "length", "low", "part", "slot", "tables", "window")

    def __init__(self, part: NativePart, window: int, tables: list[BlockTable], filled: list[int]) -> None:
        self.part: NativePart | None = part
        self.base = part.start
        self.window = window
        self.tables = tables
        self.filled = filled  # of each layer: positions whose KV it holds
        self.length = max(filled)
        self.low = self.high = 0  # positions known to be writable without a look at the tables
        self.going: tuple[object, ...] | None = None  # position, enter, leave and want of a row that needs no checks
        self.slot = part.seat(self)

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on.

        Raises:
            EngineError: `length` lies outside of what is held.
        """
        with self._open().lock:
            least = self.least if self.window else 0
            if length != 0 and not least <= length <= self.length:  # nothing is needed to start anew
                raise EngineError(f"cannot go back to {length} of {self.length} positions", f"keep at least {least}")
            self.length = length
            self.filled = [min(held, length) for held in self.filled]
            self.give_back()

    def fill(self, span: Span) -> None:
        """Notes that the span's layers now hold its positions and nothing after them.

        What layers behind them held from its first position on came from the past that was overwritten: it is
        forgotten.
        """
        start, end, base, filled = span.position, span.position + span.count, self.base, self.filled
        first, last = span.enter - base, len(filled) if span.leave is None else span.leave - base
        filled[first:last] = [end] * (last - first)
        self.going = None
        if start < self.length:
            filled[last:] = [min(held, start) for held in filled[last:]]
            self.length = max(filled)
        else:
            self.length = end

    def give_back(self) -> None:
        """Gives back the blocks that only hold positions beyond the length."""
        for table in self.tables:
            table.truncate(self.length)
        self.low = self.high = 0
        self.going = None

    @property
    def least(self) -> int:
        """The first position whose whole window is still held."""
        dropped = max(table.dropped for table in self.tables)
        return dropped * KV_BLOCK + self.window - 1 if dropped > self.tables[0].sinks else 0

    def fork(self) -> NativeSequence:
        """Another sequence with the same past, sharing its blocks."""
        part = self._open()
        with part.lock:
            self.low = self.high = 0
            self.going = None
            return NativeSequence(part, self.window, [table.fork() for table in self.tables], list(self.filled))

    def lend(self, index: int) -> NativeBlock:
        """A full block of it, to be kept by others; see `engine.part.Sequence.lend`."""
        part, end = self._open(), (index + 1) * KV_BLOCK
        with part.lock:
            if not 0 < end <= self.length or any(table.blocks[index] < 0 for table in self.tables):
                raise EngineError(f"block {index} of {self.length} positions is not held whole", "lend what is held")
            found = [int(table.blocks[index]) for table in self.tables]
            for table, block in zip(self.tables, found, strict=True):
                table.pool.share(block)
            self.low = max(self.low, end)  # it is copied before it is written again
            return NativeBlock(part, found)

    def adopt(self, blocks: Iterable[KvBlock], enter: int) -> None:
        """Begins with blocks that others lent; see `engine.part.Sequence.adopt`."""
        part = self._open()
        with part.lock:
            if self.length or any(table.count for table in self.tables):
                raise EngineError(f"{self.length} positions are held already", "let an empty sequence adopt blocks")
            if not part.start <= enter < part.end:
                raise EngineError(f"rows enter at layer {enter}", f"choose one of {part.start} to {part.end - 1}")
            lent = [cast(NativeBlock, block).shown(part) for block in blocks]
            for table, column in zip(self.tables, zip(*lent, strict=True), strict=False):
                table.begin(column)
            self.length = len(lent) * KV_BLOCK
            self.filled = [self.length if part.start + i >= enter else 0 for i in range(len(self.filled))]
            self.low = self.high = 0
            self.going = None
            part.seat(self)

    def close(self) -> None:
        """Gives the blocks back."""
        if (part := self.part) is not None:
            with part.lock:
                for table in self.tables:
                    table.truncate(0)
                part.unseat(self)
                self.part = self.going = None

    def _open(self) -> NativePart:
        if self.part is None:
            raise EngineError("the sequence is closed", "open another one")
        return self.part

    def reserve(self, start: int, end: int, first: int) -> None:
        """Makes positions [start, end) writable, letting go of what the window of position `first` does not see."""
        moved = False
        for table in self.tables:
            if self.window:
                table.drop_before(first + 1 - self.window - KV_SLACK)
            blocks = table.blocks
            table.writable(start, end)
            moved |= blocks is not table.blocks
        self.low, self.high = start, -(-end // KV_BLOCK) * KV_BLOCK
        if moved:
            self._open().seat(self)
