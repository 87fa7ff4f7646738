"""What `isthmus run` needs: resident memory, the time from process start to the first token, and `--help`'s time.

usage: python benchmarks/footprint.py [--runs 7]

The bundle is in the page cache. Memory is the operating system's count of the finished process; the time to the first
token is that of a whole process which ends after one token.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from models import BENCH, bundle
from record import Record

from isthmus.apps.bench.roofline import token_bytes
from isthmus.engine import KvConfig
from isthmus.engine.kv import block_bytes

PROMPT = "Write a story about a fox and the sea. " * 12
ALLOWANCE_MB = 120.0


def run(*arguments: str) -> tuple[float, float]:
    """Wall seconds and peak resident MB of one `isthmus` process."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "isthmus.apps.cli", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"isthmus {' '.join(arguments)} failed with {process.returncode}")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024 / 1e6


def main() -> int:
    """Measures and writes results/footprint.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    record = Record("footprint", {"runs": options.runs, "format": "q4", "answer tokens": 200})
    source = bundle("q4")
    folder = str(BENCH / "smollm2-q4")
    tokens = len(source.tokenizer().chat([{"role": "user", "content": PROMPT}])) + 200
    kv_mb = -(-tokens // 16) * block_bytes(source.config, source.config.n_layers, KvConfig()) / 1e6
    weights_mb = token_bytes(source.manifest) / 1e6
    long = ("run", folder, "--prompt", PROMPT, "--max-tokens", "200", "--greedy")
    short = ("run", folder, "--prompt", "Hello", "--max-tokens", "1", "--greedy")
    run(*short)
    peak_mb = statistics.median(run(*long)[1] for _ in range(options.runs))
    first_s = statistics.median(run(*short)[0] for _ in range(options.runs))
    help_s = statistics.median(run("--help")[0] for _ in range(options.runs))
    record.figure("weights", weights_mb, "MB")
    record.figure("KV of the run", kv_mb, "MB")
    record.figure(
        "resident memory beyond weights and KV", peak_mb - weights_mb - kv_mb, "MB", target=ALLOWANCE_MB, at_most=True
    )
    record.figure("process start to first token, and exit", first_s, "s", target=1.0, at_most=True)
    record.figure("isthmus --help", help_s, "s", target=0.2, at_most=True)
    rows = [[name, round(float(entry["value"]), 3), entry["unit"]] for name, entry in record.figures.items()]
    record.table("footprint", ["what", "measured", "unit"], rows)
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
