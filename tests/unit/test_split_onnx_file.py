"""ONNX files of strangers: what is read, and what is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.protocol.errors import PlanError
from isthmus.split.onnx_file import digest, external, read_model, tensors_of
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_writer import ALIGN, write_part

LAYERS, WIDTH = 3, 8


def values(layer: int) -> np.ndarray:
    return np.random.default_rng(layer).standard_normal((WIDTH, WIDTH)).astype(np.float32)


def chain_model() -> onnx.ModelProto:
    """LAYERS matrices, one after the other."""
    names = ["x", *(f"y{i}" for i in range(LAYERS))]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(LAYERS)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in (names[0], names[-1])]
    weights = [numpy_helper.from_array(values(i), f"w{i}") for i in range(LAYERS)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def saved(folder: Path, beside: bool = True) -> Path:
    path = folder / "model.onnx"
    options: dict[str, Any] = (
        {"save_as_external_data": True, "location": "model.bin", "size_threshold": 0} if beside else {}
    )
    onnx.save_model(chain_model(), str(path), **options)
    return path


def placed(folder: Path, **told: str) -> Path:
    """A model whose first weight lies as told."""
    path = saved(folder)
    model = onnx.load(str(path), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key in told:
            entry.value = told[entry.key]
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("beside", [False, True])
def test_a_model_is_read_without_the_weights_beside_it(tmp_path: Path, beside: bool) -> None:
    model = read_model(saved(tmp_path, beside))
    outside = [one for one in tensors_of(model) if one.data_location == TensorProto.EXTERNAL]
    assert len(outside) == (LAYERS if beside else 0)
    for layer, tensor in enumerate(outside):
        place = external(tensor, tmp_path)
        data = place.file.read_bytes()[place.offset : place.offset + place.length]
        assert data == values(layer).tobytes()


def test_the_name_of_a_model_changes_with_its_weights(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = digest(path, read_model(path))
    assert before == digest(path, read_model(path))
    weights = bytearray((tmp_path / "model.bin").read_bytes())
    weights[5] ^= 1
    (tmp_path / "model.bin").write_bytes(weights)
    assert digest(path, read_model(path)) != before


@pytest.mark.parametrize(
    ("data", "problem"),
    [(b"", "without any node"), (b"\x08", "damaged"), (b"GGUF" * 9, "no ONNX file"), (b"{}" * 50, "no ONNX file")],
)
def test_what_is_no_model_is_refused(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(PlanError, match=problem):
        read_model(path)


@pytest.mark.parametrize("at", ["/etc/passwd", "../model.bin", "a/../../model.bin", "C:\\model.bin", "a\\b", "", "."])
def test_weights_are_looked_for_beside_the_model_only(tmp_path: Path, at: str) -> None:
    with pytest.raises(PlanError, match=r"weight 'w0' lies in .*(beside the model|no file)"):
        read_model(placed(tmp_path, location=at))


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ({"offset": "-1"}, "from -1 on"),
        ({"offset": "x"}, "no number"),
        ({"length": "7"}, "has 7 bytes"),
        ({"offset": "999999"}, "ends after"),
        ({"location": "other.bin"}, "not there"),
    ],
)
def test_weights_that_lie_nowhere_are_refused(tmp_path: Path, told: dict[str, str], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        read_model(placed(tmp_path, **told))


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with (tmp_path / "model.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(PlanError, match="truncated"):
        read_model(path)


def test_a_link_in_the_place_of_weights_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (tmp_path / "model.bin").rename(tmp_path / "elsewhere")
    (tmp_path / "model.bin").symlink_to("elsewhere")
    with pytest.raises(PlanError, match="which is a link"):
        read_model(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(OSError, match="not a regular file"):
        read_model(tmp_path / "model.onnx")


def test_each_part_has_the_weights_that_it_uses_beside_it(tmp_path: Path) -> None:
    path = saved(tmp_path)
    graph, parts = OnnxGraph(read_model(path)), tmp_path / "parts"
    parts.mkdir()
    device = write_part(graph.part([0, 1], ["x"], ["y1"]), path, parts / "device.onnx")
    cloud = write_part(graph.part([2], ["y1"], ["y2"]), path, parts / "cloud.onnx")
    assert [file.name for file in (*device, *cloud)] == sorted(
        ["device.onnx", "device.weights", "cloud.onnx", "cloud.weights"], key=lambda name: (name[0] == "c", name)
    )
    assert (parts / "device.weights").stat().st_size == ALIGN + WIDTH * WIDTH * 4
    path.unlink()
    for name, held in (("device", [0, 1]), ("cloud", [2])):
        loaded = onnx.load(str(parts / f"{name}.onnx"))
        for layer, tensor in zip(held, loaded.graph.initializer, strict=True):
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), values(layer))
