"""How long an answer takes to come, as was seen."""

from __future__ import annotations

import statistics
from collections import deque

_KEPT, _RECENT = 16, 3
_FIRST_S = 1.0  # patience, until a round trip was measured
_LEAST_S, _TRIPS, _GAPS = 0.036, 1.7, 3.0  # a little less than 50 ms and two trips, for the token that follows
_ROW_S, _LATE = 0.004, 2.0  # generous: of a row among many; how many times longer it may take than it says


class Trips:
    """The last round trips and gaps of streams of one cloud.

    Attributes:
        row_s: what the cloud says that it takes for one row among many; 0 where it does not.
    """

    def __init__(self) -> None:
        self.row_s = 0.0
        self._trips: deque[float] = deque(maxlen=_KEPT)
        self._gaps: deque[float] = deque(maxlen=_KEPT)

    def answered(self, took_s: float) -> None:
        """From question to answer, without the time in the cloud's engine."""
        self._trips.append(max(0.0, took_s))

    def streamed(self, gap_s: float) -> None:
        """Between two messages of a stream."""
        self._gaps.append(gap_s)

    def due_s(self, rows: int) -> float:
        """Seconds without a sign of life after which a link on which an answer is due counts as down.

        So long that the device's own next token comes within two round trips, or 50 ms if those are shorter. A stream
        that comes slowly anyway gets longer, and so does a cloud that was sent many rows.
        """
        if not self._trips:
            return _FIRST_S
        trips = list(self._trips)
        trip_s = max(statistics.median(trips), statistics.median(trips[-_RECENT:]))  # worse counts at once
        gap_s = statistics.median(self._gaps) if self._gaps else 0.0
        return max(_LEAST_S, _TRIPS * trip_s, _GAPS * gap_s) + (_LATE * self.row_s or _ROW_S) * rows
