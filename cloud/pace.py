"""How fast a service's engine is, measured in a moment when it starts, for devices to reckon with."""

from __future__ import annotations

import time

from isthmus.engine.part import Part, Rows, Want

STEPS = (1, 2, 4, 8)
PROMPT, TURNS = 32, 2
ROOM = 128


def measured(part: Part) -> tuple[tuple[tuple[int, int], ...], int]:
    """(rows, microseconds) of steps whose rows are all sampled, and microseconds of one row of a prompt.

    Nothing and 0 where there is too little KV to try it.
    """
    if part.free_tokens < ROOM:
        return (), 0
    sequence = part.open()
    try:
        at, best = 0, dict[int, int]()

        def step(count: int, want: Want) -> int:
            nonlocal at
            began = time.perf_counter()
            part.step(Rows().tokens(sequence, at, [0] * count, want=want, want_all=want is not Want.NONE))
            at += count
            return round((time.perf_counter() - began) * 1e6)

        prompt = min(step(PROMPT, Want.NONE) for _ in range(TURNS))
        for count in STEPS * TURNS:
            took = step(count, Want.SAMPLE)
            best[count] = min(took, best.get(count, took))
        return tuple(best.items()), prompt // PROMPT
    finally:
        sequence.close()
