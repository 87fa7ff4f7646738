"""The placement of experts as an integer linear program, solved by HiGHS; and bounds of what any placement costs.

Variables: whether an expert stands in a place (binary); whether a distinct choice of a layer's experts needs a place
that costs a visit; and whether a pair of experts of layers that follow each other stands apart. The latter two are
bounded from below by the former, which makes the quadratic affinity term linear (as in MoETuner, 2502.06643).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import PlanError
from isthmus.split.placement import NEAR, Problem

MOST_ENTRIES = 3_000  # of the program's matrix where no pair of experts counts
MOST_PAIRS = 1_500  # pairs of experts times places: their relaxation says little, so that search takes long


class Solved(NamedTuple):
    """place: int64 [layers, experts], the best, None where time was up before; bound_s: none costs less a token."""

    place: NDArray[np.int64] | None
    bound_s: float


class _Rows:
    """A sparse matrix as it grows, with bounds of its rows."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
        self._low: list[NDArray[np.float64]] = []
        self._high: list[NDArray[np.float64]] = []
        self._count = 0

    def add(self, columns: NDArray[np.int64], values: NDArray[np.float64], low: float, high: float) -> None:
        """Rows with the same number of entries: columns and values [rows, entries]."""
        rows = self._count + np.repeat(np.arange(len(columns)), columns.shape[1])
        self._parts.append((rows, columns.ravel(), np.broadcast_to(values, columns.shape).ravel()))
        self._low.append(np.full(len(columns), low))
        self._high.append(np.full(len(columns), high))
        self._count += len(columns)

    def constraint(self, size: int) -> object:
        from scipy.optimize import LinearConstraint
        from scipy.sparse import coo_array

        rows, columns, values = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        matrix = coo_array((values, (rows, columns)), (self._count, size)).tocsr()
        return LinearConstraint(matrix, np.concatenate(self._low), np.concatenate(self._high))


