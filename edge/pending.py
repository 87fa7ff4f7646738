"""Requests whose answers have not come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isthmus.edge.lane import Lane
from isthmus.protocol import messages as m


@dataclass(slots=True)
class Pending:
    """A message that waits for its answer."""

    message: Any
    lane: Lane | None
    asked_at: float  # or put off until then
    retry_at: float
    tries: int = 0
    head: bytes = b""  # of a draft: chain over the tokens before it


class Requests(dict[tuple[Any, ...], Pending]):
    """What is waited for, by what its answer is known by: a kind, then of rows their lane's alias and position."""

    def any_of(self, lane: Lane) -> bool:
        """Whether something is under way on a lane."""
        return any(pending.lane is lane for pending in self.values())

    def earlier(self, lane: Lane, position: int) -> bool:
        """Whether rows of a lane from before a position are under way."""
        return any(key[0] == "rows" and pending.lane is lane and key[2] < position for key, pending in self.items())

    def concerned(self, lane: Lane | None, position: int) -> list[Pending]:
        """What a refusal of a lane's request at a position puts off; without a lane, what has none."""
        of_lane = [(key, pending) for key, pending in self.items() if pending.lane is lane]
        return [pending for key, pending in of_lane if key[0] != "rows" or key[2] >= position]

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
