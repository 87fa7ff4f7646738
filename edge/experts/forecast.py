"""What a budget for experts makes of a model's speed, foretold from its routing and from what this machine takes.

A token goes from layer to layer in simulated time. Its layer asks for what is not in memory, and for what the next one
will probably take; what is there is computed meanwhile. It does what engine/native/{experts,store,reader}.c do, in the
same order, so that reads overlap with steps as they do there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

import numpy as np

from isthmus.edge.experts.cache import Cache, Worth, check_budget
from isthmus.edge.experts.flash import Flash, FlashSpeed
from isthmus.edge.experts.store import AHEAD
from isthmus.engine.routing import Routing

_TRIED, _PAYS = 8.0, 0.4  # reads ahead that a place of the list is tried with, and the share that must be right


@dataclass(frozen=True, slots=True)
class Steps:
    """What a token's computing takes, and where.

    Attributes:
        before_ms: of each layer with experts, what is computed between the experts of the one before and its own.
        expert_ms: of each layer with experts, one of a row's experts.
        after_ms: what follows the last layer's experts.
        wait_ms: what it costs beyond the waiting itself when a layer waits for reads.
        read_ms: what a read costs the step that computes meanwhile.
        sizes: bytes of an expert of each layer with experts.
        small: whether the experts are so small that a row's are computed together.
        follows: of each layer with experts, whether the one before it has some, too, and can name its experts early.
    """

    before_ms: tuple[float, ...]
    expert_ms: tuple[float, ...]
    after_ms: float
    wait_ms: float
    read_ms: float
    sizes: tuple[int, ...]
    small: bool
    follows: tuple[bool, ...]

    def token_ms(self, top_k: int) -> float:
        """A token with all experts in memory."""
        return sum(self.before_ms) + top_k * sum(self.expert_ms) + self.after_ms


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one budget, along recorded routing.

    Attributes:
        token_ms: the median token; `mean_ms` is the mean one.
        compute_ms: of it with all experts in memory.
        hit_rate: share of experts that were in memory when their layer took them.
        read_mb: 10^6 bytes that are read for a token; `needed_mb` without those that were read ahead in vain.
        waits: layers of a token that wait for reads; `waited_ms` is how long all of them do.
        meanwhile: reads of a token that are done while it computes.
        roofline_ms: the larger one of computing, and of the needed bytes at the flash's speed.
    """

    token_ms: float
    mean_ms: float
    compute_ms: float
    hit_rate: float
    read_mb: float
    needed_mb: float
    waits: float
    waited_ms: float
    meanwhile: float
    roofline_ms: float

    @property
    def tokens_s(self) -> float:
        """Tokens a second."""
        return 1e3 / self.token_ms

    @property
    def exposed_ms(self) -> float:
        """What a token takes longer than with all experts in memory."""
        return max(0.0, self.token_ms - self.compute_ms)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "tokens_s": self.tokens_s, "exposed_ms": self.exposed_ms}

    @classmethod
    def of(
        cls,
        routing: Routing,
        n_experts: int,
        budget: int,
        steps: Steps,
        speed: FlashSpeed,
        *,
        policy: str = "lfru",
        foresee: bool = True,
        warm: int = 0,
    ) -> Forecast:
        """Goes through the routing.

        Args:
            routing: of the layers that have experts.
            n_experts: of a layer.
            budget: bytes that experts may take in memory.
            policy: one of `policy.POLICIES`.
            foresee: whether the next layer's experts are read ahead.
            warm: positions at the beginning that fill the memory and do not count.

        Raises:
            DeviceError: the budget holds less than one layer takes.
        """
        run = _Run(routing, n_experts, budget, steps, speed, policy, foresee)
        positions, layers, top_k = routing.chosen.shape
        warm = min(warm, positions - 1)
        for t in range(warm):
            run.token(t)
        before, took = run.counted(), list[float]()
        for t in range(warm, positions):
            start = run.now
            run.token(t)
            took.append(run.now - start)
        hits, read, vain, waits, waited_ms, meanwhile = (b - a for a, b in zip(before, run.counted(), strict=True))
        count, compute_ms = len(took), steps.token_ms(top_k)
        needed = max(0.0, read - vain) / count
        return cls(
            token_ms=float(np.median(took)),
            mean_ms=float(np.mean(took)),
            compute_ms=compute_ms,
            hit_rate=hits / (count * layers * top_k),
            read_mb=read / count / 1e6,
            needed_mb=needed / 1e6,
            waits=waits / count,
            waited_ms=waited_ms / count,
            meanwhile=meanwhile / count,
            roofline_ms=max(compute_ms, needed * speed.ms_per_byte),
        )


