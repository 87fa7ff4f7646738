"""Which planes leave first when a budget is spent: those of the least worth."""

from __future__ import annotations

from typing import Literal, get_args

from isthmus.protocol.errors import DeviceError

# Planes are as large as what is saved by keeping them, so bytes do not enter their worth.
Policy = Literal["lru", "lfu", "lfru"]  # least recently, least frequently, least frequently of late used
POLICIES: tuple[Policy, ...] = get_args(Policy)


def policy_number(policy: str) -> int:
    """Its place in the C engine's list.

    Raises:
        DeviceError: there is none of that name.
    """
    for number, name in enumerate(POLICIES):
        if name == policy:
            return number
    raise DeviceError(f"the eviction policy is {policy!r}", f"choose {', '.join(POLICIES)}")
