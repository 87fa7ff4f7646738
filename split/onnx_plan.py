"""A plan for a network out of two profiles and a link, from its file to the verdict.

Cuts are searched with the times of nodes and the link's mean rate. The finalists are then timed as fused models, and,
where the link changes or others use the cloud, replayed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from isthmus.protocol.errors import PlanError
from isthmus.split.agreement import AGREES, Agree
from isthmus.split.budget import LATENCY, Aim
from isthmus.split.finalists import Finalists
from isthmus.split.graph import Graph
from isthmus.split.graph_exits import NONE, Leaving, choices
from isthmus.split.link import Link, read_link
from isthmus.split.onnx_file import digest, read_model
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_measure import given
from isthmus.split.onnx_network import ENERGY, MEMORY, SERVICE_MS, Sharing
from isthmus.split.onnx_tiers import Tiers, over_three
from isthmus.split.plan import Plan, Row, choose, verdict
from isthmus.split.planner import PLAIN, Wanted, candidates, coded, judged, remeasured, told_apart, ways
from isthmus.split.profile import Profile, load_profile
from isthmus.split.replay import latencies
from isthmus.split.tflite import TfliteGraph, is_tflite
from isthmus.split.tflite import digest as tflite_digest
from isthmus.split.trial_inputs import Inputs, read_inputs
from isthmus.split.trials import Trials


@dataclass(frozen=True)
class Asked:
    """What a plan is for.

    Attributes:
        slo_ms: that the percentile may be at most; the expected time where nothing changes.
        memory_mb: of weights on the device.
        energy_j: of the device for an input, from its watts while it computes and while something travels.
        load: the share of the cloud's time that others take.
        times: how many times faster than the device the cloud is, where that is declared and no profile given.
        measure: whether the finalists are timed as fused models, on the inputs of `arrays` (a .npz file; random ones
            where there is none).
        folder, preprocess: pictures or arrays to try codecs on, and what is done with pictures, a file; "" for none.
        agreement: share of answers that codecs and exits must leave as they are; `agree` says when one is.
        exits: by the name of an output that answers early, the probability from which its answer is final.
        edge, edge_link: a server's profile between device and cloud, and the link from the device to it; the cloud is
            then behind that. "" for none.

    Raises:
        PlanError: a number is none, or two wishes do not go together.
    """

    aim: Aim = "latency"
    slo_ms: float | None = None
    percentile: float = 95.0
    memory_mb: float | None = None
    energy_j: float | None = None
    device_watts: float = 0.0
    radio_watts: float = 0.0
    load: float = 0.0
    times: float | None = None
    measure: bool = True
    arrays: str = ""
    folder: str = ""
    preprocess: str = ""
    agreement: float = 0.99
    agree: Agree = "top1"
    exits: Mapping[str, float] = field(default_factory=dict)
    edge: str = ""
    edge_link: str = ""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise PlanError(f"{name} is {value:g}", "give a number")
        if not 0.0 < self.percentile < 100.0:
            raise PlanError(f"the percentile is {self.percentile:g}", "give one between 0 and 100, as 95")
        if self.energy_j is not None and not self.device_watts + self.radio_watts > 0.0:
            raise PlanError("a budget of energy is given, and no watts", "declare --device-watts and --radio-watts")
        if self.times is not None and not self.times > 0.0:
            raise PlanError(f"the cloud is {self.times:g} times as fast as the device", "give a number above 0")
        if not 0.0 <= self.load < 1.0:
            raise PlanError(f"others take {self.load:g} of the cloud's time", "give a share from 0 to below 1")
        if not 0.0 <= self.agreement <= 1.0:
            raise PlanError(f"an agreement of {self.agreement:g} is wanted", "give a share from 0 to 1")
        if self.agree not in AGREES:
            raise PlanError(f"answers agree by {self.agree!r}", f"choose {' or '.join(AGREES)}")
        if self.preprocess and not self.folder:
            raise PlanError("a preprocessing is given, and no pictures", "name their folder with --inputs")
        if self.exits and not self.folder:
            problem = "exits are given, and no inputs to see how often each is sure on"
            raise PlanError(problem, "name their folder with --inputs")
        if bool(self.edge) != bool(self.edge_link):
            raise PlanError("an edge server needs a profile and a link", "give both --edge and --edge-link, or neither")
        if self.edge and (self.folder or self.load or self.aim == "throughput"):
            problem = "over an edge server plain tensors are planned, for one input at a time"
            raise PlanError(problem, "leave --inputs, --load and --throughput out, or the edge server")
        if self.load and self.aim == "throughput":
            raise PlanError("a pipeline has its cloud for itself", "leave --load or --throughput out")


def plan(model: str, device: str, cloud: str, link: str, asked: Mapping[str, Any]) -> Any:
    """A plan as plain data; see `plan.Plan`.

    Args:
        device, cloud: profiles; "" for a cloud that is so many times faster than the device.
        link: as `read_link` has it.
        asked: fields of `Asked`.

    Raises:
        PlanError: a profile is another model's, the link carries nothing, or no way keeps to what was asked for.
    """
    wish, file, over = Asked(**asked), Path(model), read_link(link)
    here = load_profile(Path(device))
    graph, name = _read(file, here)
    there = load_profile(Path(cloud)) if cloud else _faster(here, 1.0 if wish.times is None else wish.times)
    here.check(name, len(graph.nodes), "device")
    there.check(name, len(graph.nodes), "cloud")
    for one, size in here.inputs.items():
        if there.inputs.get(one) != size:
            problem = f"the profiles were made with other inputs: {one!r} was {list(size.shape)} on the device"
            raise PlanError(problem, "measure both with the same --shape: isthmus profile")
    sharing = Sharing(graph, here, there, over.rate(), PLAIN, SERVICE_MS, wish.device_watts, wish.radio_watts)
    tiers = None
    if wish.edge:
        tiers = _tiers(graph, here, there, over, wish)
        tiers.edge.check(name, len(graph.nodes), "edge server")
        sharing = replace(sharing, rate=tiers.through)
    budgets = {MEMORY: wish.memory_mb, ENERGY: wish.energy_j}
    if wish.aim == "throughput" and not wish.folder:  # the best pipeline may be late; codecs may make it sooner
        budgets[LATENCY] = wish.slo_ms
    wanted = Wanted(wish.aim, {what: most for what, most in budgets.items() if most is not None})
    inputs, trials, worth = None, None, list[Row]()
    early = list[Leaving]()
    if wish.folder:
        if not isinstance(graph, OnnxGraph):
            raise PlanError("codecs are tried on the cuts of ONNX models", "leave the folder of inputs out")
        inputs = read_inputs(Path(wish.folder), graph, here.inputs, wish.preprocess)
        trials = Trials(graph, file, inputs.feeds, wish.agreement, wish.agree)
        early = choices(graph, wish.exits, trials.answers, wish.agree)
        early = [one for one in early if (one.agreement or 0.0) >= wish.agreement] or early  # those say why they fail
        worth = candidates(sharing, wanted, early)
    rows = ways(sharing, [PLAIN], wanted, early)
    if tiers is not None:
        rows += over_three(tiers, replace(sharing, cloud=tiers.edge, rate=tiers.near), wanted)
    if isinstance(graph, OnnxGraph) and (wish.measure or inputs is not None):
        if inputs is None or wish.arrays:
            feeds: Mapping[str, Any] = given(
                graph, {name: size.shape for name, size in here.inputs.items()}, wish.arrays
            )
        else:
            feeds = inputs.feeds[0]
        how = inputs.how if inputs is not None else None
        shown = inputs.pictures[0] if inputs is not None and inputs.pictures else None
        finalists = Finalists(graph, file, here, there, feeds, how, shown, edge=tiers.edge if tiers else None)
        if inputs is not None and trials is not None:
            whole = [row for row in rows if row.kind == "cloud"]
            rows += _coded(sharing, trials, inputs, whole, worth, early, finalists.faster)
        if wish.measure:
            rows = remeasured(rows, sharing, finalists.timed)
    rows = [
        judged(_replayed(row, over, sharing, wish), wanted, wish.slo_ms, wish.percentile, wish.agreement)
        for row in told_apart(rows)
    ]
    best = choose(rows, wish.aim)
    said = verdict(rows, best, wish.aim)
    found = Plan(
        name,
        here.name,
        len(graph.nodes),
        over.words if tiers is None else f"{read_link(wish.edge_link).words}, and behind an edge server {over.words}",
        tuple(rows),
        best,
        said,
        aim=wish.aim,
        percentile=wish.percentile,
        inputs=here.inputs,
        tried=len(inputs.feeds) if inputs is not None else 0,
        agree=wish.agree,
        preprocess=inputs.how if inputs is not None else None,
    )
    return msgspec.to_builtins(found)


def _coded(
    sharing: Sharing,
    trials: Trials,
    inputs: Inputs,
    whole: Sequence[Row],
    worth: Sequence[Row],
    early: Sequence[Leaving],
    faster: tuple[float, float],
) -> list[Row]:
    """Pictures in place of the input, and splits, each in the smallest codec that keeps the answers."""
    found = list[Row]()
    if inputs.preprocess is not None:
        tried = trials.images(inputs.pictures, inputs.preprocess, inputs.name)
        found += [coded(row, sharing, one, faster) for row in whole for one in tried]
    leaving = {tuple(exit.output for exit in one.exits): one for one in early}
    for row in worth:
        with suppress(PlanError):  # of a way that is no cut
            if (one := trials.smallest(row.device, leaving.get(row.way[1], NONE))).codec:
                found.append(coded(row, sharing, one, faster))
    return found


def _tiers(graph: Graph, here: Profile, there: Profile, over: Link, wish: Asked) -> Tiers:
    """A device, an edge server and a cloud."""
    near = read_link(wish.edge_link)
    if near.changes or over.changes:
        raise PlanError("over an edge server links have fixed rates", "give them as rtt=20,up=5,down=20")
    if not isinstance(graph, OnnxGraph):
        raise PlanError("a .tflite model is not cut", "plan it without the edge server")
    middle = load_profile(Path(wish.edge))
    links = near.rate(), over.rate()
    return Tiers(graph, here, middle, there, *links, wish.device_watts, wish.radio_watts, SERVICE_MS)


def _read(file: Path, profile: Profile) -> tuple[Graph, str]:
    """A model's graph, and its digest; of a .tflite file, its profile knows what it takes and gives."""
    if is_tflite(file):
        return TfliteGraph(profile), tflite_digest(file)
    model = read_model(file)
    return OnnxGraph(model), digest(file, model)


