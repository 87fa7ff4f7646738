"""A link on which something is awaited: when it was last heard, when to ask it, and when it counts as dark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from isthmus.edge.trips import Trips

AT_ONCE_S = 2e-4  # looking for less found what was here already
_TICK_S = 1e-6  # what a clock may be wrong by


class Pinged(Protocol):
    """What is asked of a connection."""

    @property
    def heard_s(self) -> float: ...

    @property
    def asked_s(self) -> float | None: ...

    @property
    def probed(self) -> tuple[float, float] | None: ...

    def probe(self) -> None: ...


class Quiet:
    """The silence of one wait.

    Args:
        hush: seconds without a sign of life after which it is dark; 0 where that is known.
        sent: bytes that may be under way.
        now: by the clock of the connection.
    """

    def __init__(
        self, wire: Pinged, trips: Trips, hush: Callable[[], float], sent: Callable[[], int], now: float
    ) -> None:
        self._wire, self._trips, self._hush, self._sent = wire, trips, hush, sent
        self._asked_s = wire.asked_s
        self._probed = wire.probed
        self._heard_s = now if self._asked_s is None else self._asked_s

    @property
    def known(self) -> bool:
        """Whether it is dark already, as far as anybody knows."""
        return self._hush() <= 0.0

    def hear(self, looked_s: float, began_s: float) -> None:
        """Takes in what was heard since a look began; `looked_s` is when the one before ended."""
        if self._wire.heard_s > self._heard_s:
            self._heard_s, self._asked_s = self._wire.heard_s, self._wire.asked_s
        probed = self._wire.probed
        if probed is not None and probed != self._probed:
            sent_s, read_s = self._probed = probed
            if read_s - began_s > AT_ONCE_S:
                self._trips.answered(read_s - sent_s)
            else:  # it lay here, but not when it was looked before
                self._trips.at_least(looked_s - sent_s)

    def ask(self, now: float) -> None:
        """Asks for a sign of life, if it is time to."""
        if self._asked_s is None and now + _TICK_S >= self.wake_s():
            self._wire.probe()
            self._asked_s = now  # even where nothing could be sent

    def wake_s(self) -> float:
        """When there is something to do next: to ask, or to call it dark."""
        hush_s, ask_s = self._waits()
        return self.dark_s() if self._asked_s is not None or not hush_s else self._heard_s + ask_s

    def dark_s(self) -> float:
        """When it counts as dark, unless it is heard: never before a ping had time to come back."""
        hush_s, ask_s = self._waits()
        if self._asked_s is None or not hush_s:
            return self._heard_s + hush_s
        return max(self._heard_s + hush_s, self._asked_s + hush_s - ask_s)

    def dark(self, now: float) -> bool:
        """Whether it is, now."""
        return (self._asked_s is not None or self.known) and now + _TICK_S >= self.dark_s()

    def _waits(self) -> tuple[float, float]:
        """After how many seconds it is dark, and after how many it is asked."""
        hush_s = self._hush()
        if hush_s <= 0.0:
            return 0.0, 0.0
        return hush_s + self._trips.bulk_s(self._sent()), self._trips.ask_s(hush_s)
