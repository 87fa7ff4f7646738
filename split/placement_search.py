"""Placements of problems that are too large for one program: layer by layer, and by local search."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import PlanError
from isthmus.split.placement import NEAR, Placed, Problem
from isthmus.split.placement_program import bound, is_small, solve
from isthmus.split.placement_replay import BASELINES, baseline, filled, replay

STARTS, SWEEPS, POLISHED = 6, 60, 2
LAYER_S = 5.0  # that a single layer's program may take
_EPS, _LOAD = 1e-12, 1e-9
_Way = tuple[float, list[tuple[int, list[int], int]]]  # what it changes; a layer, its experts, and where they go
_Better = Callable[[Problem, NDArray[np.float64], NDArray[np.float64], int, NDArray[np.int64]], NDArray[np.int64]]


def place(problem: Problem, *, seed: int = 0, seconds: float = 20.0) -> Placed:
    """The best placement that is found.

    Args:
        seed: of the starts of local search.
        seconds: that the integer program may take where it is small enough to be solved as a whole.

    Raises:
        PlanError: no placement keeps to capacities and loads, or a large problem has both visits and hops.
    """
    began = time.perf_counter()
    tried: list[tuple[str, NDArray[np.int64]]] = []
    least, small = 0.0, is_small(problem)
    if small:
        whole = solve(problem, seconds)
        least = whole.bound_s
        if whole.place is not None:
            tried.append(("exact", whole.place))
    if not small or not tried or replay(problem, tried[0][1]).cost_s > least * (1 + NEAR) + _EPS:
        visits = any(one.visit_s for one in problem.places)
        if visits and problem.hop_s and not small:
            raise PlanError("visits and hops of so many experts cannot be weighed at once", "leave one of them out")
        tried += _by_layers(problem, seed) if problem.hop_s and not visits else []
        tried += _by_moves(problem, seed) if not problem.hop_s else []
        least = max(least, bound(problem, seconds))
    if not tried:
        raise PlanError(f"no placement was found in {seconds:g} s", "give it more time")
    costs = [replay(problem, one).cost_s for _, one in tried]
    best = int(np.argmin(costs))
    how = tried[best][0] if costs[best] > least * (1 + NEAR) + _EPS else "exact"
    return Placed(tried[best][1], costs[best], min(least, costs[best]), how, time.perf_counter() - began)


def balanced(problem: Problem, slack: float) -> Problem:
    """The same problem with no worker's load in a layer above the mean by more than a share of it; where experts are
    used too unevenly for that, by as little more as can be.

    Raises:
        PlanError: the share makes no sense.
    """
    if not 0 <= slack < np.inf:
        raise PlanError(f"--balance is {slack}", "give the share that a load may exceed the mean by, as 0.1")
    most = np.full(problem.layers, (1 + slack) / len(problem.places))
    for layer in range(problem.layers):
        share = problem.uses[layer] / problem.uses[layer].sum()
        if _layer(problem, np.zeros((problem.n_experts, len(problem.places))), share, float(most[layer])) is None:
            most[layer] = _least_load(problem, share)
    return replace(problem, most_load=most)


# ---- workers: layer by layer
def _by_layers(problem: Problem, seed: int) -> list[tuple[str, NDArray[np.int64]]]:
    """The best of several starts: each layer is placed by what the one before it is, and then again and again by both
    of its neighbours until nothing changes: by swaps, and of the best start by a program of each layer, too."""
    best: tuple[float, list[NDArray[np.int64]]] | None = None
    shares = problem.uses / problem.uses.sum(axis=1, keepdims=True)
    even = baseline(problem, "frequency")
    for start in range(STARTS):
        rng = np.random.default_rng([seed, start])
        gains = rng.random((problem.n_experts, len(problem.places)))
        rows = [_swapped(problem, gains, shares, 0, _first(problem, shares, 0, even[0]))]
        for layer in range(1, problem.layers):
            fitting = _first(problem, shares, layer, even[layer])
            rows.append(_swapped(problem, _gains(problem, rows, layer), shares, layer, fitting))
        cost = _settled(problem, rows, shares, _swapped, SWEEPS)
        if best is None or cost < best[0]:
            best = cost, rows
    assert best is not None
    _settled(problem, best[1], shares, _assigned, POLISHED)
    return [("layer by layer", np.stack(best[1]))]


def _settled(
    problem: Problem, rows: list[NDArray[np.int64]], shares: NDArray[np.float64], better: _Better, sweeps: int
) -> float:
    """Betters the layers' places in turn, down and up, until nothing changes; returns what they cost then."""
    cost = replay(problem, np.stack(rows)).cost_s
    for sweep in range(sweeps):
        for layer in range(problem.layers)[:: 1 if sweep % 2 else -1]:
            rows[layer] = better(problem, _gains(problem, rows, layer), shares, layer, rows[layer])
        before, cost = cost, replay(problem, np.stack(rows)).cost_s
        if cost >= before - _EPS:
            break
    return cost


