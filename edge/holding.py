"""What this device holds of a model: how many layers, whether they fit, and the part that runs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from isthmus.edge import budget
from isthmus.edge.experts.settings import ExpertSettings
from isthmus.edge.experts.store import ExpertStore, check_floor
from isthmus.edge.experts.warm import check, warm
from isthmus.edge.local import CHUNK, LocalPart
from isthmus.edge.stopwatch import Stopwatch
from isthmus.engine.experts import ExpertSource
from isthmus.engine.native_part import NativePart
from isthmus.engine.part import KV_BLOCK, KV_SINKS, KV_SLACK, KvConfig, Part, WeightSource
from isthmus.engine.placement import Placement
from isthmus.engine.slow import check_slow_down, slowed
from isthmus.protocol.errors import BundleError, DeviceError
from isthmus.split.bundle import Bundle


class Holding:
    """Layers [0, n) of a bundle, as many as are there and fit.

    Args:
        memory_mb: most memory of the process in 10^6 bytes, None for no limit.
        kv_tokens: positions of the conversation.
        window: attention window in positions, 0 for all.
        backend, threads: as in `isthmus.engine.open_part`.
        slow_down: as in `Device`.
        experts: how the experts of a mixture are held; None for all in memory.
        watch: sees what the steps of the bundle's own layers take.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        memory_mb: float | None,
        kv_tokens: int,
        window: int,
        backend: str,
        threads: int,
        slow_down: float = 1.0,
        experts: ExpertSettings | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        check_slow_down(slow_down)
        if experts is not None and bundle.config.experts is None:
            raise DeviceError(f"{bundle.name} has no experts", "leave expert_mb out")
        self._experts = experts
        self._placement = Placement.load(experts.placement) if experts and experts.placement else None
        if self._placement is not None:
            check(self._placement, bundle)
        self.store: ExpertStore | None = None
        self._bundle, self._memory_mb, self._window = bundle, memory_mb, window
        self._source = bundle.without_experts() if experts else bundle
        self._backend, self._threads, self._slow_down = backend, threads, slow_down
        self._watch = watch
        self.kv = KvConfig(max_tokens=kv_tokens + (CHUNK + KV_SLACK + KV_SINKS + 3 * KV_BLOCK if window else KV_BLOCK))
        self.part: LocalPart | None = None

    @property
    def slides(self) -> bool:
        """Whether the conversation's oldest positions fall out of sight."""
        return bool(self._window)

    @property
    def bounded(self) -> bool:
        """Whether experts are read with fewer bits than the model has."""
        return self._experts is not None and self._experts.mode == "bounded"

    def check_cloud(self, cloud: bool) -> None:
        """Checks how experts are read.

        Args:
            cloud: whether there is one, which promises what the model itself says.

        Raises:
            DeviceError: in too little memory; with fewer bits than the model has, and there is one; or there is none
                that could be asked.
            BundleError: the experts cannot be read.
        """
        if not cloud and self._experts is not None and self._experts.mode == "cloud":
            raise DeviceError("experts shall ask a cloud, and none is named", "name one, or read them exactly")
        if cloud and self._experts is not None:  # what is damaged is no reason not to ask it
            with suppress(BundleError):
                check_floor(self._bundle, self._experts.budget, self._experts.planes, self._bundle.held_layers)
            if self._experts.mode == "cloud" and self._memory_mb is not None and not self.whole:
                raise self._refusal(self._bundle.config.n_layers)
        if cloud and self._experts is not None and self._experts.planes:
            here = [layer for layer in range(self._bundle.held_layers) if self._bundle.config.experts_of(layer)]
            if any(len(self._bundle.records(layer).planes) > self._experts.planes for layer in here):
                problem = f"the experts are read with {self._experts.bits} bits, and the cloud's model has more"
                raise DeviceError(problem, "read them with all their bits, or leave the cloud out")
        if cloud and self.bounded:
            problem = "the experts are read as a bound allows, and a cloud answers as the model does"
            raise DeviceError(problem, "read them exactly, or leave the cloud out")

    @property
    def whole(self) -> bool:
        """Whether all layers and the head are here and fit."""
        return self.layers == self._bundle.config.n_layers

    @property
    def layers(self) -> int:
        """The largest n for which layers [0, n) are here and fit."""
        if self.part is not None and self.part.part.end == self._bundle.config.n_layers:
            return self.part.part.end
        held = self._held()
        if self._memory_mb is None:
            return held
        return min(held, budget.layers_that_fit(self._sizes(), self._bundle.config, self.kv, self._memory_mb))

    def prefetch(self) -> Callable[[], bool]:
        """Starts to check the weights in the background; gives a cheap look at whether that is done."""
        return self._source.prefetch(0, self.layers)

    def open(self, depth: int) -> LocalPart:
        """The part, which has at least layers [0, depth); opened when first asked for.

        Raises:
            DeviceError: so many are not here, or do not fit.
        """
        if self.part is None or self.part.part.end < depth:
            layers = self.layers
            if layers < depth:
                raise self._refusal(depth)
            part = self._open_own(layers)
            self.part = LocalPart(self._watch.timed(part) if self._watch else part, self._window)
        return self.part

    def _open_own(self, layers: int) -> Part:
        if self._experts is None:
            return self.open_part(self._bundle, 0, layers, self.kv)
        settings = self._experts
        if self.part is not None:  # fewer layers were open
            self.part.close()
            self.part = None
        self._close_store()
        self.store = ExpertStore(
            self._bundle,
            settings.budget,
            layers=layers,
            planes=settings.planes,
            bounded=self.bounded,
            bytes_per_second=settings.flash_mb_s * 1e6,
        )
        part = self._opened(self._source, 0, layers, self.kv, self.store)
        if self._placement is not None and isinstance(part, NativePart):
            try:
                warm(part, self.store, self._placement)
            except BaseException:
                part.close()
                raise
        if self._watch is not None and self._watch.stalls is not None:
            self._watch.stalls.store = self.store
        return slowed(part, self._slow_down)

    def open_part(
        self, source: WeightSource, start: int, end: int, kv: KvConfig, experts: ExpertSource | None = None
    ) -> Part:
        """Layers [start, end) on this device's engine, of its own bundle or of another source."""
        return slowed(self._opened(source, start, end, kv, experts), self._slow_down)

    def _opened(self, source: WeightSource, start: int, end: int, kv: KvConfig, experts: ExpertSource | None) -> Part:
        from isthmus.engine import open_part

        return open_part(source, start, end, backend=self._backend, threads=self._threads, kv=kv, experts=experts)

    def truncate(self, length: int) -> None:
        """Forgets the KV of positions from `length` on."""
        if self.part is not None:
            self.part.truncate(length)

    def close(self) -> None:
        """Frees KV and weights."""
        if self.part is not None:
            self.part.close()
        self._close_store()

    def _close_store(self) -> None:
        if self.store is not None:
            if self._watch is not None and self._watch.stalls is not None:
                self._watch.stalls.store = None
            self.store.close()
            self.store = None

    def _held(self) -> int:
        held, n_layers = self._bundle.held_layers, self._bundle.config.n_layers
        if held == n_layers and not all(map(self._bundle.holds, self._bundle.manifest.part_files(0, n_layers))):
            return n_layers - 1
        return held

    def _refusal(self, depth: int) -> DeviceError:
        held, config = self._held(), self._bundle.config
        if held < depth:
            whole = depth == config.n_layers
            what, how = ("the whole model is", "mode local") if whole else (f"layers [0, {depth}) are", f"cut {depth}")
            return DeviceError(
                f"{what} wanted and the bundle holds layers [0, {held}) of {config.n_layers}",
                f"open it with a cloud and {how} to fetch the rest, choose a smaller cut, or use stream mode",
            )
        assert self._memory_mb is not None
        return budget.refusal(self._sizes(), config, self.kv, self._memory_mb, depth)

    def _sizes(self) -> budget.PartSizes:
        files = {name: entry.bytes for name, entry in self._bundle.manifest.files.items()}
        expert_budget = self._experts.budget if self._experts else None
        return budget.PartSizes.from_files(self._bundle.config.n_layers, files, expert_budget)
