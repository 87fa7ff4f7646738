"""How much of its processors' time others on the same host took from this machine, and a wait until that is little."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

CALM = 0.05  # share taken that spoils no median
MOST_LEFT_OUT = 0.5  # share of rounds
LOOK_S, BETWEEN_S = 0.1, 0.5
STAT = Path("/proc/stat")


class Calm:
    """What was taken since the last look; nothing is on machines whose kernel does not tell.

    Args:
        stat: the kernel's counters (proc(5)).
    """

    def __init__(self, stat: Path = STAT) -> None:
        self._stat = stat
        self._seen = self._read()

    def taken(self) -> float:
        """Share of the time that this machine wanted of its processors since the last call and did not get."""
        before, self._seen = self._seen, self._read()
        busy, stolen = (now - then for now, then in zip(self._seen, before, strict=True))
        return stolen / max(1, busy + stolen)

    def wait(self, longest_s: float) -> None:
        """Waits until little is taken from one busy processor, or for that long."""
        until = time.monotonic() + longest_s
        while True:
            self.taken()
            look = time.monotonic() + LOOK_S
            while time.monotonic() < look:
                pass
            if self.taken() <= CALM or time.monotonic() + BETWEEN_S > until:
                return
            time.sleep(BETWEEN_S)

    def _read(self) -> tuple[int, int]:
        """Ticks in which the processors worked, and those that were taken."""
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, self._stat.read_text().split()[1:9])
        except (OSError, ValueError):
            return 0, 0
        return user + nice + system + irq + softirq, steal


def calm_enough(taken: Sequence[float]) -> list[int]:
    """Which rounds count: those from which at most `CALM` was taken, and the calmest ones up to a half of all."""
    least = len(taken) - int(MOST_LEFT_OUT * len(taken))
    order = sorted(range(len(taken)), key=lambda one: taken[one])
    return sorted(one for place, one in enumerate(order) if place < least or taken[one] <= CALM)
