"""Networks that are given pictures in place of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from isthmus.cloud.graphs import load_graph
from isthmus.edge.graph import GraphDevice
from isthmus.protocol.errors import PlanError
from isthmus.split.graph_bundle import GraphBundle
from isthmus.split.graph_manifest import CLOUD
from isthmus.split.graph_writer import write_graph
from isthmus.split.pictures import Preprocess
from tests.edge_world import LossyWire
from tests.graph_world import GraphService
from tests.unit.test_split_onnx_measure import convolutions

SIZE = 16
HOW = Preprocess((SIZE, SIZE), mean=(127.0, 100.0, 90.0), std=(64.0, 60.0, 50.0), input="x")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save_model(convolutions(), str(tmp_path / "model.onnx"))
    return tmp_path / "model.onnx"


def write(model: Path, how: Preprocess | None, codec: str = "jpeg95", **options: Any) -> Path:
    told = msgspec.to_builtins(how) if how is not None else None
    nodes = options.pop("nodes", [])
    shapes = {"x": [1, 3, SIZE, SIZE]}
    write_graph(
        str(model), "", nodes, str(model.parent / "cut"), shapes=shapes, codec=codec, preprocess=told, **options
    )
    return model.parent / "cut"


def noise(seed: int = 0) -> Any:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return small.repeat(SIZE // 4, axis=0).repeat(SIZE // 4, axis=1)


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_the_cloud_makes_the_input_of_the_picture(model: Path, channels: Any) -> None:
    how = msgspec.structs.replace(HOW, channels=channels)
    folder = write(model, how, "webp-lossless")
    manifest = GraphBundle.open(folder).manifest
    assert sorted(manifest.files) == [CLOUD] and manifest.inputs[0].shape == (1, SIZE, SIZE, 3)
    whole = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    wire = LossyWire(GraphService(load_graph(folder, threads=1)))  # type: ignore[arg-type]
    left = manifest.preprocess
    assert left is not None and left.input == manifest.inputs[0].name
    with GraphDevice(folder, wire=wire, threads=1, clock=wire.clock, mode="split") as device:
        for seed in range(3):
            found = device.infer(left.array(noise(seed)))["y"]
            assert np.allclose(found, whole.run(None, {"x": how.array(noise(seed))})[0], atol=1e-5)
            assert device.stats.where == "cloud"
        lossless = device.stats.bytes_up
    wire = LossyWire(GraphService(load_graph(folder, threads=1)))  # type: ignore[arg-type]
    with GraphDevice(folder, wire=wire, threads=1, clock=wire.clock, mode="split", codec="jpeg20") as device:
        device.infer(left.array(noise()))
        assert device.stats.bytes_up != lossless


@pytest.mark.parametrize(
    ("how", "options", "problem"),
    [
        (None, {}, "sends JPEG 95, and not to a cloud"),
        (HOW, {"nodes": [0, 1, 2]}, "sends JPEG 95, and not to a cloud"),
        (msgspec.structs.replace(HOW, input="z"), {}, "no input 'z'"),
    ],
)
def test_what_cannot_be_given_a_picture_is_refused(
    model: Path, how: Preprocess | None, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(PlanError, match=problem):
        write(model, how, **options)
    assert not (model.parent / "cut").exists()


def test_pixels_as_they_are(tmp_path: Path) -> None:
    helper = onnx.helper
    ends = [
        helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [1, 4, 4, 3]),
        helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4, 4, 3]),
    ]
    graph = helper.make_graph([helper.make_node("Cast", ["x"], ["y"], to=1)], "cast", ends[:1], ends[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(made, str(tmp_path / "model.onnx"))
    how = Preprocess((4, 4), layout="NHWC", dtype="uint8", input="x")
    told = msgspec.to_builtins(how)
    write_graph(str(tmp_path / "model.onnx"), "", [], str(tmp_path / "cut"), codec="jpeg95", preprocess=told)
    with GraphDevice(tmp_path / "cut", threads=1) as device:
        found = device.infer(how.array(noise()[:4, :4]))["y"]
        assert np.array_equal(found[0], noise()[:4, :4].astype(np.float32))
