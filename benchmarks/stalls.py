"""Experts on flash with a cloud that has the model: who answers, by the speed of flash and the round trip.

SmolLM2 as `isthmus moefy --experts 64 --active 8` converts it, a quarter of its experts in memory, behind a relay, over
emulated flash. Four devices take turns with the same answers: one alone, one that streams all of them, `auto`, and
`--experts cloud`, which asks only where a token would wait longer than a round trip. Device and cloud have one thread
each. The first answers are not counted: they show each device what it is.

usage: python benchmarks/stalls.py [--answers 4] [--tokens 48]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experts import converted, say
from record import Cell, Record

from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.apps.bench.relay import LinkProfile, Relay
from isthmus.edge import Device, ExpertSettings
from isthmus.split.bundle import Bundle

FLASH_MB_S = (20.0, 100.0, 500.0)
TRIPS_MS = (10.0, 50.0, 200.0)
SHARE, RATE_BPS, WARM = 0.25, 20e6, 2
QUESTIONS = (
    "What is the capital of France?",
    "Tell me a story about a fox and the sea.",
    "How do I make bread at home?",
    "Why is the sky blue?",
    "Name three animals that swim.",
    "What does a bicycle need?",
)
ALONE, STREAM, AUTO, CLOUD = "this device", "the cloud", "auto", "--experts cloud"
NEAR = 0.9  # of the faster one of device and cloud, that auto shall reach; of the device, that asking a cloud shall


@dataclass
class Way:
    """A device, and its answers."""

    name: str
    device: Device
    seconds: list[float] = field(default_factory=list)  # of each answer that counts
    own: list[float] = field(default_factory=list)  # share of its tokens that were computed on the device
    texts: list[list[int]] = field(default_factory=list)

    def ask(self, question: str, tokens: int, *, counts: bool) -> None:
        """One answer in a conversation of its own."""
        self.device.reset()
        began = time.perf_counter()
        found = [token.id for token in self.device.chat(question, max_tokens=tokens)]
        seconds = time.perf_counter() - began
        self.texts.append(found)
        if counts:
            self.seconds.append(seconds / len(found))
            self.own.append(self.device.stats.sources.count("device") / len(found))

    @property
    def speed(self) -> float:
        """Tokens a second, from the question on, of the median answer."""
        return 1.0 / statistics.median(self.seconds)


def ways(bundle: Bundle, flash: float, address: str, keys: Path, opened: ExitStack) -> list[Way]:
    """The four devices."""
    layers = [bundle.records(i) for i in range(bundle.config.n_layers)]
    mb = SHARE * sum(one.n_experts * sum(one.plane_sizes) for one in layers) / 1e6
    exact, cloud = (ExpertSettings(mb, flash_mb_s=flash, mode=mode) for mode in ("exact", "cloud"))
    asked: dict[str, dict[str, Any]] = {
        ALONE: {"experts": exact, "mode": "local"},
        STREAM: {"cloud": address, "mode": "stream"},
        AUTO: {"cloud": address, "experts": exact},
        CLOUD: {"cloud": address, "experts": cloud},
    }
    found = []
    for name, settings in asked.items():
        settings = settings if name == ALONE else {**settings, "keys": keys}
        found.append(Way(name, opened.enter_context(Device(bundle.path, threads=1, **settings))))
    return found


def scene(record: Record, bundle: Bundle, flash: float, trip: float, asked: argparse.Namespace) -> list[Cell]:
    """One speed of flash and one round trip; a row of the table."""
    say(f"flash {flash:g} MB/s, round trip {trip:g} ms")
    link = LinkProfile.of_rtt(trip, rate_up_bps=RATE_BPS, rate_down_bps=RATE_BPS)
    with ExitStack() as opened:
        os.environ["ISTHMUS_CACHE"] = opened.enter_context(TemporaryDirectory())  # nothing is known from other times
        keys = opened.enter_context(fresh_keys())
        cloud = opened.enter_context(CloudProcess(bundle.path, keys, 1))
        relay = opened.enter_context(Relay(cloud.address, link))
        each = ways(bundle, flash, relay.address, keys, opened)
        for turn in range(WARM + asked.answers):
            for way in each:
                way.ask(QUESTIONS[turn % len(QUESTIONS)], asked.tokens, counts=turn >= WARM)
    alone, stream, auto, own = each
    name = f"{flash:g} MB/s, {trip:g} ms"
    fastest = max((alone, stream), key=lambda way: way.speed)
    for way in each:
        record.figure(f"{way.name}/{name}", way.speed, "tok/s")
    record.figure(f"best/{name}", auto.speed, "tok/s", target=NEAR, of=f"{fastest.name}/{name}")
    record.figure(f"own/{name}", own.speed, "tok/s", target=NEAR, of=f"{alone.name}/{name}")
    other = sum(a != b for way in each for a, b in zip(alone.texts, way.texts, strict=True))
    record.figure(f"other texts/{name}", other, "answers", target=0, at_most=True)
    shares = [f"{statistics.mean(way.own):.0%}" for way in (auto, own)]
    return [f"{flash:g}", f"{trip:g}", alone.speed, stream.speed, auto.speed, shares[0], own.speed, shares[1]]


def main() -> None:
    """Measures and writes results/stalls.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=4, help="of each device that count")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    asked = parser.parse_args()
    settings = {**vars(asked), "share": SHARE, "threads": 1, "rate_mbps": RATE_BPS / 1e6}
    record = Record("stalls", settings)
    bundle = converted()
    rows = [scene(record, bundle, flash, trip, asked) for flash in FLASH_MB_S for trip in TRIPS_MS]
    columns = ["flash MB/s", "round trip ms", ALONE, STREAM, AUTO, "here", CLOUD, "here"]
    note = (
        "Tokens a second from the question to the last token, medians of answers; here: the share of tokens computed "
        "on this device. A quarter of the experts in memory, flash and link emulated, device and cloud on one machine."
    )
    record.table("stalls", columns, rows, note=note)
    record.write()


if __name__ == "__main__":
    main()
