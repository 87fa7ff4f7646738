"""Experts on a device that cannot hold them: a model of OLMoE's shape in 4 bits, with a real text's routing.

Weights are random: they say how fast, and nothing else. The routing is that of SmolLM2 as `isthmus moefy --experts 64
--active 8` converts it, over its first 16 layers, along held-out documents. Contenders take turns: all experts in
memory, none but those of the layer under way, least recently used ones read when they are wanted, and ours. Whoever
reads computes with what is there meanwhile, least recently used as well. In `bounded` an expert with a small share of a
token is read with 2 bits or not at all, by the rule of `isthmus experts calibrate`, so that the mean is 3 bits.

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
from numpy.typing import NDArray
from record import Cell, Record

from isthmus.apps.bench import experts as bench
from isthmus.edge.experts.policy import POLICIES
from isthmus.edge.experts.report import ExpertReport
from isthmus.edge.experts.simulate import foresight, hit_rate
from isthmus.edge.experts.store import ExpertStore, floor_bytes
from isthmus.engine import KvConfig
from isthmus.engine.binding import Workers, default_threads
from isthmus.engine.native_layers import Layers
from isthmus.engine.native_part import NativePart, open_native
from isthmus.engine.part import Rows, Want
from isthmus.engine.recording import along, joined
from isthmus.engine.routing import Routing
from isthmus.split.bundle import Bundle
from isthmus.split.exit_samples import divided, text_files
from isthmus.split.fetch import fetch
from isthmus.split.tolerance_run import errors
from isthmus.split.tolerance_shares import mean_bits, shares_within

POSITIONS, DOCUMENT = 3000, 512
WATCHED = 40  # tokens after which memory is looked at, and a new sequence begins
SHARES = (0.125, 0.25, 0.5)
PUBLISHED = {0.25: "47-62 %"}  # OLMoE's least recently used
PLANES = 2  # 4 bits
RESIDENT, BARE, LRU, EXACT, BY_INDEX = "all in memory", "no cache", "LRU, on demand", "exact", "exact, in index order"
BOUNDED, SMALL, INT8, NAIVE = "bounded", "bounded, small", "8 bits, LRU, on demand", "8 bits, no cache"
MEAN_BITS = 3.0  # of what is bounded
FORETOLD, LIMITS_MB_S = 256, (0.0, 500.0)  # tokens along which speeds are foretold, and speeds of flash, 0 as it is


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


def tolerance(bundle: Bundle, routing: Routing) -> NDArray[np.float32]:
    """The shares that take the planes of 4 bits, least of those with which the routing reads `MEAN_BITS` at most."""
    return shares_within(errors(bundle)[: olmoe.LAYERS, : PLANES + 1], routing.weights, MEAN_BITS)


def by_index(routing: Routing) -> Routing:
    """The same experts, in the order of their numbers and of one weight."""
    chosen, foreseen = (np.sort(array, axis=2) for array in (routing.chosen, routing.foreseen))
    return Routing(chosen, np.full_like(routing.weights, 1 / routing.weights.shape[2]), foreseen)


def recorded(bundle: Bundle) -> Routing:
    """The routing of the converted model along held-out documents, over as many layers as OLMoE has."""
    part = open_native(bundle, 0, bundle.config.n_layers, kv=KvConfig(max_tokens=1024))
    tokenizer, found, count = bundle.tokenizer(), list[Routing](), 0
    for text in divided(text_files([fetch("texts")])).held:
        tokens = tokenizer.encode(text)[:DOCUMENT]
        found.append(along(part, tokens))
        count += len(tokens)
        if count >= POSITIONS:
            break
    part.close()
    every = joined(found)
    part_of = np.s_[:POSITIONS, : olmoe.LAYERS]
    return Routing(
        np.ascontiguousarray(every.chosen[part_of]),
        np.ascontiguousarray(every.weights[part_of]),
        np.ascontiguousarray(every.foreseen[part_of]),
    )


def opened(source: Bundle, store: ExpertStore, positions: int) -> NativePart:
    """All layers on threads of their own: a pool counts steps, by which experts age, and others' must not count."""
    layers = Layers(source, 0, olmoe.LAYERS, KvConfig(max_tokens=positions), store)
    return NativePart([layers], Workers(default_threads()))


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
    def open(
        cls, name: str, bundle: Bundle, routing: Routing, budget: int, *,
        shares: NDArray[np.float32] | None = None, planes: int = PLANES, **settings: Any,
    ) -> Contender:  # fmt: skip
        store = ExpertStore(bundle, budget, planes=planes, **settings)
        source = bundle.without_experts()
        part = opened(source, store, 512)
        part.tolerate(shares)
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
        vain = [size * (one.read_ahead - one.taken_ahead) + one.dropped_bytes for one in (before, after)]
        self.needed.append(self.read[-1] - (vain[1] - vain[0]) / tokens)

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
    part = opened(source, store, WATCHED)
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
    model = converted()
    routing = recorded(model)
    rates(record, routing)
    table = tolerance(model, routing)
    folder = BENCH / "olmoe-shape"
    say("writing a model of OLMoE's shape, 7.5 GB")
    bundle = olmoe.make(folder)
    try:
        measure(record, bundle, routing, table, asked)
        foretold(record, bundle, window(routing, len(routing.chosen) // 2, FORETOLD))
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


def measure(
    record: Record, bundle: Bundle, routing: Routing, table: NDArray[np.float32], asked: argparse.Namespace
) -> None:
    """Speeds, and budgets."""
    experts = {i: bundle.records(i) for i in range(olmoe.LAYERS)}
    whole = olmoe.LAYERS * olmoe.EXPERTS * sum(experts[0].plane_sizes[:PLANES])
    least = floor_bytes(experts, dict.fromkeys(experts, PLANES), olmoe.ACTIVE)
    quarter = whole // 4
    eight = olmoe.LAYERS * olmoe.EXPERTS * sum(experts[0].plane_sizes)
    bits = mean_bits(routing.weights, table)
    lru: dict[str, Any] = {"policy": "lru", "foresee": False}
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        RESIDENT: (whole, lru),
        BARE: (least, lru),
        LRU: (quarter, lru),
        "LFRU": (quarter, {"foresee": False}),
        EXACT: (quarter, {}),
        BY_INDEX: (quarter, {}),
        BOUNDED: (quarter, {"shares": table}),
        INT8: (eight // 4, {**lru, "planes": 3}),
        SMALL: (int(quarter * bits / 4), {"shares": table}),
        NAIVE: (floor_bytes(experts, dict.fromkeys(experts, 3), olmoe.ACTIVE), {**lru, "planes": 3}),
    }
    contenders = {
        name: Contender.open(name, bundle, by_index(routing) if name == BY_INDEX else routing, budget, **settings)
        for name, (budget, settings) in ways.items()
    }
    for one in contenders.values():
        if one.name == RESIDENT:
            one.part.replay(every_expert())
            one.decode(olmoe.EXPERTS // olmoe.ACTIVE)
        one.run(asked.tokens * 2, counts=False)
    for turn in range(asked.rounds):
        say(f"round {turn + 1} of {asked.rounds}")
        for one in contenders.values():
            one.run(asked.tokens, counts=True)
    resident = contenders[RESIDENT].token_ms
    reading = [one for one in contenders.values() if one.name != RESIDENT]
    bandwidth = max(sum(one.read) * asked.tokens / sum(one.busy) for one in reading)
    record.figure("flash", bandwidth / 1e9, "GB/s")
    rows, peaks = list[list[Cell]](), dict[str, int]()
    for name, one in contenders.items():
        exposed = max(0.0, one.token_ms - resident)
        roofline = max(resident, 1e3 * statistics.median(one.needed) / bandwidth) / one.token_ms
        peaks[name] = ExpertReport.of(one.store).most_bytes
        rows.append([name, 1e3 / one.token_ms, statistics.median(one.read) / 1e6, exposed, roofline, peaks[name] / 1e6])
        record.figure(f"speed/{name}", 1e3 / one.token_ms, "tok/s")
        if name == BARE:
            record.figure("bare/exposed", exposed, "ms a token")
        for goal, (speed, share) in {EXACT: (1.2, 0.4), BOUNDED: (2.0, 0.25)}.items():
            if name == goal:
                record.figure(f"{name}/speed", 1e3 / one.token_ms, "tok/s", target=speed, of=f"speed/{LRU}")
                record.figure(f"{name}/exposed", exposed, "ms a token", target=share, of="bare/exposed", at_most=True)
                record.figure(f"{name}/roofline", roofline, "of it", target=0.85)
    record.figure("bounded/bits", bits, "bits in the mean", target=MEAN_BITS, at_most=True)
    small = 1e3 / contenders[SMALL].token_ms
    record.figure("small/speed", small, "tok/s", target=1.39, of=f"speed/{INT8}")
    record.figure("small/memory", peaks[SMALL] / peaks[INT8], "of 8 bits' memory", target=0.47, at_most=True)
    record.figure("small/naive", small, "tok/s", target=4.0, of=f"speed/{NAIVE}")
    record.figure("order", 1e3 / contenders[EXACT].token_ms, "tok/s", target=1.1, of=f"speed/{BY_INDEX}")
    note = (
        f"A quarter of the experts in memory, {quarter / 1e6:,.0f} MB of {whole / 1e6:,.0f}; with no cache one "
        f"layer's. Bounded: {bits:.2f} bits in the mean; small: in memory for as many experts. Exposed: what a token "
        "takes longer than with all in memory. Roofline: max(compute, bytes over bandwidth) at "
        f"{bandwidth / 1e9:.2f} GB/s of reading, of the bytes that routers name. 8 bits: a quarter of the experts, too."
    )
    columns = ["experts", "tokens/s", "MB read a token", "exposed ms a token", "of the roofline", "peak MB"]
    record.table("speed", columns, rows, note=note)
    for one in contenders.values():
        one.close()
    for share in SHARES:
        say(f"{asked.long} tokens in {share:.1%}")
        most, ms = keeps_its_budget(bundle, routing, int(share * whole), asked.long)
        record.figure(f"budget/{share:g}", most, "of it", target=1.05, at_most=True)
        record.figure(f"budget/{share:g}/speed", 1e3 / ms, "tok/s")


def foretold(record: Record, bundle: Bundle, routing: Routing) -> None:
    """What is said before anything is loaded, as `isthmus bench experts` and `isthmus run` do, beside what comes."""
    rows = list[list[Cell]]()
    for limit in LIMITS_MB_S:
        name = f"{limit:g} MB/s" if limit else "as it is"
        say(f"forecasts, flash {name}")
        _, found = bench.measure(bench.Setup(bundle, bench.budgets(bundle, (), 4, limit)), routing, say)
        for one in found:
            off = abs(one.predicted_tok_s / one.tok_s - 1)
            record.figure(f"foretold/{name}/{one.share:.1%}", off, "off", target=0.15, at_most=True)
            rows.append([name, f"{one.share:.1%}", one.predicted_tok_s, one.tok_s, one.predicted_tok_s / one.tok_s])
    note = f"Along {len(routing.chosen)} tokens; what is foretold knows their routing, and not these budgets."
    record.table("foretold", ["flash", "memory", "foretold tok/s", "measured tok/s", "ratio"], rows, note=note)


if __name__ == "__main__":
    main()
