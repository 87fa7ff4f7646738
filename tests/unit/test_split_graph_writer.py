"""Models that are cut into two files: what the bundle says, that the parts give what the whole gives, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.protocol.errors import BundleError, PlanError
from isthmus.split.graph_check import difference
from isthmus.split.graph_manifest import CLOUD, DEVICE, GraphManifest
from isthmus.split.graph_writer import write_graph
from isthmus.split.onnx_file import digest, read_model
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_writer import ALIGN
from isthmus.split.transform import Components
from tests.unit.test_split_onnx_file import LAYERS, WIDTH, saved
from tests.unit.test_split_onnx_measure import BLOCKS, CHANNELS, convolutions

SHAPES = {"x": [2, 3, 16, 16]}


def branching() -> onnx.ModelProto:
    """Two outputs, one of them made early and used again; a body of If that takes a value from outside."""
    weight = numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4) / 8, "w")
    scalar = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("yes", "no")]
    then = helper.make_graph([helper.make_node("MatMul", ["a", "w"], ["yes"])], "then", [], scalar[:1])
    other = helper.make_graph([helper.make_node("Neg", ["a"], ["no"])], "else", [], scalar[1:])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("ReduceSum", ["a"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["large"]),
        helper.make_node("If", ["large"], ["b"], then_branch=then, else_branch=other),
        helper.make_node("MatMul", ["b", "w"], ["c"]),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    zero = numpy_helper.from_array(np.zeros((), np.float32), "zero")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "a", "y")]
    graph = helper.make_graph(nodes, "branching", ends[:1], ends[1:], [weight, zero])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def split(path: Path, nodes: range, output: Path, **options: Any) -> GraphManifest:
    told = write_graph(str(path), digest(path, read_model(path)), list(nodes), str(output), **options)
    found = GraphManifest.parse((output / "bundle.json").read_bytes())
    assert told["model_id"] == found.model_id and told["worst"] <= 1e-5
    return found


def run(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """A part by the runtime alone, as anybody would."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(
        zip(names, session.run(names, {one.name: values[one.name] for one in session.get_inputs()}), strict=True)
    )


@pytest.mark.parametrize("end", range(1, 3 * BLOCKS + 3))
def test_every_cut_of_a_chain_of_blocks(tmp_path: Path, end: int) -> None:
    onnx.save_model(convolutions(), str(tmp_path / "model.onnx"))
    found = split(tmp_path / "model.onnx", range(end), tmp_path / "cut", shapes=SHAPES)
    assert [one.name for one in found.inputs] == ["x"] and [one.name for one in found.outputs] == ["y"]
    assert found.inputs[0].shape == (None, 3, None, None) and found.kept == ()
    assert set(found.files) == {DEVICE, CLOUD}
    x = (
        np.random.default_rng(end).standard_normal((5, 3, 20, 20)).astype(np.float32)
    )  # other sizes than it was cut with
    whole = run(tmp_path / "model.onnx", {"x": x})
    travels = run(tmp_path / "cut" / DEVICE, {"x": x})
    assert set(travels) == {one.name for one in found.crossing}
    assert difference(run(tmp_path / "cut" / CLOUD, travels)["y"], whole["y"]) <= 1e-5


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_cut_with_a_transform(tmp_path: Path, patch: int) -> None:
    onnx.save_model(convolutions(), str(tmp_path / "model.onnx"))
    plain = split(tmp_path / "model.onnx", range(6), tmp_path / "plain", shapes=SHAPES)
    x = np.random.default_rng(3).standard_normal((5, 3, 20, 20)).astype(np.float32)
    (tensor,) = plain.crossing
    features = run(tmp_path / "plain" / DEVICE, {"x": x})[tensor.name]
    one = Components(tensor.name, 1, [features], patch).coded(0.5)
    told = msgspec.to_builtins([one])
    found = split(tmp_path / "model.onnx", range(6), tmp_path / "cut", shapes=SHAPES, codec="unit", transforms=told)
    assert [part.name for part in found.crossing] == one.names and found.codec == "unit"
    assert [part.shape[1] for part in found.crossing] == list(one.groups)
    assert found.batches == plain.batches and found.inputs == plain.inputs and found.outputs == plain.outputs
    whole = run(tmp_path / "model.onnx", {"x": x})
    travels = run(tmp_path / "cut" / DEVICE, {"x": x})
    for part, wanted in zip(one.names, one.split(features), strict=True):
        np.testing.assert_allclose(travels[part], wanted, atol=1e-3)
    assert difference(run(tmp_path / "cut" / CLOUD, travels)["y"], whole["y"]) <= 1e-5


