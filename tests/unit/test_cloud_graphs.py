"""The cloud's part of a network: requests are answered, together where that is right, and refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.cloud import graphs as module
from isthmus.cloud.graphs import TOGETHER, Graph, load_graph
from isthmus.cloud.service import Service
from isthmus.protocol import messages as m
from isthmus.protocol.arrays import GraphOffer, Shape, pack, unpack
from isthmus.protocol.errors import BundleError, ServiceError
from isthmus.split.graph_manifest import Named
from tests.fakes import MemoryServer
from tests.graph_world import AddsRows, cut_network

ID = "cd" * 16


class World:
    """A service with one network, and devices by their routes."""

    def __init__(self, batches: bool = True) -> None:
        self.part, self.server, self.now = AddsRows(), MemoryServer(), 50.0
        takes = (Named("x", "float32", (None, 2)),)
        graph = Graph(GraphOffer(ID, "adds", batches), self.part, takes, ("y", "z"))
        self.service = Service([], self.server, graphs=[graph], clock=lambda: self.now)
        for route in (b"a", b"b"):
            self.server.put(m.Hello(1, 1), route)
        self.service.turn(0.0)
        (welcome,) = self.server.take(b"a")
        assert welcome.graphs == (graph.offer,) and welcome.offers == ()
        self.server.take(b"b")

    def ask(self, request: int, value: float, route: bytes = b"a", rows: int = 1, **options: Any) -> None:
        told = {"model_id": ID} | options
        shapes, data = pack([np.full((rows, 2), value, np.float32)])
        self.server.put(m.Infer(request, told.pop("model_id"), shapes, data, **told), route)

    def turn(self) -> None:
        self.service.turn(0.0)


def values(answer: Any) -> list[list[float]]:
    return [one.tolist() for one in unpack(answer.shapes, answer.data)]


def test_an_answer_names_its_request_and_has_all_outputs_in_order() -> None:
    world = World()
    world.ask(5, 1.5, rows=2)
    world.turn()
    (answer,) = world.server.take(b"a")
    assert (answer.request, answer.together, values(answer)) == (5, 1, [[3.0, 3.0], [6.0, 6.0]])


def test_what_waits_is_run_as_one() -> None:
    world = World()
    for number in range(1, 4):
        world.ask(number, number, b"a" if number % 2 else b"b", rows=number)
    world.turn()
    told = [*world.server.take(b"a"), *world.server.take(b"b")]
    assert world.part.runs == [6] and {one.together for one in told} == {3}
    found = {one.request: values(one)[0] for one in told}
    assert found == {1: [2.0], 2: [4.0, 4.0], 3: [6.0, 6.0, 6.0]}


def test_not_more_than_so_many_and_not_where_rows_mix() -> None:
    world = World()
    for number in range(TOGETHER + 3):
        world.ask(number + 1, 1.0)
    world.turn()
    world.turn()
    assert world.part.runs == [TOGETHER, 3]
    alone = World(batches=False)
    for number in range(3):
        alone.ask(number + 1, 1.0)
    for _ in range(3):
        alone.turn()
    assert alone.part.runs == [1, 1, 1] and len(alone.server.take(b"a")) == 3


def test_one_that_cannot_be_run_does_not_spoil_the_others() -> None:
    world = World()
    for number, value in enumerate((1.0, 13.0, 2.0)):
        world.ask(number + 1, value)
    world.turn()
    first, bad, last = world.server.take(b"a")
    assert (first.request, values(first)[0], last.request, values(last)[0]) == (1, [2.0], 3, [4.0])
    assert (bad.code, bad.request) == (m.Code.ENGINE, 2) and "bad luck" in bad.problem


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.zeros((1, 3), np.float32), r"'x' came as float32 \[1, 3\], not float32 \[any, 2\]"),
        (np.zeros((1, 2), np.float64), "float64"),
        (np.zeros(2, np.float32), r"\[2\]"),
    ],
)
def test_other_arrays_are_refused(array: Any, problem: str) -> None:
    world = World()
    world.server.put(m.Infer(9, ID, *pack([array])), b"a")
    world.turn()
    (fault,) = world.server.take(b"a")
    assert (fault.code, fault.request) == (m.Code.BAD_MESSAGE, 9)
    assert re.search(problem, fault.problem)


def test_pictures_are_taken_where_they_are_awaited() -> None:
    world = World()
    world.server.put(m.Infer(3, ID, (Shape("float32", (1, 2), "jpeg90", 4),), b"\xff\xd8\xff\xe0"), b"a")
    world.turn()
    (answer,) = world.server.take(b"a")
    assert (answer.code, answer.request) == (m.Code.UNSUPPORTED, 3) and "no picture travels" in answer.problem


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.ask(1, 1.0, model_id="ee" * 16)
    world.server.put(m.Infer(2, ID, *pack([np.zeros((1, 2), np.float32)] * 2)), b"a")
    monkeypatch.setattr(module, "MAX_WAITING", 1)
    world.ask(3, 1.0, budget_ms=10)
    world.ask(4, 1.0)
    for _ in range(3):
        world.service._take_in()
    unknown, many, busy = world.server.take(b"a")
    assert (unknown.code, unknown.request) == (m.Code.UNKNOWN_MODEL, 1) and "adds" in unknown.problem
    assert (many.code, many.request) == (m.Code.BAD_MESSAGE, 2)
    assert (busy.code, busy.request, busy.retry_ms > 0) == (m.Code.BUSY, 4, True)
    world.now += 1.0
    world.turn()
    (late,) = world.server.take(b"a")
    assert (late.code, late.request) == (m.Code.DEADLINE, 3) and world.part.runs == []


def test_a_device_that_left_costs_nothing() -> None:
    world = World()
    world.ask(1, 1.0)
    world.service._take_in()
    world.server.ended.append(b"a")
    world.now += 1.0
    world.service._chores(world.now)
    world.turn()
    assert world.part.runs == [] and not world.service._graphs.ready


def test_a_stopping_cloud_takes_nothing_new() -> None:
    world = World()
    world.service.stop()
    world.ask(1, 1.0)
    world.turn()
    (fault,) = world.server.take(b"a")
    assert (fault.code, fault.request) == (m.Code.CLOSING, 1)


def test_a_bundle_is_served(tmp_path: Path) -> None:
    graph = load_graph(cut_network(tmp_path), threads=1)
    assert graph.offer.name == "model" and graph.offer.batches
    with pytest.raises(ServiceError, match="same network twice"):
        Service([], MemoryServer(), graphs=[graph, graph])
    (tmp_path / "cut" / "cloud" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"has no cloud/model\.onnx"):
        load_graph(tmp_path / "cut")
