"""Networks with exits: cut, written in pieces, and left where an exit is sure."""

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
from isthmus.engine.certainty import certainty
from isthmus.protocol.errors import BundleError, PlanError
from isthmus.protocol.features import UNIT
from isthmus.split import onnx_measure
from isthmus.split.finalists import Finalists
from isthmus.split.graph_bundle import GraphBundle
from isthmus.split.graph_exits import choices
from isthmus.split.graph_manifest import DEVICE, STAGE, GraphExit, GraphManifest
from isthmus.split.graph_writer import write_graph
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.plan import Leaves, Row
from isthmus.split.profile import Profile
from isthmus.split.transform import Components
from isthmus.split.trials import Trials
from tests.branchy import EARLY, FINAL, WIDTH, inputs, saved
from tests.edge_world import LossyWire
from tests.graph_world import GraphService

SURE = 0.8
THROUGH_EXIT, BEYOND = [0, 1, 2], [0, 1, 2, 3, 4]


def cut(model: Path, nodes: list[int], *exits: GraphExit, **options: Any) -> Path:
    output = model.parent / f"cut-{len(list(model.parent.iterdir()))}"
    told = [msgspec.to_builtins(one) for one in exits or [GraphExit(EARLY, SURE)]]
    write_graph(str(model), "", nodes, str(output), exits=told, **options)
    return output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("exits"))


@pytest.fixture(scope="module")
def answers(model: Path) -> list[Any]:
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return [dict(zip([EARLY, FINAL], session.run(None, feeds), strict=True)) for feeds in inputs()]


@pytest.mark.parametrize(("nodes", "files"), [(THROUGH_EXIT, [DEVICE]), (BEYOND, [DEVICE, STAGE.format(2)])])
def test_sure_inputs_ask_nobody_and_others_get_the_whole_answer(
    model: Path, answers: list[Any], nodes: list[int], files: list[str]
) -> None:
    folder = cut(model, nodes)
    assert [file for file, _ in GraphBundle.open(folder).manifest.stages if file] == files
    wire, left = LossyWire(GraphService(load_graph(folder, threads=1))), 0  # type: ignore[arg-type]
    with GraphDevice(folder, wire=wire, threads=1, clock=wire.clock, mode="split") as device:
        for feeds, whole in zip(inputs(), answers, strict=True):
            found, sure = device.infer(feeds), certainty(whole[EARLY], False) >= SURE
            assert np.allclose(found[EARLY], whole[EARLY], atol=1e-6)
            if sure:
                assert list(found) == [EARLY] and device.stats.exit == EARLY
                assert device.stats.bytes_up == 0 and device.stats.where == "device" and device.stats.rest_ms == 0
            else:
                assert np.allclose(found[FINAL], whole[FINAL], atol=1e-6) and device.stats.exit == ""
                assert device.stats.where == "cloud" and device.stats.bytes_up > 0
            left += sure
    assert 3 < left < len(answers) - 3
    with GraphDevice(folder, threads=1, exits=False) as device:
        for feeds, whole in zip(inputs(), answers, strict=True):
            assert np.allclose(device.infer(feeds)[FINAL], whole[FINAL], atol=1e-6)


def test_two_exits_one_after_the_other(tmp_path: Path) -> None:
    model = saved(tmp_path, middle=True)
    folder = cut(model, [0, 1, 2, 3, 4, 7, 8], GraphExit(EARLY, 0.95), GraphExit("middle", 0.6, probabilities=True))
    with GraphDevice(folder, threads=1) as device:
        left = [(device.infer(feeds), device.stats.exit)[1] for feeds in inputs()]
        assert set(left) == {EARLY, "middle", ""}
        assert {name for feeds in inputs() for name in device.infer(feeds)} == {EARLY, "middle", FINAL}


