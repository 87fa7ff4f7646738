"""How far is a plan's prediction from what really happens? Networks over emulated links, every way that is planned.

A device that is declared to be four times as slow as this machine and a cloud on it share each network in every way
that its plan lists, over a relay; the link is measured first, as a user would (`isthmus profile --remote`), or replays
a trace. Held against each other are the plan's milliseconds for an input and the median of inferences from a device
process to a cloud process; over a trace, where the plan's are a mean over all moments, what its replay says of the
moments at which these inferences began and what they took, both in the mean. The way that a plan recommends is held
against what its baselines (all on the device; the input, or the picture as JPEG or WebP, to the cloud) really took;
over a trace, a few of whose moments were measured, each is brought to all of them: it takes as many times what the plan
says as it did then. EfficientNet-Lite0 is planned with photographs, so that codecs are tried on it. Each network over
each link is kept when it is done, by commit: a run that was stopped is gone on with, and `--only` and `--links` measure
some again.

usage: python benchmarks/planner.py [--only NAME,...] [--links WORD,...] [--runs 21]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
from efficientnet import SIZE
from kept import Kept
from models import BENCH
from networks import PREPROCESS, Network, networks, photographs
from PIL import Image
from record import ROOMS, Cell, Record, commit

from isthmus.apps.bench.calm import Calm
from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.apps.bench.relay import LinkProfile, Relay
from isthmus.edge import Timeouts
from isthmus.edge.graph import GraphDevice, GraphMode
from isthmus.protocol.features import is_codec
from isthmus.protocol.keys import read_device
from isthmus.protocol.pictures import names_picture
from isthmus.protocol.survey import survey
from isthmus.protocol.transport import DealerTransport
from isthmus.split import onnx_measure, onnx_plan
from isthmus.split.graph_bundle import GraphBundle
from isthmus.split.graph_writer import write_graph
from isthmus.split.link import Link, LinkFile
from isthmus.split.onnx_file import read_model
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_network import SERVICE_MS
from isthmus.split.pictures import Preprocess
from isthmus.split.plan import Plan, Row
from isthmus.split.profile import Profile
from isthmus.split.replay import latencies
from isthmus.split.traces import turned

NETWORKS = 5
NOTE = (
    "Of an input, from the device's call to its outputs. Over the trace: what the plan's replay says of the moments at "
    "which the measured inferences began, in the mean."
)
SLOW = 4.0  # times that the device is slower than this machine, declared
WARM = 3
MEDIAN, P95 = 0.08, 0.20
PHOTOGRAPHS = 16  # that codecs are tried on
PAUSE_S, MOST_PAUSE_S = 0.03, 0.5  # between an answer and the next input; over a trace a random one, at most
STARTS = 3  # moments of a trace, from which inferences go on
PLANS = (
    *ROOMS,
    *(f"benchmarks/{name}.py" for name in ("planner", "networks", "efficientnet", "minilm")),
)  # what a plan and its ways depend on
LINKS: Mapping[str, LinkProfile] = {
    "LAN, 2 ms, 200 Mbit/s": LinkProfile.of_rtt(2, rate_up_bps=200_000_000, rate_down_bps=200_000_000),
    "Wi-Fi, 10 ms, 40 Mbit/s": LinkProfile.of_rtt(10, rate_up_bps=40_000_000, rate_down_bps=80_000_000),
    "LTE, 40 ms, 8 Mbit/s": LinkProfile.of_rtt(40, rate_up_bps=8_000_000, rate_down_bps=30_000_000),
    "synthetic trace, 20 ms": LinkProfile.of_traces("synthetic", 20),
}


@dataclass(frozen=True, slots=True)
class Found:
    """A way of a plan.

    Attributes:
        best: whether the plan recommends it.
        up_bytes: that the plan says travel up for an input.
        agreement: with the unsplit model, where that was tried.
        mean_ms: that the plan says of all moments of a trace; 0 where they are alike.
    """

    network: str
    link: str
    way: str
    kind: str
    best: bool
    planned_ms: float
    measured_ms: float
    commit: str | None
    up_bytes: float
    agreement: float | None
    mean_ms: float = 0.0

    @property
    def took_ms(self) -> float:
        """What it takes, of a trace over all its moments."""
        return self.measured_ms * (self.mean_ms / self.planned_ms if self.mean_ms else 1.0)

    @property
    def off(self) -> float:
        """The plan's error, of what was measured."""
        return abs(self.planned_ms - self.measured_ms) / self.measured_ms


