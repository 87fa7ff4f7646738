"""Who gets in and how much of the cloud one session, device or principal may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isthmus.engine.part import KV_BLOCK, KV_SINKS, KV_SLACK
from isthmus.protocol.errors import ServiceError

SHORTEN = "begin a new conversation, shorten the text, or choose overflow='slide' with a smaller kv_tokens"


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What a service allows.

    Attributes:
        max_sessions: sessions at once; idle ones give way to new ones.
        max_peers: connections that have greeted.
        max_waiting: requests of one session that wait for the engine.
        max_ranges: bundle ranges of one connection that wait to be read.
        max_outbox_bytes: answers that one slow connection may leave unsent before it is dropped.
        max_step_rows: rows in one step of the engine.
        decode_rows: a request of at most that many rows counts as decode and goes first.
        prefill_rows: rows of prefill in a step without decode rows.
        prefill_rows_beside_decode: the same when decode rows wait, so that they do not stall.
        idle_s: a session without messages for so long is forgotten.
        kv_share: share of a model's KV, up to 1, that one principal may hold when several are let in.
        session_share: the same of the sessions at once; it never comes to fewer than 2.
        evict_after_s: from so long without messages on, a session's KV may be taken for another session.
        context_s: KV that no session uses is kept for so long, for those that begin with the same text; 0: none is.
        busy_retry_ms: what a full cloud tells devices to wait.
        stop_ms: how long a stopping service goes on with requests under way.
    """

    max_sessions: int = 256
    max_peers: int = 1024
    max_waiting: int = 64
    max_ranges: int = 32
    max_outbox_bytes: int = 4 * 1024 * 1024
    max_step_rows: int = 256
    decode_rows: int = 8
    prefill_rows: int = 128
    prefill_rows_beside_decode: int = 32
    idle_s: int = 600
    kv_share: float = 0.5
    session_share: float = 0.25
    evict_after_s: float = 5.0
    context_s: float = 600.0
    busy_retry_ms: int = 250
    stop_ms: int = 2000

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value, least = getattr(self, name), "0 or more" if name == "context_s" else "positive"
            if not 0 <= value < math.inf or (not value and name != "context_s"):
                raise ServiceError(f"{name} is {value}", f"it must be {least}")
        for name in ("kv_share", "session_share"):
            if getattr(self, name) > 1:
                raise ServiceError(f"{name} is {getattr(self, name)}", "it is a part of the whole, 1 at most")
        if self.max_step_rows < max(self.prefill_rows, self.decode_rows):
            raise ServiceError(
                f"max_step_rows is {self.max_step_rows}", "it must hold prefill_rows and decode_rows at least"
            )

    @property
    def chunk_rows(self) -> int:
        """Rows of one session in a step, at most."""
        return max(self.decode_rows, self.prefill_rows, self.prefill_rows_beside_decode)


@dataclass(frozen=True, slots=True)
class Load:
    """How full a service is, as far as a new session is concerned.

    Attributes:
        sessions: sessions that exist.
        own_sessions: those of the principal that asks.
        own_idle_sessions: of those, the ones that may be closed to make room.
        idle_sessions: those that may be closed to make room.
        share_sessions: sessions that the principal may have.
        free_tokens: KV positions free in the model's pool.
        idle_tokens: KV positions held by sessions that may be evicted.
        share_tokens: KV positions of the pool that the principal may hold.
        own_tokens: those that it holds in sessions that may not be evicted.
    """

    sessions: int
    own_sessions: int
    own_idle_sessions: int
    idle_sessions: int
    share_sessions: int
    free_tokens: int
    idle_tokens: int
    share_tokens: int
    own_tokens: int


def misfit(max_positions: int, window: int, share: int, limits: ServiceLimits) -> tuple[str, str] | None:
    """What is wrong with a session that would outgrow its principal's share, and what to do; None when it fits.

    Args:
        max_positions: what the device expects to need, 0 for unknown.
        window: attention window of the session in positions, 0 for none.
        share: KV positions that the principal may hold.
    """
    unknown = window and not max_positions
    need = window_tokens(window, limits) if unknown else held_tokens(max_positions, window, limits)
    if need <= share:
        return None
    problem = f"one owner of keys may hold {share} positions of KV here"
    if not window:
        return f"{problem}, and {max_positions} are wanted", SHORTEN
    remedy = "let the cloud's owner raise `isthmus serve --kv-tokens` or --kv-share"
    if (fits := share - window_tokens(0, limits)) > 0:
        remedy = f"choose a kv_tokens of at most {fits}, or {remedy}"
    return f"{problem}, and attention to the last {window} takes up to {need}", remedy


def refusal(load: Load, limits: ServiceLimits, need: int) -> str | None:
    """Why a new session cannot be opened for the moment; None when it can.

    Args:
        need: KV positions that it is known to need, no more than the principal's share.
    """
    need = max(need, 1)
    if load.own_sessions >= load.share_sessions and not load.own_idle_sessions:
        return f"this key's owner has its {load.share_sessions} sessions open already"
    if load.sessions >= limits.max_sessions and not load.idle_sessions:
        return f"the sessions of this cloud ({limits.max_sessions}) are all in use"
    if (why := share_refusal(load.own_tokens, need, load.share_tokens)) is not None:
        return why[0]
    if load.free_tokens + load.idle_tokens < need:
        return "the cloud's KV is full"
    return None


def share_sessions(principals: int, limits: ServiceLimits) -> int:
    """Sessions that one principal may have at once: all when nobody else is let in, else 2 at least.

    Args:
        principals: how many are let in.
    """
    if principals <= 1:
        return limits.max_sessions
    return min(limits.max_sessions, max(2, int(limits.max_sessions * limits.session_share)))


def share_tokens(pool_tokens: int, principals: int, limits: ServiceLimits) -> int:
    """KV positions that one principal may hold of a pool: all of it when nobody else is let in.

    Args:
        principals: how many are let in.
    """
    if principals <= 1:
        return pool_tokens
    return max(KV_BLOCK, int(pool_tokens * limits.kv_share) // KV_BLOCK * KV_BLOCK)


def share_refusal(held: int, wanted: int, share: int) -> tuple[str, bool] | None:
    """Why a principal's session may not grow, and whether waiting helps; None when it may.

    Args:
        held: KV positions of the principal's other sessions.
        wanted: KV positions that the session will have.
        share: KV positions that the principal may hold.
    """
    if wanted > share:
        return f"{wanted} KV positions are wanted and one owner of keys may hold {share} here", False
    if held + wanted > share:
        return f"other sessions of this key's owner hold {held} of the {share} KV positions that are its share", True
    return None


def held_tokens(length: int, window: int, limits: ServiceLimits) -> int:
    """KV positions, in whole blocks, of a session of `length` positions whose attention sees `window`, 0 for all."""
    if window:
        length = min(length, window_tokens(window, limits))
    return -(-length // KV_BLOCK) * KV_BLOCK


def window_tokens(window: int, limits: ServiceLimits) -> int:
    """KV positions, in whole blocks, that a session with a window holds at most.

    The rows of one step stand beside the window of the first of them, and neither end need be that of a block.
    """
    length = window + KV_SINKS + KV_SLACK + limits.chunk_rows
    return -(-length // KV_BLOCK) * KV_BLOCK + KV_BLOCK
