"""What goes into the engine's next step: a pure function of what waits.

Decode rows go first, all of them if they fit. What is left of the step's room goes to prefill in chunks, bounded so
that the next decode rows do not wait long. Both are shared by deficit round-robin over principals (Shreedhar and
Varghese, 1995) in layer-rows, so that one owner's many sessions do not push another's aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.cloud.admission import ServiceLimits


@dataclass(frozen=True, slots=True)
class Demand:
    """Rows that a session could have computed next.

    Attributes:
        session: any number that names it.
        principal: who pays.
        rows: how many, at least 1.
        layers: how many layers each goes through.
    """

    session: int
    principal: str
    rows: int
    layers: int = 1


@dataclass(frozen=True, slots=True)
class Pick:
    """Rows that go into the step."""

    session: int
    rows: int


@dataclass(frozen=True, slots=True)
class State:
    """What the scheduler remembers between steps.

    Attributes:
        deficits: layer-rows that a principal was promised and has not used.
        turn: the principal that comes first next time.
    """

    deficits: dict[str, int] = field(default_factory=dict)
    turn: str = ""


def step(state: State, demands: Sequence[Demand], limits: ServiceLimits) -> tuple[State, list[Pick]]:
    """Chooses the rows of one step, in the order of `demands` within a principal.

    Returns:
        the next state and the picks; there is at least one pick when there is a demand, and a session has one at most.
    """
    if len(demands) == 1:
        only = demands[0]
        most = limits.decode_rows if only.rows <= limits.decode_rows else limits.prefill_rows
        return State(), [Pick(only.session, min(only.rows, most))]
    decode = [demand for demand in demands if demand.rows <= limits.decode_rows]
    prefill = [demand for demand in demands if demand.rows > limits.decode_rows]
    picks: list[Pick] = []
    room = limits.max_step_rows
    if sum(demand.rows for demand in decode) <= room:
        picks = [Pick(demand.session, demand.rows) for demand in decode]
    else:
        state = _share(state, decode, room, picks, whole=True)
    room -= sum(pick.rows for pick in picks)
    room = min(room, limits.prefill_rows_beside_decode if decode else limits.prefill_rows)
    if prefill and room > 0:
        state = _share(state, prefill, room, picks, whole=False)
    return state, picks


def _share(state: State, demands: list[Demand], room: int, picks: list[Pick], *, whole: bool) -> State:
    """Adds picks for up to `room` rows; `whole` takes a demand entirely or not at all."""
    queues: dict[str, list[Demand]] = {}
    for demand in demands:
        queues.setdefault(demand.principal, []).append(demand)
    ring = sorted(queues)
    later = [name for name in ring if name >= state.turn]
    ring = later + ring[: len(ring) - len(later)]
    quantum = max(1, room // len(ring)) * max(demand.layers for demand in demands)
    deficits = {name: state.deficits.get(name, 0) for name in ring}
    turn = ""
    while room > 0 and ring:
        name = ring.pop(0)
        queue = queues[name]
        deficits[name] += quantum
        while queue and room > 0:
            demand = queue[0]
            rows = min(demand.rows, room, deficits[name] // demand.layers)
            if rows < 1 or (whole and rows < demand.rows):
                break
            picks.append(Pick(demand.session, rows))
            deficits[name] -= rows * demand.layers
            room -= rows
            queue.pop(0)
        if not queue:
            del deficits[name]
        elif whole and queue[0].rows > room:
            turn = turn or name
            continue
        else:
            ring.append(name)
            turn = turn or name
    if ring:
        turn = ring[0]
    # A principal that could not use its share keeps no more than one round of it.
    return State({name: min(deficit, quantum) for name, deficit in deficits.items() if deficit}, turn)