def main() -> int:
    """Measures and writes results/planner.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks, by name, with commas between")
    parser.add_argument("--links", default="", help="links, by words of their names, with commas between")
    parser.add_argument("--runs", type=int, default=21, help="inferences of each way")
    options = parser.parse_args()
    only, words = (set(filter(None, text.split(","))) for text in (options.only, options.links))
    kept = Kept(BENCH / f"planner-{options.runs}.jsonl", Found)
    known = {(one.network, one.link): one.commit for one in kept.found}  # the last of each
    made, names = commit(PLANS), list[str]()
    with TemporaryDirectory(prefix="isthmus-planner-") as work, fresh_keys() as keys:
        for network in networks():
            names.append(network.name)
            wanted = list[str]()
            for link in (link for link in LINKS if not words or any(word in link for word in words)):
                old = known.get((network.name, link)) != made or made is None or made.endswith("+")
                wanted += [link] if network.name in only or (not only and (old or words)) else []
            stand = Stand(network, Path(work), keys, options.runs) if wanted else None
            for link in wanted:
                assert stand is not None
                kept.add(stand.found(link))
                known[network.name, link] = made
    record = Record("planner", {"device slow-down": SLOW, "threads": "1 on each side", "runs": options.runs})
    last = (one for one in kept.found if one.commit == known[one.network, one.link])
    played = {(one.network, one.link, one.way): one for one in last}
    tell(record, sorted(played.values(), key=lambda one: names.index(one.network)), known)
    record.write()
    return 0


def tell(record: Record, found: Sequence[Found], known: Mapping[tuple[str, str], str | None]) -> None:
    """Figures and the table."""
    off = [one.off for one in found if one.kind == "split"]
    plans: dict[tuple[str, str], list[Found]] = {}
    for one in found:
        plans.setdefault((one.network, one.link), []).append(one)
    record.figure("networks over links", len(plans), "plans", target=NETWORKS * len(LINKS))
    record.figure("ways", len(found), "ways")
    record.figure("splits", len(off), "splits")
    record.figure("off by, median", statistics.median(off), "of the measured", target=MEDIAN, at_most=True)
    record.figure("off by, 95 %", float(np.quantile(off, 0.95)), "of the measured", target=P95, at_most=True)
    lost = [_best(plan) / min(one.took_ms for one in plan if one.kind != "split") for plan in plans.values()]
    record.figure("recommended over best baseline, worst", max(lost), "ratio", target=1.0, at_most=True)
    beaten = [_best(plan) / min(one.took_ms for one in plan) for plan in plans.values()]
    record.figure("recommended over best way, worst", max(beaten), "ratio")
    webp = [share for plan in plans.values() if (share := _of_webp(plan)) is not None]
    if webp:
        record.figure("recommended split's bytes of WebP's, worst", max(webp), "ratio", target=1.0, at_most=True)
    for (name, link), made in known.items():
        if made != commit(PLANS):
            record.notes.append(f"{name} over {link} was measured at commit {made}")
    rows: list[list[Cell]] = [
        [one.network, one.link, one.way, "recommended" if one.best else "", one.planned_ms, one.measured_ms, one.off]
        for one in found
    ]
    summary: list[list[Cell]] = []
    for (network, link), plan in plans.items():
        best = next(one for one in plan if one.best)
        others = [one for one in plan if one.kind != "split"]
        fastest = min(others, key=lambda one: one.took_ms)
        errors = [one.off for one in plan if one.kind == "split"]
        row: list[Cell] = [network, link, best.way, best.planned_ms, best.measured_ms, fastest.way, fastest.measured_ms]
        summary.append([*row, len(errors), statistics.median(errors) if errors else None])
    columns = ["network", "link", "recommended", "planned, ms", "measured, ms", "best baseline", "it took, ms"]
    record.table("summary", [*columns, "splits measured", "off by, median"], summary, note=NOTE)
    columns = ["network", "link", "way", "", "planned, ms", "measured, ms", "off by"]
    record.table("planner", columns, rows, note=NOTE)


def _of_webp(plan: Sequence[Found]) -> float | None:
    """The recommended split's bytes over those of the picture as WebP; None where either is not there."""
    split = next((one.up_bytes for one in plan if one.best and one.kind == "split"), None)
    webp = next((one.up_bytes for one in plan if one.kind == "image" and "WebP" in one.way), None)
    return split / webp if split is not None and webp is not None else None


