"""How long an answer takes to come, as was seen, and so when a link counts as dark."""

from __future__ import annotations

import statistics
from collections import deque

_KEPT, _RECENT = 16, 3
_FIRST_S = 1.0  # patience, until a round trip was measured
_LEAST_S, _TRIPS = 0.034, 1.6  # less than 50 ms and two trips by what a token may take
_SLOWER, _CLOUD_S, _SOONEST = 1.4, 0.012, 0.1  # than usual a trip may be; until a cloud answers; of the silence
_BULK_BYTES, _BULK_BPS, _BULK_S = 4096, 1e5, 4.0  # what is more than usual is under way so long, at most


class Trips:
    """The last round trips to one cloud, of questions and of pings."""

    def __init__(self) -> None:
        self._greeted_s = 0.0
        self._trips: deque[float] = deque(maxlen=_KEPT)

    def greeted(self, took_s: float) -> None:
        """From a request that may have waited until the cloud had time: it counts until there is something better."""
        self._greeted_s = took_s

    def answered(self, took_s: float, cloud_s: float = 0.0) -> None:
        """From question to answer, of which the cloud took a part for computing and for what came before it."""
        self._trips.append(max(0.0, took_s - cloud_s))

    def at_least(self, took_s: float) -> None:
        """A round trip was so long, or longer."""
        if self._trips and took_s > self._trip_s():
            self._trips.append(took_s)

    def due_s(self) -> float:
        """Seconds without a sign of life after which a link on which an answer is due counts as down.

        So long that the device's own next token comes within two round trips, or 50 ms if those are shorter. How long
        the cloud computes does not matter: it answers pings meanwhile.
        """
        if not self._trips and not self._greeted_s:
            return _FIRST_S
        return max(_LEAST_S, _TRIPS * self._trip_s())

    def ask_s(self, due_s: float) -> float:
        """Seconds after which a sign of life is asked for, so that it comes before a silence of `due_s` is over.

        At once while nothing sure is known of the link.
        """
        if not self._trips:
            return _SOONEST * _LEAST_S
        return min(max(_SOONEST * due_s, due_s - _SLOWER * self._trip_s() - _CLOUD_S), due_s / 2)

    @staticmethod
    def bulk_s(sent_bytes: int) -> float:
        """Seconds more, for what may be under way: pings queue up behind it."""
        return min(_BULK_S, max(0, sent_bytes - _BULK_BYTES) * 8 / _BULK_BPS)

    def _trip_s(self) -> float:
        trips = list(self._trips) or [self._greeted_s]
        return max(statistics.median(trips), statistics.median(trips[-_RECENT:]))  # worse counts at once
