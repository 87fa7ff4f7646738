"""Which experts are in memory, and which of them leave for others: the policy alone, without files and without time."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from isthmus.edge.experts.policy import policy_number
from isthmus.engine.native_layers import HALF_LIFE
from isthmus.protocol.errors import DeviceError

BELADY = "belady"
_NEVER = 1 << 30
_UNTAKEN = 2.0**20  # worth less than any that was taken
_AT_ONCE = 32  # that are chosen to leave together
_TIE = 2.0**-30  # of equal worth the expert with the lower number leaves first, as in the engine's store


class Worth:
    """What experts are worth: those of the least worth leave first.

    Args:
        policy: one of `policy.POLICIES`, or "belady": what is taken again last leaves first, which nobody can know
            (Belady, 1966).
        chosen: int32 [positions, layers, top_k], of which only "belady" looks at what is still to come.

    Attributes:
        values: float64 [layers, experts]; only their order means something.

    Raises:
        DeviceError: there is no such policy.
    """

    def __init__(self, policy: str, chosen: NDArray[np.int32], n_experts: int) -> None:
        positions, layers, _ = chosen.shape
        if policy != BELADY:
            policy_number(policy)
        self._policy, self._layers = policy, layers
        self._ties = np.arange(layers * n_experts).reshape(layers, n_experts) * _TIE
        self.values = self._ties - _UNTAKEN
        self._rate, self._last = np.zeros((layers, n_experts)), np.zeros((layers, n_experts))
        if policy == BELADY:
            self._following = np.full((positions + 1, layers, n_experts), _NEVER, np.int32)
            for t in range(positions - 1, -1, -1):
                self._following[t] = self._following[t + 1]
                np.put_along_axis(self._following[t], chosen[t], t, axis=1)
            for layer in range(layers):
                self._foretell(0, layer)

    def take(self, t: int, layer: int, experts: NDArray[np.int32]) -> None:
        """A layer of a position takes experts [top_k]; to be told in order."""
        if self._policy == BELADY:
            self._foretell(t + 1, layer)
            return
        ties, rate = self._ties[layer, experts], self._rate[layer, experts]
        if self._policy == "lru":
            self.values[layer, experts] = t + ties
        elif self._policy == "lfu":
            self._rate[layer, experts] = rate + 1
            self.values[layer, experts] = rate + 1 + ties
        else:
            # All rates fall alike, so that their order does not change with time: it is kept as of position 0.
            rate = 1 + rate * 0.5 ** ((t - self._last[layer, experts]) / HALF_LIFE)
            self._rate[layer, experts], self._last[layer, experts] = rate, t
            self.values[layer, experts] = np.log2(rate) + t / HALF_LIFE + ties

    def _foretell(self, t: int, layer: int) -> None:
        self.values[layer] = -(self._following[t, layer].astype(np.float64) * self._layers + layer)


class Cache:
    """Experts of several layers in one budget.

    Args:
        worth: says who leaves.
        budget: in the unit of `sizes`.
        sizes: of an expert of each layer; 1 each by default.

    Attributes:
        held: bool [layers, experts].
        used: of the budget.
    """

    def __init__(self, worth: Worth, budget: int, sizes: Sequence[int] | None = None) -> None:
        layers, self.n_experts = worth.values.shape
        self.worth, self.budget = worth, budget
        self.sizes = [1] * layers if sizes is None else list(sizes)
        self.held, self.used = np.zeros(worth.values.shape, bool), 0
        self._leaving = list[int]()

    def add(self, layer: int, expert: int) -> None:
        """Takes an expert in, for which there must be room."""
        self.held[layer, expert] = True
        self.used += self.sizes[layer]

    def drop(self, cell: int) -> None:
        """Lets an expert go, by its place in `held`, flat."""
        self.held.ravel()[cell] = False
        self.used -= self.sizes[cell // self.n_experts]

    def turn(self) -> None:
        """Another layer has its turn: who leaves is chosen anew."""
        self._leaving.clear()

    def make_room(self, size: int, kept: Collection[int]) -> bool:
        """Lets experts of the least worth go until there is room for `size`.

        Args:
            kept: places in `held`, flat, of those that stay.

        Returns:
            Whether there is; else as many as could have left.
        """
        while self.used + size > self.budget:
            if not self._leaving and not self._choose(kept):
                return False
            cell = self._leaving.pop()
            if cell not in kept:  # since it was chosen
                self.drop(cell)
        return True

    def _choose(self, kept: Collection[int]) -> bool:
        values = np.where(self.held.ravel(), self.worth.values.ravel(), np.inf)
        values[list(kept)] = np.inf
        some = min(_AT_ONCE, len(values))
        first = np.argpartition(values, some - 1)[:some]
        order = first[np.argsort(-values[first])]  # the one to leave first is the last
        self._leaving = order[values[order] < np.inf].tolist()
        return bool(self._leaving)


def check_budget(capacity: int, least: int) -> None:
    """Refuses what does not hold what one layer takes.

    Raises:
        DeviceError: it does not.
    """
    if capacity < least:
        raise DeviceError(f"a capacity of {capacity} experts", f"give at least the {least} that one layer takes")
