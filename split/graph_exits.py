"""Outputs of a network that answer early: how many inputs leave there, and how often their answer is the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.certainty import certainty
from isthmus.protocol.errors import PlanError
from isthmus.split.agreement import Agree, share
from isthmus.split.graph_manifest import MOST_EXITS, GraphExit
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_stages import needed


@dataclass(frozen=True)
class Leaving:
    """Some exits on the device, and where inputs leave.

    Attributes:
        exits: in the order in which they are reached.
        nodes: that each of them needs.
        places: of each input, the number of its exit; that of exits where it goes on to the end.
        same: of each input, the share of its answer that is the whole network's.
    """

    exits: tuple[GraphExit, ...] = ()
    nodes: tuple[frozenset[int], ...] = ()
    places: tuple[int, ...] = ()
    same: tuple[float, ...] = ()

    @property
    def shares(self) -> list[float]:
        """Of inputs, that leave at each exit."""
        return [self.places.count(at) / len(self.places) for at in range(len(self.exits))]

    @property
    def reach(self) -> list[float]:
        """The share of inputs that get to each piece of the network: up to each exit, and behind the last."""
        counts = [sum(place >= at for place in self.places) for at in range(len(self.exits) + 1)]
        return [count / len(self.places) for count in counts] if self.exits else [1.0]

    @property
    def agreement(self) -> float | None:
        """With the whole network's answers, where nothing else changes them; None without exits."""
        return float(np.mean(self.same)) if self.exits else None

    def asks(self, at: int) -> bool:
        """Whether an input goes beyond all exits."""
        return not self.exits or self.places[at] == len(self.exits)

    def lost(self) -> float:
        """Answers that are another's because their input left."""
        return float(sum(1.0 - one for one in self.same))


NONE = Leaving()


def choices(
    graph: OnnxGraph, wanted: Mapping[str, float], answers: Sequence[Sequence[Any]], agree: Agree
) -> list[Leaving]:
    """Every choice of one exit or more.

    Args:
        wanted: by the name of an output, the probability from which its answer is final.
        answers: the whole network's to each input, in the order of its outputs.

    Raises:
        PlanError: one is no exit.
    """
    if not wanted:
        return []
    if len(wanted) > MOST_EXITS:
        raise PlanError(f"{len(wanted)} exits are wanted", f"name {MOST_EXITS} at most")
    final = _final(graph, wanted, answers[0])
    known = []
    for name, confidence in wanted.items():
        if not 0.0 < confidence <= 1.0:
            raise PlanError(f"the exit {name!r} is sure from {confidence:g} on", "give a probability, as 0.9")
        nodes = needed(graph, name)
        column, last = graph.outputs.index(name), graph.outputs.index(final)
        exit = GraphExit(name, confidence, _are_probabilities([np.asarray(one[column]) for one in answers]))
        sure = [certainty(np.asarray(one[column]), exit.probabilities) >= confidence for one in answers]
        same = [share(one[column], one[last], agree) for one in answers]
        known.append((len(nodes), exit, frozenset(nodes), sure, same))
    known.sort(key=lambda one: one[0])
    found = []
    for count in range(1, len(known) + 1):
        for some in combinations(known, count):
            sures = np.array([sure for _, _, _, sure, _ in some])
            places = [int(column.argmax()) if column.any() else count for column in sures.T]
            agreed = [some[place][4][at] if place < count else 1.0 for at, place in enumerate(places)]
            exits, nodes_ = tuple(exit for _, exit, *_ in some), tuple(one[2] for one in some)
            found.append(Leaving(exits, nodes_, tuple(places), tuple(agreed)))
    return found


def _final(graph: OnnxGraph, wanted: Mapping[str, float], answer: Sequence[Any]) -> str:
    """The output that exits stand for: of their shape the one that takes most nodes, of several the last."""
    for name in wanted:
        if name not in graph.outputs or graph.made_by(name) < 0:
            raise PlanError(f"the model makes no output {name!r}", f"it has {', '.join(graph.outputs)}")
    shapes = dict(zip(graph.outputs, (np.shape(one) for one in answer), strict=True))
    shape = shapes[next(iter(wanted))]
    alike = [name for name in graph.outputs if graph.made_by(name) >= 0 and shapes[name] == shape]
    for name in wanted:
        if shapes[name] != shape or len(alike) < 2 or shape[-1:] <= (1,):
            problem = f"the exit {name!r} {list(shapes[name])} is of classes that no other output has"
            raise PlanError(problem, "name outputs that give what the last one gives, earlier")
    final: str = max(reversed(alike), key=lambda name: len(needed(graph, name)))
    if any(name == final or graph.made_by(final) in needed(graph, name) for name in wanted):
        raise PlanError(f"{final!r} is the network's last answer", "name an output that comes earlier")
    return final


def _are_probabilities(found: Sequence[NDArray[Any]]) -> bool:
    """Whether all rows of an output, for all inputs, are from 0 on and come to 1."""
    return all((one >= 0).all() and np.allclose(one.sum(axis=-1, dtype=np.float64), 1.0, atol=0.01) for one in found)
