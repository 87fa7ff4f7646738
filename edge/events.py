"""What happens on a link, as the session reports it, and how long it waits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isthmus.edge.lane import Lane
from isthmus.protocol import messages as m
from isthmus.protocol.errors import DeviceError, IsthmusError, LinkError

WHOLE_CONFIRM_S = 1.0  # what the whole model guessed is what the cloud would say, unless numerics differ


class Busy(LinkError):
    """The cloud is there and had no room for this device for too long."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How patient the device is, in milliseconds.

    Attributes:
        connect_ms: until the first Welcome.
        retry_ms: until an unanswered message is repeated the first time; the wait doubles up to eightfold.
        give_up_ms: how long the link may be down in the middle of an answer; cellular links stall for ten seconds.
        progress_ms: until a request fails although the cloud is there.
        confirm_ms: how long a cloud may be silent that a complete answer has guesses of this device to confirm; None
            for a second where the whole model made them, and for `give_up_ms` where less of it did. One that stays
            away keeps each answer after that for a second at most.
        busy_note_ms: until a device that waits for a busy or silent cloud says so.
        busy_ms: until a device that can go on by itself does so instead of waiting for a busy cloud.
    """

    connect_ms: int = 5_000
    retry_ms: int = 1_000
    give_up_ms: int = 12_000
    progress_ms: int = 120_000
    confirm_ms: int | None = None
    busy_note_ms: int = 2_000
    busy_ms: int = 5_000

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not (value is None and name == "confirm_ms") and not 1 <= value < math.inf:
                raise DeviceError(f"{name} is {value}", "give a positive number of milliseconds")

    def confirm_s(self, whole: bool) -> float:
        """`confirm_ms` in seconds.

        Args:
            whole: whether the whole model made the guesses.
        """
        if self.confirm_ms is not None:
            return self.confirm_ms * 1e-3
        return WHOLE_CONFIRM_S if whole else self.give_up_ms * 1e-3


@dataclass(frozen=True, slots=True)
class Up:
    """The cloud said Welcome and serves the model."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """The cloud holds the log's first `lane.committed` tokens and nothing else."""

    lane: Lane


@dataclass(frozen=True, slots=True)
class Answered:
    """A Rows at `position` was computed."""

    lane: Lane
    position: int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Streamed:
    """The next generated tokens, in order and without gaps; `reason` when the stream is done."""

    lane: Lane
    tokens: list[int]
    done: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Verified:
    """Of the tokens drafted at `position`, the first `accepted` are the model's own, and `token` follows them."""

    lane: Lane
    position: int
    accepted: int
    token: int
    engine_us: int


@dataclass(frozen=True, slots=True)
class Behind:
    """What was under way on a lane is void: align it and send again from what is then committed."""

    lane: Lane


@dataclass(frozen=True, slots=True)
class Served:
    """Answer to GetManifest or GetRange."""

    message: m.Manifest | m.Range


@dataclass(frozen=True, slots=True)
class Refused:
    """What was asked for will not come."""

    error: IsthmusError


Event = Up | Aligned | Answered | Verified | Streamed | Behind | Served | Refused
