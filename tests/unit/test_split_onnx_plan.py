"""Plans of whole files: what the rows say, which is best, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from isthmus.protocol.errors import PlanError
from isthmus.protocol.features import FEATURE_CODECS
from isthmus.split import agreement, finalists, onnx_measure, onnx_plan
from isthmus.split.onnx_file import read_model
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_network import SERVICE_MS
from isthmus.split.plan import Plan, Row
from isthmus.split.profile import Profile, load_profile
from tests.unit.test_split_onnx_measure import BLOCKS, convolutions

NODES = 3 * BLOCKS + 3
FAST = "rtt=0,rate=1000000"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "model.onnx"
    onnx.save_model(convolutions(), str(path))
    told = onnx_measure.measure(str(path), 1, {"x": [1, 3, 32, 32]}, 0.02)
    even = {"nodes_ms": [1.0] * NODES, "whole_ms": float(NODES)}  # what a plan says must not depend on the weather
    Profile.of({**told, **even}, "toy", "toy").save(path.with_suffix(".json"))
    return path


def planned(model: Path, link: str, **asked: Any) -> Plan:
    told = onnx_plan.plan(str(model), str(model.with_suffix(".json")), "", link, {"measure": False, **asked})
    return msgspec.convert(msgspec.json.decode(msgspec.json.encode(told)), Plan)


def test_a_slow_link_keeps_it_on_the_device_and_a_fast_one_sends_the_input(model: Path) -> None:
    slow = planned(model, "rtt=20,rate=0.001", times=1000.0)
    assert slow.rows[slow.best].kind == "device" and slow.verdict.startswith("Do not share it")
    assert slow.rows[slow.best].ms == pytest.approx(NODES)
    fast = planned(model, FAST, times=1000.0)
    assert fast.rows[fast.best].kind == "cloud" and fast.rows[fast.best].crossing == ("x",)
    assert fast.rows[fast.best].ms == pytest.approx(NODES / 1000 + SERVICE_MS, abs=0.01)


def test_a_tensor_that_shrank_is_where_to_cut(model: Path) -> None:
    # The mean over all places is the smallest tensor; a device as fast as the cloud gains nothing, so it is slower.
    found = planned(model, "rtt=0,up=0.01,down=1000", times=1.0, memory_mb=1.0)
    splits = [row for row in found.rows if row.kind == "split"]
    assert splits[0].crossing == ("mean",) and splits[0].up_bytes == pytest.approx(120 + 4 * 16)
    assert all(row.ms == pytest.approx(row.device_ms + row.link_ms + row.cloud_ms) for row in found.rows)


def test_what_an_input_may_take_is_held_against_the_percentile(model: Path) -> None:
    found = planned(model, "rtt=5,trace=synthetic", times=100.0, slo_ms=1000.0, percentile=99.0)
    assert all(row.tail_ms is not None and row.tail_ms >= row.ms * 0.99 for row in found.rows)
    cloud = next(row for row in found.rows if row.kind == "cloud")
    assert cloud.tail_ms is not None
    strict = planned(model, "rtt=5,trace=synthetic", times=100.0, slo_ms=cloud.tail_ms - 0.1, percentile=99.0)
    late = next(row for row in strict.rows if row.kind == "cloud")
    assert late.fails.endswith(f"{cloud.tail_ms - 0.1:.4g} wanted") and "99th percentile" in late.fails
    with pytest.raises(PlanError, match=r"no way keeps to what was asked for: .* ms, 0.001 wanted"):
        planned(model, FAST, slo_ms=0.001)


def test_a_busy_cloud_makes_it_wait(model: Path) -> None:
    idle = next(row for row in planned(model, FAST, times=2.0).rows if row.kind == "cloud")
    busy = next(row for row in planned(model, FAST, times=2.0, load=0.9).rows if row.kind == "cloud")
    assert idle.tail_ms is None and busy.tail_ms is not None
    assert busy.ms > 2 * idle.ms and busy.tail_ms > 2 * busy.ms


def test_a_pipeline_is_chosen_by_its_slowest_stage(model: Path) -> None:
    found = planned(model, FAST, times=1.0, aim="throughput")
    best = found.rows[found.best]
    assert best.kind == "split" and max(best.device_ms, best.cloud_ms) < 0.7 * NODES
    assert "an input" in found.verdict


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"memory_mb": -1.0}, "MB -1 cannot be met: 0 is the least, 1 more"),
        ({"energy_j": 1.0}, "and no watts"),
        ({"memory_mb": float("nan")}, "memory_mb is nan"),
        ({"percentile": 100.0}, "the percentile is 100"),
        ({"load": 0.5, "aim": "throughput"}, "its cloud for itself"),
        ({"load": 1.0}, "of the cloud's time"),
        ({"times": 0.0}, "0 times as fast"),
    ],
)
def test_what_cannot_be_is_refused(model: Path, asked: dict[str, Any], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        planned(model, FAST, **asked)


def test_a_profile_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    changed = convolutions()
    changed.graph.node[0].attribute[0].ints[0] = 2
    onnx.save_model(changed, str(other))
    with pytest.raises(PlanError, match="another version of this model"):
        onnx_plan.plan(str(other), str(model.with_suffix(".json")), "", FAST, {})


def test_finalists_are_timed_as_parts_and_scaled_to_the_profiled_machine(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = load_profile(model.with_suffix(".json"))
    slower = msgspec.structs.replace(
        profile, whole_ms=1000.0 * profile.whole_ms, nodes_ms=tuple(1000.0 * ms for ms in profile.nodes_ms)
    )
    graph = OnnxGraph(read_model(model))
    feeds = onnx_measure.given(graph, {"x": [1, 3, 32, 32]}, "")
    parts: list[int] = []  # that were run

    def in_turns(runs: Any, _: float) -> list[tuple[float, float]]:
        parts.append(len([run() for run in runs]))
        return [(10.0**at, 0.0) for at in range(len(runs))]

    monkeypatch.setattr(finalists, "timed_in_turns", in_turns)
    monkeypatch.setattr(finalists, "timed", lambda run, _: (2.0, 0.0))  # the whole model, here
    stand = finalists.Finalists(graph, model, slower, profile, feeds)

    def timed(end: int, **changed: Any) -> Any:
        row = Row("", "split", "as it is", tuple(range(end)), (), 1.0, 1.0, 1.0, 1.0, 1.0, 3.0)
        return stand.timed(msgspec.structs.replace(row, **changed))

    with pytest.raises(PlanError, match="nothing to cut"):
        timed(NODES)  # no split
    assert not parts
    for one in (timed(3), timed(NODES - 1), timed(3, codec="int4"), timed(0, kind="cloud")):
        assert one.stages_ms == pytest.approx((1.0 * slower.whole_ms / 2.0,))
        assert one.cloud_ms == pytest.approx(10.0 * profile.whole_ms / 2.0)
    assert parts == [2] * 4
    assert timed(0, kind="image", codec="jpeg90") is None  # nothing is known of pictures


@pytest.mark.parametrize(
    ("known", "sittings", "taken"),
    [
        (1.0, [1.1, 1.0, 9.0], 2),
        (1.0, [4.0, 4.1, 1.0, 1.05, 9.0], 4),  # somebody else on the machine, for a while
        (0.1, [4.0, 4.1, 4.05, 9.0], 3),  # a faster one was profiled
        (1.0, [8.0, 4.0, 2.0, 1.6, 1.3, 1.0, 9.0], 6),  # until there were enough
    ],
)
def test_all_rows_hang_on_an_undisturbed_time(
    model: Path, monkeypatch: pytest.MonkeyPatch, known: float, sittings: list[float], taken: int
) -> None:
    profile = load_profile(model.with_suffix(".json"))
    profile = msgspec.structs.replace(profile, whole_ms=known)
    graph, left = OnnxGraph(read_model(model)), list(sittings)
    monkeypatch.setattr(finalists, "timed", lambda run, _: (left.pop(0), 0.0))
    stand = finalists.Finalists(graph, model, profile, profile, onnx_measure.given(graph, {"x": [1, 3, 32, 32]}, ""))
    assert stand.faster[0] == pytest.approx(known / min(sittings[:taken])) and len(left) == len(sittings) - taken


def test_measured_rows_stand_in_the_plan(model: Path) -> None:
    given, measured = planned(model, FAST, times=1.0), planned(model, FAST, times=1.0, measure=True)
    assert [row.device for row in given.rows] == [row.device for row in measured.rows]
    pairs = [(a, b) for a, b in zip(given.rows, measured.rows, strict=True) if a.kind == "split"]
    for a, b in pairs:
        assert a.device_ms != b.device_ms and b.ms == pytest.approx(b.device_ms + b.link_ms + b.cloud_ms)


def test_profiles_of_other_inputs_do_not_go_together(model: Path, tmp_path: Path) -> None:
    told = onnx_measure.measure(str(model), 1, {"x": [1, 3, 16, 16]}, 0.02)
    Profile.of(told, "toy", "toy").save(tmp_path / "cloud.json")
    with pytest.raises(PlanError, match="'x' was \\[1, 3, 32, 32\\] on the device"):
        onnx_plan.plan(str(model), str(model.with_suffix(".json")), str(tmp_path / "cloud.json"), FAST, {})


def test_what_is_no_tensor_is_planned_around(tmp_path: Path) -> None:
    """A sequence between nodes, and one that the model gives."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("SequenceConstruct", ["a", "x"], ["s"]),
        helper.make_node("SequenceLength", ["s"], ["n"]),
        helper.make_node("Exp", ["a"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64]) for name in "xy"]
    ends.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [64]))
    ends.append(helper.make_tensor_value_info("n", TensorProto.INT64, []))
    graph = helper.make_graph(nodes, "sequences", ends[:1], ends[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "model.onnx"
    onnx.save_model(made, str(path))
    Profile.of(onnx_measure.measure(str(path), 1, {}, 0.02), "toy", "toy").save(path.with_suffix(".json"))
    found = planned(path, FAST, times=1000.0)
    assert [row.kind for row in found.rows] == ["device", "split"]  # the cloud cannot send a sequence back
    assert all(1 in row.device for row in found.rows) and "s" not in found.rows[1].crossing
    assert found.rows[1].fails == "output s is no array of numbers" and not found.rows[0].fails


@pytest.fixture(scope="module")
def pictures(model: Path) -> dict[str, str]:
    """Pictures to try codecs on, and what is done with them: fields of `Asked`."""
    folder = model.parent / "pictures"
    folder.mkdir()
    chance = np.random.default_rng(0)
    for at in range(4):
        small = chance.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC).save(folder / f"{at}.png")
    how = model.parent / "how.json"
    how.write_text('{"size": [32, 32], "mean": [127, 127, 127], "std": [64, 64, 64]}')
    return {"folder": str(folder), "preprocess": str(how)}


def test_codecs_and_pictures_are_rows_with_their_agreement(model: Path, pictures: dict[str, str]) -> None:
    found = planned(model, "rtt=0,up=1,down=1000", times=1.0, agreement=1.0, **pictures)
    coded = [row for row in found.rows if row.kind == "split" and row.agreement is not None]
    images = [row for row in found.rows if row.kind == "image"]
    whole = next(row for row in found.rows if row.kind == "cloud")
    assert coded and [row.codec[:4] for row in images] == ["jpeg", "webp"]
    for row in coded:
        assert row.codec in FEATURE_CODECS and row.agreement == 1.0
        plain = [one for one in found.rows if one.device == row.device and one.codec == "as it is"]
        assert all(row.up_bytes < one.up_bytes for one in plain)
        assert row.ms == pytest.approx(row.device_ms + row.link_ms + row.cloud_ms)
        assert row.link_ms == pytest.approx(8e-3 * row.up_bytes + row.down_ms + SERVICE_MS, rel=0.02)
    for row in images:
        assert row.up_bytes < whole.up_bytes and row.device_ms > 0 and row.cloud_ms > whole.cloud_ms
        assert not row.device and row.crossing == whole.crossing
    assert len({row.name for row in found.rows}) == len(found.rows)


def test_a_codec_makes_another_cut_worth_it(model: Path, pictures: dict[str, str]) -> None:
    """All blocks hold the same number of values: as they are, none travels faster than the input."""
    link = "rtt=0,up=3,down=1000"
    wish = {"times": 20.0, "memory_mb": 0.02, **pictures}  # the last block does not fit
    plain, coded = planned(model, link, times=20.0, memory_mb=0.02), planned(model, link, agreement=0.0, **wish)
    best = {row.kind: row.ms for row in plain.rows if not row.fails}
    row = min((row for row in coded.rows if row.codec in FEATURE_CODECS[1:]), key=lambda row: row.ms)
    assert row.ms < best.get("split", float("inf"))


def test_a_picture_that_changes_answers_fails(
    model: Path, pictures: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "NEAR", 1e-9)
    found = planned(model, FAST, agree="values", agreement=1.0, **pictures)
    image = next(row for row in found.rows if row.kind == "image")
    assert image.agreement is not None and image.agreement < 1.0
    assert image.fails.endswith("of answers stay, 100.0% wanted") and found.rows[found.best] != image


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"agreement": 1.5}, "an agreement of 1.5"),
        ({"agree": "vibes"}, "agree by 'vibes'"),
        ({"preprocess": "how.json"}, "no pictures"),
        ({"folder": "/none"}, "there is no folder"),
    ],
)
def test_trials_that_cannot_be(model: Path, asked: dict[str, Any], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        planned(model, FAST, **asked)
