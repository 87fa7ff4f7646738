"""Exits of networks: who leaves where, what that costs, and parts in pieces that do what one did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from isthmus.engine.certainty import certainty
from isthmus.protocol.errors import PlanError
from isthmus.split.finalists import Fused
from isthmus.split.graph_exits import Leaving, choices
from isthmus.split.graph_manifest import GraphExit
from isthmus.split.link import read_link
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_network import Codec, Rate
from isthmus.split.onnx_stages import needed, stages
from isthmus.split.planner import Wanted, remeasured, ways
from isthmus.split.replay import latencies
from tests.branchy import CLASSES, EARLY, FINAL, SEAM, branchy, inputs
from tests.unit.test_split_profile import WAYS, by_hand, sharing

RATE = Rate(1.0, 8e6, 80e6)
LEAVING = Leaving(  # of the diamond: half leave at b, which needs a; an eighth at c, behind it
    (GraphExit("b", 0.9), GraphExit("c", 0.9)),
    (frozenset({0, 1}), frozenset({0, 2})),
    (0, 0, 0, 0, 1, 2, 2, 2),
    (1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0),
)


def answers(model: onnx.ModelProto) -> list[list[Any]]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [list(session.run(None, feeds)) for feeds in inputs()]


@pytest.mark.parametrize(
    ("values", "probabilities", "sure"),
    [
        ([[0.2, 0.8]], True, 0.8),
        ([[0.2, 0.8], [0.6, 0.4]], True, 0.6),
        ([[0.0, np.log(3.0)]], False, 0.75),
        ([[1000.0, -1000.0]], False, 1.0),
        ([[np.nan, 1.0]], False, 0.0),
        ([], False, 0.0),
        ([[np.inf, 1.0]], False, 0.0),
    ],
)
def test_the_row_that_is_least_sure_counts(values: Any, probabilities: bool, sure: float) -> None:
    assert certainty(np.array(values, np.float32), probabilities) == pytest.approx(sure)


def test_inputs_leave_where_an_exit_is_sure() -> None:
    model = branchy()
    graph, told = OnnxGraph(model), answers(model)
    (found,) = choices(graph, {EARLY: 0.8}, told, "top1")
    odds = [np.exp(early[0, 0] - early[0, 0].max()) for early, _ in told]
    sure = [one.max() / one.sum() >= 0.8 for one in odds]
    assert 3 < sum(sure) < len(sure) - 3
    assert [not found.asks(at) for at in range(len(sure))] == sure
    assert found.shares == [sum(sure) / len(sure)] and found.reach == pytest.approx([1, 1 - sum(sure) / len(sure)])
    wrong = sum(early.argmax() != final.argmax() for (early, final), left in zip(told, sure, strict=True) if left)
    assert found.lost() == wrong and found.agreement == pytest.approx(1 - wrong / len(sure))
    assert found.nodes == (frozenset({0, 1, 2}),) and not found.exits[0].probabilities


def test_every_choice_of_exits_is_one() -> None:
    model = branchy(middle=True)
    graph, told = OnnxGraph(model), answers(model)
    found = choices(graph, {"middle": 0.7, EARLY: 0.8}, told, "top1")
    assert [[one.output for one in each.exits] for each in found] == [[EARLY], ["middle"], [EARLY, "middle"]]
    early, middle, both = found
    assert middle.exits[0].probabilities and not early.exits[0].probabilities
    for at in range(len(told)):
        first = 0 if not early.asks(at) else 1 if not middle.asks(at) else 2
        assert both.places[at] == first
    assert both.reach[-1] <= min(early.reach[-1], middle.reach[-1])


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"nobody": 0.9}, "makes no output 'nobody'"),
        ({"x": 0.9}, "makes no output 'x'"),
        ({EARLY: 0.0}, "sure from 0 on"),
        ({EARLY: 1.5}, "sure from 1.5 on"),
        ({EARLY: float("nan")}, "sure from nan on"),
        ({EARLY: 0.9, FINAL: 0.9, "middle": 0.5}, "'final' is the network's last answer"),
        ({FINAL: 0.9}, "'final' is the network's last answer"),
        ({str(at): 0.9 for at in range(4)}, "4 exits are wanted"),
    ],
)
def test_what_is_no_exit_is_refused(wanted: dict[str, float], says: str) -> None:
    model = branchy(middle=True)
    with pytest.raises(PlanError, match=says):
        choices(OnnxGraph(model), wanted, answers(model), "top1")


def test_an_exit_of_other_classes_is_refused() -> None:
    model = branchy()
    told = [[early[..., : CLASSES - 1], final] for early, final in answers(model)]
    with pytest.raises(PlanError, match="classes that no other output has"):
        choices(OnnxGraph(model), {EARLY: 0.9}, told, "top1")


def test_outputs_may_stand_in_any_order() -> None:
    model = branchy()
    told = answers(model)
    (usual,) = choices(OnnxGraph(model), {EARLY: 0.8}, told, "top1")
    outputs = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend(reversed(outputs))
    (found,) = choices(OnnxGraph(model), {EARLY: 0.8}, [list(reversed(one)) for one in told], "top1")
    assert found == usual


def input_by_input(leaving: Leaving, device: set[int]) -> float:
    """The mean time of a way, each input by itself."""
    one, total = sharing(rate=RATE), 0.0
    for at, place in enumerate(leaving.places):
        if leaving.asks(at):
            total += by_hand(one, device)
        else:
            done = frozenset().union(*leaving.nodes[: place + 1])
            total += sum(one.device.nodes_ms[node] for node in done)
    return total / len(leaving.places)


@pytest.mark.parametrize("exits", [1, 2])
def test_a_way_with_exits_costs_what_its_inputs_cost(exits: int) -> None:
    leaving = replace(
        LEAVING,
        exits=LEAVING.exits[:exits],
        nodes=LEAVING.nodes[:exits],
        places=tuple(min(p, exits) for p in LEAVING.places),
    )
    needs = set().union(*leaving.nodes)
    rows = ways(sharing(rate=RATE), [Codec("f32")], Wanted(), [leaving])
    mine = [row for row in rows if row.leaves]
    assert {row.kind for row in mine} == {"device", "split"} and not any(row.leaves for row in rows[:2])
    for row in mine:
        assert row.ms == pytest.approx(input_by_input(leaving, set(row.device)))
        assert row.ms == pytest.approx(row.device_ms + row.link_ms + row.cloud_ms)
        assert set(row.device) >= needs and "exit at b" in row.name
        assert row.agreement == pytest.approx(7 / 8) and row.goes_on == pytest.approx(leaving.reach[-1])
    best = min(input_by_input(leaving, way) for way in WAYS if needs <= way)
    assert min(row.ms for row in mine) == pytest.approx(best)


def test_latencies_of_a_way_with_exits_are_those_of_its_inputs() -> None:
    rows = ways(sharing(rate=RATE), [Codec("f32")], Wanted(), [LEAVING])
    for row in (row for row in rows if row.leaves):
        drawn = latencies(row, read_link("rtt=1,up=8,down=80"))
        assert drawn.mean() == pytest.approx(row.ms, rel=0.1)
        assert np.mean(np.isclose(drawn, row.leaves[0].ms)) == pytest.approx(0.5, abs=0.03)
        assert len(np.unique(drawn.round(6))) == 3


def test_measured_pieces_take_the_place_of_sums_of_nodes() -> None:
    rows = [row for row in ways(sharing(rate=RATE), [Codec("f32")], Wanted(), [LEAVING]) if row.leaves]
    split = next(row for row in rows if row.kind == "split")
    (found,) = remeasured([split], sharing(rate=RATE), lambda _: Fused((2.0, 4.0, 8.0), 16.0))
    assert [one.ms for one in found.leaves] == [2.0, 6.0]
    assert found.device_ms == pytest.approx(0.5 * 2 + 0.125 * 6 + 0.375 * 14) and found.cloud_ms == 0.375 * 16
    assert found.ms == pytest.approx(found.device_ms + found.link_ms + found.cloud_ms)


@pytest.mark.parametrize("exits", [[EARLY], [EARLY, "middle"], ["middle"], []])
def test_pieces_do_what_the_part_does(exits: list[str]) -> None:
    model = branchy(middle=True)
    graph = OnnxGraph(model)
    infos = onnx.shape_inference.infer_shapes(model).graph.value_info
    graph.learn(infos)
    halves = graph.halves(needed(graph, "middle") | needed(graph, EARLY))
    assert set(halves.kept) == {EARLY, "middle"}
    pieces = stages(halves.device, exits)
    assert len(pieces) == len(exits) + 1
    feeds = inputs()[7]
    known: dict[str, Any] = dict(feeds)
    for at, piece in enumerate(pieces):
        if piece is not None:
            session = ort.InferenceSession(piece.SerializeToString(), providers=["CPUExecutionProvider"])
            known |= dict(
                zip(
                    [one.name for one in session.get_outputs()],
                    session.run(None, {one.name: known[one.name] for one in session.get_inputs()}),
                    strict=True,
                )
            )
        if at < len(exits):
            assert exits[at] in known
            assert all(name not in known for name in exits[at + 1 :])
    whole = dict(zip([EARLY, "middle", FINAL], answers(model)[7], strict=True))
    assert all(np.allclose(known[name], whole[name], atol=1e-6) for name in (EARLY, "middle"))
    assert all(name in known for name in halves.crossing) and SEAM not in halves.crossing
