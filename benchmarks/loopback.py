"""Device and cloud as two processes on loopback, CURVE on, against one process: what sharing itself costs.

usage: python benchmarks/loopback.py [--turns 8] [--cut 15]

The model is cut in the middle, so one process computes while the other waits: what split loses against local is the
wire, the protocol and Python.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from models import BENCH, bundle
from record import Record

from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.edge import Device

QUESTION = "Tell me a story about a fox and the sea."
TOKENS = 64
TARGETS = {1: 0.85, 2: 0.75}


def speed(device: Device, mode: str, codec: str) -> tuple[float, int, list[int]]:
    """Tokens a second between the first and the last token of an answer, bytes up per token, and the tokens."""
    device.reset()
    tokens = [token.id for token in device.chat(QUESTION, max_tokens=TOKENS, mode=mode, codec=codec)]
    stats = device.stats
    return stats.tok_s, stats.bytes_up // max(1, len(tokens)), tokens


def main() -> int:
    """Measures and writes results/loopback.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--cut", type=int, default=15)
    options = parser.parse_args()
    settings = {
        "turns": options.turns,
        "cut": options.cut,
        "tokens an answer": TOKENS,
        "format": "q4",
        "link": "loopback",
    }
    record = Record("loopback", settings)
    bundle("q4")
    folder = BENCH / "smollm2-q4"
    ways = (("local", "f16"), ("split", "f16"), ("split", "f32"), ("split", "int8"), ("stream", "f16"))
    rows: list[list[str | int | float | None]] = []
    for threads in (1, 2):
        with fresh_keys() as keys, CloudProcess(folder, keys, threads) as cloud:
            measured = alternate(folder, cloud.address, keys, threads, options.cut, options.turns, ways)
        local = f"local/{threads} threads"
        for (mode, codec), (tok_s, up, same) in measured.items():
            name = "local" if mode == "local" else f"{mode} {codec}" if mode == "split" else mode
            target = TARGETS[threads] if (mode, codec) == ("split", "f16") else None
            record.figure(f"{name}/{threads} threads", tok_s, "tok/s", target=target, of=local if target else None)
            rows.append([name, threads, tok_s, tok_s / measured[ways[0]][0], up, f"{same} of {TOKENS}"])
    columns = ["mode", "threads a side", "tok/s", "of local", "bytes up a token", "first tokens as local"]
    record.table("loopback", columns, rows, note="Two processes on one machine, encrypted; answers taking turns.")
    record.write()
    return 0


def alternate(
    folder: Path, address: str, keys: Path, threads: int, cut: int, turns: int, ways: tuple[tuple[str, str], ...]
) -> dict[tuple[str, str], tuple[float, int, int]]:
    """Median tokens a second, bytes up per token and tokens in common with the first way, by (mode, codec)."""
    found: dict[tuple[str, str], list[tuple[float, int, list[int]]]] = {way: [] for way in ways}
    with Device(folder, address, keys=keys, threads=threads, mode="local", cut=cut, standby=False) as device:
        for turn in range(turns + 1):
            for way in ways:
                answer = speed(device, *way)
                found[way] += [answer] if turn else []
    truth = found[ways[0]][0][2]
    return {
        way: (statistics.median(a[0] for a in answers), answers[0][1], common(truth, answers[0][2]))
        for way, answers in found.items()
    }


def common(a: list[int], b: list[int]) -> int:
    """How many first tokens are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    sys.exit(main())
