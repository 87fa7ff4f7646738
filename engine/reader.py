"""Reads experts' planes into memory on threads of its own, while steps compute; see engine/native/reader.h."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.engine.binding import native
from isthmus.protocol.errors import EngineError

FAILURES = {1: "reading failed", 2: "the file ends too early", 3: "a checksum does not match"}


@dataclass(frozen=True, slots=True)
class ReaderReport:
    """What was read so far.

    Attributes:
        bytes, reads: finished.
        busy: seconds in which at least one read was under way.
        withdrawn: reads taken back before they began.
        dropped: bytes of reads that had begun and were of no use.
        failed: the tag of the last read that failed, None if none did.
        failure: what happened to it.
        error: its errno, 0 for none.
    """

    bytes: int
    reads: int
    busy: float
    withdrawn: int
    dropped: int
    failed: int | None
    failure: str
    error: int


class Reader:
    """Threads that read for a store.

    Args:
        room: reads that wait or are under way, at most.
        threads: of reading.
        bytes_per_second: the speed of a slower device that is emulated, 0 for none.
    """

    def __init__(self, room: int, threads: int = 2, bytes_per_second: float = 0.0) -> None:
        module = native()
        pointer = module.lib.im_reader_new(threads, room, bytes_per_second)
        if pointer == module.ffi.NULL:
            raise EngineError(f"{threads} reading threads could not be started", "ask for fewer")
        self._ffi, self._lib = module.ffi, module.lib
        self.pointer = module.ffi.gc(pointer, module.lib.im_reader_free)
        self._report = module.ffi.new("im_reader_report *")
        self._closed = False

    def report(self) -> ReaderReport:
        """See `ReaderReport`.

        Raises:
            EngineError: the reader is closed.
        """
        if self._closed:
            raise EngineError("the reader is closed", "ask before that")
        r = self._report
        self._lib.im_reader_reports(self.pointer, r)
        failed = r.failed_tag if r.failure else None
        return ReaderReport(
            r.bytes, r.reads, r.busy_ns / 1e9, r.withdrawn, r.dropped, failed, FAILURES.get(r.failure, ""), r.error
        )

    def close(self) -> None:
        """Drops what waits, and waits for what is under way; a second time it does nothing."""
        if not self._closed:
            self._closed = True
            self._ffi.release(self.pointer)


def crc32c(data: bytes | memoryview, before: int = 0) -> int:
    """CRC-32C (Castagnoli) of some bytes, going on from that of the bytes before them."""
    module = native()
    found: int = module.lib.im_crc32c(before, module.ffi.from_buffer(data), len(data))
    return found
