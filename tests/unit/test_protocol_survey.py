"""Links that are measured: what is found is what they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest

from isthmus.protocol import messages as m
from isthmus.protocol.errors import LinkError
from isthmus.protocol.survey import survey

LIMITS = m.Limits(1 << 22, 1 << 23, 1000, 1024)
WELCOME = m.Welcome(1, 1, (), (), LIMITS)


class Pipe:
    """A cloud behind a link of a round trip and of rates, in time of its own.

    Attributes:
        answer: what the cloud says to a message.
    """

    def __init__(self, trip_ms: float = 20.0, up_bps: float = 1e7, down_bps: float = 2e7) -> None:
        self.now, self._trip_s, self._rates = 0.0, trip_ms * 1e-3, (up_bps, down_bps)
        self._free = [0.0, 0.0]
        self._coming: deque[tuple[float, list[bytes]]] = deque()
        self.refuse: m.Fault | None = None
        self.old = self.dead = False

    def clock(self) -> float:
        return self.now

    def send(self, frames: Sequence[bytes]) -> bool:
        if self.dead:
            return True
        at = self._way(0, self.now, frames)
        message = m.decode([bytes(one) for one in frames])
        answer: Any = WELCOME if self.refuse is None else self.refuse
        if isinstance(message, m.Ping):
            answer = m.Pong(message.sent_us, b"" if self.old else bytes(message.wanted))
        told = m.encode(answer)
        self._coming.append((self._way(1, at, told), told))
        return True

    def poll(self, timeout_ms: float, *, sending: bool = False) -> bool:
        if sending:
            return True
        if self._coming and self._coming[0][0] <= self.now + timeout_ms * 1e-3:
            self.now = max(self.now, self._coming[0][0])
            return True
        self.now += timeout_ms * 1e-3
        return False

    def recv(self) -> list[bytes] | None:
        return self._coming.popleft()[1] if self._coming and self._coming[0][0] <= self.now else None

    def close(self) -> None:
        pass

    def _way(self, way: int, at: float, frames: Sequence[bytes]) -> float:
        self._free[way] = max(self._free[way], at) + sum(map(len, frames)) * 8 / self._rates[way]
        return self._free[way] + self._trip_s / 2


@pytest.mark.parametrize(("trip_ms", "up", "down"), [(20.0, 1e7, 2e7), (200.0, 2.5e5, 1e6), (1.0, 1e8, 1e8)])
def test_the_round_trip_and_both_rates(trip_ms: float, up: float, down: float) -> None:
    pipe = Pipe(trip_ms, up, down)
    found = survey(pipe, pipe.clock)
    assert found.trip_ms == pytest.approx(trip_ms, abs=2.0) and found.trip_high_ms >= found.trip_ms
    assert found.up_bps == pytest.approx(up, rel=0.02) and found.down_bps == pytest.approx(down, rel=0.02)
    assert pipe.now < 20.0 and found.welcome.limits == LIMITS


def test_who_does_not_answer_or_refuses_or_is_too_old() -> None:
    pipe = Pipe()
    pipe.dead = True
    with pytest.raises(LinkError, match="does not answer"):
        survey(pipe, pipe.clock)
    pipe = Pipe()
    pipe.refuse = m.Fault(m.Code.NOT_ALLOWED, "this key is not known", "ask for it")
    with pytest.raises(LinkError, match="refused: this key is not known; ask for it"):
        survey(pipe, pipe.clock)
    pipe = Pipe()
    pipe.old = True
    with pytest.raises(LinkError, match="too old"):
        survey(pipe, pipe.clock)
