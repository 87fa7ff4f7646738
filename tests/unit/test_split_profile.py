"""Profiles of machines and plans: what is kept in files, and the network that is made of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.protocol.errors import PlanError
from isthmus.protocol.features import UNIT
from isthmus.split.budget import best
from isthmus.split.cut import Shared, Use, fastest, priced
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_network import ENERGY, MEMORY, Codec, Rate, Sharing
from isthmus.split.plan import Plan, Row, choose, load_plan, verdict
from isthmus.split.profile import Profile, TensorSize, load_profile
from isthmus.split.transform import Components

MODEL = "ab" * 32


def diamond() -> OnnxGraph:
    """x -> a -> (b, c) -> d, and d is what the model gives."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Exp", ["a"], ["b"]),
        helper.make_node("Neg", ["a"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["d"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xd"]
    graph = helper.make_graph(nodes, "diamond", ends[:1], ends[1:])
    return OnnxGraph(helper.make_model(graph))


def profile(nodes_ms: tuple[float, ...] = (4.0, 3.0, 2.0, 1.0), **changed: Any) -> Profile:
    sizes = {"a": 500, "b": 2000, "c": 100, "d": 40}
    told: dict[str, Any] = {
        "model": MODEL,
        "name": "diamond",
        "runtime": "none",
        "machine": "toy",
        "processor": "toy",
        "threads": 1,
        "whole_ms": sum(nodes_ms),
        "first_ms": sum(nodes_ms),
        "nodes_ms": nodes_ms,
        "ops": ("Relu", "Exp", "Neg", "Add"),
        "weights": (10_000_000, 0, 0, 5_000_000),
        "inputs": {"x": TensorSize("float32", (1000,), 4000)},
        "tensors": {name: TensorSize("float32", (size // 4,), size) for name, size in sizes.items()},
    }
    return Profile(**{**told, **changed})


def sharing(**changed: Any) -> Sharing:
    fast = profile(tuple(ms / 10 for ms in (4.0, 3.0, 2.0, 1.0)))
    return replace(Sharing(diamond(), profile(), fast, Rate(1.0, 8e6, 80e6)), **changed)


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    profile().save(path)
    assert load_profile(path) == profile()


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("version", 9, "version 9"),
        ("model", "xyz", "of no model"),
        ("nodes_ms", [1.0], "same number of nodes"),
        ("whole_ms", -1.0, "a time that is none"),
        ("nodes_ms", [1, 1, 1, -2], "a time that is none"),
        ("weights", [1, 1, 1, -2], "a size that is none"),
        ("ops", 7, "no device profile"),
        ("format", "isthmus-plan", "no device profile"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, key: str, value: Any, problem: str) -> None:
    path = tmp_path / "device.json"
    path.write_bytes(msgspec.json.encode({**msgspec.to_builtins(profile()), key: value}))
    with pytest.raises(PlanError, match=problem):
        load_profile(path)
    path.write_bytes(b"\x00\xff")
    with pytest.raises(PlanError, match="no device profile"):
        load_profile(path)


def test_a_profile_is_of_one_model() -> None:
    profile().check(MODEL, 4)
    for model, nodes in (("cd" * 32, 4), (MODEL, 5)):
        with pytest.raises(PlanError, match="another version of this model"):
            profile().check(model, nodes)
    with pytest.raises(PlanError, match="of two models"):
        sharing(cloud=profile(model="cd" * 32))


def by_hand(one: Sharing, device: set[int]) -> float:
    """The time of a way, added up."""
    sizes, total, beyond = {**one.device.tensors, **one.device.inputs}, 0.0, set(range(4)) - device
    for at in range(4):
        total += (one.device if at in device else one.cloud).nodes_ms[at]
    for name in one.graph.crossing(device):
        total += one.rate.up_ms(one.codec.size(sizes[name])) + one.codec.work_ms(sizes[name])
    if beyond:
        total += one.rate.trip_ms + one.rate.up_ms(120) + one.rate.down_ms(120) + one.cloud_ms
        total += one.rate.down_ms(sizes["d"].bytes)
    return total


WAYS = [{0, 1, 2, 3}, {0, 1, 2}, {0, 1}, {0, 2}, {0}, set()]


@pytest.mark.parametrize(
    ("up_bps", "trip_ms", "bits"), list(product((1e5, 1e6, 8e6, 1e8), (0.0, 1.0, 50.0), (None, 8.0, 2.0)))
)
def test_the_best_way_is_the_best_of_all_ways(up_bps: float, trip_ms: float, bits: float | None) -> None:
    one = sharing(rate=Rate(trip_ms, up_bps, 10 * up_bps), codec=Codec("c", bits, 100.0, 50.0), cloud_ms=0.5)
    found = fastest(one.network())
    assert found.ms == pytest.approx(min(by_hand(one, way) for way in WAYS))
    chosen = {at for at, tier in enumerate(found.tiers) if not tier}
    assert found.ms == pytest.approx(by_hand(one, chosen))
    assert (one.up_bytes(found) > 0) == (len(chosen) < 4)


def test_budgets_of_memory_and_energy_are_kept() -> None:
    one = sharing(rate=Rate(1.0, 1e5, 1e6), device_watts=5.0, radio_watts=1.0)
    assert len([tier for tier in fastest(one.network()).tiers if not tier]) == 4
    found = best(one.network(), budgets={MEMORY: 12.0})
    assert found.use[MEMORY] <= 12.0 and any(found.tiers)
    with pytest.raises(PlanError, match=r"J 1e-06 cannot be met: .* more"):
        best(one.network(), budgets={ENERGY: 1e-6})


def tied() -> OnnxGraph:
    """x -> a -> b -> c, of which the first and the last use the same megabyte of weights, and all a small constant."""
    weights = [(np.zeros((500, 500), np.float32), "w"), (np.zeros(8, np.float32), "bias")]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "bias"], ["b"]),
        helper.make_node("Gemm", ["b", "w", "bias"], ["c"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 500]) for name in "xc"]
    fixed = [numpy_helper.from_array(value, name) for value, name in weights]
    return OnnxGraph(helper.make_model(helper.make_graph(nodes, "tied", ends[:1], ends[1:], fixed)))


def test_weights_that_nodes_share_are_held_once() -> None:
    graph = tied()
    assert graph.shared_weights == [((0, 2), 1_000_000)]
    weights = tuple(graph.weight_bytes(at) for at in range(3))
    assert weights == (1_000_000, 32, 1_000_032)
    here = profile((1.0, 1.0, 1.0), weights=weights, ops=("MatMul", "Add", "Gemm"))
    network = Sharing(graph, here, here, Rate(1.0, 8e6, 8e6)).network()
    for tiers, held in (((0, 0, 0), 1.000064), ((0, 0, 1), 1.000032), ((0, 1, 1), 1.0), ((1, 1, 1), 0.0)):
        assert priced(network, tiers).use[MEMORY] == pytest.approx(held)
    whole = best(network, budgets={MEMORY: 1.001})
    assert whole.tiers == (0, 0, 0)  # which counted twice would take two
    assert best(network, budgets={MEMORY: 0.5}).tiers == (1, 1, 1)
    with pytest.raises(PlanError, match="shared by a task that there is not"):
        replace(network, use={MEMORY: Use(np.zeros((2, 3)), np.zeros(1), (Shared((0, 3), 1.0),))})


def test_what_is_no_tensor_stays_where_it_is_made() -> None:
    tensors = {name: size for name, size in profile().tensors.items() if name != "a"}
    found = fastest(sharing(device=profile(tensors=tensors), rate=Rate(0.0, 1e3, 1e3)).network())
    assert len(set(found.tiers)) == 1


@pytest.mark.parametrize(("rate", "problem"), [((1.0, 0.0, 1.0), "0 bit/s up"), ((1.0, 1.0, -1.0), "-1 bit/s down")])
def test_a_link_that_carries_nothing_is_refused(rate: tuple[float, float, float], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        Rate(*rate)
    with pytest.raises(PlanError, match="round trip"):
        Rate(-1.0, 1.0, 1.0)


def row(name: str, kind: Any, ms: float, fails: str = "", **more: Any) -> Row:
    return Row(name, kind, "f32", (0,), ("a",), ms, 0.0, 0.0, 10.0, 10.0, ms, fails=fails, **more)


def test_the_verdict_is_one_sentence_with_the_next_best() -> None:
    rows = [row("all on the device", "device", 10.0), row("raw", "cloud", 20.0), row("split", "split", 15.0)]
    assert verdict(rows, choose(rows)).startswith("Do not share it: all on the device takes 10 ms, against 15 ms")
    rows[2] = row("split", "split", 5.0)
    assert (
        verdict(rows, choose(rows))
        == "Split it after a (f32): 5 ms, against 10 ms of the next best, all on the device."
    )
    rows[2] = row("split", "split", 5.0, fails="memory")
    assert choose(rows) == 0
    with pytest.raises(PlanError, match="too slow"):
        choose([row("split", "split", 5.0, fails="too slow")])


def test_a_plan_comes_back_from_its_file_or_is_refused(tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.json", Plan(MODEL, "diamond", 4, "1 ms", (row("raw", "cloud", 1.0),), 0, "so.")
    plan.save(path)
    assert load_plan(path) == plan
    for key, value, problem in (("version", 2, "version 2"), ("best", 1, "no way"), ("nodes", 0, "has not")):
        path.write_bytes(msgspec.json.encode({**msgspec.to_builtins(plan), key: value}))
        with pytest.raises(PlanError, match=problem):
            load_plan(path)
    path.write_bytes(onnx.ModelProto().SerializeToString())
    with pytest.raises(PlanError, match="no plan"):
        load_plan(path)
    path.write_text('{"format": "isthmus-decoder-plan", "model": 1}')
    with pytest.raises(PlanError, match="is no plan, but an isthmus-decoder-plan"):
        load_plan(path)
    path.write_text('{"format": "isthmus-plan", "model": 1}')
    with pytest.raises(PlanError, match=r"is no plan: .*`\$.model`"):
        load_plan(path)


def test_a_plan_has_its_transforms(tmp_path: Path) -> None:
    samples = [np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)]
    one = Components("a", 1, samples).coded(0.1)
    path = tmp_path / "plan.json"
    coded = msgspec.structs.replace(row("coded", "split", 1.0), codec=UNIT, transforms=(one,))
    plan = Plan(MODEL, "diamond", 4, "1 ms", (coded,), 0, "so.")
    plan.save(path)
    assert load_plan(path) == plan and load_plan(path).rows[0].transforms == (one,)
    told = msgspec.to_builtins(plan)
    changes: list[dict[str, Any]] = [{"transforms": []}, {"codec": "int4"}]
    for changed in changes:
        path.write_bytes(msgspec.json.encode(told | {"rows": [told["rows"][0] | changed]}))
        with pytest.raises(PlanError, match="'coded' lacks its codec or its transforms"):
            load_plan(path)
