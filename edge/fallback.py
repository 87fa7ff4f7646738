"""When a device goes on without its cloud, and what its errors say when it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.edge.token import Mode
from isthmus.protocol.errors import DeviceError, IsthmusError, LinkError, ServiceError

_LOCAL = "or use mode local"


def may_go_on(error: IsthmusError, mode: Mode, served: bool) -> bool:
    """Whether the whole model on this device stands in for a cloud that failed.

    Args:
        error: what the cloud failed with.
        mode: what was asked for; "auto" also goes on when the cloud refuses what it granted before.
        served: whether the cloud has served this device before.
    """
    from isthmus.protocol.transport import Refused

    if mode == "auto" and served:
        return True
    return isinstance(error, LinkError) and not isinstance(error, Refused)


def with_local(error: IsthmusError) -> IsthmusError:
    """The error, its remedy naming local mode."""
    if _LOCAL in error.remedy or not isinstance(error, LinkError | ServiceError | DeviceError):
        return error
    return type(error)(error.problem, f"{error.remedy}, {_LOCAL}" if error.remedy else "use mode local")


@contextmanager
def offering_local(whole_model: bool) -> Iterator[None]:
    """Errors from the cloud name local mode when the device holds the whole model."""
    try:
        yield
    except IsthmusError as error:
        if not whole_model:
            raise
        raise with_local(error) from error


class Rest:
    """How long a device leaves a busy cloud alone: twice as long each time that it gave up on it, up to a bound.

    Args:
        first_s, most_s: seconds, the first time and at most.
    """

    def __init__(self, first_s: float = 10.0, most_s: float = 160.0) -> None:
        self._first_s, self._most_s = first_s, most_s
        self._length_s, self._until = 0.0, float("-inf")

    def begin(self, now: float) -> None:
        """The cloud had no room for too long."""
        self._length_s = min(2.0 * self._length_s or self._first_s, self._most_s)
        self._until = now + self._length_s

    def over(self, now: float) -> bool:
        """Whether the cloud may be asked again."""
        return now >= self._until

    def end(self) -> None:
        """The cloud has answered."""
        self._length_s, self._until = 0.0, float("-inf")
