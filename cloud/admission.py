"""Who gets in and how much of the cloud one session, device or principal may take."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.engine.part import KV_SINKS, KV_SLACK
from isthmus.protocol.errors import ServiceError


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What a service allows.

    Attributes:
        max_sessions: sessions at once; idle ones give way to new ones.
        max_sessions_per_principal: of one owner of keys.
        max_peers: connections that have greeted.
        max_waiting: requests of one session that wait for the engine.
        max_ranges: bundle ranges of one connection that wait to be read.
        max_outbox_bytes: answers that one slow connection may leave unsent before it is dropped.
        max_step_rows: rows in one step of the engine.
        decode_rows: a request of at most that many rows counts as decode and goes first.
        prefill_rows: rows of prefill in a step without decode rows.
        prefill_rows_beside_decode: the same when decode rows wait, so that they do not stall.
        idle_s: a session without messages for so long is forgotten.
        evict_after_s: from so long without messages on, a session's KV may be taken for another session.
        busy_retry_ms: what a full cloud tells devices to wait.
        stop_ms: how long a stopping service goes on with requests under way.
    """

    max_sessions: int = 256
    max_sessions_per_principal: int = 64
    max_peers: int = 1024
    max_waiting: int = 64
    max_ranges: int = 32
    max_outbox_bytes: int = 4 * 1024 * 1024
    max_step_rows: int = 256
    decode_rows: int = 8
    prefill_rows: int = 128
    prefill_rows_beside_decode: int = 32
    idle_s: int = 600
    evict_after_s: float = 5.0
    busy_retry_ms: int = 250
    stop_ms: int = 2000

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise ServiceError(f"{name} is {getattr(self, name)}", "it must be positive")
        if self.max_step_rows < max(self.prefill_rows, self.decode_rows):
            raise ServiceError(
                f"max_step_rows is {self.max_step_rows}", "it must hold prefill_rows and decode_rows at least"
            )


@dataclass(frozen=True, slots=True)
class Load:
    """How full a service is, as far as a new session is concerned.

    Attributes:
        sessions: sessions that exist.
        own_sessions: those of the principal that asks.
        idle_sessions: those that may be closed to make room.
        free_tokens: KV positions free in the model's pool.
        pool_tokens: KV positions of the whole pool.
        idle_tokens: KV positions held by sessions that may be evicted.
    """

    sessions: int
    own_sessions: int
    idle_sessions: int
    free_tokens: int
    pool_tokens: int
    idle_tokens: int


def refusal(load: Load, limits: ServiceLimits, max_positions: int, window: int) -> tuple[str, bool] | None:
    """Why a new session cannot be opened, and whether waiting helps; None when it can.

    Args:
        max_positions: what the device expects to need, 0 for unknown.
        window: attention window of the session in positions, 0 for none.
    """
    need = min(max_positions, window + KV_SINKS + KV_SLACK) if window else max_positions
    if need > load.pool_tokens:
        return f"{need} positions are wanted and the cloud's KV holds {load.pool_tokens}", False
    if load.own_sessions >= limits.max_sessions_per_principal:
        return f"{load.own_sessions} sessions are open with this key already", True
    if load.sessions >= limits.max_sessions and not load.idle_sessions:
        return f"all {limits.max_sessions} sessions of this cloud are busy", True
    if load.free_tokens + load.idle_tokens < max(need, 1):
        return "the cloud's KV is full", True
    return None
