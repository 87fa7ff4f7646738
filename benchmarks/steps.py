"""Does Python keep up with steps of 2.6 ms? A service around a stub step, 16 CURVE clients, two cores.

The step (stub_step.c) keeps its threads busy in the engine's rhythm, once on the engine's own pool and once on OpenMP,
as it comes and with OMP_WAIT_POLICY=passive. Each is measured alone and beside a second engine of the same kind, which
steps, rests as long as a step (as a device waits for its cloud), and steps again.

usage: python benchmarks/steps.py [--turns 5] [--seconds 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from pathlib import Path

from record import Record
from stub_step import D_MODEL, PHASES, STEP_MS, Variant, ask, build, calibrate, neighbour, serve

from isthmus.protocol.keys import new_pair

CLIENTS = 16
PROCESSES = multiprocessing.get_context("spawn")  # a fork would take OpenMP's threads along
VARIANTS = (
    Variant("own pool", False, 1),
    Variant("OpenMP", True, 1),
    Variant("own pool", False, 2),
    Variant("OpenMP", True, 2),
    Variant("OpenMP, passive", True, 2, passive=True),
)


def measure(library: Path, work: int, variant: Variant, beside: bool, seconds: float) -> dict[str, float]:
    """One run of service, clients and, beside it, a neighbour."""
    os.environ.pop("OMP_WAIT_POLICY", None)
    if variant.passive:
        os.environ["OMP_WAIT_POLICY"] = "passive"
    keys, pairs = new_pair(), [new_pair() for _ in range(CLIENTS)]
    allowed = library.parent / "allowed"
    allowed.write_text("".join(f"{pair.public} client\n" for pair in pairs))
    ours, theirs = PROCESSES.Pipe()
    second, its = PROCESSES.Pipe()
    service = PROCESSES.Process(target=serve, args=(theirs, library, work, variant, keys, allowed, seconds))
    other = PROCESSES.Process(target=neighbour, args=(its, library, work, variant))
    service.start()
    address = ours.recv()
    clients = PROCESSES.Process(target=ask, args=(address, keys.public, pairs))
    if beside:
        other.start()
    clients.start()
    try:
        wall_s, steps, requests, step_s, wait_s = ours.recv()
        found = {
            "steps/s": steps / wall_s,
            "step ms": step_s / steps * 1e3,
            "overhead us": (wall_s - step_s) / steps * 1e6,
            "waiting us": wait_s / steps * 1e6,
            "share": step_s / wall_s,
            "requests/s": requests / wall_s,
        }
        if beside:
            second.send(None)
            found["neighbour ms"] = second.recv()
        return found
    finally:
        clients.kill()
        clients.join()
        ours.send(None)
        service.join()
        if beside:
            other.join()


def verdict(medians: list[dict[str, float]]) -> str:
    """One sentence on the medians, in the order of the table."""
    own, half = medians[0], len(VARIANTS)
    pool, openmp, passive = (medians[half + i]["steps/s"] for i in (2, 3, 4))
    return (
        f"With 1 thread the service spends {own['share']:.0%} of its time in steps and {own['overhead us']:.0f} us "
        f"a step on {own['requests/s'] / own['steps/s']:.0f} requests; with 2 threads beside a second engine "
        f"the own pool makes {pool:.0f} steps/s, OpenMP {openmp:.0f} and passive OpenMP {passive:.0f}."
    )


def main() -> int:
    """Measures in turns and writes results/steps.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    load = round(os.getloadavg()[0], 2)
    settings = {"turns": options.turns, "seconds a turn": options.seconds, "clients": CLIENTS, "step ms": STEP_MS}
    record = Record("steps", settings | {"phases a step": PHASES, "hidden": f"f16 [1, {D_MODEL}]", "load before": load})
    cases = [(variant, beside) for beside in (False, True) for variant in VARIANTS]
    runs: dict[tuple[Variant, bool], list[dict[str, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        work = calibrate(library)
        for _ in range(options.turns):
            for case in cases:
                runs[case].append(measure(library, work, *case, options.seconds))
    columns = [
        "step on",
        "threads",
        "beside it",
        "steps/s",
        "step ms",
        "overhead us",
        "waiting us",
        "share",
        "requests/s",
    ]
    columns.append("neighbour ms")
    rows: list[list[str | float | None]] = []
    medians: list[dict[str, float]] = []
    for (variant, beside), found in runs.items():
        median = {key: statistics.median(run[key] for run in found) for key in found[0]}
        medians.append(median)
        place = "second engine" if beside else "nothing"
        name = f"{variant.name}/{variant.threads} threads/{place}"
        for key in ("steps/s", "step ms", "overhead us", "share", "requests/s"):
            record.figure(f"{name}/{key}", median[key], key.split(" ")[-1])
        rows.append([variant.name, variant.threads, place, *[median.get(key) for key in columns[3:]]])
    record.table("steps", columns, rows, note=verdict(medians))
    record.settings = {**record.settings, "load after": round(os.getloadavg()[0], 2)}
    record.write()
    everything: list[list[str | float | None]] = [[*columns], *rows]
    for row in everything:
        print("  ".join(f"{f'{cell:.3f}' if isinstance(cell, float) else cell or '':>15}" for cell in row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
