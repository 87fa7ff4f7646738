"""Experts on a device that cannot hold them: a model of OLMoE's shape in 4 bits, with a real text's routing.

Weights are random: they say how fast, and nothing else. The routing is that of SmolLM2 as `isthmus moefy --experts 64
--active 8` converts it, over its first 16 layers, along held-out documents. Contenders take turns: all experts in
memory, none but those of the layer under way, least recently used ones read when they are wanted, and ours. Whoever
reads computes with what is there meanwhile, least recently used as well.

usage: python benchmarks/experts.py [--rounds 5] [--tokens 60] [--long 2000]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import olmoe
from models import BENCH
from record import Cell, Record

from isthmus.edge.experts.policy import POLICIES
from isthmus.edge.experts.report import ExpertReport
from isthmus.edge.experts.simulate import foresight, hit_rate
from isthmus.edge.experts.store import ExpertStore, floor_bytes
from isthmus.engine import KvConfig
from isthmus.engine.native_part import NativePart, open_native
from isthmus.engine.part import Rows, Want
from isthmus.engine.routing import Routing
from isthmus.split.bundle import Bundle
from isthmus.split.exit_samples import divided, text_files
from isthmus.split.fetch import fetch

POSITIONS, DOCUMENT = 3000, 512
WATCHED = 40  # tokens after which memory is looked at, and a new sequence begins
SHARES = (0.125, 0.25, 0.5)
PUBLISHED = {0.25: "47-62 %"}  # OLMoE's least recently used
PLANES = 2  # 4 bits


def say(what: str) -> None:
    """What is under way."""
    print(what, file=sys.stderr, flush=True)


def window(routing: Routing, at: int, tokens: int) -> Routing:
    """The record from a position on, as if it began there; behind its end it begins again."""
    places = np.arange(at, at + tokens) % len(routing.chosen)
    return Routing(routing.chosen[places], routing.weights[places], routing.foreseen[places])


def every_expert() -> Routing:
    """Takes each expert of each layer once."""
    turns = np.arange(olmoe.EXPERTS, dtype=np.int32).reshape(-1, 1, olmoe.ACTIVE)
    chosen = np.ascontiguousarray(np.repeat(turns, olmoe.LAYERS, axis=1))
    return Routing(chosen, np.ones(chosen.shape, np.float32), chosen)


def converted() -> Bundle:
    """SmolLM2 as a mixture, made once."""
    folder = BENCH / "smollm2-64x8"
    if not folder.exists():
        say("converting SmolLM2 to experts, some minutes")
        command = [sys.executable, "-m", "isthmus.apps.cli", "moefy", "smollm2", "--experts", "64", "--active", "8"]
        subprocess.run([*command, "-o", str(folder), "--text", str(fetch("texts"))], check=True)
    return Bundle.open(folder)


def recorded(bundle: Bundle) -> Routing:
    """The routing of the converted model along held-out documents, over as many layers as OLMoE has."""
    part = open_native(bundle, 0, bundle.config.n_layers, kv=KvConfig(max_tokens=1024))
    tokenizer, found, count = bundle.tokenizer(), list[Routing](), 0
    for text in divided(text_files([fetch("texts")])).held:
        tokens = tokenizer.encode(text)[:DOCUMENT]
        routing, sequence = part.record(len(tokens)), part.open()
        assert routing is not None
        part.step(Rows().tokens(sequence, 0, tokens, want=Want.NONE))
        sequence.close()
        found.append(routing)
        count += len(tokens)
        if count >= POSITIONS:
            break
    part.close()
    arrays = (
        np.concatenate([getattr(one, name)[:, : olmoe.LAYERS] for one in found])
        for name in ("chosen", "weights", "foreseen")
    )
    chosen, weights, foreseen = (np.ascontiguousarray(array[:POSITIONS]) for array in arrays)
    return Routing(chosen, weights, foreseen)


@dataclass
class Contender:
    """A way to hold experts, and what it took."""

    name: str
    store: ExpertStore
    part: NativePart
    routing: Routing
    ms: list[float] = field(default_factory=list)  # of each token
    waited: list[float] = field(default_factory=list)  # ms of a token, by round
    read: list[float] = field(default_factory=list)  # bytes of a token, by round
    needed: list[float] = field(default_factory=list)  # those of them that a router named
    busy: list[float] = field(default_factory=list)  # s of reading in a round
    at: int = 0

    @classmethod
    def open(cls, name: str, bundle: Bundle, routing: Routing, budget: int, **settings: Any) -> Contender:
        store = ExpertStore(bundle, budget, planes=PLANES, **settings)
        source = bundle.without_experts()
        part = open_native(source, 0, olmoe.LAYERS, kv=KvConfig(max_tokens=512), experts=store)
        return cls(name, store, part, routing)

    def run(self, tokens: int, *, counts: bool) -> None:
        """Decodes so many tokens, going on where it ended before."""
        size = float(np.mean(self.store.plane_sizes))
        self.part.replay(window(self.routing, self.at, tokens))
        self.at += tokens
        before, waited = ExpertReport.of(self.store), self.part.waited
        times = self.decode(tokens)
        after = ExpertReport.of(self.store)
        if not counts:
            return
        self.ms += times
        self.waited.append(1e3 * (self.part.waited - waited) / tokens)
        self.read.append((after.read_bytes - before.read_bytes) / tokens)
        self.busy.append(after.reading_seconds - before.reading_seconds)
        in_vain = [one.read_ahead - one.taken_ahead for one in (before, after)]
        self.needed.append(self.read[-1] - size * (in_vain[1] - in_vain[0]) / tokens)

    def decode(self, tokens: int) -> list[float]:
        """Milliseconds of each token of a new sequence."""
        sequence, token, times = self.part.open(), 5, list[float]()
        for i in range(tokens):
            begin = time.perf_counter()
            token = self.part.step(Rows().tokens(sequence, i, [token], want=Want.SAMPLE)).tokens[0]
            times.append(1e3 * (time.perf_counter() - begin))
        sequence.close()
        return times

    @property
    def token_ms(self) -> float:
        return statistics.median(self.ms)

    def close(self) -> None:
        self.part.close()
        self.store.close()


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind, by its own counter."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("the kernel does not say")


def cached_bytes(bundle: Bundle) -> int:
    """Bytes of the expert files in the page cache."""
    names = [str(bundle.path / name) for name in bundle.manifest.files if "experts-" in name]
    done = subprocess.run(["fincore", "-b", "-n", "-o", "RES", *names], capture_output=True, text=True, check=True)
    return sum(int(line) for line in done.stdout.split())


def keeps_its_budget(bundle: Bundle, routing: Routing, budget: int, tokens: int) -> tuple[float, float]:
    """The most bytes of experts in memory, page cache included, as a share of the budget; and the median ms a token."""
    source = bundle.without_experts()
    store = ExpertStore(bundle, budget, planes=PLANES)
    part = open_native(source, 0, olmoe.LAYERS, kv=KvConfig(max_tokens=WATCHED), experts=store)
    before = anonymous_bytes() - cached_bytes(bundle)
    watched = Contender("budget", store, part, routing)
    most, times = 0, list[float]()
    for start in range(0, tokens, WATCHED):
        part.replay(window(routing, start, WATCHED))
        times += watched.decode(WATCHED)
        most = max(most, anonymous_bytes() + cached_bytes(bundle) - before)
    kv = sum(layers.pool.memory.nbytes for layers in part._layers)
    share = (most - kv) / budget
    part.close()
    store.close()
    return share, statistics.median(times)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=60, help="of a round")
    parser.add_argument("--long", type=int, default=2000, help="tokens over which budgets are watched")
    asked = parser.parse_args()
    record = Record("experts", settings={**vars(asked), "weights": "random", "bits": 4})
    routing = recorded(converted())
    rates(record, routing)
    folder = BENCH / "olmoe-shape"
    say("writing a model of OLMoE's shape, 7.5 GB")
    bundle = olmoe.make(folder)
    try:
        measure(record, bundle, routing, asked)
    finally:
        shutil.rmtree(folder)
    record.write()


def rates(record: Record, routing: Routing) -> None:
    """Hit rates without a model."""
    say("hit rates")
    warm, rows = 300, list[list[Cell]]()
    for share in SHARES:
        capacity = int(share * olmoe.EXPERTS * olmoe.LAYERS)
        found = {p: hit_rate(routing, olmoe.EXPERTS, capacity, p, warm=warm) for p in (*POLICIES, "belady")}
        for policy, rate in found.items():
            record.figure(f"hits/{share:g}/{policy}", rate, "of experts")
        rows.append([f"{share:.1%}", *found.values(), PUBLISHED.get(share, "")])
    record.figure("foresight", foresight(routing), "of experts")
    note = (
        f"Share of experts in memory when a layer takes them, along {len(routing.chosen) - warm:,} tokens; LFRU counts "
        f"uses half after 16 tokens. The next layer's router, asked one layer early, names {foresight(routing):.1%} of "
        "the experts that are then taken. OLMoE itself: as published."
    )
    record.table("hits", ["memory", "LRU", "LFU", "LFRU", "Belady", "OLMoE itself, LRU"], rows, note=note)


def measure(record: Record, bundle: Bundle, routing: Routing, asked: argparse.Namespace) -> None:
    """Speeds, and budgets."""
    experts = {i: bundle.records(i) for i in range(olmoe.LAYERS)}
    whole = olmoe.LAYERS * olmoe.EXPERTS * sum(experts[0].plane_sizes[:PLANES])
    least = floor_bytes(experts, dict.fromkeys(experts, PLANES), olmoe.ACTIVE)
    quarter = whole // 4
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "all in memory": (whole, {"policy": "lru", "foresee": False}),
        "no cache": (least, {"policy": "lru", "foresee": False}),
        "LRU, on demand": (quarter, {"policy": "lru", "foresee": False}),
        "LFRU": (quarter, {"foresee": False}),
        "LFRU, read ahead": (quarter, {}),
    }
    contenders = [
        Contender.open(name, bundle, routing, budget, **settings) for name, (budget, settings) in ways.items()
    ]
    for one in contenders:
        if one.name == "all in memory":
            one.part.replay(every_expert())
            one.decode(olmoe.EXPERTS // olmoe.ACTIVE)
        one.run(asked.tokens * 2, counts=False)
    for turn in range(asked.rounds):
        say(f"round {turn + 1} of {asked.rounds}")
        for one in contenders:
            one.run(asked.tokens, counts=True)
    resident, bare, lru, _, ours = contenders
    bandwidth = max(sum(one.read) * asked.tokens / sum(one.busy) for one in contenders[1:])
    rows = list[list[Cell]]()
    for one in contenders:
        exposed = one.token_ms - resident.token_ms
        roofline = max(resident.token_ms, 1e3 * statistics.median(one.needed) / bandwidth)
        rows.append(
            [
                one.name,
                1e3 / one.token_ms,
                statistics.median(one.read) / 1e6,
                max(0.0, exposed),
                roofline / one.token_ms,
            ]
        )
        record.figure(f"speed/{one.name}", 1e3 / one.token_ms, "tok/s")
    record.figure("flash", bandwidth / 1e9, "GB/s")
    record.figure("exact/speed", 1e3 / ours.token_ms, "tok/s", target=1.2, of=f"speed/{lru.name}")
    record.figure("bare/exposed", bare.token_ms - resident.token_ms, "ms a token")
    exposed = ours.token_ms - resident.token_ms
    record.figure("exact/exposed", exposed, "ms a token", target=0.4, of="bare/exposed", at_most=True)
    needed = 1e3 * statistics.median(ours.needed) / bandwidth
    record.figure("exact/roofline", max(resident.token_ms, needed) / ours.token_ms, "of it", target=0.85)
    note = (
        f"A quarter of the experts in memory, {quarter / 1e6:,.0f} MB of {whole / 1e6:,.0f}; with no cache one "
        f"layer's. Exposed: what a token takes longer than with all in memory. Roofline: max(compute, bytes over "
        f"bandwidth) at {bandwidth / 1e9:.2f} GB/s of reading, of the bytes that routers name."
    )
    columns = ["experts", "tokens/s", "MB read a token", "exposed ms a token", "of the roofline"]
    record.table("speed", columns, rows, note=note)
    for one in contenders:
        one.close()
    for share in SHARES:
        say(f"{asked.long} tokens in {share:.1%}")
        most, ms = keeps_its_budget(bundle, routing, int(share * whole), asked.long)
        record.figure(f"budget/{share:g}", most, "of it", target=1.05, at_most=True)
        record.figure(f"budget/{share:g}/speed", 1e3 / ms, "tok/s")


if __name__ == "__main__":
    main()
