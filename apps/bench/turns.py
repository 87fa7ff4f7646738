"""Contenders take turns, and medians over all turns are compared: shared machines drift too much for anything else."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.apps.bench.contenders import PREFILL, Contender

SETTLE = 2  # first steps of a turn that are not counted


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured.

    Attributes:
        context: positions before the first decoded one; a prompt's length when `batch` is 0.
        batch: sequences decoded together, or 0 for the prefill of one prompt.
    """

    context: int
    batch: int

    def __str__(self) -> str:
        return f"prefill of {self.context}" if not self.batch else f"{self.batch} at context {self.context}"

    @property
    def tokens(self) -> int:
        """Tokens that one timed call computes."""
        return self.batch or self.context


CASES = (Case(64, 1), Case(500, 1), Case(64, 8), Case(PREFILL, 0))


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of one contender in one case: median and best tenth."""

    median: float
    best: float


def measure(contenders: Sequence[Contender], case: Case, *, turns: int = 6, steps: int = 20) -> dict[str, Speed]:
    """Speeds by contender's name; the contenders alternate `turns` times."""
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for turn in range(turns + 1):
        for contender in contenders:
            if case.batch:
                taken = contender.decode(case.context, case.batch, steps)[SETTLE:]
            else:
                taken = [contender.prefill(case.context)]
            if turn:  # the first turn warms caches
                seconds[contender.name] += taken
    return {name: Speed(case.tokens / statistics.median(s), case.tokens / tenth(s)) for name, s in seconds.items()}


def tenth(values: Sequence[float]) -> float:
    """The value below which a tenth lies."""
    return sorted(values)[len(values) // 10]
