"""A mixture of experts in several budgets on this machine: what is measured, beside what was foretold.

All budgets take turns, so that a machine that is slower for a while is so for each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from isthmus.apps.bench.expert_text import DOCUMENT, recorded
from isthmus.apps.bench.flash import FlashMeter
from isthmus.apps.bench.machine import read_machine
from isthmus.edge.experts.cache import BELADY
from isthmus.edge.experts.facts import (
    Facts,
    expert_records,
    of_expert_layers,
    steps_of,
    used_planes,
    write_facts,
    write_routing,
)
from isthmus.edge.experts.forecast import Forecast
from isthmus.edge.experts.report import ExpertReport
from isthmus.edge.experts.settings import ExpertSettings
from isthmus.edge.experts.simulate import simulate
from isthmus.edge.experts.store import ExpertStore, floor_bytes
from isthmus.engine import KvConfig
from isthmus.engine.binding import Workers, default_threads, native
from isthmus.engine.native_layers import Layers
from isthmus.engine.native_part import NativePart
from isthmus.engine.part import Rows, Want
from isthmus.engine.routing import Routing
from isthmus.protocol.errors import DeviceError
from isthmus.split.bundle import Bundle
from isthmus.split.expert_file import Records

SHARES = (0.125, 0.25, 0.5)  # of the experts, by default
POLICIES = ("lru", "lfru", BELADY)
TURNS = 12  # of each budget
CALIBRATING = (3 / 16, 3 / 8)  # of the experts in memory while it is measured what reads cost beside their time
LEAST_TOKENS = 40
FASTER, HALVINGS = 2.0, 4  # at most, than what the meter sees; and how finely that is sought

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """What a budget does.

    Attributes:
        budget_mb, share: what experts may take in memory, and how many of them that is.
        hits: share of experts in memory when they were taken, by policy, of recorded routing.
        hit_rate: as measured with our store, which reads ahead.
        tok_s, predicted_tok_s: measured, and foretold.
        token_ms: a token where the machine has little else to do (see `calm`).
        exposed_ms: what it takes longer than with all experts in memory.
        read_mb: that are read for a token.
        roofline: share of what max(computing, bytes over bandwidth) allows; of the bytes that routers name.
    """

    budget_mb: float
    share: float
    hits: dict[str, float]
    hit_rate: float
    tok_s: float
    predicted_tok_s: float
    token_ms: float
    exposed_ms: float
    read_mb: float
    roofline: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Setup:
    """What is measured.

    Attributes:
        settings: each a budget; all of the same width of experts and flash.
        threads: of the engine, 0 for one a core.
        tokens: that are recorded, and decoded with each budget.
        text: to record along; see `expert_text.recorded`.
    """

    bundle: Bundle
    settings: Sequence[ExpertSettings]
    threads: int = 0
    tokens: int = 256
    text: Path | None = None

    def __post_init__(self) -> None:
        most = self.bundle.config.context_length
        if not LEAST_TOKENS <= self.tokens <= most:
            raise DeviceError(f"--tokens is {self.tokens}", f"measure {LEAST_TOKENS} to {most}")


def check_mixture(bundle: Bundle) -> dict[int, Records]:
    """Where the experts of each layer stand.

    Raises:
        DeviceError: the bundle has no experts.
        BundleError: not all layers are here.
    """
    if bundle.config.experts is None:
        problem = f"{bundle.name} has no experts"
        raise DeviceError(problem, "name a mixture of experts; isthmus moefy makes one of a dense model")
    return expert_records(bundle)


def whole_bytes(records: dict[int, Records], planes: int) -> int:
    """Of all experts."""
    return sum(one.n_experts * sum(used_planes(one, planes)) for one in records.values())


def least_bytes(bundle: Bundle, planes: int) -> int:
    """The least budget."""
    records, experts = check_mixture(bundle), bundle.config.experts
    assert experts is not None
    return floor_bytes(records, {layer: len(used_planes(one, planes)) for layer, one in records.items()}, experts.top_k)


def share_mb(wanted: float, least: int) -> float:
    """So many bytes as 10^6 bytes, at least those that a layer needs, rounded up to 1,000 bytes."""
    return (max(least, int(wanted)) // 1000 + 1) / 1e3


def budgets(bundle: Bundle, given_mb: Sequence[float], bits: int, flash_mb_s: float) -> list[ExpertSettings]:
    """Settings of each budget, ascending; without any given, of shares of the experts that hold what a layer needs.

    Raises:
        DeviceError: see `ExpertSettings`; a budget is too small, or the bundle has no experts.
        BundleError: not all layers are here.
    """
    records, planes = check_mixture(bundle), ExpertSettings(1.0, bits, flash_mb_s).planes
    whole, least = whole_bytes(records, planes), least_bytes(bundle, planes)
    some = given_mb or [share_mb(share * whole, least) for share in SHARES]
    found = [ExpertSettings(mb, bits, flash_mb_s) for mb in sorted(dict.fromkeys(some))]
    for one in found:
        if one.budget < least:
            problem = f"a budget of {one.mb:g} MB does not hold the experts that one layer needs at once"
            raise DeviceError(problem, f"give at least {-(-least // 100_000) / 10:g} MB")
    return found


@dataclass
class Contender:
    """A budget, and what its tokens took."""

    store: ExpertStore
    part: NativePart
    at: int = 0
    rounds: list[list[float]] = field(default_factory=list)  # ms of each token
    idle: list[list[float]] = field(default_factory=list)  # ms of each that waited for reads
    token: int = 5
    sequence: Any = None

    @classmethod
    def open(cls, setup: Setup, source: Bundle, budget: int, positions: int, opened: ExitStack) -> Contender:
        """With a budget; the first setting says the rest."""
        planes, bundle = setup.settings[0].planes, setup.bundle
        store = ExpertStore(bundle, budget, planes=planes, bytes_per_second=setup.settings[0].flash_mb_s * 1e6)
        opened.callback(store.close)
        return cls(store, _open(source, store, positions, setup.threads, opened))

    def run(self, tokens: int) -> None:
        """Decodes so many, going on where it ended."""
        if self.sequence is None:
            self.sequence = self.part.open()
        took, idle = list[float](), list[float]()
        for _ in range(tokens):
            waited, begin = self.part.waited, time.perf_counter()
            rows = Rows().tokens(self.sequence, self.at, [self.token], want=Want.SAMPLE)
            self.token = self.part.step(rows).tokens[0]
            took.append(1e3 * (time.perf_counter() - begin))
            idle.append(1e3 * (self.part.waited - waited))
            self.at += 1
        self.rounds.append(took)
        self.idle.append(idle)

    @property
    def token_ms(self) -> float:
        """What a token takes where the machine has little else to do."""
        return calm(median(took) for took in self.rounds[1:])

    @property
    def busy_ms(self) -> float:
        """The same without waiting."""
        return calm(
            median(ms - idle for ms, idle in zip(*pair, strict=True))
            for pair in zip(self.rounds[1:], self.idle[1:], strict=True)
        )


def calm(medians: Iterable[float]) -> float:
    """Of the medians of turns the lower quartile: bursts of other work last for some turns, and are left out."""
    return float(np.quantile(list(medians), 0.25))


def _open(source: Bundle, store: ExpertStore, positions: int, threads: int, opened: ExitStack) -> NativePart:
    # Threads of its own: a pool counts steps, by which experts age, and others' steps must not count.
    workers, kv = Workers(threads or default_threads()), KvConfig(max_tokens=positions)
    part = NativePart([Layers(source, 0, source.config.n_layers, kv, store)], workers)
    opened.callback(part.close)
    return part


def record(setup: Setup, say: Say) -> tuple[Routing, str]:
    """Routing along the text, kept for whoever asks later.

    Raises:
        ModelError: the text cannot be read, or is too short.
    """
    bundle, planes = setup.bundle, setup.settings[0].planes
    records = check_mixture(bundle)
    room = max(setup.settings[-1].budget, min(whole_bytes(records, planes), _free() // 2))
    with ExitStack() as opened:
        store = ExpertStore(bundle, room, planes=planes)
        opened.callback(store.close)
        part = _open(bundle.without_experts(), store, 2 * DOCUMENT + setup.tokens, setup.threads, opened)
        routing, text = recorded(
            bundle, part, setup.tokens, setup.text, lambda done, of: say(f"routing: {done} of {of} tokens")
        )
    write_routing(bundle, routing, text)
    return routing, text


def _free() -> int:
    memory = read_machine().memory
    return min(memory.available_bytes, memory.limit_bytes or memory.available_bytes)


def measure(setup: Setup, routing: Routing, say: Say) -> tuple[Facts, list[BudgetRow]]:
    """Measures flash, computing and every budget; what is known then is kept for forecasts.

    Raises:
        DeviceError: the budgets do not fit in memory together, or a disk does not read.
        BundleError: an expert is damaged.
    """
    bundle, planes = setup.bundle, setup.settings[0].planes
    records = check_mixture(bundle)
    whole, positions = whole_bytes(records, planes), len(routing.chosen)
    given, free = sum(one.budget for one in setup.settings), _free()
    if given > free:
        problem = f"the budgets are {given / 1e6:.0f} MB together, {free / 1e6:.0f} are free"
        raise DeviceError(problem, "measure fewer, or smaller ones")
    large = max(one.budget for one in setup.settings) >= native().lib.IM_HUGE_FROM
    warm, each = positions - (positions * 3 // 4) // TURNS * TURNS, (positions * 3 // 4) // TURNS
    with ExitStack() as opened:
        source, flash = bundle.without_experts(), opened.enter_context(FlashMeter(records, planes, large))
        ours = [Contender.open(setup, source, one.budget, positions + 16, opened) for one in setup.settings]
        least = least_bytes(bundle, planes)
        some = [max(int(share * whole), least) for share in CALIBRATING]
        paged = [Contender.open(setup, source, budget, positions + 16, opened) for budget in some]
        every = [*ours, *paged]
        if given + sum(some) + whole < free // 2:
            every.append(Contender.open(setup, source, whole, positions + 16, opened))
        reports = []
        for one in every:
            say("filling memory")
            one.part.replay(routing)
            one.run(warm)
        reports = [ExpertReport.of(one.store) for one in ours]
        for turn in range(TURNS):
            say(f"turn {turn + 1} of {TURNS}")
            flash.measure()
            for one in every:
                one.run(each)
        found = [ExpertReport.of(one.store) for one in ours]
        used = of_expert_layers(routing, bundle.config)
        token_ms = max(every, key=lambda one: one.store.budget).busy_ms
        facts = _with_costs(setup, Facts(*flash.speed, token_ms, 0.0, 0.0, flash.direct), used, paged, warm)
        rows = [
            _row(setup, facts, used, one, settings, (before, after), whole, warm, TURNS * each)
            for one, settings, before, after in zip(ours, setup.settings, reports, found, strict=True)
        ]
    write_facts(bundle, planes, setup.threads, facts, setup.settings[0].flash_mb_s)
    return facts, rows


def _with_costs(setup: Setup, bare: Facts, routing: Routing, paged: Sequence[Contender], warm: int) -> Facts:
    """What reads cost beside their own time: by how much a forecast falls short with budgets of their own.

    Steps take longer where reads are done meanwhile and where threads fall asleep; both count alike, since either may
    be too rare to be measured. Waits take longer, too, by what it takes until somebody is awake. Where a forecast is
    too slow even so, flash is faster than was measured.
    """
    experts, planes = setup.bundle.config.experts, setup.settings[0].planes
    assert experts is not None

    def foretold(facts: Facts) -> list[Forecast]:
        steps = steps_of(setup.bundle, planes, facts)
        n, speed = experts.n_experts, facts.speed(setup.settings[0].flash_mb_s)
        return [Forecast.of(routing, n, one.store.budget, steps, speed, warm=warm) for one in paged]

    known = foretold(bare)
    events = sum(one.meanwhile + one.waits for one in known)
    slower = max(0.0, sum(one.busy_ms - bare.token_ms for one in paged) / max(1.0, events))
    known = foretold(replace(bare, read_ms=slower, wait_ms=slower))
    waits = sum(one.waits for one in known)
    took = sum(one.token_ms for one in paged)
    short = took - sum(one.token_ms for one in known)
    costs = replace(bare, read_ms=slower, wait_ms=max(0.0, slower + short / max(1.0, waits)))
    if slower + short / max(1.0, waits) >= 0:
        return costs
    low, high = 1.0, FASTER  # a disk that rests while steps are computed gives more than when it is only read
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        faster = replace(costs, flash_mb_s=middle * bare.flash_mb_s, latency_ms=bare.latency_ms / middle)
        low, high = (middle, high) if sum(one.token_ms for one in foretold(faster)) > took else (low, middle)
    return replace(costs, flash_mb_s=low * bare.flash_mb_s, latency_ms=bare.latency_ms / low)


def _row(
    setup: Setup,
    facts: Facts,
    routing: Routing,
    one: Contender,
    settings: ExpertSettings,
    reports: tuple[ExpertReport, ExpertReport],
    whole: int,
    warm: int,
    tokens: int,
) -> BudgetRow:
    before, after = reports
    experts, planes = setup.bundle.config.experts, settings.planes
    assert experts is not None
    n, steps, speed = experts.n_experts, steps_of(setup.bundle, planes, facts), facts.speed(settings.flash_mb_s)
    foretold = Forecast.of(routing, n, settings.budget, steps, speed, warm=warm)
    hits = {
        policy: simulate(routing, n, settings.budget, policy, sizes=steps.sizes).hit_rate(warm) for policy in POLICIES
    }
    read = (after.read_bytes - before.read_bytes) / tokens
    vain = (after.read_ahead - before.read_ahead) - (after.taken_ahead - before.taken_ahead)
    plane = float(np.mean(one.store.plane_sizes))
    dropped = after.dropped_bytes - before.dropped_bytes
    needed_ms = max(0.0, read - (plane * vain + dropped) / tokens) * speed.ms_per_byte
    taken, there = (sum(b) - sum(a) for a, b in ((before.taken, after.taken), (before.in_memory, after.in_memory)))
    return BudgetRow(
        budget_mb=settings.mb,
        share=min(1.0, settings.budget / whole),
        hits=hits,
        hit_rate=there / max(1, taken),
        tok_s=1e3 / one.token_ms,
        predicted_tok_s=foretold.tokens_s,
        token_ms=one.token_ms,
        exposed_ms=max(0.0, one.token_ms - facts.token_ms),
        read_mb=read / 1e6,
        roofline=max(facts.token_ms, needed_ms) / one.token_ms,
    )
