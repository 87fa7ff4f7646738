"""How far is a plan's prediction from what really happens? Networks over emulated links, every split that is planned.

A device that is declared to be four times as slow as this machine and a cloud on it share each network in every way
that its plan lists as a split, over a relay; the link is measured first, as a user would (`isthmus profile --remote`),
or replays a trace. Held against each other are the plan's milliseconds for an input and the median (over a trace: the
mean from random moments of it on) of inferences from a device process to a cloud process.

usage: python benchmarks/planner.py [--only NAME,...] [--runs 21]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
from networks import Network, networks
from record import Cell, Record

from isthmus.apps.bench.calm import Calm
from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.apps.bench.relay import LinkProfile, Relay
from isthmus.edge.graph import GraphDevice
from isthmus.protocol.errors import PlanError
from isthmus.protocol.keys import read_device
from isthmus.protocol.survey import survey
from isthmus.protocol.transport import DealerTransport
from isthmus.split import onnx_measure, onnx_plan
from isthmus.split.graph_writer import write_graph
from isthmus.split.link import LinkFile
from isthmus.split.onnx_file import read_model
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.plan import Plan, Row
from isthmus.split.profile import Profile
from isthmus.split.timing import PAUSE_S
from isthmus.split.traces import turned

SLOW = 4.0  # times that the device is slower than this machine, declared
WARM = 3
MEDIAN, P95 = 0.08, 0.20
LINKS: Mapping[str, LinkProfile] = {
    "LAN, 2 ms, 200 Mbit/s": LinkProfile.of_rtt(2, rate_up_bps=200_000_000, rate_down_bps=200_000_000),
    "Wi-Fi, 10 ms, 40 Mbit/s": LinkProfile.of_rtt(10, rate_up_bps=40_000_000, rate_down_bps=80_000_000),
    "LTE, 40 ms, 8 Mbit/s": LinkProfile.of_rtt(40, rate_up_bps=8_000_000, rate_down_bps=30_000_000),
    "synthetic trace, 20 ms": LinkProfile.of_traces("synthetic", 20),
}


def main() -> int:
    """Measures and writes results/planner.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks, by name, with commas between")
    parser.add_argument("--runs", type=int, default=21, help="inferences of each way")
    options = parser.parse_args()
    only = set(filter(None, options.only.split(",")))
    record = Record("planner", {"device slow-down": SLOW, "threads": "1 on each side", "runs": options.runs})
    rows: list[list[Cell]] = []
    off: list[float] = []
    with TemporaryDirectory(prefix="isthmus-planner-") as work, fresh_keys() as keys:
        for network in networks():
            if only and network.name not in only:
                continue
            stand = Stand(network, Path(work), keys, options.runs)
            for link in LINKS:
                for row, measured_ms in stand.measured(link):
                    error = abs(row.ms - measured_ms) / measured_ms
                    off += [error] if row.kind == "split" else []
                    rows.append([network.name, link, row.name, row.ms, measured_ms, error])
                    print(*rows[-1], sep="; ", file=sys.stderr, flush=True)
    record.figure("ways", len(off), "ways")
    record.figure("off by, median", statistics.median(off), "of the measured", target=MEDIAN, at_most=True)
    record.figure("off by, 95 %", float(np.quantile(off, 0.95)), "of the measured", target=P95, at_most=True)
    columns = ["network", "link", "way", "planned, ms", "measured, ms", "off by"]
    record.table("planner", columns, rows, note="Of an input, from the device's call to its outputs.")
    record.write()
    return 0