def perceptron(path: Path, taken: str = "") -> Path:
    """[1, 6, 8] through a product, Relu and another one; the first is a second output; something may have a name."""
    chance = np.random.default_rng(0)
    weights = [numpy_helper.from_array(chance.standard_normal((8, 8)).astype(np.float32), one) for one in "uv"]
    weights += [numpy_helper.from_array(np.zeros(1, np.float32), taken)] if taken else []
    nodes = [
        helper.make_node("MatMul", ["x", "u"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "v"], ["c"]),
        helper.make_node("Add", ["c", taken or "a"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 6, 8]) for name in "xay"]
    graph = helper.make_graph(nodes, "perceptron", ends[:1], ends[1:], weights)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


@pytest.mark.parametrize("end", [1, 2])
def test_channels_that_are_last_and_tensors_that_are_outputs_as_well(tmp_path: Path, end: int) -> None:
    path, chance = perceptron(tmp_path / "model.onnx"), np.random.default_rng(1)
    x = chance.standard_normal((1, 6, 8)).astype(np.float32)
    plain = split(path, range(end), tmp_path / "plain")
    made = run(tmp_path / "plain" / DEVICE, {"x": x})
    told = [Components(one.name, 2, [made[one.name]]).coded(0.1) for one in plain.crossing]
    assert len(told) == end and plain.kept == ("a",)
    found = split(path, range(end), tmp_path / "cut", codec="unit", transforms=msgspec.to_builtins(told))
    assert [one.name for one in found.crossing] == [name for one in told for name in one.names]
    whole, travels = run(path, {"x": x}), run(tmp_path / "cut" / DEVICE, {"x": x})
    assert difference(travels.pop("a"), whole["a"]) <= 1e-5
    assert difference(run(tmp_path / "cut" / CLOUD, travels)["y"], whole["y"]) <= 1e-4


def test_a_model_with_the_names_of_a_transform(tmp_path: Path) -> None:
    path = perceptron(tmp_path / "model.onnx", "b/unit/matrix")
    samples = [np.random.default_rng(0).standard_normal((1, 6, 8)).astype(np.float32)]
    told = msgspec.to_builtins([Components("b", 2, samples).coded(0.1)])
    with pytest.raises(PlanError, match="the model has a 'b/unit/matrix'"):
        split(path, range(2), tmp_path / "cut", codec="unit", transforms=told)


