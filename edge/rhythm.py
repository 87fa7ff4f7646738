"""When a device that chooses by itself decides again, how long it waits, when it asks the link, what it still expects.

Told the time and never asking for it: the controller goes by this, and so does the simulator of benchmarks.
"""

from __future__ import annotations

from isthmus.edge.costs import Candidate
from isthmus.edge.figures import Figures

DECIDE_S, SELDOM_S, SELDOMER = 0.05, 0.2, 1.5  # between two decisions: at least, at most, each time so much more
PROBE_S, PROBE_BYTES = 2.0, 9000  # between two measurements of an uplink whose rate might change the way
FIRST_BYTES, FIRST_S = 3000, 0.15  # of the first, which an answer waits for so long, at most, beyond a trip
PING_S, LOST_S = 0.5, 5.0  # of a link that shows nothing else; until an unanswered ping is repeated
LOOK_S, LOOK_SHARE = 0.02, 0.2  # between two looks at what is late: at least, and of how long it has been awaited
REST_S, MOST_REST_S = 1.0, 60.0  # a cloud that was given up is not asked again for so long: at first, and at most
LATE_MS = 50.0  # nothing is late before
USUAL, LEAST = 120, 24  # tokens that an answer has: mostly, and still to come however long it is


class Rhythm:
    """When to decide again: less and less often while the way of working stays the same."""

    def __init__(self) -> None:
        self._every_s, self._decided_s = DECIDE_S, float("-inf")

    def due(self, now_s: float) -> bool:
        """Whether it is time to decide."""
        return now_s - self._decided_s >= self._every_s

    def decided(self, now_s: float) -> None:
        """A decision was made."""
        self._decided_s = now_s

    def stayed(self) -> None:
        """It was that all goes on as it is."""
        self._every_s = min(SELDOM_S, SELDOMER * self._every_s)

    def changed(self) -> None:
        """It was another way of working."""
        self._every_s = DECIDE_S


class Pulse:
    """When a link is asked for a sign of life, or for its rate."""

    def __init__(self) -> None:
        self._first_s = self._asked_s = self._probed_s = float("-inf")  # the first question that has no answer, ...

    def asks(self, now_s: float, seen_s: float, curious: bool) -> int | None:
        """Bytes to ask with now, which counts as asked; None for nothing.

        Args:
            seen_s: when the link last showed its trip.
            curious: whether the uplink's rate might change the way of working.
        """
        asked = self.awaits(seen_s)
        probes = curious and not asked and self.probes(now_s)
        if not probes and now_s - max(self._asked_s, seen_s) < (LOST_S if asked else PING_S):
            return None
        self._asked_s = now_s
        if not asked:
            self._first_s = now_s
        if probes:
            self._probed_s = now_s
        return PROBE_BYTES if probes else 0

    def awaits(self, seen_s: float) -> bool:
        """Whether an answer is still to come; see `asks`."""
        return self._asked_s > seen_s

    def probes(self, now_s: float) -> bool:
        """Whether the uplink may be measured again."""
        return now_s - self._probed_s >= PROBE_S

    def silent_ms(self, now_s: float, seen_s: float, trip_high_ms: float) -> float:
        """For how many ms more than is usual a question has not been answered; below 0 if it may still be."""
        return (now_s - self._first_s) * 1e3 - 2 * trip_high_ms if self.awaits(seen_s) else 0.0


def expected(made: int, wanted: int) -> int:
    """Tokens that are still to come, as far as a device can know: the longer the answer is, the fewer.

    Args:
        made: tokens of the answer.
        wanted: that are still asked for at most.
    """
    return max(1, min(wanted, max(LEAST, USUAL - made)))


def usual_ms(choice: Candidate, known: Figures, fresh: bool) -> float:
    """How long an answer of the cloud takes when all goes well.

    Args:
        fresh: whether it is the first of this way of working.
    """
    link, cloud = known.link, known.cloud
    assert link is not None and cloud is not None
    ms = cloud.step(max(1, choice.draft_tokens + 1)) + cloud.queue_ms
    if choice.mode == "stream":
        ms += max(link.trip_high_ms - link.trip_ms, 0.5 * link.trip_ms)
    else:
        ms += 1.5 * link.trip_high_ms
    return max(LATE_MS, ms + (choice.setup_ms + 3 * link.trip_high_ms if fresh else 0.0))


def probe_s(known: Figures) -> float:
    """How long the first measurement of an uplink is waited for before anything is chosen."""
    assert known.link is not None
    return known.link.trip_high_ms * 1e-3 + FIRST_S


def next_look_s(now_s: float, waited_ms: float) -> float:
    """When to look again at what has been awaited for so long."""
    return now_s + max(LOOK_S, LOOK_SHARE * waited_ms * 1e-3)
