"""`isthmus inspect --experts`: what a budget would hold of a mixture's experts, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.edge.experts.facts import Facts
    from isthmus.edge.experts.forecast import Forecast
    from isthmus.edge.experts.settings import ExpertSettings
    from isthmus.edge.experts.simulate import Simulation
    from isthmus.engine.routing import Routing
    from isthmus.split.bundle import Bundle

SHARE = 0.25  # of the experts in memory, unless a budget is named
RECORDED = 256  # tokens, where there is no recording
BARS, COLUMNS = 20, 48  # characters of a layer's bar, and of its time
SHADES = " ░▒▓█"
WARM = 32  # tokens that fill the memory and do not count


@dataclass(frozen=True, slots=True)
class View:
    """Of one budget.

    Attributes:
        routing: of the layers that have experts, whose numbers are `layers`.
        text: along which it was recorded.
        policies: hit rates by policy.
        cache: what our policy would hold, if nothing were read ahead.
        facts, forecast: of this machine, None where nothing was measured.
    """

    name: str
    settings: ExpertSettings
    share: float
    n_experts: int
    layers: tuple[int, ...]
    routing: Routing
    text: str
    policies: dict[str, float]
    cache: Simulation
    facts: Facts | None
    forecast: Forecast | None

    @property
    def warm(self) -> int:
        """Tokens that do not count."""
        return min(WARM, len(self.routing.chosen) // 4)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        from dataclasses import asdict

        rates = self.cache.by_layer(self.warm).tolist()
        return {
            "name": self.name,
            "expert_mb": self.settings.mb,
            "expert_bits": self.settings.bits,
            "share": self.share,
            "tokens": len(self.routing.chosen),
            "text": self.text,
            "hits": self.policies,
            "hits_by_layer": [{"layer": n, "hits": rate} for n, rate in zip(self.layers, rates, strict=True)],
            "facts": asdict(self.facts) if self.facts else None,
            "forecast": self.forecast.to_dict() if self.forecast else None,
        }


def look(bundle: Bundle, expert_mb: float | None, bits: int) -> View:
    """What is known of a budget; routing that was never recorded is recorded now.

    Args:
        expert_mb: the budget, None for a quarter of the experts.

    Raises:
        DeviceError: the bundle has no experts, or the budget is too small.
        BundleError: a layer is not here.
    """
    from isthmus.apps.bench.experts import (
        POLICIES,
        Setup,
        budgets,
        check_mixture,
        least_bytes,
        record,
        share_mb,
        whole_bytes,
    )
    from isthmus.edge.experts.facts import of_expert_layers, read_facts, read_routing, steps_of, used_planes
    from isthmus.edge.experts.forecast import Forecast
    from isthmus.edge.experts.settings import ExpertSettings
    from isthmus.edge.experts.simulate import simulate

    records = check_mixture(bundle)
    planes = ExpertSettings(1.0, bits).planes
    whole = whole_bytes(records, planes)
    wanted = share_mb(SHARE * whole, least_bytes(bundle, planes)) if expert_mb is None else expert_mb
    settings = budgets(bundle, [wanted], bits, 0.0)[0]
    known = read_routing(bundle)
    if known is None:
        known = _record(Setup(bundle, [settings], tokens=min(RECORDED, bundle.config.context_length)), record)
    routing, n = of_expert_layers(known[0], bundle.config), records[min(records)].n_experts
    sizes = [sum(used_planes(one, settings.planes)) for one in records.values()]
    found = {policy: simulate(routing, n, settings.budget, policy, sizes=sizes) for policy in POLICIES}
    warm = min(WARM, len(routing.chosen) // 4)
    facts = read_facts(bundle, settings.planes, 0)
    forecast = None
    if facts is not None:
        steps = steps_of(bundle, settings.planes, facts)
        forecast = Forecast.of(routing, n, settings.budget, steps, facts.speed(), warm=warm)
    return View(
        bundle.name,
        settings,
        min(1.0, settings.budget / whole),
        n,
        tuple(records),
        routing,
        known[1],
        {policy: one.hit_rate(warm) for policy, one in found.items()},
        found["lfru"],
        facts,
        forecast,
    )


def _record(setup: Any, record: Any) -> Any:
    from rich.console import Console

    with Console(stderr=True).status("recording which experts are taken") as status:
        return record(setup, status.update)


def show(view: View, folder: Path) -> None:
    """Prints hit rates by layer, the cache over time, and bytes against the roofline."""
    for line in lines(view, folder):
        print(line)


def lines(view: View, folder: Path) -> list[str]:
    """What is printed."""
    tokens = len(view.routing.chosen)
    rates = ", ".join(f"{called} {view.policies[policy]:.0%}" for policy, called in _CALLED.items())
    resident = view.cache.resident[-1].sum(axis=1)
    found = [
        f"{view.name}: {view.settings.mb:.1f} MB hold {view.share:.1%} of the experts; {tokens} tokens of {view.text}",
        f"in memory when they are taken: {rates}",
        "",
        f"layer  hits  {'':<{BARS}}  held  hits over time, from {SHADES[1]} few to {SHADES[-1]} all",
    ]
    for row, layer in enumerate(view.layers):
        rate = float(view.cache.by_layer(view.warm)[row])
        bar = SHADES[-1] * round(rate * BARS)
        times = timeline([float(x) for x in view.cache.hits[:, row].mean(axis=-1)], COLUMNS)
        found.append(f"{layer:>5}  {rate:>4.0%}  {bar:·<{BARS}}  {resident[row]:>4}  {times}")
    found.append(f"LFRU and no reading ahead; held: of {view.n_experts} experts, at the end")
    return [*found, "", *_roofline(view, folder)]


_CALLED = {"lru": "LRU", "lfru": "LFRU", "belady": "Belady"}


def timeline(rates: list[float], columns: int) -> str:
    """Rates over time as one shade each for as many stretches of time."""
    columns = min(columns, len(rates))
    edges = [i * len(rates) // columns for i in range(columns + 1)]
    means = [sum(rates[a:b]) / (b - a) for a, b in pairwise(edges)]
    return "".join(SHADES[0 if mean == 0 else 1 + min(3, int(mean * 4))] for mean in means)


def _roofline(view: View, folder: Path) -> list[str]:
    if view.facts is None or view.forecast is None:
        return [f"nothing was measured on this machine yet: isthmus bench experts {folder} tells the speed"]
    known, facts = view.forecast, view.facts
    reading = known.needed_mb / facts.flash_mb_s * 1e3
    bound = "reading" if reading > known.compute_ms else "computing"
    return [
        f"reads    {known.read_mb:.2f} MB a token, {known.needed_mb:.2f} of them that routers name: {reading:.1f} ms "
        f"at {facts.flash_mb_s:.0f} MB/s",
        f"compute  {known.compute_ms:.1f} ms a token with all experts in memory: the roofline is {bound}",
        f"foretold {known.tokens_s:.1f} tokens/s, {known.roofline_ms / known.token_ms:.0%} of what the roofline "
        f"allows; {known.exposed_ms:.1f} ms a token are exposed",
    ]
