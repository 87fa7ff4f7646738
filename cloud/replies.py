"""What a session answers, made from where it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from isthmus.cloud.work import Refusal, Work
from isthmus.protocol import tensors
from isthmus.protocol.messages import Code, Fault, Opened, Result, Tokens, Verdict

if TYPE_CHECKING:
    from isthmus.cloud.session import Session


def opened(session: Session, numerics: str, kv_format: str, idle_s: int) -> Opened:
    """The answer to Open."""
    held = session.held
    return Opened(session.alias, session.epoch, held, session.chain.at(held), numerics, kv_format, idle_s)


def result(session: Session, position: int, tokens: list[int], work: Work | None = None) -> Result:
    """The answer to Rows, or to Truncate."""
    held = session.held
    answer = Result(session.alias, session.epoch, position, tokens, held, session.chain.at(held))
    if work is not None:
        answer.engine_us, answer.queue_us = work.engine_us, max(0, work.queue_us)
        answer.hidden = tensors.encode(np.concatenate(work.states), "f32") if work.states else None
    return answer


def tokens(session: Session, work: Work, fresh: list[int], reason: str) -> Tokens:
    """The next tokens of a stream, the last ones when there is a reason."""
    held, engine_us = session.committed, work.engine_us
    work.engine_us = 0
    at = work.prompt_end + len(work.tokens) - len(fresh)
    head = session.chain.at(held)
    return Tokens(session.alias, session.epoch, at, fresh, bool(reason), reason, held, head, engine_us)


def progress(session: Session, work: Work, done: bool = False) -> Tokens:
    """All that a stream gave so far, in one message."""
    reason = ""
    if done:
        reason = "full"
        if work.tokens[-1] in work.stop:
            reason = "stop"
        elif len(work.tokens) >= work.max_tokens:
            reason = "length"
    return tokens(session, work, work.tokens.copy(), reason)


def verdict(session: Session, position: int, accepted: int, token: int, work: Work | None = None) -> Verdict:
    """The answer to a Draft."""
    head = session.chain.at(position + accepted)
    answer = Verdict(session.alias, session.epoch, position, accepted, token, head)
    if work is not None:
        answer.engine_us, answer.queue_us = work.engine_us, max(0, work.queue_us)
    return answer


def fault(session: Session, refusal: Refusal, position: int = 0) -> Fault:
    """A refusal as a message."""
    held = session.committed
    return Fault(
        Code(refusal.code),
        refusal.problem[:1000],
        refusal.remedy[:1000],
        refusal.retry_ms,
        session.alias,
        session.epoch,
        position,
        held,
        session.chain.at(held),
    )
