"""What goes into the engine's next step: a pure function of what waits.

Decode rows go first, all of them if they fit. What is left of the step's room goes to prefill in chunks, bounded so
that the next decode rows do not wait long. Both are shared by deficit round-robin over principals (Shreedhar and
Varghese, 1995) in layer-rows, so that one owner's many sessions do not push another's aside.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
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
    queues: dict[str, deque[Demand]] = {}
    for demand in demands:
        queues.setdefault(demand.principal, deque()).append(demand)
    names = sorted(queues)
    first = bisect_left(names, state.turn)
    ring = deque(names[first:] + names[:first])
    quantum = max(demand.layers for demand in demands)  # one row at least in each round
    deficits = {name: state.deficits.get(name, 0) for name in ring}
    taken: dict[int, int] = {}
    while room > 0 and ring:
        name = ring.popleft()
        queue = queues[name]
        deficits[name] += quantum
        while queue and room > 0:
            demand = queue[0]
            left = demand.rows - taken.get(demand.session, 0)
            rows = min(left, room, deficits[name] // demand.layers)
            if rows < (left if whole else 1):
                break
            taken[demand.session] = taken.get(demand.session, 0) + rows
            deficits[name] -= rows * demand.layers
            room -= rows
            if rows == left:
                queue.popleft()
        if not queue:
            del deficits[name]
        elif not whole or queue[0].rows <= room:
            ring.append(name)
    picks += [Pick(session, rows) for session, rows in taken.items()]
    most = quantum * max(demand.rows if whole else 1 for demand in demands)
    return State({name: min(deficit, most) for name, deficit in deficits.items() if deficit}, ring[0] if ring else "")
