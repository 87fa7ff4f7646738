"""The best cut under budgets, or for a pipeline: a mixed-integer program, solved to the optimum by HiGHS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import PlanError
from isthmus.split.cut import INPUT, Cut, Network, fastest, priced

Aim = Literal["latency", "throughput"]
LATENCY = "ms"  # the resource that every network has
SOLVE_S = 4.0
_SLACK = 1e-6  # share of a budget that rounding may exceed it by
_ROUNDED = 1e-6  # share of the largest of some numbers, far above what rounding changes their sum by


def best(network: Network, aim: Aim = "latency", budgets: Mapping[str, float] | None = None) -> Cut:
    """The way that ends first, or in a pipeline lets the most inputs through, within budgets.

    Args:
        budgets: the most that may be taken of a resource of the network, or of `LATENCY`.

    Raises:
        PlanError: no way keeps to the budgets (which one, and by how much), or none is known.
    """
    budgets = {name: most for name, most in (budgets or {}).items() if np.isfinite(most)}
    for name in budgets:
        if name != LATENCY and name not in network.use:
            raise PlanError(f"nothing is known of {name}", f"budget one of: {', '.join([LATENCY, *network.use])}")
    free = fastest(network)  # also says what runs nowhere
    if aim == "latency" and all(taken(free, name) <= most for name, most in budgets.items()):
        return free
    found = _Program(network, budgets).solve(aim)
    if found is None:
        raise _impossible(network, budgets)
    return found


def taken(cut: Cut, resource: str) -> float:
    """What a way to share takes of a resource."""
    return cut.ms if resource == LATENCY else cut.use[resource]


def _impossible(network: Network, budgets: Mapping[str, float]) -> PlanError:
    short = []
    for name, most in budgets.items():
        least = _Program(network, {}).solve(name)
        needed = taken(least, name) if least is not None else np.inf
        if needed > most * (1 + _SLACK) and (least is None or least.proven):
            short.append(f"{name} {most:.4g} cannot be met: {needed:.4g} is the least, {needed - most:.4g} more")
    if short:
        return PlanError("; ".join(short), "raise that budget")
    names = " and ".join(f"{name} {most:.4g}" for name, most in budgets.items())
    return PlanError(f"{names} can each be met, but not together", "raise one of them")


class _Program:
    """Variables: whether each task lies beyond each boundary; whether each tensor crosses it; whether anything does;
    for a pipeline, its slowest stage; and whether what tasks share is spared on the first tier. Each but the first and
    the last is bounded from below by what the tasks do alone, the last from above.
    """

    def __init__(self, network: Network, budgets: Mapping[str, float]) -> None:
        self._network, self._budgets = network, budgets
        boundaries, tasks, tensors = network.tiers - 1, network.tasks, len(network.wires.makers)
        self._beyond = np.arange(boundaries * tasks).reshape(boundaries, tasks)
        at = boundaries * tasks
        self._crosses = at + np.arange(boundaries * tensors).reshape(boundaries, tensors)
        self._any = at + boundaries * tensors + np.arange(boundaries)
        self._slowest = at + boundaries * (tensors + 1)
        self._shared = [(name, one) for name, use in network.use.items() for one in use.shared]
        self._spared = self._slowest + 1 + np.arange(len(self._shared))
        self._size = self._slowest + 1 + len(self._shared)
        self._rows: list[tuple[NDArray[np.float64], float]] = []  # dense ones: row @ variables <= bound
        self._pairs: list[NDArray[np.int64]] = []  # [n, 3]: first - second <= third, -1 for none

    def solve(self, aim: str) -> Cut | None:
        """The best way, None where there is none.

        Args:
            aim: "latency", "throughput", or a resource to take the least of.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array, vstack

        network, size = self._network, self._size
        if not network.tasks or network.tiers == 1:
            cut = priced(network, [0] * network.tasks)
            met = all(taken(cut, name) <= most for name, most in self._budgets.items())
            return cut if met and np.isfinite(cut.ms) else None
        low, high = np.zeros(size), np.ones(size)
        high[self._slowest] = np.inf
        cost = np.zeros(size)
        if aim == "throughput":
            cost[self._slowest] = 1.0
            for row, constant in self._stages():
                row[self._slowest] = -1.0
                self._rows.append((row, -constant))
        else:
            cost, _ = self._resource(LATENCY if aim == "latency" else aim)
        self._order()
        self._forbid(low, high)
        for name, most in self._budgets.items():
            row, constant = self._resource(name)
            if name != LATENCY:  # a task that takes more than all there is would hide what the others take
                never = network.use[name].tasks[0] > most * (1 + _SLACK)
                low[self._beyond[0][never]] = 1.0
            fixed, least = low == high, _ROUNDED * float(np.abs(row).max())  # what adding it up may leave of nothing
            constant, row = constant + float(row[fixed] @ low[fixed]), np.where(fixed, 0.0, row)
            unit = max(abs(most), float(np.abs(row).max()), least, 1e-300)
            self._rows.append((row / unit, (most - constant) / unit + _SLACK / 10))
        if (low > high).any():
            return None
        parts, bounds = [], []
        if self._rows:
            parts.append(coo_array(np.array([row for row, _ in self._rows])))
            bounds.append(np.array([bound for _, bound in self._rows]))
        for group in self._pairs:
            count = np.arange(len(group))
            rows = [count, count] + ([count] if group.shape[1] == 3 else [])
            columns = list(group.T)
            signs = [np.ones(len(group)), -np.ones(len(group)), -np.ones(len(group))][: len(columns)]
            where = (np.concatenate(rows), np.concatenate(columns))
            parts.append(coo_array((np.concatenate(signs), where), (len(group), size)))
            bounds.append(np.zeros(len(group)))
        constraints = LinearConstraint(vstack(parts).tocsr(), -np.inf, np.concatenate(bounds))
        whole = np.zeros(size)
        whole[self._beyond] = 1
        options = {"mip_rel_gap": 0.0, "time_limit": SOLVE_S}
        solved = milp(cost, integrality=whole, bounds=Bounds(low, high), constraints=constraints, options=options)
        if solved.x is None:
            if solved.status == 1:
                raise PlanError(f"no plan was found in {SOLVE_S:g} s", "ask for fewer budgets, or group more nodes")
            return None
        found = priced(network, np.rint(solved.x[self._beyond]).astype(int).sum(axis=0).tolist())
        return found if solved.status == 0 else replace(found, proven=False)  # the best until time was up

    def _tiers(self, each: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        """A sum over tasks of something that each tier has its own of, [tiers, tasks]; and its constant."""
        each = np.where(np.isfinite(each), each, 0.0)
        row = np.zeros(self._size)
        row[self._beyond] = np.diff(each, axis=0)
        return row, float(each[0].sum())

    def _links(self, each: NDArray[np.float64]) -> NDArray[np.float64]:
        """A sum over boundaries of so much a millisecond, [boundaries]."""
        network, row = self._network, np.zeros(self._size)
        ms = network.wires.ms
        row[self._crosses] = (np.where(np.isfinite(ms), ms, 0.0) * each).T
        row[self._any] = np.array(network.trip_ms) * each
        return row

    def _resource(self, name: str) -> tuple[NDArray[np.float64], float]:
        network = self._network
        if name == LATENCY:
            row, constant = self._tiers(network.ms)
            return row + self._links(np.ones(network.tiers - 1)), constant
        use = network.use[name]
        row, constant = self._tiers(use.tasks)
        for at, (resource, one) in zip(self._spared, self._shared, strict=True):
            if resource == name:
                row[at] = -one.amount
                constant += one.amount
        return row + self._links(use.links), constant

    def _stages(self) -> list[tuple[NDArray[np.float64], float]]:
        """Milliseconds of each tier and of each link."""
        network, found = self._network, []
        for tier in range(network.tiers):
            alone = np.zeros_like(network.ms)
            alone[tier] = network.ms[tier] - (network.way_back_ms if tier else 0.0)
            found.append(self._tiers(alone))
        back = np.zeros_like(network.ms)
        back[1:] = network.way_back_ms
        found.append(self._tiers(back))
        for boundary in range(network.tiers - 1):
            row = self._links((np.arange(network.tiers - 1) == boundary).astype(float))
            row[self._any[boundary]] = network.busy_ms[boundary]
            found.append((row, 0.0))
        return found

    def _order(self) -> None:
        """Nothing travels back; a tensor crosses where its maker stays and a user does not; a trip serves all tasks;
        what is shared is spared where all who need it are beyond.
        """
        wires = self._network.wires
        makers = wires.makers[wires.owner]
        inner = makers != INPUT
        for boundary, beyond in enumerate(self._beyond):
            self._pairs.append(np.stack([beyond[makers[inner]], beyond[wires.users[inner]]], axis=1))
            crosses = self._crosses[boundary]
            self._pairs.append(
                np.stack([beyond[wires.users[inner]], beyond[makers[inner]], crosses[wires.owner[inner]]], axis=1)
            )
            self._pairs.append(np.stack([beyond[wires.users[~inner]], crosses[wires.owner[~inner]]], axis=1))
            self._pairs.append(np.stack([beyond, np.full_like(beyond, self._any[boundary])], axis=1))
            if boundary:
                self._pairs.append(np.stack([beyond, self._beyond[boundary - 1]], axis=1))
        for at, (_, one) in zip(self._spared, self._shared, strict=True):
            beyond = self._beyond[0][list(one.tasks)]
            self._pairs.append(np.stack([np.full_like(beyond, at), beyond], axis=1))
        self._pairs = [group for group in self._pairs if len(group)]

    def _forbid(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
        """No task where it cannot run, and nothing over a boundary that it cannot cross."""
        high[self._crosses[~np.isfinite(self._network.wires.ms).T]] = 0.0
        unable = ~np.isfinite(self._network.ms)
        low[self._beyond[0][unable[0]]] = 1.0
        high[self._beyond[-1][unable[-1]]] = 0.0
        for tier in range(1, self._network.tiers - 1):
            before, after = self._beyond[tier - 1][unable[tier]], self._beyond[tier][unable[tier]]
            if len(before):
                self._pairs.append(np.stack([before, after], axis=1))
        if (low > high).any():
            high[:] = np.maximum(low, high)
            self._rows.append((np.zeros(self._size), -1.0))  # a task that runs nowhere
