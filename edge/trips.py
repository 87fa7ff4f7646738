"""How long an answer takes to come, as was seen, and so when a link counts as dark."""

from __future__ import annotations

import statistics
from collections import deque

_KEPT, _RECENT = 16, 3
_FIRST_S = 1.0  # patience, until a round trip was measured
_LEAST_S, _TRIPS = 0.034, 1.6  # less than 50 ms and two trips by what a token may take
PROBED = 0.3  # share of the silence after which a sign of life is asked for: it is back in time, whatever is computed


class Trips:
    """The last round trips to one cloud."""

    def __init__(self) -> None:
        self._trips: deque[float] = deque(maxlen=_KEPT)

    def answered(self, took_s: float, cloud_s: float = 0.0) -> None:
        """From question to answer, of which the cloud took a part for computing and for what came before it."""
        self._trips.append(max(0.0, took_s - cloud_s))

    def due_s(self) -> float:
        """Seconds without a sign of life after which a link on which an answer is due counts as down.

        So long that the device's own next token comes within two round trips, or 50 ms if those are shorter. How long
        the cloud computes does not matter: it answers pings meanwhile.
        """
        if not self._trips:
            return _FIRST_S
        trips = list(self._trips)
        trip_s = max(statistics.median(trips), statistics.median(trips[-_RECENT:]))  # worse counts at once
        return max(_LEAST_S, _TRIPS * trip_s)
