"""The experts of a bundle in a byte budget: read from their files as steps need them, evicted by their worth."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.edge.experts.policy import policy_number
from isthmus.engine.binding import Memory, Workers, native
from isthmus.engine.config import ExpertsConfig
from isthmus.engine.expert_table import ExpertTables
from isthmus.engine.native_layers import HALF_LIFE
from isthmus.engine.reader import Reader
from isthmus.protocol.errors import BundleError, DeviceError, EngineError, IsthmusError
from isthmus.split.bundle import Bundle
from isthmus.split.expert_file import AGAIN, Records

MB = 1_000_000
MAX_PLANES = 3
AHEAD = 8  # experts that are read ahead for the next layer, at most


class StoreReport(NamedTuple):
    """What a store did so far.

    Attributes:
        resident, most: bytes of planes in memory, and their most.
        evicted, read: planes.
        read_ahead, taken_ahead: planes that were read ahead, and those of them that their layer took.
    """

    resident: int
    most: int
    evicted: int
    read: int
    read_ahead: int
    taken_ahead: int


class ExpertStore:
    """An `ExpertSource` over a bundle's expert files.

    Args:
        bundle: whose experts.
        budget: bytes that experts may take in memory.
        layers: how many of its layers, all by default.
        planes: how many planes are used at most, 0 for all.
        policy: one of `policy.POLICIES`.
        foresee: whether the next layer's router is asked early, and what it names read ahead.
        bounded: whether experts are read with as few bits as the bundle's tolerance allows.
        threads: that read.
        bytes_per_second: the speed of a slower device that is emulated, 0 for none.

    Attributes:
        budget: see above.
        direct: whether files are read past the page cache; where a file system cannot, the kernel is told to forget
            what was read.

    Raises:
        DeviceError: the budget holds less than one layer needs at once, a number makes no sense, or a bundle without
            a tolerance shall be read within it, or with fewer planes than that allows.
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
        bounded: bool = False,
        threads: int = 2,
        bytes_per_second: float = 0.0,
    ) -> None:
        config = bundle.config
        if config.experts is None:
            raise DeviceError(f"{bundle.name} has no experts", "leave the experts' budget out")
        number = policy_number(policy)
        self.n_layers = config.n_layers if layers is None else layers
        if not 1 <= self.n_layers <= config.n_layers or not 0 <= planes <= MAX_PLANES or threads < 1:
            raise DeviceError(
                f"{self.n_layers} layers, {planes} planes, {threads} reading threads", "check the numbers"
            )
        if isinstance(budget, bool) or not isinstance(budget, int) or not 0 <= bytes_per_second < math.inf:
            raise DeviceError(f"a budget of {budget!r} bytes, read at {bytes_per_second!r}", "check the numbers")
        self._records, self._planes, least = check_floor(bundle, budget, planes, self.n_layers)
        self.budget, self.foresee = min(budget, max(least, self._whole())), foresee
        self.tolerance = self._tolerance(bundle) if bounded else None
        self.tables = ExpertTables(config, 0, self.n_layers)
        for index, records in self._records.items():
            self.tables.layer(index).shape(records.formats_of(self._planes[index]))
        self._memory, self._parts, self._closed = Memory(), list[Any](), False
        self._workers: Workers | None = None
        with ExitStack() as opened:
            self.direct, self._files = open_files(self._records)
            for file in self._files.values():
                opened.callback(os.close, file)
            room = 3 * self.n_layers * config.experts.n_experts
            self.reader = Reader(room, threads, bytes_per_second)
            opened.callback(self.reader.close)
            self.store = self._new(config.experts, number)
            opened.callback(native().ffi.release, self.store)
            opened.callback(self.reader.close)  # before the memory goes that it reads into
            opened.callback(self._detach)
            self._opened = opened.pop_all()

    def _whole(self) -> int:
        """Bytes of all experts in memory."""
        return sum(
            one.n_experts * sum(map(in_memory, one.plane_sizes[: self._planes[layer]]))
            for layer, one in self._records.items()
        )

    def _tolerance(self, bundle: Bundle) -> NDArray[np.float32]:
        found = bundle.manifest.tolerance
        again = "calibrate it: isthmus experts calibrate; or read them exactly"
        if found is None:
            problem = f"nobody has measured with how few bits the experts of {bundle.name} may be read"
            raise DeviceError(problem, again)
        whole = max((len(one.planes) for one in self._records.values()), default=0)
        if self._records and len(found.shares[0]) != whole:
            problem = f"the tolerance of {bundle.name} is of {len(found.shares[0])} planes, its experts have {whole}"
            raise BundleError(problem, again)
        used = max(self._planes.values(), default=0)
        if used < whole:
            problem = "what was certified may need all bits of an expert"
            raise DeviceError(problem, "leave the experts' bits out, or read them exactly")
        return found.array(used)[: self.n_layers]

    def _new(self, experts: ExpertsConfig, policy: int) -> Any:
        module, memory = native(), self._memory
        stock = memory.keep(module.ffi.new("im_stock *"))
        shelves = memory.keep(module.ffi.new("im_shelf[]", self.n_layers))
        stock.n_layers, stock.n_experts, stock.policy, stock.ahead = self.n_layers, experts.n_experts, policy, AHEAD
        stock.half_life, stock.budget, stock.shelves = HALF_LIFE, self.budget, shelves
        stock.cells, stock.uses = self.tables.cells, self.tables.uses
        for index, shelf in enumerate(shelves):
            shelf.file, shelf.drop = self._files.get(index, -1), not self.direct
            if index in self._records:
                self._shelve(shelf, index)
        store = module.lib.im_store_new(stock, self.reader.pointer)
        if store == module.ffi.NULL:
            raise DeviceError("no memory for the experts, or planes of too many sizes", "split the model again")
        return module.ffi.gc(store, module.lib.im_store_free)

    def _shelve(self, shelf: Any, index: int) -> None:
        records, memory = self._records[index], self._memory
        shelf.n_planes, shelf.start, shelf.record_bytes = self._planes[index], records.start, records.record_bytes
        sums = np.zeros((records.n_experts, 3), np.uint32)
        sums[:, : len(records.planes)] = records.checksums
        shelf.checksums = memory.pointer(sums, "uint32_t *")
        for plane, size in enumerate(records.plane_sizes[: self._planes[index]]):
            fields = self.tables.layer(index).fields(plane)
            shelf.bytes[plane], shelf.n_fields[plane] = size, len(fields)
            shelf.fields[plane] = memory.pointer(fields, "int32_t *")

    @property
    def plane_sizes(self) -> tuple[int, ...]:
        """Bytes of each plane that is used, in the first layer that has experts."""
        index = min(self._records, default=0)
        return self._records[index].plane_sizes[: self._planes[index]]

    def expert_bytes(self, layer: int) -> int:
        """Bytes of an expert of a layer in memory, 0 where it has none."""
        if layer not in self._records:
            return 0
        return sum(map(in_memory, self._records[layer].plane_sizes[: self._planes[layer]]))

    def attach(self, part: Any, workers: Workers) -> None:
        """See `ExpertSource`."""
        if self._closed:
            raise EngineError("the experts are closed", "open them again")
        if self._workers not in (None, workers):
            raise EngineError("another part of these experts runs on other threads", "give both the same threads")
        if self._workers is None:
            self._workers = workers
            workers.stores += 1
        self._parts.append(part)

    def failure(self, layer: int) -> IsthmusError:
        """See `ExpertSource`."""
        if self._closed:
            return DeviceError("the experts are closed", "open them and the part again")
        report = self.reader.report()
        failed = np.flatnonzero(self.tables.layer(layer).present < 0)
        if not len(failed):
            return DeviceError("the disk does not give what was asked of it", "check it, and start again")
        what = f"expert {failed[0]} of layer {layer} in {self._records[layer].path.name}"
        if report.error:
            return DeviceError(f"{what} cannot be read: {os.strerror(report.error)}", "check the disk, and start again")
        return BundleError(f"{what} was altered or is damaged: {report.failure}", AGAIN)

    def report(self) -> StoreReport:
        """See `StoreReport`.

        Raises:
            DeviceError: the store is closed.
        """
        if self._closed:
            raise DeviceError("the experts are closed", "ask before that")
        module = native()
        r = module.ffi.new("im_store_report *")
        module.lib.im_store_reports(self.store, r)
        return StoreReport(r.resident, r.most, r.evicted, r.read, r.read_ahead, r.taken_ahead)

    def close(self) -> None:
        """Ends the reading threads and closes the files; a part that was opened with this can no longer be stepped."""
        if not self._closed:
            self._closed = True
            self._opened.close()

    def _detach(self) -> None:
        for part in self._parts:
            part.store = part.reader = native().ffi.NULL
        if self._workers is not None:
            self._workers.stores -= 1


