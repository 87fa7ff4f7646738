"""A placement beside others: what each costs along the text that it was made for, and along what came behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig
from isthmus.engine.placement import Placement
from isthmus.protocol.errors import PlanError
from isthmus.split.bundle import Bundle
from isthmus.split.placement import Placed, Problem
from isthmus.split.placement_replay import BASELINES, Replayed, baseline, replay
from isthmus.split.placement_trace import expert_layers

Way = tuple[str, Replayed, Replayed]  # its name; along the text, and held out


def halves(chosen: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The first half of the positions, to place by, and the rest, held out."""
    middle = len(chosen) // 2
    return chosen[:middle], chosen[middle:]


def compared(problem: Problem, placed: Placed, held: NDArray[np.int32], seed: int = 0) -> list[Way]:
    """A placement and the baselines, replayed.

    Args:
        held: int32 [positions, layers, top_k], the experts along a text that it was not made for.
    """
    ways = [("placed", placed.place), *((name, baseline(problem, name, seed)) for name in BASELINES)]
    return [(name, replay(problem, one), replay(problem, one, held)) for name, one in ways]


def figures(problem: Problem, placed: Placed, ways: list[Way], held: int) -> dict[str, Any]:
    """All of it as plain JSON types.

    Args:
        held: held-out positions.
    """
    device = not problem.hop_s
    unit = "seconds a token" if device else "hops a token"
    found: dict[str, Any] = {
        "cost": placed.cost_s,
        "unit": unit,
        "bound": placed.bound_s,
        "gap": placed.gap,
        "proven": placed.proven,
        "how": placed.how,
        "solve_s": placed.seconds,
        "positions": problem.positions,
        "held_out_positions": held,
        "capacities_mb": [
            one.capacity_bytes / 1e6 if np.isfinite(one.capacity_bytes) else None for one in problem.places
        ],
        "use_ms": [1e3 * one.use_s for one in problem.places],
        "visit_ms": [1e3 * one.visit_s for one in problem.places],
    }
    if problem.most_load is not None:
        found["load_bound"] = float(problem.most_load.max() * len(problem.places))
    keys = ("uses", "visits") if device else ("hops", "spread", "imbalance")
    found["ways"] = [
        {
            "name": name,
            "cost": along.cost_s,
            "held_out_cost": behind.cost_s,
            **{f"held_out_{key}": getattr(behind, key) for key in keys},
        }
        for name, along, behind in ways
    ]
    return found


def kept(bundle: Bundle, problem: Problem, placed: Placed, figures: dict[str, Any]) -> Placement:
    """The placement as a file has it."""
    layers = expert_layers(bundle.config)
    stands: list[tuple[int, ...]] = [()] * bundle.config.n_layers
    uses: list[tuple[float, ...]] = [()] * bundle.config.n_layers
    for at, layer in enumerate(layers):
        stands[layer] = tuple(placed.place[at].tolist())
        uses[layer] = tuple((problem.uses[at] / problem.positions).tolist())
    return Placement(
        model=bundle.model_id,
        name=bundle.name,
        kind="workers" if problem.hop_s else "device",
        places=tuple(one.name for one in problem.places),
        stands=tuple(stands),
        uses=tuple(uses),
        figures=figures,
    )


def trip_s(config: DecoderConfig, rtt_ms: float, up_bps: float, down_bps: float) -> float:
    """Seconds of a round trip with one token's state both ways, as float16.

    Raises:
        PlanError: the link never delivers.
    """
    if not (up_bps > 0 and down_bps > 0):
        raise PlanError("the link does not deliver both ways", "give another one with --link")
    bits = 16 * config.d_model
    return rtt_ms / 1e3 + bits / up_bps + bits / down_bps
