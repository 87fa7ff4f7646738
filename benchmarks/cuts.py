"""Do the halves of a network give what the whole gives? Every place at which its order of nodes can be cut, of many.

Each prefix of the nodes, as `split.onnx_graph` orders them, runs as a model of its own, and what follows as another, on
random inputs (PP-OCR: on lines of text) with one thread; outputs are held against the whole's. Models:
EfficientNet-Lite0, PP-OCRv4 (detection and recognition), silero-vad, MiniLM, and those that the onnx package carries
for its tests of runtimes. Beside it stands how far the runtime is from itself, with the whole model's nodes fused and
not. Each network is kept when it is done, by commit: a run that was stopped is gone on with.

usage: python benchmarks/cuts.py [--only NAME,...]
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass

import numpy as np
from kept import Kept
from models import BENCH
from networks import Network, carried, networks
from record import Cell, Record, commit

from isthmus.protocol.errors import PlanError
from isthmus.split.graph_check import difference, rounding
from isthmus.split.onnx_file import read_model
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_measure import given, learn, outputs, session

WORST = 1e-5  # of the largest magnitude of an output
NICE = 10
MADE_BY = (
    "split",
    "engine",
    "protocol",
    *(f"benchmarks/{name}.py" for name in ("cuts", "networks", "efficientnet", "minilm")),
)


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a network.

    Attributes:
        cuts: places at which it can be cut, `refused` those at which it cannot.
        worst, own: differences of the halves, and of the runtime from itself; of an output's largest magnitude.
        skipped: why it was not cut at all, "" if it was.
    """

    network: str
    commit: str | None
    nodes: int = 0
    cuts: int = 0
    refused: int = 0
    worst: float = 0.0
    own: float = 0.0
    skipped: str = ""


def main() -> int:
    """Cuts and writes results/cuts.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, with commas between")
    only = set(filter(None, parser.parse_args().only.split(",")))
    os.nice(NICE)
    kept, made = Kept(BENCH / "cuts.jsonl", Found), commit(MADE_BY)
    known = {one.network: one for one in kept.found}  # the last of each
    record = Record("cuts", {"threads": 1, "inputs": "random, seeded; text for PP-OCR"})
    for network in (*networks(), *carried()):
        old = network.name not in known or known[network.name].commit != made or made is None or made.endswith("+")
        if network.name in only or (not only and old):
            try:
                known[network.name] = tried(network)
            except PlanError as error:
                known[network.name] = Found(network.name, made, skipped=error.problem)
            kept.add([known[network.name]])
            print(known[network.name], file=sys.stderr, flush=True)
    tell(record, list(known.values()))
    record.write()
    return 0


def tell(record: Record, found: list[Found]) -> None:
    """Figures and the table."""
    rows: list[list[Cell]] = []
    for one in found:
        if one.skipped:
            record.skip(one.network, one.skipped)
            continue
        rows.append([one.network, one.nodes, one.cuts, one.worst, one.own, one.refused])
        if one.commit != commit(MADE_BY):
            record.notes.append(f"{one.network} was cut at commit {one.commit}")
    record.figure("networks", len(rows), "networks")
    record.figure("cuts", sum(one.cuts for one in found), "cuts")
    worst = max(found, key=lambda one: one.worst, default=Found("", None))
    record.figure("worst difference", worst.worst, "of the largest magnitude", target=WORST, at_most=True)
    record.figure("of the runtime from itself, there", worst.own, "of the largest magnitude")
    columns = ["network", "nodes", "cuts", "worst difference", "of the runtime from itself"]
    note = "Differences are of the output's largest magnitude; 0 is bit-equal."
    record.table("cuts", [*columns, "places where it cannot be cut"], rows, note=note)
    record.table("summary", columns, summary([one for one in found if not one.skipped]), note=note)


def summary(found: list[Found]) -> list[list[Cell]]:
    """A row for each network, and one for all of a folder of small ones."""
    groups: dict[str, list[Found]] = {}
    for one in found:
        folder, _, _ = one.network.rpartition("/")
        groups.setdefault(f"{folder}/*" if folder else one.network, []).append(one)
    rows: list[list[Cell]] = []
    for name, some in groups.items():
        called = f"{name}, {len(some)} networks" if len(some) > 1 else name
        worst, own = (f"{max(sizes):.1e}" for sizes in ([one.worst for one in some], [one.own for one in some]))
        rows.append([called, sum(one.nodes for one in some), sum(one.cuts for one in some), worst, own])
    return rows


def tried(network: Network) -> Found:
    """All cuts of a network."""
    model = read_model(network.path)
    graph = OnnxGraph(model)
    feeds = given(graph, network.known_shapes, "")
    feeds |= {name: np.asarray(value) for name, value in network.values.items()}
    whole = dict(zip(graph.outputs, outputs(session(model, network.path, 1), feeds), strict=True))
    learn(graph, network.path, feeds)
    count, worst, refused = 0, 0.0, 0
    for end in range(1, len(graph.nodes)):
        try:
            halves = graph.halves(range(end))
        except PlanError:
            refused += 1
            continue
        known = dict(feeds)
        for part in (halves.device, halves.cloud):
            running = session(part, network.path, 1)
            names = [one.name for one in running.get_outputs()]
            takes = {one.name: known[one.name] for one in running.get_inputs()}
            known |= dict(zip(names, outputs(running, takes), strict=True))
        count += 1
        for name, value in whole.items():
            if (off := difference(known[name], value)) > worst:
                worst = off
                print(f"{network.name}: cut at {end}: {name} is off by {off:.2g}", file=sys.stderr, flush=True)
    own = max((off for off in rounding(graph, network.path, feeds, whole).values() if np.isfinite(off)), default=0.0)
    return Found(network.name, commit(MADE_BY), len(graph.nodes), count, refused, worst, own)


if __name__ == "__main__":
    sys.exit(main())