def _best(plan: Sequence[Found]) -> float:
    """What the recommended way took."""
    return next(one.took_ms for one in plan if one.best)


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
        self._cut: dict[tuple[Any, ...], Path] = {}
        self._tries: dict[str, str] = {}
        if network.name.startswith("EfficientNet"):
            folder, how = self._work / "photographs", self._work / "how.json"
            folder.mkdir()
            for at, picture in enumerate(photographs()[:: len(photographs()) // PHOTOGRAPHS][:PHOTOGRAPHS]):
                Image.fromarray(picture).save(folder / f"{at:02}.png")
            how.write_text(json.dumps(PREPROCESS | {"resize": SIZE}))
            self._tries = {"folder": str(folder), "preprocess": str(how)}
            self._pictures = sorted(folder.iterdir())

    def found(self, link: str) -> list[Found]:
        """Each way of the plan for a link that keeps to what was asked for, and what it really took."""
        plan, profile, ways = self.planned(link), LINKS[link], list[Found]()
        for row in (row for row in plan.rows if not row.fails):
            planned_ms, measured_ms = self._took(plan, row, profile)
            name, best, mean_ms = self._network.name, row is plan.rows[plan.best], row.ms if profile.trace_up else 0.0
            sent = (row.up_bytes, row.agreement, mean_ms)
            ways.append(Found(name, link, row.name, row.kind, best, planned_ms, measured_ms, commit(PLANS), *sent))
            print(ways[-1], file=sys.stderr, flush=True)
        return ways

    def planned(self, link: str) -> Plan:
        """The plan for a link, on what device and cloud take now."""
        self._profile()
        profile = LINKS[link]
        words = f"rtt={profile.rtt_ms},trace=synthetic"
        if profile.trace_up is None:
            words = str(self._surveyed(profile))
        asked = self._tries or {"arrays": str(self._given)}
        here, there = (str(self._work / f"{side}.json") for side in ("device", "cloud"))
        return msgspec.convert(onnx_plan.plan(str(self._network.path), here, there, words, asked), Plan)

    def _profile(self) -> None:
        self._calm.wait(30.0)
        told = onnx_measure.measure(str(self._network.path), 1, self._network.known_shapes, 3.0, str(self._given))
        cloud = Profile.of(told, "this", "this")
        slower: dict[str, Any] = {name: SLOW * getattr(cloud, name) for name in ("whole_ms", "first_ms")}
        slower["nodes_ms"] = tuple(SLOW * ms for ms in cloud.nodes_ms)
        cloud.save(self._work / "cloud.json")
        msgspec.structs.replace(cloud, **slower).save(self._work / "device.json")

    def _surveyed(self, profile: LinkProfile) -> Path:
        """A link's file, as `isthmus profile --remote` writes it."""
        bundle = self._bundle(None, None)
        with CloudProcess(bundle, self._keys, 1) as cloud, Relay(cloud.address, profile) as relay:
            transport = DealerTransport(relay.address, read_device(self._keys))
            try:
                found = survey(transport)
            finally:
                transport.close()
        path = self._work / "link.json"
        LinkFile(found.trip_ms, found.up_bps / 1e6, found.down_bps / 1e6).save(path)
        return path

    def _bundle(self, plan: Plan | None, row: Row | None) -> Path:
        """A way, written; by default all of it in the cloud."""
        codec = row.codec if row is not None and is_codec(row.codec) else ""
        device = row.device if row is not None and row.kind != "device" else ()
        transforms = msgspec.to_builtins(row.transforms) if row is not None else []
        key = device, codec, row.name if transforms and row is not None else ""
        if key not in self._cut:
            path = self._work / f"cut-{len(self._cut)}"
            shapes = {name: list(value.shape) for name, value in self._feeds.items()}
            more: dict[str, Any] = {"codec": codec, "transforms": transforms}
            if names_picture(codec) and plan is not None:
                more["preprocess"] = msgspec.to_builtins(plan.preprocess)
            else:
                more["arrays"] = str(self._given)
            write_graph(str(self._network.path), "", device, str(path), shapes=shapes, **more)
            self._cut[key] = path
        return self._cut[key]

    def _took(self, plan: Plan, row: Row, profile: LinkProfile) -> tuple[float, float]:
        """What the plan says that inferences take, and what they took, in ms."""
        bundle = GraphBundle.open(self._bundle(plan, row))
        self._calm.wait(30.0)
        if row.kind == "device":
            return row.ms, statistics.median(ms for _, ms in self._inferred(bundle, None, self._runs))
        with CloudProcess(bundle.path, self._keys, 1) as cloud:
            if profile.trace_up is None or profile.trace_down is None:
                with Relay(cloud.address, profile) as relay:
                    return row.ms, statistics.median(ms for _, ms in self._inferred(bundle, relay, self._runs))
            chance, planned, found = np.random.default_rng(0), list[float](), list[float]()
            for start_s in chance.uniform(0.0, profile.trace_up.period_ms / 1e3, STARTS):
                there = _from(profile, start_s)
                with Relay(cloud.address, there) as relay:
                    began_s = time.perf_counter()
                    took = self._inferred(bundle, relay, self._runs // STARTS, chance)
                at_ms = np.array([(at_s - began_s) * 1e3 for at_s, _ in took])
                assert there.trace_up is not None and there.trace_down is not None
                link = Link(there.rtt_ms, there.trace_up, there.trace_down)
                planned += list(latencies(row, link, beside_ms=SERVICE_MS, at_ms=at_ms))
                found += [ms for _, ms in took]
            return statistics.fmean(planned), statistics.fmean(found)

    def _inferred(
        self, bundle: GraphBundle, relay: Relay | None, runs: int, chance: np.random.Generator | None = None
    ) -> list[tuple[float, float]]:
        """When each of so many inferences began (s), and its ms, after some that are not counted; here without a relay.

        Args:
            chance: draws how long to wait before the next one, else it is always as long.
        """
        feeds, (given,) = [self._feeds], [one.name for one in bundle.manifest.inputs][:1]
        if self._tries:  # the photographs in turn: of noise, more would travel
            how = bundle.manifest.preprocess or msgspec.convert(PREPROCESS | {"resize": SIZE}, Preprocess)
            feeds = [{given: how.array(how.shown(path))} for path in self._pictures]
        address = relay.address if relay is not None else None
        mode: GraphMode = "split" if relay is not None else "local"
        more: dict[str, Any] = {"mode": mode, "timeouts": Timeouts(connect_ms=60_000, give_up_ms=60_000)}  # of traces
        with GraphDevice(bundle, address, keys=self._keys, threads=1, slow_down=SLOW, **more) as device:
            took = []
            for run in range(WARM + runs):
                began = time.perf_counter()
                device.infer(feeds[run % len(feeds)])
                if run >= WARM:
                    took.append((began, (time.perf_counter() - began) * 1e3))
                time.sleep(PAUSE_S if chance is None else chance.uniform(0.0, MOST_PAUSE_S))
        return took


def _from(profile: LinkProfile, start_s: float) -> LinkProfile:
    """A link whose traces begin where they are after some seconds."""
    assert profile.trace_up is not None and profile.trace_down is not None
    return replace(profile, trace_up=turned(profile.trace_up, start_s), trace_down=turned(profile.trace_down, start_s))


if __name__ == "__main__":
    sys.exit(main())