def _faster(device: Profile, times: float) -> Profile:
    nodes_ms = tuple(ms / times for ms in device.nodes_ms)
    whole = {"whole_ms": device.whole_ms / times, "first_ms": device.first_ms / times}
    return msgspec.structs.replace(device, nodes_ms=nodes_ms, machine=f"declared, {times:g} times as fast", **whole)


def _replayed(row: Row, link: Link, sharing: Sharing, wish: Asked) -> Row:
    """A row with what it takes over time, where that is not always the same."""
    if not (link.changes or wish.load):
        return row
    others_ms = sharing.cloud.whole_ms  # who has all of it in the cloud
    taken = latencies(row, link, wish.load, sharing.cloud_ms, others_ms)
    ms, tail_ms = float(taken.mean()), float(np.percentile(taken, wish.percentile))
    if link.changes and row.kind != "device":
        # Waiting in the cloud is not on the link.
        alone_ms = float(latencies(row, link, beside_ms=sharing.cloud_ms).mean()) if wish.load else ms
        link_ms = max(0.0, alone_ms - row.device_ms - row.cloud_ms)
        energy_j = sharing.energy_j(row.device_ms, link_ms)
        row = msgspec.structs.replace(row, link_ms=link_ms, energy_j=energy_j)
    return msgspec.structs.replace(row, ms=ms, tail_ms=tail_ms)
