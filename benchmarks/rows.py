"""What a step of several rows costs beside a step of one, and what an exit's decision costs with a smaller head.

usage: python benchmarks/rows.py [--turns 15]

The rows of a step are consecutive tokens of one sequence, and each chooses a token: the check of a block of drafts.
Ratios are taken within a turn. One thread's time is what it computed, so that a busy machine disturbs it less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from models import bundle
from numpy.typing import NDArray
from record import Record

from isthmus.engine import KvConfig, Part, Rows, Want, open_part
from isthmus.quant.groups import quantize
from isthmus.quant.packed import LANES, PackedMatrix
from isthmus.split.bundle import Bundle
from isthmus.split.exits import ExitSource

CONTEXT, STEPS, SETTLE = 200, 5, 1
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32)
FORMATS = ("q4", "keep")
TARGETS = {5: 1.5, 9: 2.2}  # one thread's steps of so many rows, in steps of one row
EXIT_LAYER, EXIT_TOKENS = 20, 8192


class SmallHead(ExitSource):
    """An exit whose head has rows for the first `EXIT_TOKENS` tokens only."""

    def head(self) -> PackedMatrix:
        whole, blocks = super().head(), EXIT_TOKENS // LANES
        arrays = {name: array[:blocks] for name, array in whole.arrays.items()}
        return PackedMatrix(whole.format, EXIT_TOKENS, whole.cols, arrays)

    def head_tokens(self) -> NDArray[np.int32]:
        """The tokens of `head`."""
        return np.arange(EXIT_TOKENS, dtype=np.int32)


def exit_weights(source: Bundle) -> Mapping[str, Any]:
    """An exit made of the model's own layer behind an identity, which costs what a trained one does."""
    width, layer = source.config.d_model, source.layer(EXIT_LAYER)
    first = quantize(np.eye(width, dtype=np.float32), "q8")
    return {**layer, "input": first, "final_norm": source.final_norm()}


def clock_of(threads: int) -> Callable[[], float]:
    """Seconds: computed ones for one thread, which is the caller's own, else those that passed."""
    return time.thread_time if threads == 1 else time.perf_counter


def of_rows(part: Part, count: int, clock: Callable[[], float]) -> Callable[[], float]:
    """Seconds of a step of `count` rows behind the context, the median of a few."""
    sequence = part.open()
    part.step(Rows().tokens(sequence, 0, list(range(1000, 1000 + CONTEXT)), want=Want.NONE))
    tokens = list(range(2000, 2000 + count))

    def run() -> float:
        seconds = []
        for _ in range(SETTLE + STEPS):
            sequence.truncate(CONTEXT)
            rows = Rows().tokens(sequence, CONTEXT, tokens, want_all=True)
            begin = clock()
            part.step(rows)
            seconds.append(clock() - begin)
        return statistics.median(seconds[SETTLE:])

    return run


def of_exit(part: Part, clock: Callable[[], float]) -> Callable[[], float]:
    """Seconds of one exit decision behind the context, the median of a few."""
    states = np.random.default_rng(0).standard_normal((CONTEXT + 1, part.config.d_model)).astype(np.float32)
    sequence, want = part.open(), Want.SAMPLE | Want.CONFIDENCE
    part.step(Rows().hidden(sequence, 0, states[:CONTEXT], enter=EXIT_LAYER, want=Want.NONE))

    def run() -> float:
        seconds = []
        for _ in range(4 * (SETTLE + STEPS)):
            sequence.truncate(CONTEXT)
            rows = Rows().hidden(sequence, CONTEXT, states[CONTEXT:], enter=EXIT_LAYER, want=want)
            begin = clock()
            part.step(rows)
            seconds.append(clock() - begin)
        return statistics.median(seconds[4 * SETTLE :])

    return run


def alternate(ways: Mapping[Any, Callable[[], float]], turns: int) -> dict[Any, tuple[float, float]]:
    """Medians of each one's seconds and of its ratio to the first, taking turns; the first turn does not count."""
    taken: dict[Any, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, run in ways.items():
            seconds = run()
            taken[name] += [seconds] if turn else []
    first = next(iter(taken.values()))
    return {
        name: (statistics.median(all_of), statistics.median(a / b for a, b in zip(all_of, first, strict=True)))
        for name, all_of in taken.items()
    }


def main() -> int:
    """Measures and writes results/rows.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    record = Record(
        "rows", {"turns": options.turns, "steps a turn": STEPS, "context": CONTEXT, "load": os.getloadavg()}
    )
    rows: list[list[str | float | None]] = []
    for format in FORMATS:
        source = bundle(format)
        for threads in (1, 2):
            part = open_part(source, 0, source.config.n_layers, threads=threads, kv=KvConfig("f16", 4096))
            clock = clock_of(threads)
            found = alternate({count: of_rows(part, count, clock) for count in COUNTS}, options.turns)
            part.close()
            name = f"{format}/{threads} threads"
            record.figure(f"1 row/{name}", found[1][0] * 1e3, "ms")
            for count in COUNTS[1:]:
                target = TARGETS.get(count) if threads == 1 else None
                record.figure(f"{count} rows over 1/{name}", found[count][1], "ratio", target=target, at_most=True)
            rows.append([format, threads, found[1][0] * 1e3, *[found[count][1] for count in COUNTS[1:]]])
    columns = ["weights", "threads", "1 row, ms", *(f"{count} rows" for count in COUNTS[1:])]
    record.table("rows", columns, rows, note="Steps of several rows of one sequence, in steps of one row.")
    source = bundle("q4")
    weights = exit_weights(source)
    small = f"{EXIT_TOKENS} rows"
    exits: list[list[str | float | None]] = []
    for threads in (1, 2):
        made = {name: make(source, EXIT_LAYER, weights) for name, make in (("whole", ExitSource), (small, SmallHead))}
        parts = {
            name: open_part(made[name], EXIT_LAYER, EXIT_LAYER + 1, threads=threads, kv=KvConfig("f16", 512))
            for name in made
        }
        clock = clock_of(threads)
        found = alternate({name: of_exit(part, clock) for name, part in parts.items()}, options.turns)
        record.figure(f"exit decision, whole head/{threads} threads", found["whole"][0] * 1e3, "ms")
        ratio = found[small][1]
        record.figure(f"exit decision, head of {small} over whole head/{threads} threads", ratio, "ratio")
        exits.append([threads, found["whole"][0] * 1e3, found[small][0] * 1e3, ratio])
    columns = ["threads", "whole head, ms", f"head of {small}, ms", "ratio"]
    record.table("exits", columns, exits, note="One decision of an exit of one layer: token and confidence.")
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
