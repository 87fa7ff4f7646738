"""Is the planner's cut the best of all, and how long does it look for it?

Random networks (directed acyclic graphs of up to 16 nodes, two or three tiers, budgets or none, for one input or for a
pipeline) are solved and held against every way to share them. Beside that, the time of a minimum cut of 5,000 nodes,
and of whole plans, from the files to the verdict, of the networks that the planner is measured on: after profiling,
without the timing of finalists.

usage: python benchmarks/solver.py [--networks 2000]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
from networks import networks
from record import ROOT, Cell, Record

from isthmus.protocol.errors import PlanError
from isthmus.split import onnx_measure, onnx_plan
from isthmus.split.budget import Aim, best, taken
from isthmus.split.cut import Cut, fastest
from isthmus.split.profile import Profile

sys.path.insert(0, str(ROOT))
from tests.random_network import every_cut, random_budgets, random_network

NODES, MOST_NODES, TURNS = 5000, 16, 9
NEAR = 1e-6
CUT_MS, PLAN_S = 50.0, 5.0
LINK = "rtt=20,up=5,down=20"


def main() -> int:
    """Measures and writes results/solver.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=2000, help="random ones")
    count = parser.parse_args().networks
    record = Record("solver", {"networks": count, "nodes": MOST_NODES, "threads": 1})
    wrong, sizes = 0, list[int]()
    for seed in range(count):
        same, ways = solved(seed)
        wrong, sizes = wrong + (not same), [*sizes, ways]
    record.figure("random networks", count, "networks", target=2000)
    record.figure("other than the best of all ways", wrong, "networks", target=0, at_most=True)
    record.figure("ways to share one, most", max(sizes), "ways")
    took = []
    for seed in range(TURNS):
        large = random_network(random.Random(seed), NODES, 2, anywhere=True)
        began = time.perf_counter()
        fastest(large)
        took.append((time.perf_counter() - began) * 1e3)
    record.figure(f"minimum cut of {NODES} nodes", statistics.median(took), "ms", target=CUT_MS, at_most=True)
    rows: list[list[Cell]] = []
    with TemporaryDirectory(prefix="isthmus-solver-") as work:
        for network in networks():
            profile, given = Path(work) / "profile.json", _given(network.values, work)
            told = onnx_measure.measure(str(network.path), 1, network.known_shapes, 1.0, given)
            Profile.of(told, "this", "this").save(profile)
            began = time.perf_counter()
            made = onnx_plan.plan(str(network.path), str(profile), "", LINK, {"times": 4.0, "measure": False})
            rows.append([network.name, made["nodes"], len(made["rows"]), time.perf_counter() - began])
            print(*rows[-1], sep="; ", file=sys.stderr, flush=True)
    record.figure("a plan, longest", max(float(row[3] or 0) for row in rows), "s", target=PLAN_S, at_most=True)
    note = "From the files to the verdict, after profiling and before finalists are timed."
    record.table("plans", ["network", "nodes", "ways in the plan", "seconds"], rows, note=note)
    record.write()
    return 0


def solved(seed: int) -> tuple[bool, int]:
    """Whether a random network's cut is the best of all ways to share it, and how many there are."""
    chance = random.Random(seed)
    tiers, aim = chance.choice([2, 2, 3]), chance.choice(get_args(Aim))
    network = random_network(chance, chance.randrange(1, MOST_NODES + 1), tiers)
    cuts = list(every_cut(network))
    budgets = random_budgets(chance, cuts)
    allowed = [cut for cut in cuts if all(taken(cut, name) <= most for name, most in budgets.items())]
    try:
        found = best(network, aim, budgets)
    except PlanError:
        return not allowed, len(cuts)
    if not allowed or any(taken(found, name) > most * (1 + NEAR) + 1e-9 for name, most in budgets.items()):
        return False, len(cuts)
    least = min(_value(cut, aim) for cut in allowed)
    return abs(_value(found, aim) - least) <= NEAR * least + 1e-9, len(cuts)


def _value(cut: Cut, aim: Aim) -> float:
    return cut.ms if aim == "latency" else cut.slowest_ms


def _given(values: Mapping[str, Any], work: str) -> str:
    """A file with inputs that random numbers would not do for; "" where there are none."""
    if not values:
        return ""
    path = Path(work) / "given.npz"
    np.savez(path, **values)
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
