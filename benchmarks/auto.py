"""How near does "auto" come to the best fixed mode? Every mode and auto itself, simulated at every point of a grid.

Points are round trip x device slow-down x cloud step x layers held x link x allowed disagreement. The simulator replays
measured times (feasibility.json, decode.json), recorded facts about all exits that ship and n-grams (facts.json, along
answers to prompts that no exit was trained or certified with) and links: those of --traces, and a seeded synthetic one
that needs no file. Exits are believed as they are certified. Half of the answers calibrate drafts, the others are
played. Auto runs the device's own estimator and policy and sees what a device could measure. Fixed modes are all those
that the wish allows, with every cut, codec and draft length that auto may choose; the cloud runs the device's model,
more slowly.

usage: python benchmarks/auto.py [--traces FOLDER] [--windows 8] [--answers 2] [--processes 2] [--record]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import product
from multiprocessing import Pool
from pathlib import Path

from record import RESULTS, Cell, Record

from isthmus.apps.bench import facts, simulate
from isthmus.apps.bench.simulate import LinkPlan, Point
from isthmus.edge.figures import Wish
from isthmus.split.traces import SYNTHETIC, Trace, read_pair, synthetic_pair

FACTS = Path(__file__).parent / "facts.json"
ROUND_TRIPS_MS, SLOW_DOWNS, CLOUD_STEPS, HOLDS = (5, 20, 50, 100, 200), (1, 4), (1, 8), (30, 20)
DISAGREEMENTS = (0.0, 0.05)
START_S = 30.0  # from one window's begin in the trace to the next one's
NEAR, ALONE = 1.10, 0.9


@dataclass(frozen=True)
class Case:
    """A point of the grid, and how it is played."""

    link: str
    held: int
    slow: int
    cloud: int
    rtt_ms: int
    traces: str | None
    windows: int
    answers: int


@dataclass(frozen=True)
class Found:
    """Seconds of all windows together, at one allowed disagreement."""

    case: Case
    disagreement: float
    best: str
    best_s: float
    alone_s: float
    auto_s: float
    switches: int
    wrong: float


@cache
def measured() -> tuple[dict[int, float], dict[int, float], float, float]:
    """Times of this machine: layers [0, k), steps of n rows, the output head, one row of a prompt."""
    figures = json.loads((RESULTS / "feasibility.json").read_text())["figures"]
    layers = {
        int(name.removeprefix("step/layers [0, ").removesuffix(")")): entry["value"]
        for name, entry in figures.items()
        if name.startswith("step/layers")
    }
    rows = {
        int(name.removeprefix("step/").removesuffix(" rows")): entry["value"]
        for name, entry in figures.items()
        if name.endswith(" rows")
    }
    decode = json.loads((RESULTS / "decode.json").read_text())["figures"]
    prefill = 1e3 / decode["isthmus 4-bit with minimum/prefill of 512/1 threads"]["value"]
    return layers, rows, rows[1] - layers[max(layers)], prefill


@cache
def recorded() -> facts.Facts:
    """Of exits and answers."""
    return facts.read(FACTS)


def answers() -> tuple[tuple[facts.Answer, ...], tuple[facts.Answer, ...]]:
    """To calibrate drafts on, and to play."""
    found = recorded().answers
    return found[: len(found) // 2], found[len(found) // 2 :]


@cache
def traces(link: str, folder: str | None) -> tuple[Trace, Trace]:
    """A link's two ways."""
    if link == SYNTHETIC or folder is None:
        return synthetic_pair()
    return read_pair(Path(folder) / link)


def point(case: Case) -> Point:
    """What the case says, out of measured times."""
    layers, rows, head, prefill = measured()
    heads = recorded().heads
    device = simulate.device_figures(layers, head, prefill, slow=case.slow, held=case.held, heads=heads)
    cloud = simulate.cloud_figures(rows, head, prefill, max(layers), factor=case.cloud)
    link = LinkPlan(case.rtt_ms, *traces(case.link, case.traces))
    return simulate.point(device, cloud, link, answers()[0], recorded().exits)


def play(case: Case) -> list[Found]:
    """Every mode once, and auto at each allowed disagreement."""
    windows = simulate.windows(answers()[1], [START_S * i for i in range(case.windows)], case.answers)
    here = point(case)
    seconds = {
        one.name: sum(simulate.play_fixed(here, one, window).seconds for window in windows)
        for one in simulate.fixed_modes(here, Wish("speed", max(DISAGREEMENTS)))
    }
    found = []
    for disagreement in DISAGREEMENTS:
        wish = Wish("speed", disagreement)
        allowed = [one.name for one in simulate.fixed_modes(here, wish)]
        best = min(allowed, key=seconds.__getitem__)
        alone = min(seconds[name] for name in allowed if name in ("local", "stream"))
        auto = [simulate.play_auto(here, wish, window) for window in windows]
        auto_s, switches = sum(one.seconds for one in auto), sum(one.switches for one in auto)
        wrong = sum(one.wrong for one in auto) / sum(one.tokens for one in auto)
        found.append(Found(case, disagreement, best, seconds[best], alone, auto_s, switches, wrong))
    return found