def test_components_travel_only_for_who_goes_on(model: Path, answers: list[Any]) -> None:
    given = [feeds["x"] for feeds in inputs()]
    session = ort.InferenceSession(GraphBundle.open(cut(model, THROUGH_EXIT)).path / DEVICE)
    seam = [dict(zip(["h1", EARLY], session.run(["h1", EARLY], {"x": x}), strict=True))["h1"] for x in given]
    transform = Components("h1", 2, seam, 1, 4).coded(1e-3)
    folder = cut(model, THROUGH_EXIT, codec=UNIT, transforms=[msgspec.to_builtins(transform)])
    manifest = GraphBundle.open(folder).manifest
    assert [bool(file) for file, _ in manifest.stages] == [True, True]  # the transform is behind the exit
    with GraphDevice(folder, threads=1, exits=False) as device:
        for feeds, whole in zip(inputs(), answers, strict=True):
            assert np.allclose(device.infer(feeds)[FINAL], whole[FINAL], atol=2e-2)


def test_trials_count_the_answers_of_who_leaves(model: Path) -> None:
    graph = OnnxGraph(onnx.load(str(model)))
    trials = Trials(graph, model, inputs(), 0.0)
    (leaving,) = choices(graph, {EARLY: SURE}, trials.answers, "top1")
    plain, early = trials.smallest(tuple(THROUGH_EXIT)), trials.smallest(tuple(THROUGH_EXIT), leaving)
    assert 0.0 < early.agreement <= 1.0 - leaving.lost() / len(inputs()) + 1e-9
    assert early.plain_bytes == plain.plain_bytes == 4 * WIDTH
    strict = Trials(graph, model, inputs(), 1.0).smallest(tuple(THROUGH_EXIT), leaving)
    assert (strict.agreement == 1.0) == (not leaving.lost())
    (all_,) = choices(graph, {EARLY: 1e-6}, trials.answers, "top1")
    with pytest.raises(PlanError, match="every input leaves"):
        trials.smallest(tuple(THROUGH_EXIT), all_)


def test_all_on_the_device_is_timed_in_pieces(model: Path) -> None:
    told = onnx_measure.measure(str(model), 1, {}, 0.02)
    profile = Profile.of(told, "toy", "toy")
    finalists = Finalists(OnnxGraph(onnx.load(str(model))), model, profile, profile, inputs()[0], seconds=0.02)
    leaves = (Leaves(GraphExit(EARLY, 0.9), 0.5, 1.0),)
    base = Row("", "device", "", tuple(range(7)), (), 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, leaves=leaves)
    whole = finalists.timed(base)
    split = finalists.timed(msgspec.structs.replace(base, kind="split", device=tuple(BEYOND), crossing=("h3",)))
    assert whole is not None and split is not None and len(whole.stages_ms) == len(split.stages_ms) == 2
    assert whole.cloud_ms == 0.0 and min(*whole.stages_ms, *split.stages_ms, split.cloud_ms) > 0.0
    assert finalists.timed(msgspec.structs.replace(base, leaves=())) is None


def test_a_piece_without_its_exit_is_refused(model: Path, tmp_path: Path) -> None:
    folder = cut(model, BEYOND)
    told = msgspec.json.decode((folder / "bundle.json").read_bytes())
    with pytest.raises(BundleError, match="and no exit before it"):
        GraphManifest.parse(msgspec.json.encode({**told, "exits": []}))
    two = cut(
        saved(tmp_path, middle=True), [0, 1, 2, 3, 4, 7, 8], GraphExit(EARLY, 0.9), GraphExit("middle", 0.9, True)
    )
    told = msgspec.json.decode((two / "bundle.json").read_bytes())
    (two / "bundle.json").write_bytes(msgspec.json.encode({**told, "exits": told["exits"][::-1]}))
    with pytest.raises(BundleError, match="does not make 'middle' before it ends there"):
        GraphDevice(two)


@pytest.mark.parametrize(
    ("exits", "problem"),
    [
        ([{"output": FINAL, "confidence": 0.9}], "an exit at 'final'"),
        ([{"output": EARLY, "confidence": 0.0}], "sure from 0 on"),
        ([{"output": EARLY, "confidence": 1.01}], "sure from 1.01 on"),
        ([{"output": EARLY, "confidence": 0.9}] * 2, "two at one output"),
        ([{"output": EARLY}], "cannot be read"),
    ],
)
def test_an_exit_that_cannot_be_is_refused(model: Path, exits: list[Any], problem: str) -> None:
    told = msgspec.json.decode((cut(model, THROUGH_EXIT) / "bundle.json").read_bytes())
    with pytest.raises(BundleError, match=problem):
        GraphManifest.parse(msgspec.json.encode({**told, "exits": exits}))
