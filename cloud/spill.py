"""KV blocks on disk: slots of one size in a file without a name, which is gone with the process."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from isthmus.protocol.errors import ServiceError

_log = logging.getLogger("isthmus.cloud")
_PAUSE_S = 30.0  # after a write failed


class Slot(NamedTuple):
    """Where a block is, and what it must be.

    Attributes:
        place: in the file, counted in slots.
        size: in bytes.
        digest: BLAKE2b-128 of them.
    """

    place: int
    size: int
    digest: bytes


class Spill:
    """See the module. What cannot be written or read is as good as forgotten; the log tells.

    Args:
        folder: where the file is made, for this process alone.
        slot_bytes: of a block at most.
        max_bytes: that the file may have, in whole slots.
        clock: seconds, monotonic.

    Attributes:
        meanwhile: entered while the disk is waited for.
        written, read, damaged: blocks so far; damaged ones are counted as read, too.

    Raises:
        ServiceError: no file can be made there, or not even one slot is wanted.
    """

    def __init__(self, folder: Path, slot_bytes: int, max_bytes: int, clock: Callable[[], float]) -> None:
        self._slot_bytes, self._clock, self._count = slot_bytes, clock, max_bytes // slot_bytes
        if self._count < 1:
            least = -(-slot_bytes // 10**6)
            raise ServiceError(f"{max_bytes / 1e6:g} MB hold no block of KV", f"give --spill-mb {least} or more")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise ServiceError(f"cannot write into {folder}: {error.strerror}", "choose another --spill") from error
        self.meanwhile: AbstractContextManager[None] = nullcontext()
        self.written = self.read = self.damaged = 0
        self._free, self._used, self._paused_s = list[int](), 0, -_PAUSE_S

    @property
    def full(self) -> bool:
        """Whether a slot must be given back before another is had."""
        return not self._free and self._used == self._count

    @property
    def held_bytes(self) -> int:
        """Bytes of the slots that are in use."""
        return (self._used - len(self._free)) * self._slot_bytes

    def put(self, data: bytes) -> Slot | None:
        """Writes a block; None when it is full, or the disk fails, as it then does for a while."""
        if self.full or self._clock() - self._paused_s < _PAUSE_S:
            return None
        digest = blake2b(data, digest_size=16).digest()
        place = self._free.pop() if self._free else self._used
        self._used = max(self._used, place + 1)
        try:
            with self.meanwhile:
                self._write(place * self._slot_bytes, data)
        except OSError as error:
            self._free.append(place)
            self._paused_s = self._clock()
            _log.warning("KV cannot be written to disk, and is forgotten for %g s: %s", _PAUSE_S, error.strerror)
            return None
        self.written += 1
        return Slot(place, len(data), digest)

    def get(self, slot: Slot) -> bytes | None:
        """What was written; None when it is not that any more. The slot stays."""
        self.read += 1
        try:
            with self.meanwhile:
                data = os.pread(self._file.fileno(), slot.size, slot.place * self._slot_bytes)
        except OSError as error:
            _log.warning("KV cannot be read from disk: %s", error.strerror)
            data = b""
        if blake2b(data, digest_size=16).digest() == slot.digest:
            return data
        self.damaged += 1
        _log.warning("KV on disk is damaged; it is computed again")
        return None

    def give(self, slot: Slot) -> None:
        """Gives a slot back."""
        self._free.append(slot.place)

    def close(self) -> None:
        """Removes the file."""
        self._file.close()

    def _write(self, at: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if not (count := os.pwrite(self._file.fileno(), view, at)):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            view, at = view[count:], at + count
