"""How long an answer takes to come, as was seen."""

from __future__ import annotations

import statistics
from collections import deque

from isthmus.edge.figures import between
from isthmus.protocol.messages import Offer

_KEPT, _RECENT = 16, 3
_FIRST_S = 1.0  # patience, until a round trip was measured
_LEAST_S, _TRIPS, _GAPS = 0.034, 1.6, 3.0  # less than 50 ms and two trips by what a token may take
_USUAL, _ENGINE = 1.05, 1.15  # times the trip, and what the cloud's engine should take, when it computes
_ROW_S = 0.004  # of it, for a row, where the cloud does not say
_CHUNK = 128  # rows that a cloud computes before it looks again who speaks to it


class Trips:
    """The last round trips, engine times and gaps of streams of one cloud."""

    def __init__(self) -> None:
        self._trips: deque[float] = deque(maxlen=_KEPT)
        self._gaps: deque[float] = deque(maxlen=_KEPT)
        self._paces: deque[float] = deque(maxlen=_KEPT)  # engine times over those that were declared
        self._offer: Offer | None = None

    def declared(self, offer: Offer) -> None:
        """What the cloud says of the model's steps."""
        self._offer = offer

    def answered(self, took_s: float, engine_s: float = 0.0, rows: int = 0) -> None:
        """From question to answer, of which the cloud's engine took a part, for so many rows."""
        self._trips.append(max(0.0, took_s - engine_s))
        if engine_s > 0.0 and self._engine_s(rows) > 0.0:
            self._paces.append(engine_s / self._engine_s(rows))

    def streamed(self, gap_s: float) -> None:
        """Between two messages of a stream."""
        self._gaps.append(gap_s)

    def due_s(self, rows: int) -> float:
        """Seconds without a sign of life after which a link on which an answer is due counts as down.

        So long that the device's own next token comes within two round trips, or 50 ms if those are shorter. A stream
        that comes slowly anyway gets longer, and so does a cloud whose steps are long or that was sent many rows: one
        answers no ping while it computes.
        """
        if not self._trips:
            return _FIRST_S
        trips = list(self._trips)
        trip_s = max(statistics.median(trips), statistics.median(trips[-_RECENT:]))  # worse counts at once
        gap_s = statistics.median(self._gaps) if self._gaps else 0.0
        pace = max(1.0, statistics.median(self._paces)) if self._paces else 1.0
        engine_s = _ENGINE * pace * self._engine_s(rows) if rows else 0.0
        step_s = pace * self._engine_s(1) if self._offer is not None and self._offer.steps else 0.0
        return max(_LEAST_S, _TRIPS * trip_s, _USUAL * trip_s + engine_s, _GAPS * max(gap_s, step_s))

    def _engine_s(self, rows: int) -> float:
        """What the cloud's engine takes for rows, or for as many as it takes at once, by its own word."""
        rows = min(rows, _CHUNK)
        if self._offer is None or not self._offer.steps:
            return _ROW_S * rows
        steps = tuple((count, us * 1e-6) for count, us in self._offer.steps)
        last = steps[-1][0]
        return between(steps, min(rows, last)) + max(0, rows - last) * self._offer.row_us * 1e-6