def test_a_transform_of_something_else_is_refused(tmp_path: Path) -> None:
    onnx.save_model(convolutions(), str(tmp_path / "model.onnx"))
    (tensor,) = split(tmp_path / "model.onnx", range(6), tmp_path / "plain", shapes=SHAPES).crossing
    for name, count, patch, problem in (
        ("nothing", 4, 1, "does not go with its transforms"),
        (tensor.name, CHANNELS + 1, 1, "of another shape"),
        (tensor.name, CHANNELS, 8, "sizes that cannot be"),
    ):
        samples = [np.random.default_rng(0).standard_normal((1, count, 8, 8)).astype(np.float32)]
        one = msgspec.structs.replace(Components(name, 1, samples).coded(0.5), patch=patch)
        told = msgspec.to_builtins([one])
        with pytest.raises(PlanError, match=problem):
            split(tmp_path / "model.onnx", range(6), tmp_path / "cut", shapes=SHAPES, codec="unit", transforms=told)
    good = msgspec.to_builtins([msgspec.structs.replace(one, patch=1)])
    for codec, told, problem in (
        ("int4", good, "does not go with its transforms"),
        ("unit", [], "does not go with its transforms"),
        ("unit", good * 2, "transforms a tensor twice"),
    ):
        with pytest.raises(PlanError, match=problem):
            split(tmp_path / "model.onnx", range(6), tmp_path / "cut", shapes=SHAPES, codec=codec, transforms=told)
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("end", range(1, 6))
def test_outputs_of_both_sides_bodies_and_shared_weights(tmp_path: Path, end: int) -> None:
    onnx.save_model(branching(), str(tmp_path / "model.onnx"))
    found = split(tmp_path / "model.onnx", range(end), tmp_path / "cut")
    assert found.kept == ("a",) and "a" in {one.name for one in found.crossing}
    x = np.array([[1.0, -2.0, 3.0, 0.5]], np.float32)
    for sign in (1, -1):  # both branches
        whole = run(tmp_path / "model.onnx", {"x": sign * x})
        told = run(tmp_path / "cut" / DEVICE, {"x": sign * x})
        told |= run(tmp_path / "cut" / CLOUD, told)
        for name in ("a", "y"):
            np.testing.assert_array_equal(told[name], whole[name])


def test_weights_in_bodies_count_where_the_body_is(tmp_path: Path) -> None:
    model = branching()
    then = model.graph.node[3].attribute[0].g
    then.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "inside"))
    then.node.append(helper.make_node("Constant", [], ["more"], value=numpy_helper.from_array(np.ones(8, np.float32))))
    graph = OnnxGraph(model)
    assert [node.op_type for node in graph.nodes][3] == "If"
    assert [graph.weight_bytes(at) for at in range(6)] == [64, 0, 4, 64 + 64 + 32, 64, 0]


def test_outputs_that_are_constants_or_inputs_are_handed_through(tmp_path: Path) -> None:
    model = branching()
    constant = numpy_helper.from_array(np.full((1, 4), 7, np.float32), "c7")
    model.graph.initializer.append(constant)
    model.graph.output.append(helper.make_tensor_value_info("c7", TensorProto.FLOAT, [1, 4]))
    onnx.save_model(model, str(tmp_path / "model.onnx"))
    found = split(tmp_path / "model.onnx", range(2), tmp_path / "cut")
    assert found.kept == ("a", "c7")
    told = run(tmp_path / "cut" / DEVICE, {"x": np.ones((1, 4), np.float32)})
    np.testing.assert_array_equal(told["c7"], numpy_helper.to_array(constant))


