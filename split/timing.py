"""What a run takes when inputs come one by one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

WARM, LEAST, MOST = 3, 8, 60  # runs that are not counted, and that are
PAUSE_S = 0.01  # between two runs: the processor that is never left alone is faster


def timed(run: Callable[[], object], seconds: float) -> tuple[float, float]:
    """The median of later runs and the time of the first one, in milliseconds."""
    took = list[float]()
    began = time.perf_counter()
    while len(took) < WARM + LEAST or (time.perf_counter() - began < seconds and len(took) < WARM + MOST):
        start = time.perf_counter()
        run()
        took.append((time.perf_counter() - start) * 1e3)
        time.sleep(PAUSE_S)
    return statistics.median(took[WARM:]), took[0]
