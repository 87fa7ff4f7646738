"""The experts of a bundle in a byte budget: read from their files as steps need them, evicted by their worth."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from isthmus.edge.experts.arena import Arena
from isthmus.edge.experts.policy import POLICIES
from isthmus.engine.expert_table import ExpertTables
from isthmus.engine.experts import Wanted
from isthmus.engine.reader import Read, Reader
from isthmus.protocol.errors import BundleError, DeviceError, IsthmusError
from isthmus.split.bundle import Bundle
from isthmus.split.expert_file import AGAIN, Records

MB = 1_000_000
AHEAD = 8  # experts that are read ahead for the next layer, at most
VICTIMS = 64  # planes that are named at once for leaving
_FREE, _NEVER = np.float32(3e38), 1 << 30


@dataclass(frozen=True, slots=True)
class _UnderWay:
    layer: int
    expert: int
    places: dict[int, int]  # plane -> address
    ahead: bool


class ExpertStore:
    """An `ExpertSource` over a bundle's expert files.

    Args:
        bundle: whose experts.
        budget: bytes that experts may take in memory.
        layers: how many of its layers, all by default.
        planes: how many planes are used at most, 0 for all.
        policy: a key of `POLICIES`.
        foresee: whether the next layer's router is asked early, and what it names read ahead.
        threads: that read.
        bytes_per_second: the speed of a slower device that is emulated, 0 for none.

    Attributes:
        direct: whether files are read past the page cache; where a file system cannot, pages are dropped after reading.

    Raises:
        DeviceError: the budget holds less than one layer needs at once.
        BundleError: an expert file is absent or describes something else.
    """

    def __init__(
        self,
        bundle: Bundle,
        budget: int,
        *,
        layers: int | None = None,
        planes: int = 0,
        policy: str = "lfru",
        foresee: bool = True,
        threads: int = 2,
        bytes_per_second: float = 0.0,
    ) -> None:
        config = bundle.config
        if config.experts is None:
            raise DeviceError(f"{bundle.name} has no experts", "leave the experts' budget out")
        self.n_layers = config.n_layers if layers is None else layers
        self._records = {i: bundle.records(i) for i in range(self.n_layers) if config.experts_of(i)}
        self._planes = {i: min(planes or 3, len(records.planes)) for i, records in self._records.items()}
        least = floor_bytes(self._records, self._planes, config.experts.top_k)
        if budget < least:
            raise DeviceError(
                f"a budget of {budget / MB:g} MB does not hold the experts that one layer needs at once",
                f"give at least {-(-least // 100_000) / 10:g} MB",
            )
        self.budget, self.foresee, self._policy = budget, foresee, POLICIES[policy]
        self.tables = ExpertTables(config, 0, self.n_layers)
        for index, records in self._records.items():
            self.tables.layer(index).shape(records.formats_of(self._planes[index]))
        sizes = {
            size for index, records in self._records.items() for size in records.plane_sizes[: self._planes[index]]
        }
        self.arena = Arena(budget, sizes)
        self.direct, self._files = _open(self._records)
        self.reader: Reader | None = Reader(threads, bytes_per_second)
        shape = self.n_layers, config.experts.n_experts, 3
        self._address = np.zeros(shape, np.uint64)
        self._checked = np.zeros(shape, bool)
        self._kept = np.zeros(shape[:2], bool)  # read ahead, and their layer is not there yet
        self._due: list[tuple[int, int, int]] = []  # (step, layer, expert) of those
        self._under_way: dict[int, _UnderWay] = {}
        self._tag = 0
        self._victims: list[int] = []

    def want(self, step: int, layer: int, wanted: Sequence[Wanted], foreseen: Sequence[Wanted]) -> None:
        """See `ExpertSource`."""
        assert self.reader is not None
        self._collect()
        self._take_back()
        self._settle(step, layer)
        self._victims = []
        reads = [read for one in wanted if (read := self._fetch(step, layer, one, ahead=False))]
        self.reader.ask(reads, urgent=True)
        if foreseen and len(reads) == len(wanted):
            ahead = [self._fetch(step, layer + 1, one, ahead=True) for one in foreseen[:AHEAD]]
            self.reader.ask([read for read in ahead if read], urgent=False)

    def failure(self) -> IsthmusError:
        """See `ExpertSource`."""
        assert self.reader is not None
        report = self.reader.report()
        if report.failed is None:
            return DeviceError("the disk does not give what was asked of it", "check it, and start again")
        one = self._under_way[report.failed]
        path = self._records[one.layer].path
        what = f"expert {one.expert} of layer {one.layer} in {path.name}"
        if report.error:
            return DeviceError(f"{what} cannot be read: {os.strerror(report.error)}", "check the disk, and start again")
        return BundleError(f"{what} was altered or is damaged: {report.failure}", AGAIN)

    def close(self) -> None:
        """Ends the reading threads and closes the files; parts that were opened with this are not to be used again."""
        if self.reader is not None:
            self.reader.close()
            self.reader = None
            for file in self._files.values():
                os.close(file)

    def _collect(self) -> None:
        """Takes note of what was read."""
        assert self.reader is not None
        for tag in self.reader.done():
            one = self._under_way[tag]
            if self.tables.present[one.layer, one.expert] < 0:
                continue  # `failure` will ask for it
            del self._under_way[tag]
            for plane in one.places:
                self._checked[one.layer, one.expert, plane] = True
            if not self.direct:
                records, first = self._records[one.layer], min(one.places)
                length = sum(records.plane_sizes[plane] for plane in one.places)
                with suppress(OSError):
                    os.posix_fadvise(
                        self._files[one.layer], records.offset(one.expert, first), length, os.POSIX_FADV_DONTNEED
                    )

    def _take_back(self) -> None:
        """Withdraws what was to be read ahead and has not begun."""
        assert self.reader is not None
        for tag in self.reader.withdraw():
            one = self._under_way.pop(tag)
            sizes = self._records[one.layer].plane_sizes
            for plane, address in one.places.items():
                self.arena.give(sizes[plane], address)
            self.tables.asked[one.layer, one.expert] = min(one.places)
            self._kept[one.layer, one.expert] = False

    def _settle(self, step: int, layer: int) -> None:
        """From here on the layers that were read ahead for speak for themselves."""
        left = []
        for due in self._due:
            if due[0] == step and due[1] > layer:
                left.append(due)
            else:
                self._kept[due[1], due[2]] = False
        self._due = left

    def _fetch(self, step: int, layer: int, one: Wanted, *, ahead: bool) -> Read | None:
        """Makes room for what an expert lacks; None when there is none."""
        records, table = self._records[layer], self.tables.layer(layer)
        first, sizes = int(table.asked[one.expert]), records.plane_sizes
        places: dict[int, int] = {}
        for plane in range(first, min(one.planes, self._planes[layer])):
            address = self._room(step, sizes[plane])
            if address is None:
                for other, taken in places.items():
                    self.arena.give(sizes[other], taken)
                return None
            places[plane] = address
        if not places:
            return None
        table.expect(one.expert, places)
        self._tag = (self._tag + 1) % _NEVER
        self._under_way[self._tag] = _UnderWay(layer, one.expert, places, ahead)
        for plane, address in places.items():
            self._address[layer, one.expert, plane] = address
        if ahead:
            self._kept[layer, one.expert] = True
            self._due.append((step, layer, one.expert))
        unchecked = frozenset(plane for plane in places if not self._checked[layer, one.expert, plane])
        sums = records.checksums[one.expert]
        offset = records.offset(one.expert, first)
        return Read(self._files[layer], offset, places, sizes, sums, unchecked, table, one.expert, self._tag)

    def _room(self, step: int, size: int) -> int | None:
        address = self.arena.take(size)
        while address is None:
            if not self._victims:
                self._victims = self._choose(step)
                if not self._victims:
                    return None
            self._evict(self._victims.pop())
            address = self.arena.take(size)
        return address

    def _choose(self, step: int) -> list[int]:
        """Planes that may leave, by their place in an array [layers, experts, 3], that of the least worth last."""
        tables = self.tables
        ready = tables.ready()
        settled = (tables.asked == ready) & ~self._kept & (tables.present >= 0)
        planes = np.arange(3)
        free = settled[..., None] & (planes < ready[..., None]) & (planes >= tables.wanted[..., None])
        worth = np.where(free, self._policy(step, tables), _FREE).ravel()
        n = min(VICTIMS, worth.size - 1)
        least = np.argpartition(worth, n)[:n]
        least = least[worth[least] < _FREE]
        # Of planes of one expert that are worth the same, the higher ones leave first.
        expert, plane = least // 3, least % 3
        order = np.lexsort((plane, -expert, -worth[least]))
        found: list[int] = least[order].tolist()
        return found

    def _evict(self, victim: int) -> None:
        _, n_experts = self._kept.shape
        pair, plane = divmod(victim, 3)
        layer, expert = divmod(pair, n_experts)
        table = self.tables.layer(layer)
        for top in range(int(table.asked[expert]) - 1, plane - 1, -1):  # those above it are of no use without it
            table.evict(expert, top)
            self.arena.give(self._records[layer].plane_sizes[top], int(self._address[layer, expert, top]))


def floor_bytes(records: Mapping[int, Records], planes: Mapping[int, int], top_k: int) -> int:
    """The least budget: one more expert than a row takes in a layer."""
    return max((top_k + 1) * sum(one.plane_sizes[: planes[layer]]) for layer, one in records.items())


def _open(records: Mapping[int, Records]) -> tuple[bool, dict[int, int]]:
    """Whether files are read past the page cache, and their descriptors."""
    for flags in {os.O_RDONLY | getattr(os, "O_DIRECT", 0): None, os.O_RDONLY: None}:
        files: dict[int, int] = {}
        try:
            for layer, one in records.items():
                files[layer] = os.open(one.path, flags)
                os.preadv(files[layer], [_page()], 0)
        except OSError as error:
            for file in files.values():
                os.close(file)
            if flags == os.O_RDONLY:
                raise BundleError(f"{one.path} cannot be read: {error.strerror}", AGAIN) from error
            continue
        return flags != os.O_RDONLY, files
    raise AssertionError("the last way raises or returns")


def _page() -> mmap.mmap:
    """Memory that a direct read can go to."""
    return mmap.mmap(-1, mmap.PAGESIZE)
