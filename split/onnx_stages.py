"""A device's part of an ONNX model in pieces: up to each exit, and what is left."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from isthmus.split.onnx_graph import OnnxGraph


def stages(part: onnx.ModelProto, exits: Sequence[str]) -> list[onnx.ModelProto | None]:
    """Models that do together what the part does, one after the other; None for one that does nothing.

    Args:
        part: a model.
        exits: names of its outputs, in the order in which they are reached; a model ends at each.
    """
    graph = OnnxGraph(part)
    if not exits:
        return [part if graph.nodes or graph.outputs else None]
    left, pieces = set(range(len(graph.nodes))), list[set[int]]()
    for name in exits:
        pieces.append(needed(graph, name) & left)
        left -= pieces[-1]
    pieces.append(left)
    found: list[onnx.ModelProto | None] = []
    for at, piece in enumerate(pieces):
        later = {name for other in pieces[at + 1 :] for node in other for name in graph.needs[node]}
        made = dict.fromkeys(name for node in sorted(piece) for name in graph.nodes[node].output)
        given = dict.fromkeys(name for node in sorted(piece) for name in graph.needs[node] if name not in made)
        gives = [name for name in made if name in later or name in graph.outputs]
        if not at:
            gives += [name for name in graph.outputs if graph.made_by(name) < 0]  # constants
        found.append(graph.part(piece, list(given), gives) if piece or gives else None)
    return found


def needed(graph: OnnxGraph, name: str) -> set[int]:
    """Numbers of all nodes that a tensor depends on."""
    found, ahead = set[int](), [graph.made_by(name)]
    while ahead:
        at = ahead.pop()
        if at >= 0 and at not in found:
            found.add(at)
            ahead += [graph.made_by(one) for one in graph.needs[at]]
    return found