@pytest.mark.parametrize("end", range(1, LAYERS))
def test_weights_beside_the_model_lie_beside_the_parts(tmp_path: Path, end: int) -> None:
    path = saved(tmp_path)
    found = split(path, range(end), tmp_path / "cut", shapes={"x": [3, WIDTH]})
    sizes = [found.files[f"{side}/model.weights"].bytes for side in ("device", "cloud")]
    assert [-(-size // ALIGN) for size in sizes] == [end, LAYERS - end]
    x = np.ones((7, WIDTH), np.float32)
    travels = run(tmp_path / "cut" / DEVICE, {"x": x})
    (output,) = run(tmp_path / "cut" / CLOUD, travels).values()
    (whole,) = run(path, {"x": x}).values()
    assert difference(output, whole) <= 1e-5


def test_a_cut_with_a_transform_of_a_model_whose_weights_lie_beside_it(tmp_path: Path) -> None:
    onnx.save_model(convolutions(), str(tmp_path / "small.onnx"))
    path = tmp_path / "model.onnx"
    beside: Any = {"save_as_external_data": True, "location": "model.bin", "size_threshold": 0}
    onnx.save_model(onnx.load(str(tmp_path / "small.onnx")), str(path), **beside)
    x = np.random.default_rng(3).standard_normal((5, 3, 20, 20)).astype(np.float32)
    plain = split(path, range(6), tmp_path / "plain", shapes=SHAPES)
    features = run(tmp_path / "plain" / DEVICE, {"x": x})[plain.crossing[0].name]
    told = msgspec.to_builtins([Components(plain.crossing[0].name, 1, [features], 2).coded(0.5)])
    found = split(path, range(6), tmp_path / "cut", shapes=SHAPES, codec="unit", transforms=told)
    assert {"device/model.weights", "cloud/model.weights"} <= set(found.files)
    travels = run(tmp_path / "cut" / DEVICE, {"x": x})
    assert difference(run(tmp_path / "cut" / CLOUD, travels)["y"], run(path, {"x": x})["y"]) <= 1e-5


@pytest.mark.parametrize("end", range(1, 4))
@pytest.mark.parametrize("kind", ["Loop", "Scan"])
def test_bodies_that_take_values_from_outside(tmp_path: Path, kind: str, end: int) -> None:
    """a = x + 1, b = 2 a, and a body that adds b, of outside, to what it is given, three times; y = -c."""
    float_, chance = TensorProto.FLOAT, np.random.default_rng(0)
    told = helper.make_tensor_value_info
    fixed = [numpy_helper.from_array(np.full(4, 2.0, np.float32), "two")]
    if kind == "Loop":
        fixed += [numpy_helper.from_array(np.array(3, np.int64), "times")]
        steps = [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Add", ["before", "b"], ["after"])]
        given = [told("i", TensorProto.INT64, []), told("on", TensorProto.BOOL, []), told("before", float_, [4])]
        gives = [told("still", TensorProto.BOOL, []), told("after", float_, [4])]
        body = helper.make_graph(steps, "body", given, gives)
        node = helper.make_node("Loop", ["times", "", "a"], ["c"], body=body)
    else:
        fixed += [numpy_helper.from_array(np.zeros((3, 4), np.float32), "rows")]
        steps = [helper.make_node("Add", ["before", "b"], ["sum"]), helper.make_node("Add", ["sum", "row"], ["after"])]
        given = [told("before", float_, [4]), told("row", float_, [4])]
        body = helper.make_graph(steps, "body", given, [told("after", float_, [4])])
        node = helper.make_node("Scan", ["a", "rows"], ["c"], body=body, num_scan_inputs=1)
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Mul", ["a", "two"], ["b"]), node]
    nodes.append(helper.make_node("Neg", ["c"], ["y"]))
    graph = helper.make_graph(nodes, "body", [told("x", float_, [4])], [told("y", float_, [4])], fixed)
    path = tmp_path / "model.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    found = split(path, range(end), tmp_path / "cut")
    assert {one.name for one in found.crossing} == [set(), {"a"}, {"a", "b"}, {"c"}][end]
    x = chance.standard_normal(4).astype(np.float32)
    travels = run(tmp_path / "cut" / DEVICE, {"x": x})
    (y,) = run(tmp_path / "cut" / CLOUD, travels).values()
    np.testing.assert_allclose(y, -7 * np.maximum(x, 0), rtol=1e-6)


def steep(path: Path, factor: float) -> Path:
    """A convolution that is fused with what normalizes it, and a sine of many times that: roundings grow."""
    chance = np.random.default_rng(0)
    weights = {"w": chance.standard_normal((8, 3, 3, 3)), "factor": np.array(factor)}
    weights |= {name: chance.uniform(0.5, 1.5, 8) for name in ("scale", "shift", "mean", "var")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["b"]),
        helper.make_node("Mul", ["b", "factor"], ["c"]),
        helper.make_node("Sin", ["c"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    ends[0] = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])
    fixed = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "steep", ends[:1], ends[1:], fixed)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def test_parts_may_be_as_far_off_as_the_whole_is_from_itself(tmp_path: Path) -> None:
    path = steep(tmp_path / "model.onnx", 300.0)
    told = write_graph(str(path), "", [0], str(tmp_path / "cut"))
    assert 1e-5 < told["worst"] < 1e-2
    with pytest.raises(PlanError, match="the parts give another 'y'"):
        write_graph(str(steep(tmp_path / "steeper.onnx", 1e5)), "", [0], str(tmp_path / "other"))


def test_parts_of_an_old_file_are_valid_models(tmp_path: Path) -> None:
    """Before the fourth version of the format, weights had to be inputs as well."""
    model = onnx.load(str(saved(tmp_path, beside=False)))
    model.ir_version = 3
    model.graph.input.extend(
        helper.make_tensor_value_info(one.name, one.data_type, list(one.dims)) for one in model.graph.initializer
    )
    path = tmp_path / "old.onnx"
    onnx.save_model(model, str(path))
    onnx.checker.check_model(str(path))
    split(path, range(1), tmp_path / "cut", shapes={"x": [3, WIDTH]})
    for part in (DEVICE, CLOUD):
        onnx.checker.check_model(str(tmp_path / "cut" / part))


def test_what_is_no_cut_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save_model(convolutions(), str(path))
    nodes = len(OnnxGraph(read_model(path)).nodes)
    for chosen, problem in ((range(nodes), "on the device"), (range(3, nodes), "needs")):
        with pytest.raises(PlanError, match=problem):
            split(path, chosen, tmp_path / "cut", shapes=SHAPES)
    with pytest.raises(PlanError, match="another version of model"):
        write_graph(str(path), "ab" * 32, [0], str(tmp_path / "cut"), "", False, SHAPES)
    with pytest.raises(PlanError, match="open shape"):
        split(path, range(3), tmp_path / "cut")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model.onnx"]
    split(path, range(3), tmp_path / "cut", shapes=SHAPES)
    with pytest.raises(BundleError, match="exists already"):
        split(path, range(4), tmp_path / "cut", shapes=SHAPES)
    assert len(split(path, range(4), tmp_path / "cut", shapes=SHAPES, force=True).crossing) == 1


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("kind", "decoder", "of a language model"),
        ("format_version", 9, "format_version 9"),
        ("model_id", "00" * 16, "does not follow"),
        ("name", "a\nb", "model's name"),
        ("crossing", [], "0 crossing tensors"),
        ("kept", ["y"], "keeps outputs"),
        ("inputs", [{"name": "x", "dtype": "object", "shape": [1]}], "of type 'object'"),
        ("inputs", [{"name": "x", "dtype": "float32", "shape": [-1]}], "with the shape"),
        ("files", {"../x": {"bytes": 1, "sha256": "ab" * 32}}, "names the file"),
        ("files", {}, "lists no device/model.onnx"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(tmp_path: Path, key: str, value: Any, problem: str) -> None:
    onnx.save_model(convolutions(), str(tmp_path / "model.onnx"))
    found = split(tmp_path / "model.onnx", range(3), tmp_path / "cut", shapes=SHAPES)
    told = {**msgspec.to_builtins(found), key: value}
    with pytest.raises(BundleError, match=problem):
        GraphManifest.parse(json.dumps(told).encode())


def test_differences_are_shares_of_the_largest_magnitude() -> None:
    other = np.array([1.0, -4.0, np.nan, np.inf], np.float32)
    assert difference(other.copy(), other) == 0.0
    assert difference(np.array([1.0, -4.4, np.nan, np.inf], np.float32), other) == pytest.approx(0.1)
    for wrong in ([1.0, -4.0, 0.0, np.inf], [1.0, -4.0, np.nan, -np.inf]):
        assert difference(np.array(wrong, np.float32), other) == np.inf
    assert difference(np.ones(3, np.int64), np.ones(3, np.int64)) == 0.0
    assert difference(np.ones(3, np.int64), np.zeros(3, np.int64)) == np.inf
    assert difference(np.ones(2, np.float32), np.ones(3, np.float32)) == np.inf
    assert difference(np.zeros(2, np.float32), np.zeros(2, np.float32)) == 0.0
