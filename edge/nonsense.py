"""What no cloud can mean that does what it was asked: each check gives what is wrong, in words, or nothing."""

from __future__ import annotations

from isthmus.edge.lane import Lane
from isthmus.protocol import messages as m


def of_opened(message: m.Opened, room: int) -> str:
    """Holds the answer to Open against the positions that a session has room for, 0 for no bound."""
    if room and message.committed > room:
        return f"it holds {message.committed} tokens and has room for {room}"
    return ""


def of_cut(message: m.Result, length: int) -> str:
    """Holds the answer to Truncate against the length that was asked for."""
    if message.committed > length:
        return f"it holds {message.committed} tokens after it was asked to keep {length}"
    return ""


def of_position(position: int, lane: Lane) -> str:
    """Holds the position of an answer against what the lane was sent."""
    return f"it answers about token {position} and was sent {lane.sent}" if position > lane.sent else ""


def of_result(message: m.Result, rows: m.Rows, lane: Lane) -> str:
    """Holds the answer to rows against them."""
    if message.committed > lane.sent:
        return f"it holds {message.committed} tokens and was sent {lane.sent}"
    most = len(rows.tokens) if rows.want_all else 1
    return f"it gives {len(message.tokens)} tokens for {most}" if len(message.tokens) > most else ""


def of_verdict(message: m.Verdict, draft: m.Draft) -> str:
    """Holds the answer to a draft against it."""
    drafted = len(draft.tokens)
    return f"it accepts {message.accepted} of {drafted} drafted tokens" if message.accepted > drafted else ""


def of_tokens(message: m.Tokens, first: int, end: int) -> str:
    """Holds a stream's tokens against the positions [first, end) that were asked for."""
    at, after = message.position, message.position + len(message.tokens)
    if at < first or after > end:
        return f"it tells the tokens {at} to {after} and was asked for {first} to {end}"
    if message.committed > end or (message.tokens and message.committed < after - 1):
        return f"it tells the tokens {at} to {after} and holds {message.committed}"
    return ""


def of_ids(message: m.Message, vocab: int) -> str:
    """Holds the tokens of any answer against the model's vocabulary, 0 for no bound."""
    ids = [message.token] if isinstance(message, m.Verdict) else getattr(message, "tokens", ())
    strange = next((token for token in ids if vocab and not 0 <= token < vocab), None)
    return f"token {strange} of a vocabulary of {vocab}" if strange is not None else ""
