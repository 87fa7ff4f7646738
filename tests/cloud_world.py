"""A service without sockets, in time of our own, for the tests of the cloud."""

from __future__ import annotations

from typing import Any

from isthmus.cloud.admission import ServiceLimits
from isthmus.cloud.models import Model, serve_part
from isthmus.cloud.service import Service
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.keys import AllowList
from isthmus.protocol.limits import LinkLimits
from tests.fakes import FakePart, MemoryServer, fake_text

ANNA, BERT = "A" * 40, "B" * 40
PROMPT = [3, 1, 4, 1, 5]
TEXT = fake_text(PROMPT, 20)
SESSION = bytes(range(16))


class World:
    """A service with one thread of time."""

    def __init__(self, *models: Model, allowed: AllowList | None = None, link: LinkLimits | None = None, **limits: Any):
        self.now = 1000.0
        self.tick = 0.0  # that passes whenever somebody looks at the clock
        self.wire = MemoryServer()
        self.service = Service(
            models or (serve_part(FakePart(), "aa", "fake"),),
            self.wire,
            allowed,
            limits=ServiceLimits(**limits),
            link_limits=link or LinkLimits(),
            clock=self.clock,
        )

    def clock(self) -> float:
        self.now += self.tick
        return self.now

    def ask(self, *messages: m.Message, route: bytes = b"a", key: str = "", turns: int = 1) -> list[Any]:
        """What comes back when these messages arrive together."""
        for message in messages:
            self.wire.put(message, route, key)
        for _ in range(turns):
            self.service.turn(0.0)
        return self.wire.take(route)

    def open(self, route: bytes = b"a", key: str = "", **fields: Any) -> Any:
        """The answer to Hello and Open."""
        fields = {"session": SESSION, "alias": 1, "epoch": 1, "model_id": "aa", **fields}
        return self.ask(m.Hello(1, 1), m.Open(**fields), route=route, key=key)[-1]

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.service.turn(0.0)


def rows(log: list[int], count: int, **fields: Any) -> m.Rows:
    at = len(log) - count
    return m.Rows(fields.pop("alias", 1), fields.pop("epoch", 1), at, Chain(log[:at]).head, log[at:], **fields)


def code(message: Any) -> m.Code:
    assert isinstance(message, m.Fault), message
    assert message.problem
    return message.code
