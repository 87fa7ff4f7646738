"""Do the halves of a network give what the whole gives? Every place at which its order of nodes can be cut, of many.

Each prefix of the nodes, as `split.onnx_graph` orders them, runs as a model of its own, and what follows as another, on
random inputs (PP-OCR: on lines of text) with one thread; outputs are held against the whole's. Models:
EfficientNet-Lite0, PP-OCRv4 (detection and recognition), silero-vad, MiniLM, and those that the onnx package carries
for its tests of runtimes.

usage: python benchmarks/cuts.py [--only NAME,...]
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from networks import Network, carried, networks
from record import Cell, Record

from isthmus.protocol.errors import PlanError
from isthmus.split.graph_check import difference
from isthmus.split.onnx_file import read_model
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_measure import given, learn, outputs, session

WORST = 1e-5  # of the largest magnitude of an output


def main() -> int:
    """Cuts and writes results/cuts.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, with commas between")
    only = set(filter(None, parser.parse_args().only.split(",")))
    record = Record("cuts", {"threads": 1, "inputs": "random, seeded; text for PP-OCR"})
    rows: list[list[Cell]] = []
    total, worst = 0, 0.0
    for network in (*networks(), *carried()):
        if only and network.name not in only:
            continue
        try:
            count, off, refused = tried(network)
        except PlanError as error:
            record.skip(network.name, error.problem)
            continue
        total, worst = total + count, max(worst, off)
        rows.append([network.name, network.nodes, count, off, refused])
        print(*rows[-1], file=sys.stderr, flush=True)
    record.figure("networks", len(rows), "networks")
    record.figure("cuts", total, "cuts")
    record.figure("worst difference", worst, "of the largest magnitude", target=WORST, at_most=True)
    columns = ["network", "nodes", "cuts", "worst difference", "places where it cannot be cut"]
    record.table("cuts", columns, rows, note="The difference is of the output's largest magnitude; 0 is bit-equal.")
    record.write()
    return 0


def tried(network: Network) -> tuple[int, float, int]:
    """How many cuts there are, the largest difference, and at how many places there is none."""
    model = read_model(network.path)
    graph = OnnxGraph(model)
    network.nodes = len(graph.nodes)
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
    return count, worst, refused


if __name__ == "__main__":
    sys.exit(main())
