"""Where experts stand: on the device, its flash or the cloud, or on which of several workers, by recorded routing.

The cost of a placement is what a token takes for its experts: so much for each use of an expert in a place, so much
once for each layer of a token that needs a place at all (a round trip), and so much where paths through experts pass
from one place to another between layers that follow each other. It is minimised as an integer linear program (after
MoETuner, 2502.06643, and ExFlow, 2401.08383), or, where that is too large, layer by layer and by local search, beside a
lower bound of what any placement costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import PlanError

NEAR = 1e-6  # share of a cost by which a bound may be missed and still count as met


@dataclass(frozen=True, slots=True)
class Place:
    """Where experts may stand.

    Attributes:
        capacity_bytes: of experts; infinite for no limit.
        use_s: seconds of each use of an expert that stands there.
        visit_s: seconds for each layer of a token that uses one or more experts there.
    """

    name: str
    capacity_bytes: float = math.inf
    use_s: float = 0.0
    visit_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.capacity_bytes >= 0 and 0 <= self.use_s < math.inf and 0 <= self.visit_s < math.inf):
            raise PlanError(
                f"the place {self.name!r} has {self.capacity_bytes} bytes, {self.use_s} and {self.visit_s} s",
                "give numbers of 0 or more",
            )


@dataclass(frozen=True)
class Problem:
    """What is to be placed, and along which text it counts.

    Attributes:
        chosen: int32 [positions, layers, top_k], the experts along a text.
        n_experts: of a layer.
        expert_bytes: int64 [layers], of an expert of each layer.
        places: two or more.
        hop_s: for a path from an expert to one of the next layer that stands elsewhere. A token takes top_k^2 paths
            between two layers, each of which counts 1 / top_k^2.
        most_of_layer: experts of one layer in one place at most, None for no limit.
        most_load: float64 [layers], share of a layer's uses in one place at most; None for no limit.
    """

    chosen: NDArray[np.int32]
    n_experts: int
    expert_bytes: NDArray[np.int64]
    places: tuple[Place, ...]
    hop_s: float = 0.0
    most_of_layer: int | None = None
    most_load: NDArray[np.float64] | None = field(default=None)

    def __post_init__(self) -> None:
        if self.chosen.ndim != 3 or not self.chosen.size or self.expert_bytes.shape != self.chosen.shape[1:2]:
            raise PlanError(
                f"routing is {self.chosen.shape}, bytes of experts {self.expert_bytes.shape}",
                "give [positions, layers, top_k] and [layers]",
            )
        if self.chosen.min() < 0 or self.chosen.max() >= self.n_experts:
            raise PlanError(f"the routing names an expert that is none of {self.n_experts}", "record it again")
        if not self.places or not 0 <= self.hop_s < math.inf:
            raise PlanError(f"{len(self.places)} places, {self.hop_s} s a hop", "give one place or more")
        needed, room = int(self.expert_bytes.sum()) * self.n_experts, sum(one.capacity_bytes for one in self.places)
        if needed > room:
            names = ", ".join(one.name for one in self.places)
            raise PlanError(
                f"all experts are {needed / 1e6:.1f} MB, and {names} hold {room / 1e6:.1f} MB",
                f"give {(needed - room) / 1e6:.1f} MB more, or another place",
            )

    @property
    def positions(self) -> int:
        """Of the text."""
        return len(self.chosen)

    @property
    def layers(self) -> int:
        """Those with experts."""
        return len(self.expert_bytes)

    @cached_property
    def uses(self) -> NDArray[np.int64]:
        """How often each expert is taken along the text, [layers, experts]."""
        rows = np.arange(self.layers)[:, None] * self.n_experts + self.chosen
        return np.bincount(rows.ravel(), minlength=self.layers * self.n_experts).reshape(self.layers, self.n_experts)

    @cached_property
    def affinity(self) -> NDArray[np.float64]:
        """The share of tokens' paths from each expert to each of the next layer, which sums to 1 for each two layers:
        float64 [layers - 1, experts, experts]."""
        positions, layers, top_k = self.chosen.shape
        found = np.empty((layers - 1, self.n_experts, self.n_experts))
        for layer in range(layers - 1):
            pairs = self.chosen[:, layer, :, None] * self.n_experts + self.chosen[:, layer + 1, None, :]
            counts = np.bincount(pairs.ravel(), minlength=self.n_experts**2)
            found[layer] = counts.reshape(self.n_experts, self.n_experts) / (positions * top_k**2)
        return found


@dataclass(frozen=True)
class Placed:
    """A placement, and how good it is known to be.

    Attributes:
        place: int64 [layers, experts], numbers of places.
        cost_s: seconds a token, along the text that it was made for.
        bound_s: no placement costs less there.
        how: "exact" where the integer program was solved, else "layer by layer" or "local search".
        seconds: that it took to find.
    """

    place: NDArray[np.int64]
    cost_s: float
    bound_s: float
    how: str
    seconds: float

    @property
    def gap(self) -> float:
        """Share of the cost that a better placement could save at most."""
        return max(0.0, (self.cost_s - self.bound_s) / self.cost_s) if self.cost_s > 0 else 0.0

    @property
    def proven(self) -> bool:
        """Whether no placement is better."""
        return self.gap <= NEAR


def workers(chosen: NDArray[np.int32], n_experts: int, expert_bytes: NDArray[np.int64], count: int) -> Problem:
    """Several workers of a cloud that share every layer equally; a hop costs 1, and loads are not bounded yet.

    Raises:
        PlanError: there are not 2 to `n_experts` of them.
    """
    if not 2 <= count <= n_experts:
        raise PlanError(f"{count} workers for {n_experts} experts a layer", f"give 2 to {n_experts}")
    places = tuple(Place(f"worker {i}") for i in range(count))
    return Problem(chosen, n_experts, expert_bytes, places, 1.0, -(-n_experts // count))


def device(
    chosen: NDArray[np.int32],
    n_experts: int,
    expert_bytes: NDArray[np.int64],
    *,
    memory_bytes: float,
    flash_bytes_s: float,
    flash_read_s: float = 0.0,
    flash_bytes: float = math.inf,
    trip_s: float | None = None,
) -> Problem:
    """A device's memory, its flash, and a cloud behind a link.

    Args:
        flash_bytes_s: that flash reads in a second.
        flash_read_s: of each read beside that.
        flash_bytes: that flash holds.
        trip_s: a round trip to the cloud with a token's state both ways; None for no cloud.

    Raises:
        PlanError: they do not hold all experts, or a number makes no sense.
    """
    if not 0 < flash_bytes_s < math.inf:
        raise PlanError(f"flash reads {flash_bytes_s / 1e6:g} MB/s", "give a positive number with --flash-mb-s")
    read_s = float(expert_bytes.mean()) / flash_bytes_s + flash_read_s
    places = [Place("memory", memory_bytes), Place("flash", flash_bytes, use_s=read_s)]
    if trip_s is not None:
        places.append(Place("cloud", visit_s=trip_s))
    return Problem(chosen, n_experts, expert_bytes, tuple(places))
