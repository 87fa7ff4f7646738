"""How long a device waits for a cloud that is silent, slow or busy."""

from __future__ import annotations

from isthmus.edge.events import Busy, Timeouts
from isthmus.protocol.errors import IsthmusError, LinkError, SlowLinkError


class Patience:
    """What one device puts up with while it waits; times are seconds of the session's clock.

    Args:
        where: the cloud's address, for error messages.

    Attributes:
        known: whether that cloud has answered this conversation before, so that its address is right.
        impatient: whether a cloud that stays busy counts as gone after `Timeouts.busy_ms`.
        waiting: says that a busy cloud has been putting the device off for some time, or that it has been silent; empty
            when neither is so.
    """

    def __init__(self, timeouts: Timeouts, where: str) -> None:
        self.known = self.impatient = False
        self.waiting = ""
        self._timeouts, self._where = timeouts, where
        self._alive_at = self._progress_at = 0.0
        self._put_off = ""  # why the cloud last said that it is busy
        self._put_off_at = 0.0  # when it began to say so
        self._put_off_until = float("-inf")  # when it counts as busy no more, unless it says so again

    def begin(self, now: float) -> None:
        """Something is asked for after a time in which nothing was."""
        self._alive_at = now
        self.progressed(now)

    def alive(self, now: float) -> None:
        """The link has shown a sign of life."""
        self._alive_at = now

    def progressed(self, now: float) -> None:
        """An answer came."""
        self._progress_at = self._put_off_until = now
        self.waiting = ""

    def put_off(self, why: str, asked_at: float, retry_at: float, now: float) -> None:
        """The cloud said that it is busy.

        Args:
            asked_at: when the oldest request that it puts off was made.
            retry_at: when it is asked again.
        """
        if now >= self._put_off_until:
            self._put_off_at = now
        # A cloud of long steps says so rarely.
        self._put_off_until = retry_at + max(self._timeouts.retry_ms / 1e3, 2 * (now - asked_at))
        self._put_off = why

    def ends_at(self, connected: bool) -> float:
        """When silence has lasted too long."""
        return self._alive_at + (self._timeouts.give_up_ms if connected else self._timeouts.connect_ms) / 1e3

    def lost(self, now: float, connected: bool, closing: bool, failure: IsthmusError | None) -> IsthmusError | None:
        """Why waiting is given up; None while it goes on.

        Args:
            connected: whether the cloud ever said Welcome.
            closing: whether it said that it stops.
            failure: why the link is down, when that is known.
        """
        patience_ms = self._timeouts.give_up_ms if connected else self._timeouts.connect_ms
        if closing:
            patience_ms = min(patience_ms, self._timeouts.retry_ms)
        elif not (connected or self.known or failure is None or isinstance(failure, SlowLinkError)):
            patience_ms //= 4  # somebody said no; a cloud that is just starting gets a moment
        put_off_ms = (now - self._put_off_at) * 1e3 if now < self._put_off_until else 0.0
        if (now - self._alive_at) * 1e3 >= patience_ms:
            return failure or self._silence(connected, closing)
        if (now - self._progress_at) * 1e3 >= self._timeouts.progress_ms:
            took_s = now - self._progress_at
            why = f": {self._put_off}" if put_off_ms else ""
            return LinkError(f"{self._where} is there but gave no answer in {took_s:.0f} s{why}", "try again")
        if put_off_ms >= self._timeouts.busy_ms and self.impatient:
            return Busy(f"{self._where} is busy: {self._put_off}", "try again in a moment")
        if connected and not closing:
            silent_ms = (now - self._alive_at) * 1e3
            if max(put_off_ms, silent_ms) < self._timeouts.busy_note_ms:
                self.waiting = ""
            elif not self.waiting and put_off_ms:
                self.waiting = f"{self._where} is busy: waiting ({self._put_off})"
            elif not self.waiting:
                self.waiting = f"{self._where} is silent: waiting for {patience_ms / 1e3:g} s in all"
        return None

    def _silence(self, connected: bool, closing: bool) -> LinkError:
        if not connected:
            return LinkError(f"{self._where} does not answer", "check the address, and that `isthmus serve` runs there")
        if closing:
            return LinkError(f"{self._where} has stopped", "start it again or name another cloud")
        return LinkError(f"{self._where} went away", "check the link, and that `isthmus serve` runs there")
