"""How long after a link has gone dark does the device say its next token by itself?

Not in auto, which goes on alone with tokens that are certain: nothing tells them from those still under way.

usage: python benchmarks/silence.py [--cuts 10]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from models import BENCH, bundle, part_of
from record import Record
from scene import QUESTION, Cloud

from isthmus.apps.bench.calm import Calm, calm_enough
from isthmus.apps.bench.cloud_process import fresh_keys
from isthmus.apps.bench.relay import Relay
from isthmus.edge import Device, Timeouts

ROUND_TRIPS_MS = (5, 50, 200)
LEAST_MS = 50.0
HELD = 20
MODES = ("stream", "verify", "exit", "split")
SCENES = (
    *((mode, mode, "whole") for mode in MODES),
    *((f"{mode}, {HELD} layers", mode, "part") for mode in MODES),
)
PATIENCE_S = 30.0  # with others on the host, before each cut


def silence(record: Record, whole: Path, part: Path, cuts: int) -> None:
    """Cuts the link in answers.

    Args:
        whole, part: folders with all layers, and with `HELD` of them and the exits before those.
    """
    rows: list[list[str | int | float | None]] = []
    for rtt_ms in ROUND_TRIPS_MS:
        with fresh_keys() as key_folder:
            cloud = Cloud(whole, key_folder, rtt_ms)
            try:
                for mode, way, folder in SCENES:
                    gaps, calm = _gaps(whole if folder == "whole" else part, key_folder, cloud.relay, way, cuts)
                    bound = max(LEAST_MS, 2.0 * rtt_ms)
                    ended, aside = cuts - len(gaps), len(gaps) - len(calm)
                    record.figure(f"{mode} at {rtt_ms} ms/answers that ended early", ended, f"of {cuts}")
                    if not gaps:
                        record.skip(f"{mode} at {rtt_ms} ms", "every answer ended before the device went on by itself")
                        continue
                    record.figure(f"{mode} at {rtt_ms} ms/set aside for the median", aside, f"of {len(gaps)}")
                    gap = statistics.median(calm)
                    record.figure(f"{mode} at {rtt_ms} ms", gap, "ms", target=bound, at_most=True)
                    record.figure(f"{mode} at {rtt_ms} ms, longest", max(gaps), "ms", target=bound, at_most=True)
                    rows.append([mode, rtt_ms, round(gap, 1), aside, round(max(gaps), 1), bound])
            finally:
                cloud.close()
    record.table(
        "silence",
        ["mode", "round trip, ms", "median, ms", "set aside", "longest, ms", "two round trips, 50 ms at least"],
        rows,
        note="From the last token before the cut, or since, to the first that the device says by itself; in exit mode "
        "that last token may be an exit's. The longest is of all cuts; the median leaves out those set aside, at most "
        "half, in which others on the host took more than 5 % of what this machine wanted of its processors. "
        f"What a device with {HELD} layers says is an exit's.",
    )


def _gaps(folder: Path, key_folder: Path, relay: Relay, mode: str, cuts: int) -> tuple[list[float], list[float]]:
    """Of all cuts that gave one, and of those in which others on the host were calm, or of the calmer half."""
    calm, taken, gaps = Calm(), list[float](), list[float]()
    for _ in range(cuts):
        calm.wait(PATIENCE_S)
        gap, share = _gap_ms(folder, key_folder, relay, mode), calm.taken()
        if gap is not None:
            gaps.append(gap)
            taken.append(share)
    return gaps, [gaps[one] for one in calm_enough(taken)]


def _gap_ms(folder: Path, key_folder: Path, relay: Relay, mode: str) -> float | None:
    """From the last token that came from anywhere; None where the answer ended before the device went on by itself."""
    with Device(
        folder, relay.address, keys=key_folder, mode=mode, threads=1, standby=True, timeouts=Timeouts(connect_ms=20_000)
    ) as device:
        last = cut = 0.0
        for number, token in enumerate(device.chat(QUESTION, max_tokens=120)):
            now = time.perf_counter()
            if cut and not token.verified:
                relay.mend()
                return (now - max(last, cut)) * 1e3
            last = now
            if number == 24:
                relay.cut()
                cut = time.perf_counter()
    relay.mend()
    return None


def main() -> int:
    """Measures and writes results/silence.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=10, help="for each mode and round trip")
    options = parser.parse_args()
    record = Record("silence", vars(options))
    source = bundle("keep")
    with TemporaryDirectory(prefix="isthmus-silence-", dir=BENCH) as folder:
        silence(record, source.path, part_of(source, HELD, Path(folder)), options.cuts)
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
