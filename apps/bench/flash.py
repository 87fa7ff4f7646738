"""How fast this machine reads experts: through the engine's own reader, past the page cache where that is possible."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress

import numpy as np

from isthmus.edge.experts.facts import used_planes
from isthmus.edge.experts.flash import THREADS
from isthmus.edge.experts.store import open_files
from isthmus.engine.binding import native
from isthmus.engine.reader import Reader
from isthmus.protocol.errors import DeviceError
from isthmus.split.expert_file import Records

AT_ONCE = (1, 2, 4, 8)  # reads
_MOST = 16 << 20  # bytes that a turn of reads takes, about
_TURNS = 8  # of each number of reads, at most
_PATIENCE = 60.0  # seconds for the reads of a turn


class FlashMeter:
    """Reads experts at random places, one and several at once; a context manager.

    Args:
        records: by layer.
        planes: leading planes of an expert that are read; 0 for all.
        large: whether memory has large pages, as that of a store with a large budget: small ones are read slower into.

    Attributes:
        direct: whether reads go past the page cache.

    Raises:
        BundleError: a file cannot be read.
    """

    def __init__(self, records: Mapping[int, Records], planes: int, large: bool = False) -> None:
        self._records, self._planes, self._layers = records, planes, list(records)
        self._size = max(sum(used_planes(one, planes)) for one in records.values())
        self._rng = np.random.default_rng(0)
        self._took: dict[int, list[float]] = {count: [] for count in AT_ONCE}
        with ExitStack() as opened:
            self.direct, self._files = open_files(records)
            for file in self._files.values():
                opened.callback(os.close, file)
            self._reader = Reader(2 * max(AT_ONCE), THREADS)
            opened.callback(self._reader.close)
            self._asking = _Asking(self._reader, max(AT_ONCE), self._size, self.direct, large)
            self._opened = opened.pop_all()

    def __enter__(self) -> FlashMeter:
        self._turn()  # opens whatever there is to open
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def measure(self) -> None:
        """Reads for some milliseconds; now and then, it averages over what else the machine does.

        Raises:
            DeviceError: the disk does not answer.
        """
        for _ in range(max(1, min(_TURNS, _MOST // (self._size * sum(AT_ONCE))))):
            for count, ms in self._turn().items():
                self._took[count].append(ms)

    @property
    def speed(self) -> tuple[float, float]:
        """10^6 bytes a second of many reads, and what a single one takes beyond that in ms."""
        slope, start = np.polyfit(AT_ONCE, [self._calm(count) for count in AT_ONCE], 1)
        if slope <= 0:  # noise: then what many take is all that is known
            slope, start = self._calm(AT_ONCE[-1]) / AT_ONCE[-1], 0.0
        return self._size / float(slope) / 1e3, max(0.0, float(start))

    def _calm(self, count: int) -> float:
        return float(np.quantile(self._took[count], 0.25))  # as of steps: where the machine has little else to do

    def _turn(self) -> dict[int, float]:
        found = {}
        for count in AT_ONCE:
            places = []
            for layer in self._rng.choice(self._layers, count).tolist():
                records = self._records[layer]
                places.append((self._files[layer], records, int(self._rng.integers(records.n_experts))))
            ms, read = self._asking.read(places, self._planes)
            found[count] = ms * self._size * count / read  # layers may have experts of several sizes
        return found


class _Asking:
    """Asks the reader for experts, to the same memory again and again."""

    def __init__(self, reader: Reader, room: int, size: int, direct: bool, large: bool) -> None:
        module = native()
        self._ffi, self._lib, self._reader, self._drop = module.ffi, module.lib, reader, not direct
        memory = mmap.mmap(-1, room * size)
        if large and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._held = module.ffi.from_buffer(memory)
        self._to, self._size = module.ffi.cast("char *", self._held), size
        self._experts = module.ffi.new("im_expert[]", room)
        self._reads = module.ffi.new("im_read[]", room)
        self._tags = module.ffi.new("int32_t[]", room)

    def read(self, places: list[tuple[int, Records, int]], planes: int) -> tuple[float, int]:
        """Reads experts (file, where they stand, number) at once: ms in which the reader was busy, and bytes."""
        total = 0
        for i, (file, records, expert) in enumerate(places):
            read, at = self._reads[i], self._to + i * self._size
            read.file, read.offset, read.tag = file, records.offset(expert, 0), i
            read.expert, read.check, read.drop, read.begun = self._experts + i, 0, self._drop, 0
            for plane in range(3):
                read.to[plane] = self._ffi.NULL
            for plane, size in enumerate(used_planes(records, planes)):
                read.to[plane], read.bytes[plane] = at, size
                at, total = at + size, total + size
        before, until, done = self._reader.report(), time.monotonic() + _PATIENCE, 0
        self._lib.im_reader_ask(self._reader.pointer, self._reads, len(places), 1)
        while done < len(places):
            done += self._lib.im_reader_done(self._reader.pointer, self._tags, len(places))
            if done < len(places):
                if time.monotonic() > until:
                    raise DeviceError("the disk does not give what was asked of it", "check it, and start again")
                time.sleep(1e-4)
        after = self._reader.report()
        if after.failure:
            raise DeviceError(f"experts cannot be read: {after.failure}", "check the disk, and verify the bundle")
        return 1e3 * (after.busy - before.busy), total
