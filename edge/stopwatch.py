"""What this device's own steps take, seen while they are made for other reasons."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from isthmus.edge.estimator import quantile
from isthmus.edge.experts.stalls import Stalls
from isthmus.engine.part import Part, Rows, StepResult, Want, waited

MANY = 16  # rows from which on a step is a prompt's, bound by arithmetic and not by memory
KEPT = 31  # steps that are remembered
FAST = 0.25  # share of them that are faster than what is told
ENOUGH = 3  # steps of one row that tell how fast a device is
GUESSED_ROW = 0.2  # what one of many rows costs, of a token, until a prompt was seen


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of weights that one row reads.

    Attributes:
        layer: of a layer, in the mean.
        head: of the output head.
        exit: of an exit's own layer.
        exits: (layer, bytes) of the exit before it, its rows of the output head included.
    """

    n_layers: int
    layer: float
    head: float
    exit: float = 0.0
    exits: tuple[tuple[int, float], ...] = ()

    def of(self, layers: int, head: bool) -> float:
        """Of one row through so many layers, and the head if it is sampled."""
        return layers * self.layer + (self.head if head else 0.0)


class Stopwatch:
    """Times of steps, as milliseconds for a megabyte of weights and for a row of a prompt.

    One row is bound by the weights that it reads, so a step through some layers tells of all. What a step waits for
    experts is not part of its time.

    Args:
        clock: seconds. Steps that take no time on it tell nothing.
        stalls: is told what steps wait for experts; None where they do not.
    """

    def __init__(self, sizes: Sizes, clock: Callable[[], float], stalls: Stalls | None = None) -> None:
        self.sizes, self.stalls, self._clock = sizes, stalls, clock
        self._decoded: deque[float] = deque(maxlen=KEPT)
        self._prompt: deque[float] = deque(maxlen=KEPT)

    @property
    def knows(self) -> bool:
        """Whether enough was seen to say how fast this device is."""
        return len(self._decoded) >= ENOUGH

    @property
    def ms_per_mb(self) -> float:
        """Of one row: the fast ones, as whatever else runs only ever makes a step slower."""
        return quantile(list(self._decoded), FAST)

    @property
    def knows_prompts(self) -> bool:
        """Whether a step of many rows was seen."""
        return bool(self._prompt)

    @property
    def row_ms(self) -> float:
        """Of one of many rows through the whole model."""
        if self._prompt:
            return quantile(list(self._prompt), FAST)
        return GUESSED_ROW * self.ms_per_mb * self.sizes.of(self.sizes.n_layers, False) / 1e6

    def remember(self, ms_per_mb: float, row_ms: float) -> None:
        """What was measured another time: it counts as little as it can. A row of 0 ms is one that was not measured."""
        self._decoded.extend([ms_per_mb] * ENOUGH)
        if row_ms:
            self._prompt.append(row_ms)

    def timed(self, part: Part) -> Part:
        """The part, its steps watched."""
        return cast(Part, _Timed(part, self, self._clock))

    def saw(self, rows: Rows, part: Part, seconds: float, idle: float = 0.0) -> None:
        """A step was made.

        Args:
            idle: the seconds of it in which it waited for experts.
        """
        seconds -= idle
        if len(rows.spans) != 1 or seconds <= 0.0:
            return
        span = rows.spans[0]
        layers = (part.end if span.leave is None else span.leave) - span.enter
        if span.enter or layers <= 0:
            return  # an exit's own layer is too small a sample
        if self.stalls is not None:
            self.stalls.saw(span.count, layers / self.sizes.n_layers, idle * 1e3, self.row_ms if self.knows else 0.0)
        if span.count == 1:
            self._decoded.append(seconds * 1e9 / self.sizes.of(layers, bool(span.want & ~Want.HIDDEN)))
        elif span.count >= MANY:
            self._prompt.append(seconds * 1e3 / span.count * self.sizes.n_layers / layers)


class _Timed:
    """A part that tells a stopwatch; everything but `step` is the part's own."""

    def __init__(self, part: Part, watch: Stopwatch, clock: Callable[[], float]) -> None:
        self._part, self._watch, self._clock = part, watch, clock

    def step(self, rows: Rows) -> StepResult:
        """See `engine.part.Part.step`."""
        began, before = self._clock(), waited(self._part)
        result = self._part.step(rows)
        self._watch.saw(rows, self._part, self._clock() - began, waited(self._part) - before)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)
