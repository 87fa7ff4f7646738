"""What a part costs: one part, a chain of 30 one-layer parts in one native call, and 30 calls from Python.

usage: python benchmarks/parts.py [--turns 12]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from models import bundle
from record import Record

from isthmus.engine import KvConfig, Rows, Want
from isthmus.engine.native_part import NativePart, chain, open_native

CONTEXT, STEPS, SETTLE = 64, 24, 4


def whole(part: NativePart) -> Callable[[int], float]:
    """Decodes steps through one part, or one chain."""

    def run(steps: int) -> float:
        sequence = part.open()
        part.step(Rows().tokens(sequence, 0, [5] * CONTEXT, want=Want.NONE))
        seconds = []
        for i in range(steps):
            begin = time.perf_counter()
            part.step(Rows().tokens(sequence, CONTEXT + i, [1000 + i]))
            seconds.append(time.perf_counter() - begin)
        sequence.close()
        return statistics.median(seconds[SETTLE:])

    return run


def by_hand(parts: list[NativePart]) -> Callable[[int], float]:
    """Decodes steps by one Python call a part."""
    d_model = parts[0].config.d_model

    def run(steps: int) -> float:
        sequences = [part.open() for part in parts]
        zeros = np.zeros((CONTEXT, d_model), np.float32)
        for part, sequence in zip(parts, sequences, strict=True):
            rows = Rows()
            if part.start:
                rows.hidden(sequence, 0, zeros, enter=part.start, want=Want.NONE)
            else:
                rows.tokens(sequence, 0, [5] * CONTEXT, want=Want.NONE)
            part.step(rows)
        seconds = []
        for i in range(steps):
            begin = time.perf_counter()
            hidden = parts[0].step(Rows().tokens(sequences[0], CONTEXT + i, [1000 + i], want=Want.HIDDEN)).hidden
            for part, sequence in zip(parts[1:-1], sequences[1:-1], strict=True):
                rows = Rows().hidden(sequence, CONTEXT + i, hidden, enter=part.start, want=Want.HIDDEN)
                hidden = part.step(rows).hidden
            parts[-1].step(Rows().hidden(sequences[-1], CONTEXT + i, hidden, enter=parts[-1].start))
            seconds.append(time.perf_counter() - begin)
        for sequence in sequences:
            sequence.close()
        return statistics.median(seconds[SETTLE:])

    return run


def main() -> int:
    """Measures and writes results/parts.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12)
    options = parser.parse_args()
    record = Record("parts", {"turns": options.turns, "steps a turn": STEPS, "context": CONTEXT, "format": "q4"})
    source, kv = bundle("q4"), KvConfig("f16", 1024)
    rows: list[list[str | float]] = []
    for threads in (1, 2):
        layers = source.config.n_layers
        parts = [open_native(source, i, i + 1, threads=threads, kv=kv) for i in range(layers)]
        ways = {
            "one part": whole(open_native(source, 0, layers, threads=threads, kv=kv)),
            "30 parts, one native call": whole(chain(parts)),
            "30 parts, 30 Python calls": by_hand(parts),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.turns + 1):
            for name, run in ways.items():
                seconds = run(STEPS)
                taken[name] += [seconds] if turn else []
        best = {name: statistics.median(seconds) for name, seconds in taken.items()}
        for (name, seconds), target in zip(best.items(), (None, 0.97, 0.90), strict=True):
            of = f"one part/{threads} threads" if target else None
            record.figure(f"{name}/{threads} threads", 1 / seconds, "tok/s", target=target, of=of)
            rows.append([name, threads, 1 / seconds, best["one part"] / seconds])
    record.table("parts", ["model", "threads", "tok/s", "of one part"], rows)
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
