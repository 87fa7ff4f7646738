"""Traces of a changing link in mahimahi's format: one line for each 1,500 bytes it can deliver, in ms from its start.

The format is that of mm-link (Netravali et al., Mahimahi, USENIX ATC 2015). A link has two: PREFIX.up and PREFIX.down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import IsthmusError

SEGMENT = 1500  # bytes that one opportunity delivers
STEP_MS = 100  # a synthetic link changes its state at most this often
FADE_MS = 20  # and its strength within a state this often
LEVELS = (250, 1000, 2200)  # strength of poor, fair and good
OUTAGE = 8  # strength of an outage
MAX_LINES = 20_000_000
SYNTHETIC, SEED = "synthetic", 11  # the link that needs no file
_WORD = 2**64 - 1


class TraceError(IsthmusError):
    """A trace that cannot be read or made."""


@dataclass(frozen=True)
class Trace:
    """When a link can deliver; it repeats from its last time on.

    Attributes:
        times_ms: one time for each opportunity of 1,500 bytes, in ms from the start, in order; several may be equal.
        name: where it comes from, for messages and results.

    Raises:
        TraceError: there is no time, one is negative or earlier than the one before, or the last is 0.
    """

    times_ms: tuple[int, ...]
    name: str = "trace"

    def __post_init__(self) -> None:
        before = 0
        for line, time_ms in enumerate(self.times_ms, 1):
            if time_ms < before:
                why = f"is earlier than {before} before it" if time_ms >= 0 else "is negative"
                raise TraceError(f"{self.name}, line {line}: {time_ms} {why}", "give times in ms that never decrease")
            before = time_ms
        if not before:
            why = f"ends at 0 ms (line {len(self.times_ms)})" if self.times_ms else "has no lines"
            raise TraceError(f"{self.name} {why}", "a trace must last for at least 1 ms")

    @cached_property
    def array_ms(self) -> NDArray[np.float64]:
        """`times_ms` as an array."""
        return np.array(self.times_ms, np.float64)

    @property
    def period_ms(self) -> int:
        """Time after which it repeats, in ms."""
        return self.times_ms[-1]


def read(path: str | Path) -> Trace:
    """Reads one direction of a link from a file.

    Raises:
        TraceError: the file cannot be read, or a line of it is no time in ms; the message names the line.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise TraceError(
            f"{path} cannot be read: {error.strerror}", "name a file of PREFIX.up and PREFIX.down"
        ) from error
    times = []
    for number, line in enumerate(lines, 1):
        digits = line.strip()
        if not digits.isdigit() or len(digits) > 15:
            said = repr(digits[:40].decode(errors="replace"))
            raise TraceError(f"{path}, line {number}: {said} is no time in ms", "write one whole number on each line")
        times.append(int(digits))
    return Trace(tuple(times), str(path))


def read_pair(prefix: str | Path) -> tuple[Trace, Trace]:
    """Reads PREFIX.up and PREFIX.down.

    Raises:
        TraceError: one of them cannot be read.
    """
    return read(f"{prefix}.up"), read(f"{prefix}.down")


def write(trace: Trace, path: str | Path) -> None:
    """Writes a trace, one time in ms on each line.

    Raises:
        TraceError: the file cannot be written.
    """
    try:
        Path(path).write_bytes(b"".join(b"%d\n" % time_ms for time_ms in trace.times_ms))
    except OSError as error:
        raise TraceError(
            f"{path} cannot be written: {error.strerror}", "name a file in a folder that exists"
        ) from error


def mean_rate(trace: Trace) -> float:
    """Mean rate over one period, in bit/s."""
    return len(trace.times_ms) * SEGMENT * 8 * 1000 / trace.period_ms


