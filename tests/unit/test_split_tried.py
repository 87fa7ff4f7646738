"""Parts that come from elsewhere are opened in a child process first, and once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.edge.graph import GraphDevice
from isthmus.protocol.errors import PlanError
from isthmus.split import tried
from isthmus.split.graph_bundle import GraphBundle
from isthmus.split.graph_manifest import CLOUD, DEVICE, graph_id
from isthmus.split.tried import known, remember, try_part
from tests.graph_world import cut_network


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return cut_network(tmp_path)


def strange(bundle: Path, part: str, model: onnx.ModelProto) -> None:
    """Puts another model in a part's place, as whoever made the bundle could."""
    path, told = bundle / part, GraphBundle.open(bundle).manifest
    onnx.save_model(model, str(path))
    size, sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    files = {**told.files, part: msgspec.structs.replace(told.files[part], bytes=size, sha256=sha256)}
    identity = graph_id(files, (told.inputs, told.outputs, told.crossing))
    (bundle / "bundle.json").write_bytes(msgspec.structs.replace(told, files=files, model_id=identity).encode())


def endless() -> onnx.ModelProto:
    """x turned about for ever: its runs have no end that anybody waits for."""
    name, value = helper.make_tensor_value_info, numpy_helper.from_array
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["more"]), helper.make_node("Neg", ["a"], ["b"])],
        "body",
        [name("at", TensorProto.INT64, []), name("go", TensorProto.BOOL, []), name("a", TensorProto.FLOAT, [4])],
        [name("more", TensorProto.BOOL, []), name("b", TensorProto.FLOAT, [4])],
    )
    turns = [value(np.array(1 << 60, np.int64), "turns"), value(np.array(True), "go_on")]
    node = helper.make_node("Loop", ["turns", "go_on", "x"], ["y"], body=body)
    ends = [name("x", TensorProto.FLOAT, [4])], [name("y", TensorProto.FLOAT, [4])]
    graph = helper.make_graph([node], "endless", *ends, turns)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def greedy() -> onnx.ModelProto:
    """A model that takes 64 GiB when it is opened, as what is constant is computed then."""
    name = helper.make_tensor_value_info
    shape = numpy_helper.from_array(np.array([1 << 34], np.int64), "shape")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["much"]),
        helper.make_node("ReduceSum", ["much"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    ends = [name("x", TensorProto.FLOAT, [4])], [name("y", TensorProto.FLOAT, [4])]
    graph = helper.make_graph(nodes, "greedy", *ends, [shape])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_what_was_cut_here_is_opened_at_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tried, "confined", None)
    with GraphDevice(bundle, mode="local") as device:
        device.infer(np.zeros((1, 3, 8, 8), np.float32))


def test_what_came_from_elsewhere_is_tried_once(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(tried, "folder", lambda: tmp_path / "notes")
    monkeypatch.setattr(tried, "confined", lambda *arguments, **_: calls.append(arguments))
    for _ in range(2):
        with GraphDevice(bundle, mode="local") as device:
            device.infer(np.zeros((1, 3, 8, 8), np.float32))
    assert sorted(Path(path).name for _, path in calls) == sorted(Path(part).name for part in (DEVICE, CLOUD))


def test_a_part_is_run_in_the_child(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tried, "folder", lambda: tmp_path / "notes")
    found = GraphBundle.open(bundle)
    found.part(DEVICE)
    assert known(found.manifest.files[DEVICE].sha256) and not known(found.manifest.files[CLOUD].sha256)


def test_what_takes_too_much_does_not_harm_who_opens_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strange(bundle, DEVICE, greedy())
    with pytest.raises(PlanError, match=r"cannot be run on that.*Alloc|takes more than"):
        GraphBundle.open(bundle).part(DEVICE)
    sha256 = GraphBundle.open(bundle).manifest.files[DEVICE].sha256
    assert not known(sha256)


def test_a_run_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save_model(endless(), str(tmp_path / "endless.onnx"))
    monkeypatch.setattr(tried, "SECONDS", 2)
    tried.opened(str(tmp_path / "endless.onnx"))  # half a second of it; whoever runs it has limits of their own


def test_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(PlanError, match="no ONNX file"):
        try_part(tmp_path / "a.onnx", "ab" * 32)
    assert not known("ab" * 32)


def test_where_nothing_can_be_noted_it_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tried, "folder", lambda: tmp_path / "file" / "notes")
    remember("ab" * 32)
    assert not known("ab" * 32)
