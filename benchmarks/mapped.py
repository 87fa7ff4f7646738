"""Experts on flash beside llama.cpp with a mapped file, under one memory limit: OLMoE's shape, 4 bits, random weights.

Both compute with the same weights, a GGUF file and the bundle that `isthmus split` makes of it, and decode the same
tokens, so that their routers choose alike; logits tell whether they do. Each runs in a memory cgroup of its own with
the same limit, page cache included: a quarter of the experts, all other weights, and room for a runtime. The two
take turns. llama.cpp's defaults copy 4-bit weights into another layout, which needs them all in memory; so it runs
with its defaults and in ways that leave the experts in the file, one after the other, and the fastest counts.

usage: python benchmarks/mapped.py [--turns 6] [--tokens 60] [--threads 2]

llama.cpp's environment is that of decode.py.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import olmoe_gguf
from cgroup import CgroupUnavailableError, MemoryGroup
from models import BENCH, peer_python
from numpy.typing import NDArray
from olmoe import EXPERTS, LAYERS
from record import Cell, Record

from isthmus.apps.bench.contenders import Elsewhere
from isthmus.edge.experts.simulate import foresight, hit_rate
from isthmus.engine.routing import Routing
from isthmus.protocol.errors import EngineError
from isthmus.split.bundle import Bundle

PEERS = Path(__file__).resolve().parent / "peers"
OURS = "isthmus, experts on flash"
WAYS = (  # see peers/llama.py
    "defaults",
    "mapped",
    "experts mapped",
    "experts mapped, 2 MB a fault",
)
SHARE = 0.25  # of the experts that our budget holds
RUNTIME = 160_000_000  # bytes beside weights: an interpreter, libraries, 640 positions of KV, buffers
WARM = 2  # turns that do not count
COMPARED = 24  # tokens whose logits are held against each other
PUBLISHED = "47-62 %"  # OLMoE's own hit rate with a quarter of its experts, least recently used


def say(what: str) -> None:
    """What is under way."""
    print(what, file=sys.stderr, flush=True)


class Confined(Elsewhere):
    """An engine in a cgroup."""

    def __init__(self, name: str, group: MemoryGroup, command: Sequence[str]) -> None:
        self.group = group
        super().__init__(name, Path(sys.executable), PEERS / "confined.py", [str(group.folder), *command])

    def ask(self, do: str, **arguments: Any) -> Any:
        """The answer to a question of its script."""
        return self._ask({"do": do, **arguments})

    @property
    def read_bytes(self) -> int:
        """What the disk gave to it so far, the kernel's readahead included."""
        lines = Path(f"/proc/{self._process.pid}/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@dataclass
class Contender:
    """One of them, and what it took."""

    name: str
    engine: Confined
    speeds: list[float] = field(default_factory=list)  # tokens a second, by turn
    read: list[float] = field(default_factory=list)  # bytes a token, by turn
    peak: int = 0  # bytes of memory

    def run(self, tokens: list[int], *, counts: bool) -> None:
        """Decodes a sequence."""
        before = self.engine.read_bytes
        seconds = self.engine.ask("along", tokens=tokens)
        if counts:
            self.speeds.append(len(tokens) / sum(seconds))
            self.read.append((self.engine.read_bytes - before) / len(tokens))

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """[len(tokens), vocab_size] f32."""
        with tempfile.NamedTemporaryFile(suffix=".f32", dir=BENCH) as file:
            self.engine.ask("along", tokens=tokens, path=file.name)
            return np.fromfile(file.name, np.float32).reshape(len(tokens), -1)

    @property
    def speed(self) -> float:
        """Tokens a second, the median of turns."""
        return statistics.median(self.speeds)

    @property
    def read_mb(self) -> float:
        """Read for a token, in MB."""
        return statistics.median(self.read) / 1e6


def made(folder: Path) -> tuple[Path, Bundle]:
    """The GGUF file and the bundle, made once; nothing of them is in the page cache."""
    model, bundle = folder / "model.gguf", folder / "bundle"
    folder.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        say("writing a GGUF file of OLMoE's shape, 3.9 GB")
        olmoe_gguf.write(model)
    if not bundle.exists():
        say("splitting it, another 3.9 GB")
        command = [sys.executable, "-m", "isthmus.apps.cli", "split", str(model), "-o", str(bundle)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for path in (model, *(path for path in bundle.rglob("*") if path.is_file())):
        olmoe_gguf.forget(path)
    return model, Bundle.open(bundle)


def sizes(model: Path, bundle: Bundle) -> tuple[int, int]:
    """Bytes of all experts, and of the GGUF file beside them."""
    layers = [bundle.records(i) for i in range(bundle.config.n_layers)]
    experts = sum(one.n_experts * one.record_bytes for one in layers)
    return experts, model.stat().st_size - experts


def started(name: str, limit: int, command: Sequence[str], opened: ExitStack, record: Record) -> Contender | None:
    """A contender in its own group; None, and a note, if it ends before it is ready."""
    group = MemoryGroup(name.replace(" ", "-").replace(",", ""), limit)
    opened.callback(group.close)
    try:
        engine = Confined(name, group, command)
    except EngineError:
        why = "needs more memory than the limit, and the kernel ended it" if group.killed else "it did not start"
        record.skip(name, why)
        return None
    opened.callback(engine.close)
    return Contender(name, engine)


def cached_bytes(path: Path) -> int:
    """Bytes of a file in the page cache."""
    command = ["fincore", "-b", "-n", "-o", "RES", str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def agreement(ours: Contender, other: Contender, tokens: list[int], record: Record) -> None:
    """How near the logits of both are."""
    a, b = ours.logits(tokens), other.logits(tokens)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    record.figure("agreement/cosine", float(np.median(cosines)), "ratio", target=0.99)
    record.figure("agreement/least cosine", float(cosines.min()), "ratio")
    record.figure("agreement/same token", float((a.argmax(1) == b.argmax(1)).mean()), "of tokens")


def routed(ours: Contender, record: Record) -> None:
    """Which share of the experts would have been in a quarter's memory along these tokens, by policy."""
    with tempfile.NamedTemporaryFile(suffix=".npz", dir=BENCH) as file:
        ours.engine.ask("routing", path=file.name)
        with np.load(file.name, allow_pickle=False) as kept:
            routing = Routing(kept["chosen"], kept["weights"], kept["foreseen"])
    capacity = int(SHARE * EXPERTS * LAYERS)
    rates = {
        p: hit_rate(routing, EXPERTS, capacity, p, warm=len(routing.chosen) // 4) for p in ("lru", "lfru", "belady")
    }
    for policy, rate in rates.items():
        record.figure(f"hits/{policy}", rate, "of experts")
    record.figure("foresight", foresight(routing), "of experts")


@dataclass
class Scene:
    """What all contenders share.

    Attributes:
        budget: bytes of experts that ours may hold.
        limit: bytes of each process.
        turns: tokens that both decode, by turn; the first two warm up.
    """

    model: Path
    bundle: Bundle
    budget: int
    limit: int
    threads: int
    turns: list[list[int]]

    def ours(self, opened: ExitStack, record: Record) -> Contender:
        """This project's engine, with the defaults of its store."""
        command = [sys.executable, str(PEERS / "flash.py"), str(self.bundle.path), str(self.budget), str(self.threads)]
        found = started(OURS, self.limit, command, opened, record)
        if found is None:
            raise EngineError("our own engine did not start under the limit", "see what it says without one")
        return found

    def llama(self, way: str, opened: ExitStack, record: Record) -> Contender | None:
        """llama.cpp, if it starts; nothing of the file is in the page cache before."""
        python = peer_python("llama")
        olmoe_gguf.forget(self.model)
        if cached_bytes(self.model) > self.limit // 100:
            raise EngineError("the GGUF file stays in the page cache", "end what else has it open")
        command = [str(python), str(PEERS / "llama.py"), str(self.model), str(self.threads), "--one", way]
        return started(f"llama.cpp, {way}", self.limit, command, opened, record)


def beside(scene: Scene, way: str, record: Record) -> tuple[Contender, Contender] | None:
    """Ours and one way of llama.cpp, in turns; None if that does not start.

    No two processes of llama.cpp run at a time: they would share the file's pages, and so their limits.
    """
    with ExitStack() as opened:
        say(f"llama.cpp, {way}")
        other = scene.llama(way, opened, record)
        if other is None:
            return None
        ours = scene.ours(opened, record)
        for turn, tokens in enumerate(scene.turns):
            for one in (ours, other):
                began = time.perf_counter()
                one.run(tokens, counts=turn >= WARM)
                say(f"  turn {turn + 1 - WARM} {one.name}: {len(tokens) / (time.perf_counter() - began):.2f} tokens/s")
        for one in (ours, other):
            group = one.engine.group
            name = f"{one.name} beside {way}" if one is ours else one.name
            one.peak = group.peak_bytes
            record.figure(f"speed/{name}", one.speed, "tok/s")
            record.figure(f"read/{name}", one.read_mb, "MB a token")
            record.figure(f"peak/{name}", one.peak / scene.limit, "of the limit", target=1.0, at_most=True)
            record.figure(f"killed/{name}", group.killed, "processes", target=0, at_most=True)
        cached = cached_bytes(scene.model) / scene.limit
        record.figure(f"cached/{other.name}", cached, "of the limit", target=1.0, at_most=True)
        report = ours.engine.ask("report")
        record.figure(f"hits/{OURS} beside {way}", report["hit_rate"], "of experts")
        flash = report["read_bytes"] / report["reading_seconds"] / 1e9
        record.figure(f"flash/{OURS} beside {way}", flash, "GB/s")
        if "agreement/cosine" not in record.figures:
            routed(ours, record)
            agreement(ours, other, scene.turns[0][:COMPARED], record)
    return ours, other


def measure(record: Record, model: Path, bundle: Bundle, asked: argparse.Namespace) -> None:
    """Speeds under one limit."""
    experts, rest = sizes(model, bundle)
    budget = int(SHARE * experts)
    stream = olmoe_gguf.text(asked.tokens * (asked.turns + WARM))
    turns = [stream[i : i + asked.tokens] for i in range(0, len(stream), asked.tokens)]
    scene = Scene(model, bundle, budget, budget + rest + RUNTIME, asked.threads, turns)
    record.figure("limit", scene.limit / 1e6, "MB")
    if not peer_python("llama").exists():
        record.skip("llama.cpp", "it has no environment; decode.py tells how to make one")
        return
    pairs = [pair for way in asked.way or WAYS if (pair := beside(scene, way, record))]
    if not pairs:
        return
    ours, fastest = max(pairs, key=lambda pair: pair[1].speed)
    record.figure("mapped/speed", ours.speed, "tok/s", target=5.0, of=f"speed/{fastest.name}")
    rows: list[list[Cell]] = [
        [other.name, other.speed, mine.speed, mine.speed / other.speed, other.read_mb, other.peak / 1e6]
        for mine, other in pairs
    ]
    rows.append([OURS, ours.speed, None, None, ours.read_mb, ours.peak / 1e6])
    lru = record.figures["hits/lru"]["value"]
    note = (
        f"{scene.limit / 1e6:,.0f} MB for each process, page cache included, by a cgroup: a quarter of the experts, "
        f"{budget / 1e6:,.0f} MB of {experts / 1e6:,.0f}, the other weights, {rest / 1e6:,.0f}, and "
        f"{RUNTIME / 1e6:.0f} for all else. A quarter holds {lru:.0%} of the experts that these tokens take (least "
        f"recently used; OLMoE itself: {PUBLISHED}). Unless told otherwise this machine's kernel reads "
        f"{asked.readahead_kb or 0:,} KB ahead in files, and llama.cpp asks it for twice as much."
    )
    columns = ["", "tokens/s", "isthmus beside it", "times", "MB read a token", "most memory, MB"]
    record.table("mapped", columns, rows, note=note)


def readahead_kb(folder: Path) -> int | None:
    """How far the kernel reads ahead on the disk of a folder."""
    device = folder.stat().st_dev
    name = f"{device >> 8 & 0xFFF}:{device & 0xFF}"
    for place in (f"/sys/dev/block/{name}/queue", f"/sys/dev/block/{name}/../queue"):
        path = Path(place) / "read_ahead_kb"
        if path.exists():
            return int(path.read_text())
    return None


def peer_version(python: Path) -> str | None:
    """Of llama-cpp-python."""
    if not python.exists():
        return None
    command = [str(python), "-c", "import importlib.metadata as m; print(m.version('llama-cpp-python'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=60, help="of a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", action="append", choices=WAYS, help="of llama.cpp, by default all")
    parser.add_argument("--keep", action="store_true", help="the 7.8 GB of the model")
    parser.add_argument("--results", type=Path, help="another folder for the record")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that groups are removed
    BENCH.mkdir(parents=True, exist_ok=True)
    asked.readahead_kb = readahead_kb(BENCH)
    settings = {name: value for name, value in vars(asked).items() if name not in ("results", "keep")}
    settings |= {"weights": "random", "bits": 4, "llama-cpp-python": peer_version(peer_python("llama"))}
    record = Record("mapped", settings=settings)
    try:
        probe = MemoryGroup("probe", 1 << 30)
        probe.close()
        record.settings = {**settings, "cgroup": probe.version.number}
    except CgroupUnavailableError as error:
        record.skip("all of it", f"no memory cgroup can be made here: {error}")
    else:
        folder = BENCH / "olmoe-mapped"
        try:
            measure(record, *made(folder), asked)
        finally:
            if not asked.keep:
                shutil.rmtree(folder, ignore_errors=True)
    record.write(*([asked.results] if asked.results else []))


if __name__ == "__main__":
    main()
