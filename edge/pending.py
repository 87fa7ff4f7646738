"""A request whose answer has not come."""

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
    rows: int = 0  # that the cloud has to compute before it says something
    tries: int = 0
    head: bytes = b""  # of a draft: chain over the tokens before it


def bulk_key(request: m.GetManifest | m.GetRange) -> tuple[Any, ...]:
    """What a request for bulk data is known by until it is answered."""
    return ("range", request.name, request.offset) if isinstance(request, m.GetRange) else ("manifest",)
