"""Times of nodes: what is fused stands for what it was made of, and all together take what the model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.protocol.errors import PlanError
from isthmus.split import onnx_measure
from isthmus.split.onnx_graph import OnnxGraph

CHANNELS, BLOCKS = 16, 3


def convolutions() -> onnx.ModelProto:
    """Blocks of Conv, BatchNormalization and Relu, which are fused, with a sum of two of them, and a Loop-free end."""
    chance = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for block in range(BLOCKS):
        shape = (CHANNELS, CHANNELS if block else 3, 3, 3)
        weights.append(numpy_helper.from_array(chance.standard_normal(shape).astype(np.float32), f"w{block}"))
        rest = [f"{what}{block}" for what in ("scale", "bias", "mean", "var")]
        weights += [numpy_helper.from_array(np.ones(CHANNELS, np.float32), one) for one in rest]
        nodes += [
            helper.make_node("Conv", [name, f"w{block}"], [f"c{block}"], pads=[1] * 4),
            helper.make_node("BatchNormalization", [f"c{block}", *rest], [f"n{block}"]),
            helper.make_node("Relu", [f"n{block}"], [f"r{block}"]),
        ]
        name = f"r{block}"
    nodes += [
        helper.make_node("Add", [name, "r1"], ["sum"]),
        helper.make_node("GlobalAveragePool", ["sum"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CHANNELS])]
    graph = helper.make_graph(nodes, "convolutions", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save_model(convolutions(), str(path))
    return path


def measured(path: Path, **shapes: list[int]) -> Any:
    return onnx_measure.measure(str(path), 1, shapes, 0.02)


def test_every_node_has_its_share_and_all_take_what_the_model_takes(model: Path) -> None:
    told = measured(model, x=[1, 3, 16, 16])
    assert len(told["nodes_ms"]) == len(told["ops"]) == 3 * BLOCKS + 3
    assert sum(told["nodes_ms"]) == pytest.approx(told["whole_ms"]) and min(told["nodes_ms"]) >= 0.0
    assert sum(ms for op, ms in zip(told["ops"], told["nodes_ms"], strict=True) if op == "Conv") > told["nodes_ms"][-1]
    assert told["tensors"]["sum"] == ["float32", [1, CHANNELS, 16, 16], CHANNELS * 1024]
    assert told["inputs"] == {"x": ["float32", [1, 3, 16, 16], 3072]}


def test_each_node_belongs_to_one_of_those_that_ran(model: Path) -> None:
    whole = onnx.load(str(model))
    graph = OnnxGraph(whole)
    for at, node in enumerate(graph.nodes):
        node.name = f"node{at}"
    feeds = onnx_measure.given(graph, {"x": [1, 3, 16, 16]}, "")
    fused, optimized = onnx_measure._profiled(whole, model, 1, feeds, 0.02, fused=True)
    groups = onnx_measure._groups(graph, optimized)
    assert sorted(at for members in groups.values() for at in members) == list(range(len(graph.nodes)))
    assert len(optimized.node) < len(graph.nodes) and set(fused) == {node.name for node in optimized.node}
    blocks = [members for members in groups.values() if len(members) > 1]
    assert sorted(map(sorted, blocks)) == [[3 * block, 3 * block + 1, 3 * block + 2] for block in range(BLOCKS)]


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        ({}, r"open shape 1,3,\?,\?; give it: --shape x=1,3,\?,\?"),
        ({"y": [1]}, "no input 'y'; it has: x"),
        ({"x": [1, 4, 16, 16]}, "refuses its inputs"),
        ({"x": [1, 3]}, "refuses its inputs"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(model: Path, shapes: dict[str, list[int]], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        measured(model, **shapes)


def test_inputs_come_from_a_file_where_one_is_given(model: Path, tmp_path: Path) -> None:
    arrays = tmp_path / "inputs.npz"
    np.savez(arrays, x=np.zeros((2, 3, 8, 8), np.float32))
    assert onnx_measure.measure(str(model), 1, {}, 0.02, str(arrays))["tensors"]["y"][1] == [2, CHANNELS]
    arrays.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(PlanError, match=r"no \.npz file"):
        onnx_measure.measure(str(model), 1, {}, 0.02, str(arrays))
    np.savez(arrays, x=np.array([{}], object))
    with pytest.raises(PlanError, match=r"no \.npz file"):
        onnx_measure.measure(str(model), 1, {}, 0.02, str(arrays))
