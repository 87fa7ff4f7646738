"""A network over three machines: the best of all ways, and what it costs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from isthmus.protocol.errors import PlanError
from isthmus.split.budget import best
from isthmus.split.cut import priced
from isthmus.split.onnx_graph import within
from isthmus.split.onnx_network import ENERGY, MEMORY, MESSAGE, Rate
from isthmus.split.onnx_tiers import CLOUD, DEVICE, EDGE, Tiers, over_three
from isthmus.split.planner import Wanted
from tests.unit.test_split_profile import sharing

NEAR, FAR = Rate(2.0, 40e6, 80e6), Rate(30.0, 4e6, 8e6)


def tiers(near: Rate = NEAR, far: Rate = FAR, faster: float = 3.0, **watts: Any) -> Tiers:
    two = sharing()
    nodes_ms = tuple(ms / faster for ms in two.device.nodes_ms)
    edge = msgspec.structs.replace(two.device, nodes_ms=nodes_ms, whole_ms=two.device.whole_ms / faster)
    return Tiers(two.graph, two.device, edge, two.cloud, near, far, **watts)


def by_hand(one: Tiers, places: tuple[int, ...]) -> float:
    """Milliseconds of a way: the work, and what crosses each link, up and back."""
    sizes = {**one.device.tensors, **one.device.inputs}
    profiles, ms = (one.device, one.edge, one.cloud), 0.0
    for at, place in enumerate(places):
        ms += profiles[place].nodes_ms[at]
    for link, boundary in ((one.near, DEVICE), (one.far, EDGE)):
        if max(places) <= boundary:
            continue
        ms += link.trip_ms + link.up_ms(MESSAGE) + link.down_ms(MESSAGE)
        for tensor in one.graph.tensors:
            made = places[tensor.producer] if tensor.producer >= 0 else DEVICE
            if made <= boundary < max((places[at] for at in tensor.consumers), default=DEVICE):
                ms += link.up_ms(sizes[tensor.name].bytes)
        for name in one.graph.outputs:
            if (at := one.graph.made_by(name)) >= 0 and places[at] > boundary:
                ms += link.down_ms(sizes[name].bytes)
    return ms


def ways(one: Tiers) -> list[tuple[int, ...]]:
    """All in which nothing travels back."""
    found = []
    for places in itertools.product(range(3), repeat=len(one.graph.nodes)):
        if all(places[t.producer] <= places[at] for t in one.graph.tensors if t.producer >= 0 for at in t.consumers):
            found.append(places)
    return found


@pytest.mark.parametrize("faster", [1.0, 3.0, 100.0])
@pytest.mark.parametrize("far", [FAR, Rate(5.0, 1e9, 1e9), Rate(1.0, 1e5, 1e5)])
def test_the_best_of_all_ways_over_three_machines(faster: float, far: Rate) -> None:
    one = tiers(far=far, faster=faster)
    network, all_ = one.network(), ways(one)
    for places in all_:
        cut = priced(network, places)
        assert cut.ms == pytest.approx(by_hand(one, places))
        row = one.row(cut)
        assert row.ms == pytest.approx(row.device_ms + row.edge_ms + row.cloud_ms + row.link_ms)
        assert row.three == ({EDGE, CLOUD} <= set(places))
        assert set(row.edge) == {at for at, place in enumerate(places) if place == EDGE}
    assert best(network).ms == pytest.approx(min(by_hand(one, places) for places in all_))
    held = min(priced(network, places).use[MEMORY] for places in all_ if places[0] == DEVICE)
    found = best(network, "latency", {MEMORY: held})
    able = [places for places in all_ if priced(network, places).use[MEMORY] <= held + 1e-9]
    assert found.ms == pytest.approx(min(by_hand(one, places) for places in able))


def test_rows_say_where_things_run() -> None:
    one = tiers(far=Rate(1.0, 1e9, 1e9))
    rows = over_three(one, sharing(rate=NEAR), Wanted())
    assert rows[0].name == "the input to the edge server" and rows[0].kind == "cloud" and not rows[0].beyond
    assert all(row.edge and not row.beyond for row in rows if "rest on the edge server" in row.name)
    assert len({row.name for row in rows}) == len(rows)
    assert one.through.trip_ms == 3.0 and one.through.up_bps == pytest.approx(1 / (1 / 40e6 + 1 / 1e9))


def test_energy_is_of_the_device_and_its_own_link() -> None:
    one = tiers(device_watts=2.0, radio_watts=1.0)
    cut = priced(one.network(), (DEVICE,) * 2 + (CLOUD,) * (len(one.graph.nodes) - 2))
    row = one.row(cut)
    down_ms = sum(one.near.down_ms(one.device.tensors[name].bytes) for name in one.graph.outputs)
    assert row.energy_j == pytest.approx((2.0 * row.device_ms + cut.links[0] + down_ms) * 1e-3)
    assert row.energy_j == pytest.approx(cut.use["J"])


def test_numbers_within_the_rest() -> None:
    assert within([0, 2], [1, 3]) == [0, 1] and within([0, 1], [4]) == [2] and within([], [0, 2]) == [0, 2]


def test_profiles_of_several_models_are_refused() -> None:
    one = tiers()
    other = msgspec.structs.replace(one.edge, model="cd" * 32)
    with pytest.raises(PlanError, match="several models"):
        Tiers(one.graph, one.device, other, one.cloud, NEAR, FAR)


def test_what_is_no_tensor_stays_where_it_is_made() -> None:
    one = tiers(device_watts=1.0, radio_watts=1.0)
    for lacks in ("a", "d"):
        left = {name: size for name, size in one.device.tensors.items() if name != lacks}
        odd = replace(one, device=msgspec.structs.replace(one.device, tensors=left))
        found = best(odd.network())
        if lacks == "a":  # whoever makes it goes on with it
            assert len({found.tiers[0], found.tiers[1], found.tiers[2]}) == 1
        else:  # the device is to have it
            assert set(found.tiers) == {DEVICE}
        assert odd.row(found).ms == pytest.approx(found.ms)
        best(odd.network(), budgets={ENERGY: 1e6})
