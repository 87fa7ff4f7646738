"""What a placement really costs along a text, counted token by token; and placements that nobody thought about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import PlanError
from isthmus.split.placement import Problem

BASELINES = ("contiguous", "random", "frequency")


@dataclass(frozen=True, slots=True)
class Replayed:
    """Counted along a text; what is "a token" is a mean over its positions.

    Attributes:
        cost_s: seconds a token.
        uses: of each place, experts a token takes there.
        visits: of each place, layers of a token that need it.
        hops: passages between places a token, of paths through experts; at most one less than there are layers.
        spread: places that a layer of a token needs, mean.
        imbalance: the most loaded place's uses over the mean of all places, in the worst layer.
    """

    cost_s: float
    uses: tuple[float, ...]
    visits: tuple[float, ...]
    hops: float
    spread: float
    imbalance: float


def replay(problem: Problem, place: NDArray[np.int64], chosen: NDArray[np.int32] | None = None) -> Replayed:
    """Counts what a placement costs.

    Args:
        place: int64 [layers, experts], numbers of places.
        chosen: int32 [positions, layers, top_k], the experts along another text than the problem's.
    """
    chosen = problem.chosen if chosen is None else chosen
    positions, layers, top_k = chosen.shape
    where = place[np.arange(layers)[:, None], chosen]  # [positions, layers, top_k]
    counts = (where[..., None] == np.arange(len(problem.places))).sum(axis=2)  # [positions, layers, places]
    uses, visits = counts.sum(axis=(0, 1)) / positions, (counts > 0).sum(axis=(0, 1)) / positions
    here = counts.astype(np.int64)
    together = int((here[:, :-1] * here[:, 1:]).sum())  # paths that stay in their place
    hops = (layers - 1) - together / (positions * top_k**2)
    cost = sum(
        one.use_s * use + one.visit_s * visit for one, use, visit in zip(problem.places, uses, visits, strict=True)
    )
    loads = here.sum(axis=0)  # [layers, places]
    return Replayed(
        cost_s=float(cost + problem.hop_s * hops),
        uses=tuple(uses.tolist()),
        visits=tuple(visits.tolist()),
        hops=float(hops),
        spread=float((counts > 0).sum(axis=2).mean()),
        imbalance=float((loads.max(axis=1) / loads.mean(axis=1)).max()),
    )


def baseline(problem: Problem, name: str, seed: int = 0) -> NDArray[np.int64]:
    """A placement of all experts that looks at no affinity: int64 [layers, experts].

    Args:
        name: one of `BASELINES`. "contiguous": in the order of their numbers, where a layer is shared equally expert e
            of E on worker e * N // E; "random": equally many on each worker, which ones is left to chance; "frequency":
            the most used first, to the cheapest place with room, on workers to the least loaded.
        seed: of chance.
    """
    if name not in BASELINES:
        raise PlanError(f"there is no baseline {name!r}", f"choose {', '.join(BASELINES)}")
    if problem.most_of_layer is not None:
        return _shared(problem, name, seed)
    cells = np.arange(problem.layers * problem.n_experts)
    if name == "random":
        cells = np.random.default_rng(seed).permutation(cells)
    elif name == "frequency":
        cells = np.argsort(-problem.uses.ravel(), kind="stable")
    return filled(problem, cells, range(len(problem.places)))


def filled(problem: Problem, cells: NDArray[np.int64], order: range | tuple[int, ...]) -> NDArray[np.int64]:
    """Experts one after the other, each in the first place of an order that has room; where none has, in the others."""
    free = np.array([one.capacity_bytes for one in problem.places])
    found = np.zeros(problem.layers * problem.n_experts, np.int64)
    each = problem.expert_bytes[cells // problem.n_experts]
    wide = (*order, *(p for p in range(len(problem.places)) if p not in order))
    for cell, size in zip(cells.tolist(), each.tolist(), strict=True):
        place = next((p for p in wide if free[p] >= size), None)
        if place is None:
            raise PlanError("experts of different sizes leave no place with room for the last ones", "give more room")
        found[cell], free[place] = place, free[place] - size
    return found.reshape(problem.layers, problem.n_experts)


def _shared(problem: Problem, name: str, seed: int) -> NDArray[np.int64]:
    count, n = len(problem.places), problem.n_experts
    if name == "contiguous":
        return np.repeat((np.arange(n) * count // n)[None], problem.layers, axis=0)
    if name == "random":
        rng = np.random.default_rng(seed)
        return np.stack([rng.permutation(np.arange(n) * count // n) for _ in range(problem.layers)])
    found = np.zeros((problem.layers, n), np.int64)
    for layer, uses in enumerate(problem.uses):
        load, held = np.zeros(count), np.zeros(count, np.int64)
        for expert in np.argsort(-uses, kind="stable"):
            open_ = held < (problem.most_of_layer or n)
            place = int(np.argmin(np.where(open_, load, np.inf)))
            found[layer, expert] = place
            load[place] += uses[expert]
            held[place] += 1
    return found
