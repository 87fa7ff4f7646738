"""Reads parts of files into memory on threads of its own, while steps compute; see engine/native/reader.h."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from isthmus.engine.binding import native
from isthmus.engine.expert_table import ExpertTable
from isthmus.protocol.errors import EngineError

ROOM = 4096  # reads that wait or are under way, at most
FAILURES = {1: "reading failed", 2: "the file ends too early", 3: "a checksum does not match"}


class Read(NamedTuple):
    """Planes of one expert that follow each other in a file.

    Attributes:
        file: descriptor.
        offset: of the first plane, a multiple of the page where the file is opened for direct reads.
        places: plane -> address in memory.
        sizes: bytes of all the expert's planes.
        checksums: CRC-32C of all the expert's planes.
        check: planes to be compared with their checksums.
        table, expert: whose planes they are.
        tag: the caller's own number, 0..2^31-1.
    """

    file: int
    offset: int
    places: dict[int, int]
    sizes: Sequence[int]
    checksums: Sequence[int]
    check: frozenset[int]
    table: ExpertTable
    expert: int
    tag: int


@dataclass(frozen=True, slots=True)
class ReaderReport:
    """What was read so far.

    Attributes:
        bytes, reads: finished.
        busy: seconds in which at least one read was under way.
        withdrawn: reads taken back before they began.
        failed: the tag of the first read that failed, None if none did.
        failure: what happened to it.
        error: its errno, 0 for none.
        waiting, under_way: reads.
    """

    bytes: int
    reads: int
    busy: float
    withdrawn: int
    failed: int | None
    failure: str
    error: int
    waiting: int
    under_way: int


class Reader:
    """Threads that read.

    Args:
        threads: of reading.
        bytes_per_second: the speed of a slower device that is emulated, 0 for none.
    """

    def __init__(self, threads: int = 2, bytes_per_second: float = 0.0) -> None:
        module = native()
        self._ffi, self._lib = module.ffi, module.lib
        pointer = module.lib.im_reader_new(threads, ROOM, bytes_per_second)
        if pointer == self._ffi.NULL:
            raise EngineError(f"{threads} reading threads could not be started", "ask for fewer")
        self.pointer = self._ffi.gc(pointer, module.lib.im_reader_free)
        self._reads = self._ffi.new("im_read[]", 256)
        self._tags = self._ffi.new("int32_t[]", ROOM)
        self._report = self._ffi.new("im_reader_report *")
        self.pid = os.getpid()

    def ask(self, reads: Sequence[Read], *, urgent: bool) -> None:
        """Queues reads in their order; urgent ones go before all others.

        Raises:
            EngineError: more wait than there is room for.
        """
        if self.pid != os.getpid():
            raise EngineError("the experts were opened before this process was forked", "open them in the child")
        for start in range(0, len(reads), len(self._reads)):
            some = reads[start : start + len(self._reads)]
            for cell, read in zip(self._reads, some, strict=False):
                self._fill(cell, read)
            if self._lib.im_reader_ask(self.pointer, self._reads, len(some), urgent) < len(some):
                raise EngineError(f"more than {ROOM} reads are under way", "use smaller steps")

    def _fill(self, cell: Any, read: Read) -> None:
        ffi, cast = self._ffi, self._ffi.cast
        cell.offset, cell.file, cell.tag = read.offset, read.file, read.tag
        cell.check = sum(1 << plane for plane in read.check)
        cell.expert = read.table.cells + read.expert
        for plane in range(3):
            address = read.places.get(plane)
            cell.to[plane] = ffi.NULL if address is None else cast("void *", address)
            if address is not None:
                cell.bytes[plane], cell.checksum[plane] = read.sizes[plane], read.checksums[plane]

    def done(self) -> list[int]:
        """The tags of reads that were finished since the last call."""
        n = self._lib.im_reader_done(self.pointer, self._tags, ROOM)
        return self._ffi.unpack(self._tags, n) if n else []

    def withdraw(self) -> list[int]:
        """Takes back reads that are not urgent and have not begun: their tags."""
        n = self._lib.im_reader_withdraw(self.pointer, self._tags)
        return self._ffi.unpack(self._tags, n) if n else []

    def report(self) -> ReaderReport:
        """See `ReaderReport`."""
        r = self._report
        self._lib.im_reader_reports(self.pointer, r)
        failed = r.failed_tag if r.failure else None
        return ReaderReport(
            r.bytes, r.reads, r.busy_ns / 1e9, r.withdrawn, failed, FAILURES.get(r.failure, ""), r.error,
            r.waiting, r.under_way,
        )  # fmt: skip

    def close(self) -> None:
        """Drops what waits, and waits for what is under way."""
        self._ffi.release(self.pointer)


def crc32c(data: bytes | memoryview, before: int = 0) -> int:
    """CRC-32C (Castagnoli) of some bytes, going on from that of the bytes before them."""
    module = native()
    found: int = module.lib.im_crc32c(before, module.ffi.from_buffer(data), len(data))
    return found
