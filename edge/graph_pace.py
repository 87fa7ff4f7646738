"""Where the rest of a network is run: here or in the cloud, by how long either took of late; no clock, no I/O."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Literal

Place = Literal["here", "there", "both"]
SEEN = 8  # times that count
BETTER = 0.9  # of the other's time that a change must come to
LOOK_S, MOST_LOOK_S = 2.0, 60.0  # after which the place that is not in use is tried beside the other; doubles in vain
FIRST_MS = 2_000.0  # how long the first answer is waited for
LATE, SLACK_MS = 2.0, 50.0  # the others: so many times their usual time, and this on top


class GraphPace:
    """Learns from every answer.

    Args:
        able: whether the rest can be run here at all.
    """

    def __init__(self, able: bool) -> None:
        self._able, self._warm = able, False
        self._here, self._there = deque[float](maxlen=SEEN), deque[float](maxlen=SEEN)
        self._away, self._looked_s, self._rest_s = False, float("-inf"), LOOK_S

    def place(self, now_s: float) -> Place:
        """Where to run the next one, as long as the cloud is there; on "both" the answer counts if it comes first."""
        if not self._able:
            return "there"
        if not self._here or now_s - self._looked_s >= self._rest_s:
            return "both"
        return self.usual

    @property
    def usual(self) -> Place:
        """The place that is in use."""
        return "here" if self._away else "there"

    def here(self, ms: float) -> None:
        """It was run here, in that time; the first run, which is a cold one, tells nothing."""
        if self._warm:
            self._here.append(ms)
        self._warm = True

    def there(self, ms: float) -> None:
        """An answer came, that long after it was asked for."""
        self._there.append(ms)
        if self._here:
            self._away = statistics.median(self._here) < BETTER * statistics.median(self._there)

    def raced(self, now_s: float, answered: bool) -> None:
        """It was run here, and the cloud's answer was there by then or was not."""
        away = not answered
        if away and self._there and not self._away:  # it has to be worth a change
            away = bool(self._here) and self._here[-1] < BETTER * statistics.median(self._there)
        if away != self._away:
            self._there.clear()  # what was seen is of another time
        self._rest_s = min(2.0 * self._rest_s, MOST_LOOK_S) if away == self._away and self._here else LOOK_S
        self._away, self._looked_s = away, now_s

    def missed(self, now_s: float) -> None:
        """No answer came in time."""
        self.raced(now_s, False)
        self._away = True

    @property
    def patience_ms(self) -> float:
        """How long an answer is waited for where the rest can be run here."""
        return LATE * statistics.median(self._there) + SLACK_MS if self._there else FIRST_MS