def distinct(problem: Problem, layer: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """The distinct choices of a layer's experts [n, top_k], and the share of positions that made each [n]."""
    sets, counts = np.unique(np.sort(problem.chosen[:, layer], axis=1), axis=0, return_counts=True)
    return sets, counts / problem.positions


def is_small(problem: Problem) -> bool:
    """Whether the whole program can be given to the solver."""
    pairs = int(np.count_nonzero(problem.affinity)) * len(problem.places) if problem.hop_s else 0
    visited = sum(one.visit_s > 0 for one in problem.places)
    choices = sum(len(distinct(problem, layer)[0]) for layer in range(problem.layers)) if visited else 0
    entries = 2 * choices * visited * problem.chosen.shape[2]
    return pairs <= MOST_PAIRS and entries <= MOST_ENTRIES


def solve(problem: Problem, seconds: float) -> Solved:
    """The best placement there is, if that is known in some seconds: the best until then would differ by machine.

    Raises:
        PlanError: no placement keeps to capacities and loads.
    """
    from scipy.optimize import Bounds, milp

    layers, n, places = problem.layers, problem.n_experts, len(problem.places)
    stands = np.arange(layers * n * places).reshape(layers, n, places)
    size, rows, cost = stands.size, _Rows(), [_use_costs(problem).ravel()]
    rows.add(stands.reshape(-1, places), np.ones(places), 1, 1)
    _limit(problem, stands, rows)
    for place, one in enumerate(problem.places):
        if not one.visit_s:
            continue
        for layer in range(layers):
            sets, share = distinct(problem, layer)
            visits = size + np.arange(len(sets))
            pairs = np.stack([stands[layer, sets, place].ravel(), np.repeat(visits, sets.shape[1])], axis=1)
            rows.add(pairs, np.array([1.0, -1.0]), -np.inf, 0)
            cost.append(share * one.visit_s)
            size += len(sets)
    if problem.hop_s:
        for layer, share in enumerate(problem.affinity):
            before, after = np.nonzero(share)
            apart = size + np.arange(len(before))
            for place in range(places):
                here, there = stands[layer, before, place], stands[layer + 1, after, place]
                rows.add(np.stack([here, there, apart], axis=1), np.array([1.0, -1.0, -1.0]), -np.inf, 0)
            cost.append(share[before, after] * problem.hop_s)
            size += len(before)
    low, high = np.zeros(size), np.ones(size)
    if problem.hop_s and len({(one.capacity_bytes, one.use_s, one.visit_s) for one in problem.places}) == 1:
        low[stands[0, 0, 0]] = 1  # places that are all alike have no names
    whole = np.zeros(size)
    whole[: stands.size] = 1
    costs = np.concatenate(cost)
    unit = float(costs.max()) or 1.0
    found = milp(
        costs / unit,
        integrality=whole,
        bounds=Bounds(low, high),
        constraints=rows.constraint(size),
        options={"mip_rel_gap": NEAR / 10, "time_limit": seconds},
    )
    bound = float(found.mip_dual_bound) * unit if found.mip_dual_bound is not None else 0.0
    if found.status == 1:  # time is up
        return Solved(None, max(0.0, bound))
    if found.x is None:
        raise PlanError("no placement keeps to the capacities and loads", "give more room, or a looser --balance")
    return Solved(found.x[: stands.size].reshape(stands.shape).argmax(axis=2), max(0.0, bound))


def _use_costs(problem: Problem) -> NDArray[np.float64]:
    """Seconds a token of an expert in a place, visits and hops left out: [layers, experts, places]."""
    use_s = np.array([one.use_s for one in problem.places])
    found: NDArray[np.float64] = problem.uses[..., None] / problem.positions * use_s
    return found


def _limit(problem: Problem, stands: NDArray[np.int64], rows: _Rows) -> None:
    """Bytes of each place, and in each layer experts and loads of each place."""
    _, n, places = stands.shape
    unit = float(problem.expert_bytes.max())
    for place, one in enumerate(problem.places):
        if np.isfinite(one.capacity_bytes):
            rows.add(
                stands[:, :, place].reshape(1, -1),
                np.repeat(problem.expert_bytes / unit, n)[None],
                -np.inf,
                one.capacity_bytes / unit,
            )
    if problem.most_of_layer is not None and problem.most_of_layer < n:
        rows.add(stands.transpose(0, 2, 1).reshape(-1, n), np.ones(n), -np.inf, problem.most_of_layer)
    if problem.most_load is not None:
        for layer, most in enumerate(problem.most_load):
            share = problem.uses[layer] / problem.uses[layer].sum()
            rows.add(stands[layer].T, np.broadcast_to(share, (places, n)), -np.inf, float(most) + 1e-9)


def bound(problem: Problem, seconds: float) -> float:
    """What no placement costs less than, in seconds a token, without solving the whole program.

    A visit is shared by `top_k` uses at most, so that each use pays at least that part of it; what remains is a
    knapsack, of which HiGHS gives a bound. Of hops see `least_hops`.
    """
    top_k = problem.chosen.shape[2]
    found = problem.hop_s * float(least_hops(problem).sum()) if problem.hop_s else 0.0
    if any(one.use_s or one.visit_s for one in problem.places):
        from dataclasses import replace

        apart = tuple(replace(one, use_s=one.use_s + one.visit_s / top_k, visit_s=0.0) for one in problem.places)
        found += solve(replace(problem, places=apart, hop_s=0.0), seconds).bound_s
    return found


def least_hops(problem: Problem) -> NDArray[np.float64]:
    """The hops of a token between each two layers that no placement has less of, float64 [layers - 1].

    Of two layers the experts that stand together are a graph in which each has at most `most_of_layer` neighbours: the
    best such graph is a linear program. Where places share layers equally, what stays together is also bounded by the
    largest singular values of the centred affinity (after Donath and Hoffman, 1973). The tighter one counts.
    """
    n, places = problem.n_experts, len(problem.places)
    most, found = problem.most_of_layer, np.zeros(problem.layers - 1)
    if most is None or most >= n:
        return found
    for layer, share in enumerate(problem.affinity):
        kept = _degree_bound(share, most)
        if most * places == n:
            centred = share - share.mean(axis=0) - share.mean(axis=1)[:, None] + share.mean()
            values = np.linalg.svd(centred, compute_uv=False)
            kept = min(kept, float(share.sum()) / places + most * float(values[: places - 1].sum()))
        found[layer] = max(0.0, float(share.sum()) - kept)
    return found


def _degree_bound(share: NDArray[np.float64], most: int) -> float:
    """The largest sum of entries of which each row and each column has at most `most`."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    before, after = np.nonzero(share)
    count, n = np.arange(len(before)), len(share)
    entries = np.ones(2 * len(before))
    rows = np.concatenate([before, n + after])
    matrix = coo_array((entries, (rows, np.concatenate([count, count]))), (2 * n, len(before))).tocsr()
    found = linprog(-share[before, after], A_ub=matrix, b_ub=np.full(2 * n, most), bounds=(0, 1), method="highs")
    return float(-found.fun) if found.status == 0 else float(share.sum())
