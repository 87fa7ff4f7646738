"""A part that takes longer than this machine needs: a weaker device, or a cloud with a larger model, as declared."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

from isthmus.engine.part import Part, Rows, StepResult, waited
from isthmus.protocol.errors import EngineError

MOST = 1000.0


class SlowPart:
    """A part whose steps take so many times as long: it waits in proportion to what it computed.

    Everything but `step` is the part's own; see `engine.part.Part`.

    Args:
        slow_down: 1 or more.
        clock, sleep: in seconds, as those of `time`.
    """

    def __init__(
        self,
        part: Part,
        slow_down: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._part, self._slow_down, self._clock, self._sleep = part, slow_down, clock, sleep

    def step(self, rows: Rows) -> StepResult:
        """See `engine.part.Part.step`."""
        began, before = self._clock(), waited(self._part)
        result = self._part.step(rows)
        computed = self._clock() - began - (waited(self._part) - before)
        self._sleep((self._slow_down - 1.0) * max(0.0, computed))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def slowed(part: Part, slow_down: float) -> Part:
    """The part, slowed down by that factor; 1 leaves it as it is.

    Raises:
        EngineError: no such factor.
    """
    check_slow_down(slow_down)
    return part if slow_down == 1.0 else cast(Part, SlowPart(part, slow_down))


def check_slow_down(slow_down: float) -> None:
    """Refuses what is no factor.

    Raises:
        EngineError: below 1, or too large to wait for.
    """
    if not 1.0 <= slow_down <= MOST:
        raise EngineError(f"the slow-down is {slow_down:g}", f"choose a factor of 1 to {MOST:g}")
