"""Parts of networks: what they are given and give, and a run that would not end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from isthmus.engine.graph_part import GraphPart
from isthmus.protocol.errors import EngineError


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adds one to x as often as it is told."""

    def told(name: str, kind: int, shape: list[int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    steps = [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Add", ["before", "one"], ["after"])]
    given = [told("i", TensorProto.INT64, []), told("on", TensorProto.BOOL, []), told("before", TensorProto.FLOAT, [1])]
    kept = [told("still", TensorProto.BOOL, []), told("after", TensorProto.FLOAT, [1])]
    body = helper.make_graph(steps, "body", given, kept, [one])
    inputs = [told("times", TensorProto.INT64, []), told("x", TensorProto.FLOAT, [1])]
    node = helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)
    graph = helper.make_graph([node], "loop", inputs, [told("y", TensorProto.FLOAT, [1])])
    path = tmp_path_factory.mktemp("loop") / "loop.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def test_a_run_that_does_not_end_is_given_up_and_the_next_one_runs(loop: Path) -> None:
    part, x = GraphPart(loop, threads=1, limit_s=0.2), np.zeros(1, np.float32)
    with pytest.raises(EngineError, match=r"given up after 0\.2 s"):
        part.run({"times": np.array(2**62), "x": x})
    assert part.run({"times": np.array(3), "x": x, "more": x})["y"].tolist() == [3.0]


def test_what_is_absent_or_no_model_is_named(loop: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="input 'times' is absent; give times, x"):
        GraphPart(loop).run({"x": np.zeros(1, np.float32)})
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(EngineError, match="onnxruntime cannot run"):
        GraphPart(tmp_path / "bad.onnx")
    with pytest.raises(EngineError, match=r"slow-down is 0\.5"):
        GraphPart(loop, slow_down=0.5)


def test_what_is_no_array_of_numbers_is_refused(tmp_path: Path) -> None:
    """Sequences and texts, whatever bundle.json says of them."""
    value, kinds = (
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]),
        (
            helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, [4]),
            helper.make_tensor_value_info("y", TensorProto.STRING, [4]),
        ),
    )
    nodes = (
        helper.make_node("SequenceConstruct", ["x"], ["y"]),
        helper.make_node("Cast", ["x"], ["y"], to=TensorProto.STRING),
    )
    for kind, node in zip(kinds, nodes, strict=True):
        graph = helper.make_graph([node], "odd", [value], [kind])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save_model(model, str(tmp_path / "odd.onnx"))
        part = GraphPart(tmp_path / "odd.onnx")
        with pytest.raises(EngineError, match="gives 'y', which is no array of numbers"):
            part.run({"x": np.zeros(4, np.float32)})