def _most(problem: Problem, layer: int) -> float:
    return np.inf if problem.most_load is None else float(problem.most_load[layer])


def _first(problem: Problem, shares: NDArray[np.float64], layer: int, even: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of a layer's experts that keep to its load, [experts]: those of the even placement where they do."""
    places = len(problem.places)
    if np.bincount(even, shares[layer], places).max() <= _most(problem, layer) + _LOAD:
        return even
    return _assigned(problem, np.zeros((problem.n_experts, places)), shares, layer, None)


def _swapped(
    problem: Problem, gains: NDArray[np.float64], shares: NDArray[np.float64], layer: int, now: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The places of a layer's experts, [experts], bettered by swaps of two as long as one is better; or by the best
    assignment, where that keeps to the load."""
    most, share, experts = _most(problem, layer), shares[layer], np.arange(problem.n_experts)
    free = _unloaded(problem, gains)
    if np.bincount(free, share, len(problem.places)).max() <= most + _LOAD:
        return free if gains[experts, free].sum() > gains[experts, now].sum() + _EPS else now
    here = now.copy()
    load = np.bincount(here, share, len(problem.places))
    for _ in range(problem.n_experts**2):
        own, theirs = gains[experts, here], gains[:, here]  # theirs: [expert, whose place]
        worth = theirs + theirs.T - own[:, None] - own
        moved = load[here] + share[:, None] - share  # of the place of the second, where the first comes for it
        heavy = moved > most + _LOAD
        worth[heavy | heavy.T | (here[:, None] == here)] = -np.inf
        i, j = np.unravel_index(int(worth.argmax()), worth.shape)
        if worth[i, j] <= _EPS:
            break
        here[i], here[j] = here[j], here[i]
        load = np.bincount(here, share, len(problem.places))
    return here


def _gains(problem: Problem, rows: list[NDArray[np.int64]], layer: int) -> NDArray[np.float64]:
    """Share of paths that stay together where an expert of a layer stands in a place, [experts, places]."""
    found = np.zeros((problem.n_experts, len(problem.places)))
    one_hot = np.eye(len(problem.places))
    if layer:
        found += problem.affinity[layer - 1].T @ one_hot[rows[layer - 1]]
    if layer + 1 < len(rows):
        found += problem.affinity[layer] @ one_hot[rows[layer + 1]]
    return found


def _assigned(
    problem: Problem,
    gains: NDArray[np.float64],
    shares: NDArray[np.float64],
    layer: int,
    now: NDArray[np.int64] | None,
) -> NDArray[np.int64]:
    """The best places of a layer's experts, [experts]; `now` where nothing is found that is better than that."""
    found = _layer(problem, gains, shares[layer], _most(problem, layer))
    if found is None and now is None:
        raise PlanError(f"layer {layer} cannot be shared so evenly", "give a looser --balance")
    experts = np.arange(problem.n_experts)
    if found is None or (now is not None and gains[experts, found].sum() <= gains[experts, now].sum() + _EPS):
        assert now is not None
        return now
    return found


def _unloaded(problem: Problem, gains: NDArray[np.float64]) -> NDArray[np.int64]:
    """The places of a layer's experts with the largest sum of gains, whatever their loads."""
    from scipy.optimize import linear_sum_assignment

    seats = np.repeat(np.arange(gains.shape[1]), problem.most_of_layer or len(gains))
    _, taken = linear_sum_assignment(gains[:, seats], maximize=True)
    found: NDArray[np.int64] = seats[taken]
    return found


def _layer(
    problem: Problem, gains: NDArray[np.float64], share: NDArray[np.float64], most: float
) -> NDArray[np.int64] | None:
    """The same within loads, to within a thousandth; None where none is found."""
    found = _unloaded(problem, gains)
    if np.bincount(found, share, gains.shape[1]).max() <= most + _LOAD:
        return found
    return _layer_program(gains, share, most, problem.most_of_layer or len(gains))


def _layer_program(
    gains: NDArray[np.float64], share: NDArray[np.float64], most: float, room: int
) -> NDArray[np.int64] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import eye_array, kron

    n, places = gains.shape
    one, each = np.ones((1, n)), np.ones((1, places))
    limits = [
        LinearConstraint(kron(eye_array(n), each), 1, 1),
        LinearConstraint(kron(one, eye_array(places)), -np.inf, room),
        LinearConstraint(kron(share[None], eye_array(places)), -np.inf, most + _LOAD),
    ]
    unit = float(np.abs(gains).max()) or 1.0
    options = {"mip_rel_gap": 1e-3, "time_limit": LAYER_S}
    bounds = Bounds(0, 1)
    solved = milp(
        -gains.ravel() / unit, integrality=np.ones(gains.size), bounds=bounds, constraints=limits, options=options
    )
    return None if solved.x is None else solved.x.reshape(n, places).argmax(axis=1)


def _least_load(problem: Problem, share: NDArray[np.float64]) -> float:
    """The least share of a layer's uses that its most loaded place can have, to within a hundredth of the mean."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, eye_array, hstack, kron

    n, places = problem.n_experts, len(problem.places)
    room = problem.most_of_layer or n
    cost = np.append(np.zeros(n * places), 1.0)
    none = coo_array((places, 1))
    limits = [
        LinearConstraint(hstack([kron(eye_array(n), np.ones((1, places))), coo_array((n, 1))]), 1, 1),
        LinearConstraint(hstack([kron(np.ones((1, n)), eye_array(places)), none]), -np.inf, room),
        LinearConstraint(hstack([kron(share[None], eye_array(places)), -np.ones((places, 1))]), -np.inf, 0),
    ]
    options = {"mip_rel_gap": 0.01, "time_limit": LAYER_S}
    solved = milp(
        cost, integrality=np.append(np.ones(n * places), 0), bounds=Bounds(0, 1), constraints=limits, options=options
    )
    if solved.x is None:
        raise PlanError(f"{n} experts cannot be shared by {places} places of {room}", "give more room")
    loads = np.bincount(solved.x[:-1].reshape(n, places).argmax(axis=1), share, places)
    return float(loads.max())


# ---- a device: local search
def _by_moves(problem: Problem, seed: int) -> list[tuple[str, NDArray[np.int64]]]:
    """Local optima from the baselines and from placements that fill places in other orders."""
    others = range(1, len(problem.places))
    by_use = np.argsort(-problem.uses.ravel(), kind="stable")
    starts = [baseline(problem, name, seed) for name in BASELINES]
    starts += [filled(problem, by_use, (0, other)) for other in others]
    starts += [filled(problem, np.arange(by_use.size), (0, other)) for other in others]
    found: list[tuple[str, NDArray[np.int64]]] = []
    for start in starts:
        one = _Moves(problem, start)
        one.run()
        found.append(("local search", one.place))
    return found


class _Moves:
    """A placement that is bettered by the best move of an expert, or of a layer's in one place, or swap of two."""

    def __init__(self, problem: Problem, start: NDArray[np.int64]) -> None:
        self._problem, self.place = problem, start.copy()
        self._use = np.array([one.use_s for one in problem.places]) / problem.positions
        self._visit = np.array([one.visit_s for one in problem.places]) / problem.positions
        self._bytes = problem.expert_bytes.astype(np.float64)
        held = np.array([self._bytes @ (start == p).sum(axis=1) for p in range(len(problem.places))])
        self._free = np.array([one.capacity_bytes for one in problem.places]) - held
        shape = problem.layers, problem.n_experts, len(problem.places)
        self._delta = np.zeros(shape)
        self._blocks = np.zeros((problem.layers, shape[2], shape[2]))
        for layer in range(problem.layers):
            self._weigh(layer)

    def run(self) -> None:
        """Until nothing is better."""
        for _ in range(20 * self.place.size):
            ways = [self._single(), self._block(), self._swap()]
            gain, changes = min(ways, key=lambda way: way[0])
            if gain >= -_EPS:
                return
            for layer, experts, to in changes:
                for expert in experts:
                    self._free[self.place[layer, expert]] += self._bytes[layer]
                    self._free[to] -= self._bytes[layer]
                    self.place[layer, expert] = to
            for layer in {layer for layer, _, _ in changes}:
                self._weigh(layer)

    def _weigh(self, layer: int) -> None:
        """What each move in a layer would change of the cost."""
        problem, here = self._problem, self.place[layer]
        chosen, n, places = problem.chosen[:, layer], problem.n_experts, len(problem.places)
        counts = (here[chosen][..., None] == np.arange(places)).sum(axis=1)  # [positions, places]
        alone, absent = np.zeros((n, places)), np.zeros((n, places))
        for p in range(places):
            for to, hit in ((alone, counts[:, p] == 1), (absent, counts[:, p] == 0)):
                to[:, p] = np.bincount(chosen[hit].ravel(), minlength=n)
        uses, experts = problem.uses[layer], np.arange(n)
        saved = uses * self._use[here] + alone[experts, here] * self._visit[here]
        self._delta[layer] = uses[:, None] * self._use + absent * self._visit - saved[:, None]
        self._delta[layer][experts, here] = np.inf
        needs = counts > 0
        sums = counts.sum(axis=0)
        for p in range(places):
            for q in range(places):
                joined = (needs[:, p] | needs[:, q]).sum() - needs[:, q].sum()
                change = sums[p] * (self._use[q] - self._use[p]) + joined * self._visit[q]
                self._blocks[layer, p, q] = change - needs[:, p].sum() * self._visit[p] if p != q else np.inf

    def _single(self) -> _Way:
        fits = self._bytes[:, None, None] <= self._free
        worth = np.where(fits, self._delta, np.inf)
        layer, expert, to = np.unravel_index(int(worth.argmin()), worth.shape)
        return float(worth[layer, expert, to]), [(int(layer), [int(expert)], int(to))]

    def _block(self) -> _Way:
        counts = np.stack([(self.place == p).sum(axis=1) for p in range(len(self._free))], axis=1)
        fits = (self._bytes[:, None] * counts)[..., None] <= self._free
        worth = np.where(fits, self._blocks, np.inf)
        layer, here, to = np.unravel_index(int(worth.argmin()), worth.shape)
        experts = np.flatnonzero(self.place[layer] == here).tolist()
        return float(worth[layer, here, to]) if len(experts) else np.inf, [(int(layer), experts, int(to))]

    def _swap(self) -> _Way:
        """The best of an expert of one layer with one of another, or within a layer where no place costs visits."""
        best: _Way = (np.inf, [])
        layers = np.arange(len(self.place))
        for p in range(len(self._free)):
            for q in range(p):
                out = np.where(self.place == p, self._delta[..., q], np.inf)
                back = np.where(self.place == q, self._delta[..., p], np.inf)
                a, b = out.argmin(axis=1), back.argmin(axis=1)
                worth = out[layers, a][:, None] + back[layers, b]
                larger = self._bytes[:, None] - self._bytes
                worth[(larger > self._free[q]) | (-larger > self._free[p])] = np.inf
                if self._visit[p] or self._visit[q]:
                    np.fill_diagonal(worth, np.inf)
                i, j = np.unravel_index(int(worth.argmin()), worth.shape)
                if worth[i, j] < best[0]:
                    best = float(worth[i, j]), [(int(i), [int(a[i])], q), (int(j), [int(b[j])], p)]
        return best
