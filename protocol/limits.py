"""Timeouts and limits of a link, named; the service's own stand in `cloud.admission`."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.protocol.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """What one side of a link allows and waits for.

    Attributes:
        max_message_bytes: largest frame that is accepted.
        max_queued_messages: high-water mark of each ZeroMQ queue; byte credits bound what waits there.
        credit_bytes: bytes that a device may have under way at the cloud.
        max_rows: rows in one message.
        handshake_ms: a connection that is not through with CURVE, which takes four round trips, by then is dropped.
        connect_ms: a device waits that long for Welcome.
        heartbeat_ms: silence after which a Ping is sent.
        silent_intervals: heartbeats without any sign of life after which a fresh connection is tried.
        dead_ms: silence after which a cloud closes a connection: cellular links stall for ten seconds, and then bring
            all that was on its way.
        linger_ms: how long closing waits for messages under way.
        max_held_bytes: bytes that a connection may have sent without a whole message of them; beyond it is cut off.
            Credit and one message stay well below it.
        max_held_total_bytes: the same of all connections together; beyond it those that hold most are cut off.
        spin_us: busy polling before a thread goes to sleep; on two cores it gains nothing, so 0 for none.
    """

    max_message_bytes: int = 5 * 1024 * 1024
    max_queued_messages: int = 256
    credit_bytes: int = 8 * 1024 * 1024
    max_rows: int = 1024
    handshake_ms: int = 3000
    connect_ms: int = 5000
    heartbeat_ms: int = 1000
    silent_intervals: int = 3
    dead_ms: int = 30_000
    linger_ms: int = 200
    spin_us: int = 0
    max_held_bytes: int = 32 * 1024 * 1024
    max_held_total_bytes: int = 1024 * 1024 * 1024

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            least = 0 if name in ("linger_ms", "spin_us") else 1
            if not least <= value < 2**31:
                raise ProtocolError(f"{name} is {value}", f"choose one in {least}..2^31-1")


LIMITS = LinkLimits()
