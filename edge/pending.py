"""Requests whose answers have not come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isthmus.edge.lane import Lane
from isthmus.protocol import messages as m
from isthmus.protocol.chain import extend


@dataclass(slots=True)
class Pending:
    """A message that waits for its answer.

    Attributes:
        head: of a draft, chain over the tokens before it.
    """

    message: Any
    lane: Lane | None
    asked_at: float  # or put off until then
    retry_at: float
    tries: int = 0
    head: bytes = b""

    def head_after(self, accepted: int) -> bytes:
        """Chain over the tokens up to the draft's first so many."""
        head = self.head
        for token in self.message.tokens[:accepted]:
            head = extend(head, token)
        return head

    def timed(self, now: float) -> bool:
        """Whether its answer tells how long a trip takes: it was asked once, and was not put off."""
        return not self.tries and now >= self.asked_at

    def repeated(self, now: float, retry_s: float) -> Any:
        """The message, which is sent once more; each time later."""
        self.tries += 1
        self.retry_at = now + retry_s * min(2**self.tries, 8)
        return self.message


class Requests(dict[tuple[Any, ...], Pending]):
    """What is waited for, by what its answer is known by: a kind, then of rows their lane's alias and position."""

    def any_of(self, lane: Lane) -> bool:
        """Whether something is under way on a lane."""
        return any(pending.lane is lane for pending in self.values())

    def earlier(self, lane: Lane, position: int) -> bool:
        """Whether rows of a lane from before a position are under way."""
        return any(key[0] == "rows" and pending.lane is lane and key[2] < position for key, pending in self.items())

    def put_off(self, lane: Lane | None, position: int, until: float) -> float | None:
        """Waits with what a refusal of a lane's request at a position concerns; without a lane, with what has none.

        Returns:
            When the oldest of it was asked for; None when there is nothing.
        """
        of_lane = [(key, pending) for key, pending in self.items() if pending.lane is lane]
        later = [pending for key, pending in of_lane if key[0] != "rows" or key[2] >= position]
        asked_at = min((pending.asked_at for pending in later), default=None)
        for pending in later:
            pending.asked_at = pending.retry_at = until
        return asked_at

    def void(self, lane: Lane, position: int) -> None:
        """No answer to a lane's rows from a position on will come."""
        for key in [key for key in self if key[:2] == ("rows", lane.alias) and key[2] >= position]:
            del self[key]

    def drop(self, lane: Lane) -> bool:
        """Nothing of a lane is wanted any more; whether anything was."""
        keys = [key for key, pending in self.items() if pending.lane is lane]
        for key in keys:
            del self[key]
        return bool(keys)


def bulk_key(request: m.GetManifest | m.GetRange) -> tuple[Any, ...]:
    """What a request for bulk data is known by until it is answered."""
    return ("range", request.name, request.offset) if isinstance(request, m.GetRange) else ("manifest",)
