"""What a way to share takes again and again: over a link that changes, and in a cloud that others use as well.

Inputs come at random moments of the link's trace. What is under way takes the opportunities that the trace gives from
then on; nothing else uses the link. Others' requests come to the cloud independently of each other and take all as
long, so that one waits as in an M/D/1 queue.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import PlanError
from isthmus.split.link import Link
from isthmus.split.plan import Row
from isthmus.split.traces import SEGMENT, Trace

INPUTS = 4000
_LEAST_LOAD = 1e-6  # below which nobody is ever waited for
_PIECES = 32  # that are added up one by one: the sum of more is about normal
Times = NDArray[np.float64]


def latencies(
    row: Row,
    link: Link,
    load: float = 0.0,
    beside_ms: float = 0.0,
    others_ms: float = 0.0,
    seed: int = 0,
    at_ms: Times | None = None,
) -> Times:
    """Milliseconds from input to output.

    Args:
        load: the share of the cloud's time that others take, below 1, by requests of `others_ms`.
        beside_ms: that a request takes in the cloud beside the model.
        at_ms: when inputs come, in ms of the trace; None for `INPUTS` random moments.

    Raises:
        PlanError: a load that leaves no time.
    """
    if not 0.0 <= load < 1.0:
        raise PlanError(f"others take {load:g} of the cloud's time", "give a share from 0 to below 1")
    generator = np.random.default_rng(seed)
    period_ms = max((way.period_ms for way in (link.up, link.down) if isinstance(way, Trace)), default=1)
    starts = generator.uniform(0.0, period_ms, INPUTS) if at_ms is None else at_ms
    goes_on, early_ms = row.goes_on, sum(one.share * one.ms for one in row.leaves)
    found = np.full(len(starts), (row.device_ms - early_ms) / goes_on if goes_on else 0.0)
    if row.kind != "device" and goes_on:
        cloud_ms = row.cloud_ms / goes_on
        there = passed(link.up, starts + found, row.up_bytes / goes_on) + link.trip_ms / 2
        done = there + waits(load, others_ms, generator, len(starts)) + cloud_ms + beside_ms
        found = passed(link.down, done, row.down_bytes / goes_on) + link.trip_ms / 2 - starts
    if row.leaves:
        ends = np.cumsum([one.share for one in row.leaves])
        drawn = generator.uniform(size=len(starts))
        for at in reversed(range(len(ends))):
            found = np.where(drawn < ends[at], row.leaves[at].ms, found)
    return found


def passed(way: Trace | float, at_ms: Times, size: float) -> Times:
    """When so many bytes are through that are handed to one way of a link at each of these moments."""
    if size <= 0:
        return at_ms
    if not isinstance(way, Trace):
        return at_ms + size * 8e3 / way
    times = way.array_ms
    cycle, within = np.divmod(at_ms, way.period_ms)
    ends = (within == 0) & (cycle > 0)  # the last time of a period is also time 0 of the next
    cycle, within = cycle - ends, within + ends * way.period_ms
    last = np.searchsorted(times, within) + int(-(-size // SEGMENT)) - 1
    more, place = np.divmod(last, len(times))
    found: Times = (cycle + more) * way.period_ms + times[place]
    return found


def waits(load: float, service_ms: float, generator: np.random.Generator, count: int = INPUTS) -> Times:
    """What so many requests, each at a moment of its own, wait for others before them.

    Others come at random and take the same time each, so that a wait is the sum of as many pieces of such a time as a
    geometric number has it (Pollaczek and Khinchine's law).
    """
    if load < _LEAST_LOAD or not service_ms:
        return np.zeros(count)
    ahead = generator.geometric(1.0 - load, count) - 1
    pieces = np.zeros((count, _PIECES + 1))
    pieces[:, 1:] = np.cumsum(generator.uniform(size=(count, _PIECES)), axis=1)
    few = pieces[np.arange(count), np.minimum(ahead, _PIECES)]
    many = ahead / 2.0 + np.sqrt(ahead / 12.0) * generator.standard_normal(count)
    waited: Times = service_ms * np.where(ahead <= _PIECES, few, np.maximum(many, 0.0))
    return waited
