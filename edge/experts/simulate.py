"""Eviction over recorded routing, without a model: how many experts would have been in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.native_layers import HALF_LIFE
from isthmus.engine.routing import Routing

_NEVER = 1 << 30


def hit_rate(routing: Routing, n_experts: int, capacity: int, policy: str, *, warm: int = 0) -> float:
    """Share of the experts that were in memory when a layer took them, all layers sharing one budget.

    Args:
        n_experts: of a layer.
        capacity: experts of all layers together that fit, at least as many as one layer takes.
        policy: one of `policy.POLICIES`, or "belady": what is taken again last leaves first, which nobody can know
            (Belady, 1966).
        warm: positions at the beginning that fill the memory and do not count.
    """
    positions, layers, top_k = routing.chosen.shape
    held, hits = np.zeros((layers, n_experts), bool), 0
    worth, count = _worth(policy, routing.chosen, n_experts), 0
    for t in range(positions):
        for layer in range(layers):
            taken = routing.chosen[t, layer]
            missing = taken[~held[layer, taken]]
            hits += top_k - len(missing) if t >= warm else 0
            values = worth(t, layer)
            if (leave := count + len(missing) - capacity) > 0:
                kept = np.where(held, values, np.inf)
                kept[layer, taken] = np.inf
                gone = np.argpartition(kept.ravel(), leave - 1)[:leave]
                held.ravel()[gone] = False
                count -= leave
            held[layer, missing] = True
            count += len(missing)
    return float(hits / ((positions - warm) * layers * top_k))


def foresight(routing: Routing) -> float:
    """Share of the experts named one layer early that were then chosen."""
    chosen, foreseen = routing.chosen[:, 1:], routing.foreseen[:, 1:]
    return float((foreseen[..., :, None] == chosen[..., None, :]).any(-1).mean())


def _worth(policy: str, chosen: NDArray[np.int32], n_experts: int) -> Callable[[int, int], NDArray[np.float64]]:
    """What each expert is worth when a layer of a position has chosen, [layers, experts]; to be asked in order."""
    positions, layers, _ = chosen.shape
    last = np.zeros((layers, n_experts))
    if policy == "belady":
        following = np.full((positions + 1, layers, n_experts), float(_NEVER), np.float32)
        for t in range(positions - 1, -1, -1):
            following[t] = following[t + 1]
            np.put_along_axis(following[t], chosen[t], t, axis=1)

        def next_use(t: int, layer: int) -> NDArray[np.float64]:
            # Layers up to this one are taken again at t + 1 at the earliest, those behind it perhaps now.
            ahead = np.concatenate([following[t + 1, : layer + 1], following[t, layer + 1 :]])
            when: NDArray[np.float64] = ahead.astype(np.float64) * layers + np.arange(layers)[:, None]
            return -when

        return next_use
    rate, count = np.zeros((layers, n_experts)), np.zeros((layers, n_experts))

    def of_the_past(t: int, layer: int) -> NDArray[np.float64]:
        taken = chosen[t, layer]
        rate[layer, taken] = 1 + rate[layer, taken] * 0.5 ** ((t - last[layer, taken]) / HALF_LIFE)
        last[layer, taken] = t
        count[layer, taken] += 1
        lately: NDArray[np.float64] = rate * 0.5 ** ((t - last) / HALF_LIFE)
        return {"lru": last, "lfu": count}.get(policy, lately)

    return of_the_past