class _Run:
    """Simulated time and what is in memory then. Experts are named by their places: layer times experts and number."""

    def __init__(
        self, routing: Routing, n_experts: int, budget: int, steps: Steps, speed: FlashSpeed, policy: str, foresee: bool
    ) -> None:
        layers, top_k = routing.chosen.shape[1:]
        worth = Worth(policy, routing.chosen, n_experts)
        self._cache = Cache(worth, budget, steps.sizes)  # what is there, on its way, or asked for
        check_budget(budget // max(steps.sizes), min(top_k + 1, n_experts * layers))
        self._flash, self._steps, self._n, self._foresee = Flash(speed), steps, n_experts, foresee
        self._chosen, self._foreseen = routing.chosen, routing.foreseen
        self._held = self._cache.held.ravel()
        self._coming: set[int] = set()  # asked for, and not there when it was last looked
        self._ahead: dict[int, int] = {}  # read ahead: its rank in the list it was read ahead by
        self._ahead_layer = -1
        self._tried, self._right = [0.0] * AHEAD, [0.0] * AHEAD
        self._hits = self._vain = self._waits = self._meanwhile = 0
        self._waited_ms = 0.0
        self.now = 0.0

    def counted(self) -> tuple[float, ...]:
        """So far: hits, bytes read, those of them in vain, waits of layers, ms of them, reads done meanwhile."""
        vain = self._vain + self._flash.dropped
        return self._hits, self._flash.bytes, vain, self._waits, self._waited_ms, self._meanwhile

    def token(self, t: int) -> None:
        """One token through all layers."""
        steps, last = self._steps, self._chosen.shape[1] - 1
        for layer in range(last + 1):
            self._work(steps.before_ms[layer])
            asked = self._foresee and layer < last and steps.follows[layer + 1]
            self._layer(t, layer, self._foreseen[t, layer + 1] if asked else None)
        self._work(steps.after_ms)

    def _work(self, ms: float) -> None:
        """Computes, while reads go on, which take some of the processors' time."""
        end, there = self.now + ms, self._flash.there
        self._flash.advance(end)
        done = sum(self.now < there.get(cell, inf) <= end for cell in self._coming)
        self._meanwhile += done
        self.now = end + done * self._steps.read_ms

    def _wait(self, until: float) -> None:
        self._waits += 1
        self._waited_ms += until - self.now + self._steps.wait_ms
        self.now = until + self._steps.wait_ms

    def _layer(self, t: int, layer: int, foreseen: Any) -> None:
        base, taken = layer * self._n, self._chosen[t, layer]
        cells: list[int] = (taken + base).tolist()
        self._begin(cells)
        for cell in cells:
            if (rank := self._ahead.pop(cell, None)) is not None:
                self._right[rank] += 1
        coming = [cell for cell in cells if cell in self._coming]
        missing = [cell for cell in cells if not self._held[cell]]
        self._hits += len(cells) - len(coming) - len(missing)
        self._cache.worth.take(t, layer, taken)
        guesses = [] if foreseen is None else [c for c in (foreseen + base + self._n).tolist() if not self._held[c]]
        if missing or guesses:
            self._settle(layer)
            for cell in missing:
                self._fetch(cell, cells, urgent=True)
            self._guess(guesses[:AHEAD], cells, layer)
        self._compute(cells, coming + missing, layer)

    def _begin(self, cells: Collection[int]) -> None:
        """What was asked for is looked after, and what was read ahead and is not among these cells taken back."""
        self._flash.advance(self.now)
        self._cache.turn()
        there = self._flash.there
        for cell in [cell for cell in self._coming if there.get(cell, inf) <= self.now]:
            self._coming.remove(cell)
            del there[cell]
        for cell, begun in self._flash.withdraw(cells):
            self._coming.remove(cell)
            self._cache.drop(cell)
            if (rank := self._ahead.pop(cell, None)) is not None:
                self._tried[rank] -= not begun

    def _settle(self, layer: int) -> None:
        """What was read ahead for a layer that is through was read in vain, unless it was taken."""
        if self._ahead_layer >= 0 and self._ahead_layer != layer + 1:
            self._vain += sum(self._cache.sizes[cell // self._n] for cell in self._ahead)
            self._ahead.clear()
            self._ahead_layer = -1

    def _pays(self, rank: int) -> bool:
        if self._tried[rank] > 64:
            self._tried[rank] *= 0.5
            self._right[rank] *= 0.5
        if self._tried[rank] < _TRIED or self._right[rank] > _PAYS * self._tried[rank]:
            return True
        self._tried[rank] *= 0.999
        self._right[rank] = self._right[rank] * 0.999 + 0.0005
        return False

    def _fetch(self, cell: int, cells: Sequence[int], *, urgent: bool) -> bool:
        """Asks for an expert; only what is urgent waits until there is room."""
        size = self._cache.sizes[cell // self._n]
        while not self._cache.make_room(size, {*cells, *self._coming, *self._ahead}):
            if not urgent:
                return False
            if self._cache.make_room(size, {*cells, *self._coming}):
                break
            soonest = min(self._flash.arrival(one) for one in self._coming if one not in cells)
            self.now = max(self.now, soonest)
            self._begin(cells)
        self._cache.add(cell // self._n, cell % self._n)
        self._coming.add(cell)
        self._flash.ask(cell, size, self.now, urgent=urgent)
        return True

    def _guess(self, guesses: Sequence[int], cells: Sequence[int], layer: int) -> None:
        for rank, cell in enumerate(guesses):
            if not self._pays(rank):
                continue
            if not self._fetch(cell, cells, urgent=False):
                break
            self._ahead[cell] = rank
            self._ahead_layer = layer + 1
            self._tried[rank] += 1

    def _compute(self, cells: Sequence[int], reads: Sequence[int], layer: int) -> None:
        """The layer's experts, those that are being read when they are there."""
        steps, expert_ms = self._steps, self._steps.expert_ms[layer]
        left = sorted(self._flash.arrival(cell) for cell in reads if cell in self._coming)
        ready = len(cells) - len(left)
        if steps.small and left and left[-1] > self.now:
            self._wait(left[-1])
            ready, left = len(cells), []
        while ready or left:
            if ready:
                self._work(ready * expert_ms)
            elif left[0] > self.now:
                self._wait(left[0])
            ready = sum(at <= self.now for at in left)
            left = left[ready:]
        self._flash.advance(self.now)
