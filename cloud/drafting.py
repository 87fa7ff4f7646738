"""Drafts: which guesses the model's own tokens confirm, and what was found of them before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.cloud import replies
from isthmus.cloud.work import Reply, Work

if TYPE_CHECKING:
    from isthmus.cloud.session import Session


def checked(session: Session, work: Work, rows: int, sampled: list[int]) -> Reply | None:
    """Commits the drafted rows up to the first whose sample is not what was drafted next."""
    given = max(0, work.position - work.start)
    session.samples.extend(given, [], work.sampler)
    session.committed += given
    work.start += given
    rows -= given
    drafted = session.chain.tokens[work.start + 1 : work.end]
    at = work.start + 1 - work.position  # in the block, of the first of them
    for i, (guess, token) in enumerate(zip(drafted, sampled, strict=False)):
        if guess != token and work.firm >> (at + i) & 1:
            sampled[i] = guess
    wrong = (i for i, (guess, token) in enumerate(zip(drafted, sampled, strict=False)) if guess != token)
    kept = next(wrong, rows - 1) + 1
    session.committed += kept
    work.start += kept
    session.samples.extend(kept, sampled[:kept], work.sampler)
    token = sampled[kept - 1]
    if kept == rows and work.start < work.end and session.chain.tokens[work.start] == token:
        return None  # the rest of the block comes with the next step
    session.work.popleft()
    session.freed_bytes += work.size_bytes
    if session.sequence.length > session.committed:
        session.sequence.truncate(session.committed)
    session.follow(token)
    return replies.verdict(session, work.position, session.committed - work.position, token, work)


def judged_before(session: Session, position: int, tokens: list[int]) -> Reply | None:
    """The answer to a repeated draft, None while it waits, or where none of it was right."""
    if any(work.position == position for work in session.work):
        return None
    same = zip(tokens, session.chain.tokens[position : session.committed], strict=False)
    accepted = next((i for i, (guess, token) in enumerate(same) if guess != token), None)
    if accepted is None:
        accepted = min(len(tokens), session.committed - position)
    token = session.samples.after(position + accepted - 1)
    return replies.verdict(session, position, accepted, token) if accepted and token is not None else None
