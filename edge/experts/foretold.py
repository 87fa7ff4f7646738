"""How fast a device will answer with a budget for experts, said before any weight is loaded."""

from __future__ import annotations

from isthmus.edge.experts.facts import of_expert_layers, read_facts, read_routing, steps_of
from isthmus.edge.experts.forecast import Forecast
from isthmus.edge.experts.settings import ExpertSettings
from isthmus.engine.routing import Routing
from isthmus.split.bundle import Bundle

POSITIONS, WARM = 160, 32  # of recorded routing that are looked at, and those of them that fill the memory


def foretell(bundle: Bundle, settings: ExpertSettings, threads: int = 0) -> Forecast | None:
    """What was recorded of a model's routing and of this machine, put together for a budget.

    Args:
        threads: of the engine, 0 for one a core.

    Returns:
        The forecast; None where nothing was recorded with these threads and bits (`isthmus bench experts` does it), or
        what was is damaged.

    Raises:
        BundleError: a layer is not here.
        DeviceError: the budget holds less than one layer takes.
    """
    experts = bundle.config.experts
    facts = read_facts(bundle, settings.planes, threads, settings.flash_mb_s)
    known = read_routing(bundle) if facts else None
    if experts is None or facts is None or known is None:
        return None
    some = known[0]
    some = Routing(some.chosen[-POSITIONS:], some.weights[-POSITIONS:], some.foreseen[-POSITIONS:])
    return Forecast.of(
        of_expert_layers(some, bundle.config),
        experts.n_experts,
        settings.budget,
        steps_of(bundle, settings.planes, facts),
        facts.speed(settings.flash_mb_s),
        warm=WARM,
    )
