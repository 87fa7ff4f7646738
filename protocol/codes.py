"""Why a request is refused, as it travels in a Fault."""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """Why something was refused; each says what the device does next."""

    UNKNOWN = 0  # a newer side's code: treat as fatal for the request
    BAD_MESSAGE = 1  # malformed or too large: a bug, do not repeat
    VERSION = 2  # no common protocol version
    NOT_ALLOWED = 3  # the key is not (or no longer) on the list
    UNKNOWN_MODEL = 4  # no such model_id here
    UNKNOWN_SESSION = 5  # expired, evicted or never opened: Open again and send everything
    STALE_EPOCH = 6  # a newer epoch owns the session: drop the request
    GAP = 7  # position lies beyond `committed`: send again from there
    DIVERGED = 8  # another token or hash at a committed position: Truncate with a higher epoch
    BUSY = 9  # no room now: try again after retry_ms
    KV_FULL = 10  # this session's context does not fit any more
    DEADLINE = 11  # budget_ms ran out before it was computed
    CANCELLED = 12
    UNSUPPORTED = 13  # this cloud cannot do what was asked (codec, want, KV format, numerics)
    CLOSING = 14  # the cloud is stopping: go elsewhere
    NOT_FOUND = 15  # no such file in the bundle
    ENGINE = 16  # the engine failed on this request

    @classmethod
    def _missing_(cls, value: object) -> Code:
        return cls.UNKNOWN