def main() -> int:
    """Plays the grid and writes results/auto.json, or auto-synthetic.json without traces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", help="folder of PREFIX.up and PREFIX.down")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--answers", type=int, default=2, help="in each window")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--record", action="store_true", help="record the facts of exits and n-grams first")
    options = parser.parse_args()
    if options.record:
        from record_facts import record as record_facts

        record_facts(FACTS)
    links = [SYNTHETIC]
    if options.traces:
        links += sorted(path.stem for path in Path(options.traces).glob("*.up"))
    cases = [
        Case(link, held, slow, cloud, rtt, options.traces, options.windows, options.answers)
        for link, held, slow, cloud, rtt in product(links, HOLDS, SLOW_DOWNS, CLOUD_STEPS, ROUND_TRIPS_MS)
    ]
    found: list[Found] = []
    with Pool(options.processes, os.nice, (10,)) as pool:
        for done, some in enumerate(pool.imap(play, cases), 1):
            found += some
            if done * 20 // len(cases) != (done - 1) * 20 // len(cases):
                print(f"{done} of {len(cases)} points", file=sys.stderr, flush=True)

    record = Record(
        "auto" if options.traces else "auto-synthetic",  # one link does not take the place of five
        {
            "links": links,
            "windows": options.windows,
            "seconds between windows": START_S,
            "answers in a window": options.answers,
            "emulated": "device slow-down, cloud step, round trip and links; in virtual time",
        },
    )
    for loss in DISAGREEMENTS:
        told = f"at {loss:.0%} disagreement"
        here = [one for one in found if one.disagreement == loss]
        slower = [one.auto_s / one.best_s for one in here]
        alone = [one.alone_s / one.auto_s for one in here]
        record.figure(f"{told}/auto over the best mode, worst", max(slower), "ratio", target=NEAR, at_most=True)
        record.figure(f"{told}/auto over the best mode, mean", sum(slower) / len(slower), "ratio")
        record.figure(
            f"{told}/points within 10 %", sum(one <= NEAR for one in slower), f"of {len(here)}", target=len(here)
        )
        record.figure(f"{told}/speed over local or stream, worst", min(alone), "ratio", target=ALONE)
        record.figure(f"{told}/speed over local or stream, best", max(alone), "ratio")
        if loss:
            record.figure(
                f"{told}/tokens that differ, worst", max(one.wrong for one in here), "share", target=loss, at_most=True
            )
        for mode, count in Counter(one.best.split()[0] for one in here).most_common():
            record.figure(f"{told}/best at/{mode}", count, f"of {len(here)}")
    summary: list[list[Cell]] = []
    for link, loss in product(links, DISAGREEMENTS):
        here = [one for one in found if (one.case.link, one.disagreement) == (link, loss)]
        slower = sorted(one.auto_s / one.best_s for one in here)
        least = min(one.alone_s / one.auto_s for one in here)
        modes = ", ".join(f"{mode} {n}" for mode, n in Counter(one.best.split()[0] for one in here).most_common())
        near = sum(one <= NEAR for one in slower)
        summary.append([link, loss, len(here), modes, near, sum(slower) / len(slower), slower[-1], least])
    record.table(
        "summary",
        ["link", "disagreement", "points", "best modes", "within 10 %", "mean", "worst", "worst over local or stream"],
        summary,
        note="Auto's seconds over the best fixed mode's; last, its speed over that of the better of local and stream.",
    )
    rows: list[list[Cell]] = [
        [
            one.case.link,
            one.disagreement,
            one.case.held,
            one.case.slow,
            one.case.cloud,
            one.case.rtt_ms,
            one.best,
            round(one.best_s, 2),
            round(one.auto_s, 2),
            round(one.auto_s / one.best_s, 3),
            round(one.alone_s / one.auto_s, 3),
            one.switches,
        ]
        for one in found
    ]
    columns = ["link", "disagreement", "layers held", "device slow-down", "cloud step", "round trip, ms"]
    columns += ["best mode", "best, s", "auto, s", "auto / best", "speed over local or stream", "switches"]
    record.table("auto", columns, rows, note="Seconds of virtual time for all windows together.")
    for row in sorted(rows, key=lambda row: -float(row[9] or 0))[:10]:
        print(*row)
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
