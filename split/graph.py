"""A network as the planner knows it, whatever its file: nodes in order, and what they hand on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Crossing:
    """A tensor between nodes.

    Attributes:
        producer: number of the node that makes it, -1 for an input of the model.
        consumers: numbers of the nodes that use it.
    """

    name: str
    producer: int
    consumers: tuple[int, ...]


class Graph(Protocol):
    """What is known of a network's nodes: an `OnnxGraph`, or a `TfliteGraph`, which has one."""

    inputs: list[str]
    outputs: list[str]

    @property
    def nodes(self) -> Sequence[object]:
        """In an order in which they can run."""
        ...

    @property
    def shared_weights(self) -> list[tuple[tuple[int, ...], int]]:
        """Numbers of the nodes that use the same weights, and bytes of these, which count for each of them."""
        ...

    @property
    def tensors(self) -> list[Crossing]:
        """All that nodes hand on to each other, and the inputs."""
        ...

    def made_by(self, name: str) -> int:
        """Number of the node that makes a tensor, -1 for an input."""
        ...

    def crossing(self, device: Collection[int]) -> list[str]:
        """Names that travel when these nodes run on the device."""
        ...
