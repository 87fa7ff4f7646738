"""Streams: what the log knows of one already, and each token that it gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.cloud import refusals, replies
from isthmus.cloud.work import Reply, Work

if TYPE_CHECKING:
    from isthmus.cloud.session import Session


def relive(session: Session, work: Work) -> bool:
    """Fills a stream with what the log knows of it; whether that is all of it."""
    at = work.prompt_end - 1
    while True:
        token = session.samples.after(at, work.sampler)
        if token is None:
            if at + 1 < session.committed:
                raise refusals.diverged(f"the answer at {at + 1} is not in the log, and later positions build on it")
            tail = session.chain.tokens[at:]
            session.forget(at)
            session.chain.extend(tail)
            work.start, work.end = at, at + 1
            return False
        work.tokens.append(token)
        if token in work.stop or len(work.tokens) >= work.max_tokens:
            return True
        at += 1
        if at == session.committed:
            if at + 1 > session.shape.context_length and not session.window:
                return True
            session.chain.extend((token,))
            work.start, work.end = at, at + 1
            return False
        if session.chain.tokens[at] != token:
            raise refusals.diverged(f"the log goes on with another token at {at}")


def streamed(session: Session, work: Work, tokens: list[int]) -> Reply | None:
    """Takes in what a step gave for a stream, none or one token, and ends what is done; the news for the device."""
    if not tokens:
        return None
    token = tokens[0]
    work.tokens.append(token)
    reason = ""
    if token in work.stop:
        reason = "stop"
    elif len(work.tokens) >= work.max_tokens:
        reason = "length"
    elif not session.window and session.committed >= session.shape.context_length:
        reason = "full"
    if reason:
        session.work.popleft()
        session.freed_bytes += work.size_bytes
    else:
        session.chain.extend(tokens)
        work.end += 1
    return replies.tokens(session, work, tokens, reason)
