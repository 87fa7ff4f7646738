"""Where to cut a network: the exact optimum over all ways to give its nodes to a chain of machines.

Machines, called tiers, stand in a row: a device, perhaps an edge server, a cloud. Data only travel onwards, so a node's
tier is at least that of each node it depends on, and a tensor crosses a boundary once however many nodes behind it
use it. Without budgets that is a minimum s-t cut (Picard 1976; for tensors used twice an auxiliary node stands between
the producer and its consumers, as in DADS, INFOCOM 2019), with one layer of the network for each boundary (Ishikawa
2003) where there are more than two tiers. Budgets, and pipelines whose slowest stage counts, make it a mixed-integer
program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import PlanError

INPUT = -1  # the producer of what the device is given
_UNITS = 1 << 29  # that the sum of all finite capacities becomes; the solver's are 32-bit


@dataclass(frozen=True, slots=True)
class Flow:
    """A tensor.

    Attributes:
        producer: number of the task that makes it, `INPUT` for what the device is given.
        consumers: numbers of the tasks that use it.
        ms: to send it over each boundary, in milliseconds.
    """

    producer: int
    consumers: tuple[int, ...]
    ms: tuple[float, ...]


class Wires(NamedTuple):
    """Tensors as arrays.

    Attributes:
        makers: producer of each, [tensors] i64.
        users, owner: a consumer, and which tensor it consumes, [uses] i64.
        starts: where the uses of each tensor begin, [tensors] i64.
        ms: [tensors, boundaries] f64.
    """

    makers: NDArray[np.int64]
    users: NDArray[np.int64]
    owner: NDArray[np.int64]
    starts: NDArray[np.int64]
    ms: NDArray[np.float64]


class Shared(NamedTuple):
    """What several tasks need and a tier has once, as weights that two nodes use.

    Attributes:
        tasks: numbers of them.
        amount: of a resource, where any of them runs on the first tier.
    """

    tasks: tuple[int, ...]
    amount: float


@dataclass(frozen=True)
class Use:
    """What a way to share takes of a resource, such as a device's memory or its battery.

    Attributes:
        tasks: by each task on each tier, [tiers, tasks] f64.
        links: by each millisecond of each boundary, [boundaries] f64.
        shared: on the first tier, beside what its tasks take each for itself.
    """

    tasks: NDArray[np.float64]
    links: NDArray[np.float64]
    shared: tuple[Shared, ...] = ()


@dataclass(frozen=True)
class Network:
    """What is to be cut: tasks, numbered in an order in which they can run, and the tensors between them.

    Attributes:
        ms: what each task takes on each tier, [tiers, tasks] f64; infinite where it cannot run.
        flows: the tensors.
        trip_ms: what a boundary costs when anything crosses it, however little.
        use: resources that may be budgeted, by name.
        wait_ms: of `trip_ms`, in which nothing is on the wire; a pipeline does not wait for it. None for none.
        back_ms: of `ms` beyond the first tier, in which what a task gives travels back, [tasks] f64: no machine of a
            pipeline waits for that. None for none.

    Raises:
        PlanError: the parts do not fit together.
    """

    ms: NDArray[np.float64]
    flows: tuple[Flow, ...]
    trip_ms: tuple[float, ...]
    use: Mapping[str, Use] = field(default_factory=dict)
    wait_ms: tuple[float, ...] | None = None
    back_ms: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if self.ms.ndim != 2 or not len(self.ms) or np.isnan(self.ms).any() or (self.ms < 0).any():
            raise PlanError("a task's time is not a number from 0 on", "measure the profile again")
        if len(self.trip_ms) != self.tiers - 1:
            raise PlanError(f"{len(self.trip_ms)} links between {self.tiers} machines", "give one for each boundary")
        if len(self.busy_ms) != len(self.trip_ms) or min(self.busy_ms, default=0.0) < 0.0:
            raise PlanError("a link waits for longer than its trip", "give no more than the trip for each boundary")
        back = self.way_back_ms
        if back.shape != (self.tasks,) or not ((back >= 0) & (back <= self.ms[1:].min(axis=0, initial=np.inf))).all():
            raise PlanError("the way back takes longer than the task whose it is", "measure the profile again")
        wires = self.wires
        if wires.ms.shape[1] != self.tiers - 1 or not (wires.ms >= 0).all():
            raise PlanError("a tensor's time is not a number from 0 on for each link", "give the link's rate")
        for name, one in self.use.items():
            if one.tasks.shape != self.ms.shape or one.links.shape != (self.tiers - 1,):
                raise PlanError(f"{name} is not known for every task and link", "measure the profile again")
            if any(not 0 <= task < self.tasks for shared in one.shared for task in shared.tasks):
                raise PlanError(f"{name} is shared by a task that there is not", "measure the profile again")
        late = wires.users <= wires.makers[wires.owner]
        if late.any() or (wires.users >= self.tasks).any() or (wires.makers < INPUT).any():
            raise PlanError("a tensor is used before it is made", "number the tasks in the order of their work")

    @property
    def busy_ms(self) -> tuple[float, ...]:
        """What anything that crosses a boundary, however little, keeps it busy for."""
        if self.wait_ms is None:
            return self.trip_ms
        return tuple(trip - wait for trip, wait in zip(self.trip_ms, self.wait_ms, strict=False))

    @property
    def way_back_ms(self) -> NDArray[np.float64]:
        """`back_ms`, zeros for none."""
        return np.zeros(self.tasks) if self.back_ms is None else self.back_ms

    @property
    def tiers(self) -> int:
        """Machines."""
        return len(self.ms)

    @property
    def tasks(self) -> int:
        """Nodes."""
        return int(self.ms.shape[1])

    @cached_property
    def wires(self) -> Wires:
        """The tensors that anybody uses, as arrays."""
        used = [flow for flow in self.flows if flow.consumers]
        counts = np.array([len(flow.consumers) for flow in used], np.int64)
        return Wires(
            np.array([flow.producer for flow in used], np.int64),
            np.fromiter(chain.from_iterable(flow.consumers for flow in used), np.int64, int(counts.sum())),
            np.repeat(np.arange(len(used)), counts),
            np.cumsum(counts) - counts,
            np.array([flow.ms for flow in used], np.float64).reshape(len(used), -1 if used else self.tiers - 1),
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """A way to share a network.

    Attributes:
        tiers: of each task.
        ms: from the input to the last task's end, everything one after the other.
        stages: milliseconds of each tier.
        links: milliseconds of each boundary, its trip included where anything crosses.
        use: of each resource.
        waits: of `links`, in which nothing is on the wire.
        backs: of `stages`, in which something is on its way back.
        proven: whether no other way is better; else a search was ended before it knew.
    """

    tiers: tuple[int, ...]
    ms: float
    stages: tuple[float, ...]
    links: tuple[float, ...]
    use: Mapping[str, float]
    waits: tuple[float, ...] = ()
    backs: tuple[float, ...] = ()
    proven: bool = True

    @property
    def slowest_ms(self) -> float:
        """The stage or link that bounds how many inputs a second go through a pipeline."""
        busy = (link - wait for link, wait in zip(self.links, self.waits or (0.0,) * len(self.links), strict=True))
        own = (stage - back for stage, back in zip(self.stages, self.backs or (0.0,) * len(self.stages), strict=True))
        return max(*own, *busy, sum(self.backs), 0.0)


def priced(network: Network, tiers: Sequence[int]) -> Cut:
    """What a way to share costs.

    Raises:
        PlanError: data would travel backwards.
    """
    at, wires = np.asarray(tiers, np.int64), network.wires
    columns = np.arange(network.tasks)
    took = network.ms[at, columns]
    stages = np.bincount(at, took, network.tiers)
    made = np.where(wires.makers == INPUT, 0, at[wires.makers])
    if (at[wires.users] < made[wires.owner]).any():
        raise PlanError("a tensor would travel back to an earlier machine", "give later tasks later machines")
    reach = np.maximum.reduceat(at[wires.users], wires.starts) if len(wires.starts) else made
    boundaries = np.arange(network.tiers - 1)
    crosses = (made[:, None] <= boundaries) & (boundaries < reach[:, None])
    links, used = np.where(crosses, wires.ms, 0.0).sum(axis=0), boundaries < at.max(initial=0)
    links += np.where(used, network.trip_ms, 0.0)
    waits = np.where(used, np.subtract(network.trip_ms, network.busy_ms), 0.0)
    use = {}
    for name, one in network.use.items():
        paid = one.links != 0.0  # a link that costs nothing may take for ever
        once = sum(amount for needing, amount in one.shared if not at[list(needing)].all())
        use[name] = float(one.tasks[at, columns].sum() + one.links[paid] @ links[paid] + once)
    ms = float(stages.sum() + links.sum())
    backs = np.bincount(at, np.where(at > 0, network.way_back_ms, 0.0), network.tiers)
    times = tuple(stages.tolist()), tuple(links.tolist()), use, tuple(waits.tolist()), tuple(backs.tolist())
    return Cut(tuple(at.tolist()), ms, *times)


def fastest(network: Network) -> Cut:
    """The way that ends first, by minimum cuts.

    Raises:
        PlanError: a task runs nowhere.
    """
    found = [_reaching(network, last) for last in range(network.tiers)]
    able = [cut for cut in found if cut is not None and np.isfinite(cut.ms)]
    if not able:
        nowhere = np.flatnonzero(~np.isfinite(network.ms).any(axis=0))
        what = f"task {nowhere[0]} runs on no machine" if len(nowhere) else "no machine may run what another needs"
        raise PlanError(what, "measure it on one of them")
    return min(able, key=lambda cut: cut.ms)


def _reaching(network: Network, last: int) -> Cut | None:
    """The best way with no tier beyond `last`, whose trips are paid; None where there is none."""
    count = network.tasks
    if not last or not count:
        return priced(network, [0] * count)
    layers = _Layers(network, last)
    beyond = layers.solve()
    if beyond is None:
        return None
    return priced(network, beyond.sum(axis=0).tolist())


class _Layers:
    """The flow network: for each boundary below `last` a node for each task and each tensor.

    The source's side of a cut is what does not lie beyond the boundary; an arc is paid for when its tail is there and
    its head is not.
    """

    def __init__(self, network: Network, last: int) -> None:
        self._network, self._last = network, last
        self._tails: list[NDArray[np.int64]] = []
        self._heads: list[NDArray[np.int64]] = []
        self._weights: list[NDArray[np.float64]] = []

    def solve(self) -> NDArray[np.bool_] | None:
        """Whether a task lies beyond each boundary, [boundaries, tasks]; None where every cut is infinite."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        network, last, tasks = self._network, self._last, np.arange(self._network.tasks)
        makers, users, owner, _, on_wire = network.wires
        able = np.isfinite(network.ms)
        ms = np.where(able, network.ms, 0.0)
        source, sink, width = 0, 1, network.tasks + len(makers)
        inside = makers[owner] != INPUT
        for boundary in range(last):
            task = 2 + boundary * width + tasks
            tensor = 2 + boundary * width + network.tasks + np.arange(len(makers))
            more = ms[boundary + 1] - ms[boundary]
            self._arcs(source, task, np.maximum(more, 0.0))
            self._arcs(task, sink, np.maximum(-more, 0.0))
            self._arcs(np.where(makers == INPUT, source, task[makers]), tensor, on_wire[:, boundary])
            self._arcs(tensor[owner], task[users], np.inf)  # one user beyond takes the tensor there
            self._arcs(task[users[inside]], task[makers[owner[inside]]], np.inf)  # data do not travel back
            if boundary:
                self._arcs(task - width, task, np.inf)  # beyond this boundary is beyond the one before
                self._arcs(task[~able[boundary]], task[~able[boundary]] - width, np.inf)
            else:
                self._arcs(task[~able[0]], sink, np.inf)
            if boundary + 1 == last:
                self._arcs(source, task[~able[last]], np.inf)
        tails, heads = np.concatenate(self._tails), np.concatenate(self._heads)
        weights = np.concatenate(self._weights)
        # No best cut pays for an arc that is dearer than all on one machine, and what is dear takes others' precision.
        dear = min(priced(network, [tier] * network.tasks).ms for tier in range(last + 1))
        if np.isfinite(dear):
            weights = np.where(np.isfinite(weights), np.minimum(weights, 1.001 * dear + 1e-9), weights)
        finite = np.isfinite(weights)
        scale = _UNITS / max(float(weights[finite].sum()), 1e-300)
        units = np.where(finite, np.rint(np.where(finite, weights, 0.0) * scale), 2.0 * _UNITS).astype(np.int64)
        size = 2 + last * width
        arcs = coo_array((units, (tails, heads)), (size, size)).tocsr()
        arcs.data = np.minimum(arcs.data, 2 * _UNITS)
        arcs = arcs.astype(np.int32)
        solved = maximum_flow(arcs, source, sink)
        if solved.flow_value >= 2 * _UNITS:
            return None
        left = arcs - solved.flow
        left.eliminate_zeros()
        reached = breadth_first_order(left, source, return_predecessors=False)
        beyond = np.ones(size, bool)
        beyond[reached] = False
        return beyond[2:].reshape(last, width)[:, : network.tasks]

    def _arcs(
        self, tails: int | NDArray[np.int64], heads: int | NDArray[np.int64], weights: float | NDArray[np.float64]
    ) -> None:
        tail, head, weight = np.broadcast_arrays(tails, heads, np.asarray(weights, np.float64))
        self._tails.append(tail.astype(np.int64))
        self._heads.append(head.astype(np.int64))
        self._weights.append(weight)