class Stand:
    """One network: profiled, planned for each link, and cut as the plans say.

    Args:
        work: a folder for its files.
    """

    def __init__(self, network: Network, work: Path, keys: Path, runs: int) -> None:
        self._network, self._keys, self._runs = network, keys, runs
        self._work = work / network.name.replace(" ", "-")
        self._work.mkdir()
        self._calm = Calm()
        graph = OnnxGraph(read_model(network.path))
        feeds = onnx_measure.given(graph, network.known_shapes, "") | dict(network.values)
        self._feeds = {name: np.asarray(value) for name, value in feeds.items()}
        self._given = self._work / "given.npz"
        np.savez(self._given, **self._feeds)  # type: ignore[arg-type]
        self._calm.wait(30.0)
        told = onnx_measure.measure(str(network.path), 1, network.known_shapes, 3.0, str(self._given))
        cloud = Profile.of(told, "this", "this")
        slower: dict[str, Any] = {name: SLOW * getattr(cloud, name) for name in ("whole_ms", "first_ms")}
        slower["nodes_ms"] = tuple(SLOW * ms for ms in cloud.nodes_ms)
        cloud.save(self._work / "cloud.json")
        msgspec.structs.replace(cloud, **slower).save(self._work / "device.json")
        self._cut: dict[tuple[int, ...], Path] = {}

    def measured(self, link: str) -> Iterator[tuple[Row, float]]:
        """Each split of the plan for a link, and what it really took, in ms."""
        for row in self._planned(link).rows:
            if row.kind == "split" and not row.fails:
                yield row, self._took(row, LINKS[link])

    def _planned(self, link: str) -> Plan:
        profile = LINKS[link]
        words = f"rtt={profile.rtt_ms},trace=synthetic"
        if profile.trace_up is None:
            words = str(self._surveyed(profile))
        asked = {"arrays": str(self._given)}
        here, there = (str(self._work / f"{side}.json") for side in ("device", "cloud"))
        return msgspec.convert(onnx_plan.plan(str(self._network.path), here, there, words, asked), Plan)

    def _surveyed(self, profile: LinkProfile) -> Path:
        """A link's file, as `isthmus profile --remote` writes it."""
        bundle = self._bundle(self._first_cut())
        with CloudProcess(bundle, self._keys, 1) as cloud, Relay(cloud.address, profile) as relay:
            transport = DealerTransport(relay.address, read_device(self._keys))
            try:
                found = survey(transport)
            finally:
                transport.close()
        path = self._work / "link.json"
        LinkFile(found.trip_ms, found.up_bps / 1e6, found.down_bps / 1e6).save(path)
        return path

    def _first_cut(self) -> tuple[int, ...]:
        """Of the places where the network can be cut, for a cloud that is only asked about the link."""
        graph = OnnxGraph(read_model(self._network.path))
        for end in range(1, len(graph.nodes)):
            with suppress(PlanError):
                graph.halves(range(end))
                return tuple(range(end))
        raise PlanError(f"{self._network.name} cannot be cut", "take another network")

    def _bundle(self, nodes: tuple[int, ...]) -> Path:
        if nodes not in self._cut:
            path = self._work / f"cut-{len(self._cut)}"
            shapes = {name: list(value.shape) for name, value in self._feeds.items()}
            write_graph(str(self._network.path), "", nodes, str(path), shapes=shapes, arrays=str(self._given))
            self._cut[nodes] = path
        return self._cut[nodes]

    def _took(self, row: Row, profile: LinkProfile) -> float:
        bundle = self._bundle(row.device)
        self._calm.wait(30.0)
        with CloudProcess(bundle, self._keys, 1) as cloud:
            if profile.trace_up is None:
                return statistics.median(self._inferred(bundle, cloud, profile, self._runs))
            chance = np.random.default_rng(0)
            starts_s = chance.uniform(0.0, profile.trace_up.period_ms / 1e3, self._runs)
            return statistics.fmean(
                ms for start_s in starts_s for ms in self._inferred(bundle, cloud, _from(profile, start_s), 1)
            )

    def _inferred(self, bundle: Path, cloud: CloudProcess, profile: LinkProfile, runs: int) -> list[float]:
        """Milliseconds of so many inferences, after some that are not counted."""
        with (
            Relay(cloud.address, profile) as relay,
            GraphDevice(bundle, relay.address, mode="split", keys=self._keys, threads=1, slow_down=SLOW) as device,
        ):
            took = []
            for run in range(WARM + runs):
                began = time.perf_counter()
                device.infer(self._feeds)
                if run >= WARM:
                    took.append((time.perf_counter() - began) * 1e3)
                time.sleep(PAUSE_S)
        return took


def _from(profile: LinkProfile, start_s: float) -> LinkProfile:
    """A link whose traces begin where they are after some seconds."""
    assert profile.trace_up is not None and profile.trace_down is not None
    return replace(profile, trace_up=turned(profile.trace_up, start_s), trace_down=turned(profile.trace_down, start_s))


if __name__ == "__main__":
    sys.exit(main())