def per_second(trace: Trace) -> list[float]:
    """What it delivers in each of its seconds, in bit/s; of a shorter one, its mean rate."""
    seconds = trace.period_ms // 1000
    if not seconds:
        return [mean_rate(trace)]
    counts = [0] * seconds
    for time_ms in trace.times_ms:  # each up to and with its end, as the last time of a period is
        if time_ms <= 1000 * seconds:
            counts[(max(time_ms, 1) - 1) // 1000] += 1
    return [8.0 * SEGMENT * count for count in counts]


def turned(trace: Trace, start_s: float) -> Trace:
    """A trace that begins where another is after some seconds; it repeats from the last opportunity before that."""
    start = round(start_s * 1e3) % trace.period_ms
    times = [time_ms - start for time_ms in trace.times_ms if time_ms > start]
    return Trace((*times, *(t + trace.period_ms - start for t in trace.times_ms if t <= start)), trace.name)


def synthetic(
    seed: int, seconds: int, mean_bps: int, *, outage_every_s: float = 20.0, outage_s: float = 1.5, name: str = ""
) -> Trace:
    """A made-up cellular link: it moves between poor, fair and good, fades within them, and at times all but stops.

    Markov-modulated, in integers only: the same arguments give the same trace on every machine.

    Args:
        seed: any whole number.
        seconds: its length, after which it repeats.
        mean_bps: mean rate in bit/s over its length, met to the nearest 1,500 bytes below.
        outage_every_s: mean time from one outage to the next, in seconds; 0 for none.
        outage_s: mean length of an outage, in seconds; the rate is then about a hundredth of the mean.

    Raises:
        TraceError: a length or rate out of bounds, or too low to deliver anything.
    """
    total = mean_bps * seconds // (SEGMENT * 8) if seconds > 0 else 0
    if not 0 < total <= MAX_LINES:
        raise TraceError(
            f"{mean_bps} bit/s over {seconds} s are {max(total, 0)} opportunities of {SEGMENT} bytes",
            f"choose a rate and a length with 1 to {MAX_LINES}",
        )
    every, length = round(outage_every_s * 1000), round(outage_s * 1000)
    if every and not (STEP_MS <= length < every):
        raise TraceError(
            f"outages of {outage_s} s each {outage_every_s} s",
            f"give a length from {STEP_MS / 1000} s on that is below the time between them, or 0 between them for none",
        )
    strengths = list(_strengths(seed, seconds * 1000 // FADE_MS, every, length))
    whole = sum(strengths) * FADE_MS
    times: list[int] = []
    reached = 0
    for fade, strength in enumerate(strengths):
        for ms in range(FADE_MS):
            reached += strength
            new = reached * total // whole - len(times)
            if new:
                times += [fade * FADE_MS + ms + 1] * new
    return Trace(tuple(times), name or f"synthetic(seed={seed}, seconds={seconds}, mean_bps={mean_bps})")


def synthetic_pair(seed: int = SEED) -> tuple[Trace, Trace]:
    """The synthetic link that benchmarks use, its two ways: 1.2 and 3 Mbit/s in the mean, for two minutes."""
    return synthetic(seed, 120, 1_200_000), synthetic(seed + 1, 120, 3_000_000)


def named_pair(name: str | Path) -> tuple[Trace, Trace]:
    """The two ways of a link: "synthetic", "synthetic:SEED", or those that PREFIX.up and PREFIX.down hold.

    Raises:
        TraceError: a trace cannot be read, or the seed is no whole number.
    """
    kind, colon, seed = str(name).partition(":")
    if kind != SYNTHETIC:
        return read_pair(name)
    if colon and not seed.isdecimal():
        raise TraceError(f"the trace's seed is {seed!r}", "give a whole number, as in synthetic:7")
    return synthetic_pair(int(seed) if colon else SEED)


def _strengths(seed: int, count: int, every_ms: int, length_ms: int) -> Iterator[int]:
    """Relative strength of a link in each `FADE_MS`, always above 0."""
    draw = _words(seed)
    level, out = 1, False
    for fade in range(count):
        if fade % (STEP_MS // FADE_MS) == 0:
            if out:
                out = next(draw) % length_ms >= STEP_MS
            elif every_ms:
                out = next(draw) % (every_ms - length_ms) < STEP_MS
            move = next(draw) % 16  # a level lasts 0.8 s in the mean
            level = max(level - 1, 0) if move == 0 else min(level + 1, len(LEVELS) - 1) if move == 1 else level
        fading = 50 + next(draw) % 101
        yield (OUTAGE if out else LEVELS[level]) * fading


def _words(seed: int) -> Iterator[int]:
    """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): 64-bit words from a counter."""
    counter = seed & _WORD
    while True:
        counter = (counter + 0x9E3779B97F4A7C15) & _WORD
        word = ((counter ^ (counter >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
        yield word ^ (word >> 31)
