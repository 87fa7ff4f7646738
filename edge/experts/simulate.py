"""Eviction over recorded routing, without a model: which experts would have been in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.edge.experts.cache import Cache, Worth, check_budget
from isthmus.engine.routing import Routing


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a cache would have held along a text.

    Attributes:
        hits: bool [positions, layers, top_k], whether an expert was in memory when its layer took it.
        resident: bool [positions, layers, experts], what was in memory behind each position.
    """

    hits: NDArray[np.bool_]
    resident: NDArray[np.bool_]

    def hit_rate(self, warm: int = 0) -> float:
        """Share of the experts that were in memory; `warm` positions at the beginning do not count."""
        return float(self.hits[warm:].mean())

    def by_layer(self, warm: int = 0) -> NDArray[np.float64]:
        """The same of each layer, [layers]."""
        found: NDArray[np.float64] = self.hits[warm:].mean(axis=(0, 2))
        return found


def simulate(
    routing: Routing, n_experts: int, budget: int, policy: str, *, sizes: Sequence[int] | None = None
) -> Simulation:
    """Every expert is read when its layer takes it, all layers sharing one budget.

    Args:
        n_experts: of a layer.
        budget: what fits, in the unit of `sizes`; at least what one layer takes.
        policy: one of `policy.POLICIES`, or "belady" (see `cache.Worth`).
        sizes: of an expert of each layer; 1 each by default, so that `budget` counts experts.

    Raises:
        DeviceError: a policy that there is not, or a budget that does not hold what one layer takes.
    """
    positions, layers, top_k = routing.chosen.shape
    cache = Cache(Worth(policy, routing.chosen, n_experts), budget, sizes)
    check_budget(budget // max(cache.sizes), top_k)
    hits = np.zeros((positions, layers, top_k), bool)
    resident = np.zeros((positions, layers, n_experts), bool)
    for t in range(positions):
        for layer in range(layers):
            taken = routing.chosen[t, layer]
            hits[t, layer] = cache.held[layer, taken]
            cache.worth.take(t, layer, taken)
            missing = taken[~hits[t, layer]]
            if len(missing):
                cache.turn()
                cache.make_room(len(missing) * cache.sizes[layer], (taken + layer * n_experts).tolist())
                for expert in missing.tolist():
                    cache.add(layer, expert)
        resident[t] = cache.held
    return Simulation(hits, resident)


def hit_rate(routing: Routing, n_experts: int, capacity: int, policy: str, *, warm: int = 0) -> float:
    """Share of the experts that were in memory when a layer took them, all layers sharing one budget.

    Args:
        n_experts: of a layer.
        capacity: experts of all layers together that fit, at least as many as one layer takes.
        policy: one of `policy.POLICIES`, or "belady" (see `cache.Worth`).
        warm: positions at the beginning that fill the memory and do not count.

    Raises:
        DeviceError: see `simulate`.
    """
    return simulate(routing, n_experts, capacity, policy).hit_rate(warm)


def foresight(routing: Routing) -> float:
    """Share of the experts named one layer early that were then chosen."""
    chosen, foreseen = routing.chosen[:, 1:], routing.foreseen[:, 1:]
    return float((foreseen[..., :, None] == chosen[..., None, :]).any(-1).mean())