def in_memory(plane: int) -> int:
    """Bytes of the pages that a plane takes."""
    return -(-plane // mmap.PAGESIZE) * mmap.PAGESIZE


def check_floor(
    bundle: Bundle, budget: int, planes: int, n_layers: int
) -> tuple[dict[int, Records], dict[int, int], int]:
    """Refuses a budget that holds less than one layer needs at once.

    Args:
        budget: bytes.
        planes: how many are used at most, 0 for all.
        n_layers: of the model's first layers.

    Returns:
        The records of layers with experts, how many planes of each are used, and the least budget in bytes.

    Raises:
        DeviceError: it does.
        BundleError: an expert file is absent or describes something else.
    """
    config = bundle.config
    assert config.experts is not None
    records = {i: bundle.records(i) for i in range(n_layers) if config.experts_of(i)}
    used = {i: min(planes or MAX_PLANES, len(one.planes)) for i, one in records.items()}
    least = floor_bytes(records, used, config.experts.top_k)
    if budget < least:
        raise DeviceError(
            f"a budget of {budget / MB:g} MB does not hold the experts that one layer needs at once",
            f"give at least {-(-least // 100_000) / 10:g} MB",
        )
    return records, used, least


def floor_bytes(records: Mapping[int, Records], planes: Mapping[int, int], top_k: int) -> int:
    """The least budget: one more expert than a row takes in a layer."""
    return max(
        ((top_k + 1) * sum(map(in_memory, one.plane_sizes[: planes[layer]])) for layer, one in records.items()),
        default=0,
    )


def open_files(records: Mapping[int, Records]) -> tuple[bool, dict[int, int]]:
    """Whether files are read past the page cache, and their descriptors, which the caller closes.

    Raises:
        BundleError: a file cannot be read.
    """
    for flags in dict.fromkeys((os.O_RDONLY | getattr(os, "O_DIRECT", 0), os.O_RDONLY)):
        files: dict[int, int] = {}
        try:
            for layer, one in records.items():
                files[layer] = os.open(one.path, flags)
                os.preadv(files[layer], [mmap.mmap(-1, mmap.PAGESIZE)], 0)
        except OSError as error:
            for file in files.values():
                os.close(file)
            if flags == os.O_RDONLY:
                raise BundleError(f"{one.path} cannot be read: {error.strerror}", AGAIN) from error
            continue
        return flags != os.O_RDONLY, files
    raise AssertionError("the last way raises or returns")
