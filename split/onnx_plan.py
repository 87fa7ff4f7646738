"""A plan for an ONNX model out of two profiles and a link, from its file to the verdict.

Cuts are searched with the times of nodes and the link's mean rate. The finalists are then timed as fused models, and,
where the link changes or others use the cloud, replayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from isthmus.protocol.errors import PlanError
from isthmus.split.budget import Aim
from isthmus.split.finalists import Finalists
from isthmus.split.link import Link, read_link
from isthmus.split.onnx_file import digest, read_model
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_network import ENERGY, MEMORY, Sharing
from isthmus.split.plan import Plan, Row, choose, verdict
from isthmus.split.planner import PLAIN, Wanted, remeasured, ways
from isthmus.split.profile import Profile, load_profile
from isthmus.split.replay import latencies


class Asked(NamedTuple):
    """What a plan is for.

    Attributes:
        slo_ms: that the percentile may be at most; the expected time where nothing changes.
        memory_mb: of weights on the device.
        energy_j: of the device for an input, from its watts while it computes and while something travels.
        load: the share of the cloud's time that others take.
        beside_ms: that a request takes in the cloud beside the model.
        times: how many times faster than the device the cloud is, where that is declared and no profile given.
        measure: whether the finalists are timed as fused models.
    """

    aim: Aim = "latency"
    slo_ms: float | None = None
    percentile: float = 95.0
    memory_mb: float | None = None
    energy_j: float | None = None
    device_watts: float = 0.0
    radio_watts: float = 0.0
    load: float = 0.0
    beside_ms: float = 0.0
    times: float | None = None
    measure: bool = True


def plan(model: str, device: str, cloud: str, link: str, asked: Mapping[str, Any]) -> Any:
    """A plan as plain data; see `plan.Plan`.

    Args:
        device, cloud: profiles; "" for a cloud that is so many times faster than the device.
        link: as `read_link` has it.
        asked: fields of `Asked`.

    Raises:
        PlanError: a profile is another model's, the link carries nothing, or no way keeps to what was asked for.
    """
    wish, file = Asked(**asked), Path(model)
    proto, over = read_model(file), read_link(link)
    graph, name = OnnxGraph(proto), digest(file, proto)
    here = load_profile(Path(device))
    there = load_profile(Path(cloud)) if cloud else _faster(here, 1.0 if wish.times is None else wish.times)
    for profile in (here, there):
        profile.check(name, len(graph.nodes))
    watts = (wish.device_watts, wish.radio_watts)
    sharing = Sharing(graph, here, there, over.rate(), PLAIN, wish.beside_ms, *watts)
    budgets = {MEMORY: wish.memory_mb, ENERGY: wish.energy_j}
    wanted = Wanted(wish.aim, {what: most for what, most in budgets.items() if most is not None})
    rows = ways(sharing, [PLAIN], wanted)
    if wish.measure:
        rows = remeasured(rows, Finalists(graph, file, here, there).fused(row.device for row in rows))
    rows = [_kept(_replayed(row, over, wish), wish) for row in rows]
    best = choose(rows, wish.aim)
    said = verdict(rows, best, wish.aim)
    found = Plan(name, here.name, len(graph.nodes), over.words, tuple(rows), best, said, wish.aim, wish.percentile)
    return msgspec.to_builtins(found)


def _faster(device: Profile, times: float) -> Profile:
    if not 0.0 < times < float("inf"):
        raise PlanError(f"the cloud is {times:g} times as fast as the device", "give a number above 0")
    nodes_ms = tuple(ms / times for ms in device.nodes_ms)
    whole = {"whole_ms": device.whole_ms / times, "first_ms": device.first_ms / times}
    return msgspec.structs.replace(device, nodes_ms=nodes_ms, machine=f"declared, {times:g} times as fast", **whole)


def _replayed(row: Row, link: Link, wish: Asked) -> Row:
    """A row with what it takes over time, where that is not always the same."""
    if not (link.changes or wish.load):
        return row
    taken = latencies(row, link, wish.load, wish.beside_ms)
    tail_ms = float(np.percentile(taken, wish.percentile))
    return msgspec.structs.replace(row, ms=float(taken.mean()), tail_ms=tail_ms)


def _kept(row: Row, wish: Asked) -> Row:
    """A row that says when it is too late."""
    taken = row.ms if row.tail_ms is None else row.tail_ms
    if wish.slo_ms is None or taken <= wish.slo_ms:
        return row
    what = "" if row.tail_ms is None else f" at the {wish.percentile:g}th percentile"
    late = f"{taken:.4g} ms{what}, {wish.slo_ms:.4g} wanted"
    return msgspec.structs.replace(row, fails="; ".join(filter(None, (row.fails, late))))
