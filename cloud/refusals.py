"""The refusals that a session's requests meet again and again."""

from __future__ import annotations

from isthmus.cloud.work import Refusal
from isthmus.protocol.messages import Code


def busy(problem: str, retry_ms: int) -> Refusal:
    """Not now."""
    return Refusal(Code.BUSY, problem, "wait for its answer", retry_ms)


def stale(epoch: int, owner: int) -> Refusal:
    """Of an epoch that is over."""
    return Refusal(Code.STALE_EPOCH, f"epoch {epoch} is over, {owner} owns the session", "drop this request")


def diverged(problem: str) -> Refusal:
    """The two sides' logs are not the same."""
    return Refusal(Code.DIVERGED, problem, "send Truncate with a higher epoch")
