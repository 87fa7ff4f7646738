"""What a run takes when inputs come one by one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

WARM, LEAST, MOST = 3, 8, 60  # runs that are not counted, and that are
FEW, PATIENCE = 3, 8.0  # runs of what is slow: of more than so many times the seconds it was given
PAUSE_S = 0.03  # between two runs, as between inputs: a processor that is never left alone is faster


def timed(run: Callable[[], object], seconds: float) -> tuple[float, float]:
    """The median of later runs and the time of the first one, in milliseconds."""
    ((median, first),) = timed_in_turns([run], seconds)
    return median, first


def timed_in_turns(runs: Sequence[Callable[[], object]], seconds: float) -> list[tuple[float, float]]:
    """See `timed`; of several that take turns, as they will, so that each finds the caches as the others left them.

    Args:
        seconds: for each of them.
    """
    took: list[list[float]] = [[] for _ in runs]
    began, whole = time.perf_counter(), seconds * len(runs)
    while True:
        done, spent = len(took[0]), time.perf_counter() - began
        most = WARM + (MOST if spent < whole else LEAST if spent < PATIENCE * whole else 0)
        if done >= max(most, FEW):
            break
        for run, mine in zip(runs, took, strict=True):
            start = time.perf_counter()
            run()
            mine.append((time.perf_counter() - start) * 1e3)
            time.sleep(PAUSE_S)
    return [(statistics.median(mine[WARM:] or mine[1:]), mine[0]) for mine in took]
