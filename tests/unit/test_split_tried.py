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
from isthmus.protocol.errors import BundleError, EngineError, PlanError
from isthmus.split import tried
from isthmus.split.graph_bundle import GraphBundle
from isthmus.split.graph_manifest import CLOUD, DEVICE, graph_id
from isthmus.split.manifest import FileEntry
from isthmus.split.tried import known, remember, weights_of
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

    def confined(*arguments: Any, **_: Any) -> list[str]:
        calls.append(arguments)
        return []

    monkeypatch.setattr(tried, "confined", confined)
    for _ in range(2):
        with GraphDevice(bundle, mode="local") as device:
            device.infer(np.zeros((1, 3, 8, 8), np.float32))
    assert sorted(Path(path).name for _, path in calls) == sorted(Path(part).name for part in (DEVICE, CLOUD))


def test_a_part_is_run_in_the_child(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tried, "folder", lambda: tmp_path / "notes")
    found = GraphBundle.open(bundle)
    found.part(DEVICE)
    files = found.manifest.files
    assert known(tried.key(DEVICE, files)) and not known(tried.key(CLOUD, files))


def test_what_takes_too_much_does_not_harm_who_opens_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strange(bundle, DEVICE, greedy())
    with pytest.raises(PlanError, match=r"cannot be run on that.*Alloc|takes more than"):
        GraphBundle.open(bundle).part(DEVICE)
    assert not known(tried.key(DEVICE, GraphBundle.open(bundle).manifest.files))


def heavy(value: int) -> onnx.ModelProto:
    """y = x + w, whose w lies in a file beside the model."""
    name = helper.make_tensor_value_info
    weight = numpy_helper.from_array(np.full(4096, value, np.float32), "w")
    ends = [name("x", TensorProto.FLOAT, [4096])], [name("y", TensorProto.FLOAT, [4096])]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "heavy", *ends, [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_the_same_model_with_other_weights_is_another(tmp_path: Path) -> None:
    keys = set()
    for value in (1, 2):
        entry = FileEntry(9, "ab" * 32)
        files = {
            "device/model.onnx": entry,
            "device/model.data": FileEntry(9, f"{value}" * 64),
            "cloud/model.onnx": entry,
        }
        keys.add(tried.key("device/model.onnx", files))
        assert tried.key("cloud/model.onnx", files) not in keys
    assert len(keys) == 2


def test_weights_that_the_bundle_does_not_list_are_refused(bundle: Path) -> None:
    beside = bundle / DEVICE.replace("model.onnx", "other.onnx")
    onnx.save_model(heavy(1), str(beside), save_as_external_data=True, location="w.bin", size_threshold=1024)
    strange(bundle, DEVICE, onnx.load(str(beside), load_external_data=False))
    with pytest.raises(BundleError, match=r"has weights in 'w\.bin', which bundle\.json does not list"):
        GraphBundle.open(bundle).part(DEVICE)


def test_nothing_strange_is_parsed_in_this_process(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strange(bundle, DEVICE, heavy(1))

    def parsed(*_: object) -> None:
        raise AssertionError("it was")

    monkeypatch.setattr("isthmus.split.onnx_file.read_model", parsed)
    GraphBundle.open(bundle).part(DEVICE)


def test_a_device_that_cannot_run_the_rest_asks_the_cloud_all_the_same(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    strange(bundle, CLOUD, greedy())
    with GraphDevice(bundle, "127.0.0.1:9", encrypted=False) as device:
        assert "cannot go on without the cloud" in caplog.text and not device._able
    with pytest.raises(PlanError, match="cannot be run on that"):
        GraphDevice(bundle, mode="local")
    with pytest.raises(PlanError, match="cannot be run on that"):
        GraphDevice(bundle)


def test_an_inference_without_end_is_given_up(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.edge.graph.RUN_S", 0.5)
    monkeypatch.setattr(tried, "confined", lambda *_, **__: [])
    strange(bundle, DEVICE, endless())
    with GraphDevice(bundle, mode="local") as device, pytest.raises(EngineError, match=r"given up after 0\.5 s"):
        device._stages[0][0].run({"x": np.zeros(4, np.float32)})  # type: ignore[union-attr]


def test_a_run_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save_model(endless(), str(tmp_path / "endless.onnx"))
    monkeypatch.setattr(tried, "SECONDS", 2)
    with pytest.raises(PlanError, match=r"given up after 0\.5 s"):
        tried.opened(str(tmp_path / "endless.onnx"))


def test_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(PlanError, match="no ONNX file"):
        weights_of(tmp_path / "a.onnx")


def test_where_nothing_can_be_noted_it_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tried, "folder", lambda: tmp_path / "file" / "notes")
    remember("ab" * 32)
    assert not known("ab" * 32)
