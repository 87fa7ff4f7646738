"""In which mode a device works, as its requests show."""

from __future__ import annotations

from isthmus.protocol.messages import Draft, Fill, Generate, Rows


def mode_of(message: Rows | Generate | Draft | Fill, enter: int, before: str) -> str:
    """The mode, as devices name it.

    Args:
        enter: layer before which the session's rows enter.
        before: what its requests showed so far, empty for nothing.
    """
    match message:
        case Generate():
            return "stream"
        case Draft() | Fill():
            return "exit" if enter else "verify"
        case _:
            return before or ("split" if enter else "verify")
