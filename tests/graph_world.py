"""A network that is cut, its bundle, and a cloud without sockets that serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from isthmus.cloud.admission import ServiceLimits
from isthmus.cloud.graphs import Graph
from isthmus.cloud.service import Service
from isthmus.protocol.arrays import Array
from isthmus.protocol.errors import EngineError
from isthmus.split.graph_writer import write_graph
from tests.fakes import MemoryServer
from tests.unit.test_split_onnx_measure import convolutions

SHAPES = {"x": [1, 3, 8, 8]}


def cut_network(folder: Path, end: int = 6) -> Path:
    """The bundle of a small convolutional network whose first nodes are the device's."""
    onnx.save_model(convolutions(), str(folder / "model.onnx"))
    write_graph(str(folder / "model.onnx"), "", list(range(end)), str(folder / "cut"), shapes=SHAPES)
    return folder / "cut"


class AddsRows:
    """In place of a `GraphPart`: y is x summed over all but its rows, z twice that.

    Attributes:
        runs: rows of each run.
    """

    inputs, outputs = ("x",), ("y", "z")

    def __init__(self) -> None:
        self.runs: list[int] = []

    def run(self, arrays: Mapping[str, Array], wanted: Sequence[str] | None = None) -> dict[str, Any]:
        x = arrays["x"]
        if (x == 13).any():
            raise EngineError("thirteen brings bad luck")
        self.runs.append(len(x))
        y = x.reshape(len(x), -1).sum(axis=1)
        return {"y": y, "z": 2 * y}


class GraphService:
    """A service of networks that answers at once, as `tests.edge_world.LossyWire` wants a cloud.

    Attributes:
        busy_s: how long it takes over a request.
    """

    def __init__(self, *graphs: Graph, limits: ServiceLimits | None = None) -> None:
        self.server, self.busy_s = MemoryServer(), 0.0
        self.service = Service([], self.server, limits=limits, graphs=graphs)

    def receive(self, message: Any) -> list[tuple[float, Any]]:
        self.server.put(message)
        self.service.turn(0.0)
        self.service.turn(0.0)
        return [(self.busy_s, answer) for answer in self.server.take()]

    def forget(self) -> None:
        """Nothing is kept between requests."""
