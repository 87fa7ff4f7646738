"""Networks in .tflite files: profiled and planned in one piece."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import flatbuffers
import msgspec
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from isthmus.engine.litert import LitertNetwork
from isthmus.protocol.errors import EngineError, PlanError
from isthmus.split import onnx_plan, tflite
from isthmus.split.plan import Plan
from isthmus.split.profile import Profile

FAST = "rtt=1,up=1000,down=1000"
ADDED = np.array([1, 2, 3, 4], np.float32)


def tensor(name: str, shape: list[int], buffer: int = 0, open_shape: list[int] | None = None) -> Any:
    found = schema.TensorT()
    found.name, found.shape, found.buffer, found.type = name.encode(), shape, buffer, schema.TensorType.FLOAT32
    found.shapeSignature = open_shape
    return found


@pytest.fixture
def adder(tmp_path: Path) -> Path:
    """x [n, 4] + a constant."""
    data, empty = schema.BufferT(), schema.BufferT()
    data.data = np.frombuffer(ADDED.tobytes(), np.uint8)
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.ADD
    code.version = 1
    add = schema.OperatorT()
    add.inputs, add.outputs = [0, 1], [2]
    add.builtinOptionsType, add.builtinOptions = schema.BuiltinOptions.AddOptions, schema.AddOptionsT()
    graph = schema.SubGraphT()
    graph.tensors = [tensor("x", [1, 4], 0, [-1, 4]), tensor("c", [4], 1), tensor("y", [1, 4], 0, [-1, 4])]
    graph.inputs, graph.outputs, graph.operators = [0], [2], [add]
    model = schema.ModelT()
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], [empty, data]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path = tmp_path / "adder.tflite"
    path.write_bytes(bytes(builder.Output()))
    return path


def test_it_runs(adder: Path) -> None:
    network = LitertNetwork(adder, threads=1)
    assert [(one.name, one.dtype, one.shape) for one in network.inputs] == [("x", np.dtype(np.float32), (-1, 4))]
    for rows in (1, 3, 1):  # a shape that is left open
        x = np.arange(4 * rows, dtype=np.float32).reshape(rows, 4)
        np.testing.assert_array_equal(network.run({"x": x})["y"], x + ADDED)
    with pytest.raises(EngineError, match="'x' is absent; give x float32"):
        network.run({})
    with pytest.raises(EngineError, match="cannot be run on that"):
        network.run({"x": np.zeros((1, 4), np.int64)})
    with pytest.raises(EngineError, match="cannot be run on that"):
        network.run({"x": np.zeros((1, 5), np.float32)})


def test_a_plan_leaves_it_in_one_piece(adder: Path) -> None:
    told = tflite.measure(str(adder), 1, {"x": [8, 4]}, 0.05)
    profile = Profile.of(told, "here", "this")
    assert profile.inputs["x"].bytes == profile.tensors["y"].bytes == 8 * 4 * 4
    assert profile.ops == (tflite.WHOLE,) and profile.weights == (adder.stat().st_size,)
    profile.save(adder.with_suffix(".json"))
    slow = msgspec.structs.replace(profile, whole_ms=1e3, nodes_ms=(1e3,))
    slow.save(adder.with_suffix(".slow.json"))
    for device, best in ((".json", "device"), (".slow.json", "cloud")):
        here, there = str(adder.with_suffix(device)), str(adder.with_suffix(".json"))
        plan = msgspec.convert(onnx_plan.plan(str(adder), here, there, FAST, {}), Plan)
        assert [row.kind for row in plan.rows] == ["device", "cloud"]
        assert plan.rows[plan.best].kind == best
    assert plan.rows[1].crossing == ("x",) and plan.rows[1].down_bytes == 128
    with pytest.raises(PlanError, match="codecs are tried on the cuts of ONNX models"):
        onnx_plan.plan(str(adder), here, there, FAST, {"folder": str(adder.parent)})


def test_it_is_measured_where_there_is_no_onnx(adder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("isthmus.split.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("onnx", "onnxruntime", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
    alone = import_module("isthmus.split.tflite")
    assert alone.measure(str(adder), 1, {}, 0.05)["ops"] == [alone.WHOLE]


def test_what_is_none_is_refused(adder: Path, tmp_path: Path) -> None:
    junk, cut = tmp_path / "junk.tflite", tmp_path / "cut.tflite"
    junk.write_bytes(b"not a network")
    cut.write_bytes(adder.read_bytes()[:64])
    with pytest.raises(PlanError, match=r"junk.tflite is no .tflite file"):
        tflite.measure(str(junk), 1, {}, 0.05)
    with pytest.raises(EngineError, match=r"LiteRT cannot run cut.tflite"):
        tflite.measure(str(cut), 1, {}, 0.05)
    with pytest.raises(PlanError, match="has no input 'z'"):
        tflite.measure(str(adder), 1, {"z": [1]}, 0.05)
    other = Profile.of(tflite.measure(str(adder), 1, {}, 0.05), "here", "this")
    msgspec.structs.replace(other, model="0" * 64).save(tmp_path / "other.json")
    with pytest.raises(PlanError, match="another version of this model"):
        onnx_plan.plan(str(adder), str(tmp_path / "other.json"), "", FAST, {})
