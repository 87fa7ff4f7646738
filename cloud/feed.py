"""From what a session waits for to rows of an engine's step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.cloud.work import Work
from isthmus.engine.part import Rows, Want
from isthmus.protocol.messages import WANT_HIDDEN, WANT_NONE, WANT_SAMPLE

if TYPE_CHECKING:
    from isthmus.cloud.session import Session

_WANTS = [Want(bits) for bits in range(8)]  # building one costs a microsecond


def take(session: Session, rows: int, into: Rows) -> tuple[int, int]:
    """Adds up to `rows` rows of the first request to a step.

    Returns:
        how many tokens and how many hidden states they will give.
    """
    work = session.work[0]
    start = work.start
    stop = min(start + rows, work.end)
    if work.want_all and start < work.position:  # what was lazy goes in front, and wants nothing
        _put(session, work, start, min(stop, work.position), WANT_NONE, into)
        start = min(stop, work.position)
    want = work.want if (work.want_all or stop == work.end) and start < stop else WANT_NONE
    if start < stop:
        _put(session, work, start, stop, want, into)
    given = stop - start if work.want_all else 1
    return given if want & WANT_SAMPLE else 0, given if want & WANT_HIDDEN else 0


def _put(session: Session, work: Work, start: int, stop: int, want: int, into: Rows) -> None:
    wanted, sampling = _WANTS[want], work.sampling
    if work.hidden is None:
        tokens = session.chain.tokens[start:stop]
        into.tokens(session.sequence, start, tokens, want=wanted, want_all=work.want_all, sampling=sampling)
    else:
        states = work.hidden[start - work.hidden_at : stop - work.hidden_at]
        into.hidden(
            session.sequence, start, states, enter=session.enter, want=wanted, want_all=work.want_all, sampling=sampling
        )
