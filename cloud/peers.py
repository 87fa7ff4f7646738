"""The service's end of one connection: who it is, its sessions' aliases, credit, and answers that wait to be sent."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from isthmus.cloud.metrics import Metrics
from isthmus.cloud.session import Session
from isthmus.protocol.errors import LinkError
from isthmus.protocol.messages import Credit, Fault, GetRange, Message, encode
from isthmus.protocol.transport import Incoming


class ServerTransport(Protocol):
    """What a service needs of `protocol.transport.RouterTransport`; tests bring faulty ones."""

    address: str

    def poll(self, timeout_ms: float) -> bool: ...

    def stirs(self, timeout_s: float) -> bool: ...

    def recv(self) -> Incoming | None: ...

    def send(self, route: bytes, frames: list[bytes]) -> bool: ...

    def lost(self) -> list[bytes]: ...

    def close(self) -> None: ...


class Peer:
    """A connection that said Hello.

    Args:
        credit_bytes: what it may have under way.
        max_outbox_bytes: answers that may wait before it counts as stuck.
        key: its public key, "" in the clear.
        name: who it is, for the log.

    Attributes:
        aliases: sessions by the number that this connection gave them.
        ranges: bundle ranges still to be sent.
        gone: whether it cannot be reached any more.
    """

    def __init__(
        self,
        route: bytes,
        transport: ServerTransport,
        metrics: Metrics,
        *,
        credit_bytes: int,
        max_outbox_bytes: int,
        key: str = "",
        name: str = "",
    ) -> None:
        self.route, self.key, self.name = route, key, name
        self.aliases: dict[int, Session] = {}
        self.ranges: deque[tuple[GetRange, int]] = deque()
        self.heard_s = 0.0
        self.gone = False
        self.outbox: deque[list[bytes]] = deque()
        self._outbox_bytes = 0
        self._max_outbox_bytes = max_outbox_bytes
        self._transport = transport
        self._metrics = metrics
        self._credit_bytes = credit_bytes
        self._under_way = 0
        self._owed = 0

    def send(self, message: Message) -> None:
        """Sends a message, or keeps it until the connection takes it."""
        if type(message) is Fault:
            self._metrics.fault(message.code.name.lower())
        frames = encode(message)
        size = sum(map(len, frames))
        self._metrics.bytes_out += size
        if self.outbox or not self._try(frames):
            self.outbox.append(frames)
            self._outbox_bytes += size
            self.gone = self.gone or self._outbox_bytes > self._max_outbox_bytes

    def flush(self) -> None:
        """Sends what was kept, as far as the connection takes it."""
        while self.outbox and self._try(self.outbox[0]):
            self._outbox_bytes -= sum(map(len, self.outbox.popleft()))

    def took(self, size: int) -> bool:
        """Counts received bytes; False when they exceed the credit given."""
        self._under_way += size
        return self._under_way <= self._credit_bytes

    def done(self, size: int) -> None:
        """Gives credit for bytes that are dealt with; a message goes out when enough has come together."""
        self._owed += size
        self._under_way -= size
        if self._owed * 4 >= self._credit_bytes:
            self.send(Credit(self._owed))
            self._owed = 0

    def _try(self, frames: list[bytes]) -> bool:
        if self.gone:
            return True  # nobody will read it
        try:
            return self._transport.send(self.route, frames)
        except LinkError:
            self.gone = True
            return True
