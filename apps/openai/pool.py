"""Devices for answers under way: each has one conversation, and one that is free takes the next question."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from isthmus.apps.openai.errors import busy
from isthmus.edge.aio import AsyncDevice
from isthmus.protocol.errors import DeviceError

IDLE_S = 60.0


@dataclass(frozen=True, slots=True)
class Desk:
    """For whom a device speaks, and with which model."""

    owner: str
    model: str


@dataclass(frozen=True, slots=True)
class _Free:
    desk: Desk
    device: AsyncDevice
    since_s: float


class DevicePool:
    """See the module; for one event loop.

    Args:
        make: opens a device.
        most: devices at once.
        wait_s: that a question waits for one.
    """

    def __init__(self, make: Callable[[Desk], Awaitable[AsyncDevice]], most: int, wait_s: float) -> None:
        self._make, self._most, self._wait_s = make, most, wait_s
        self._free: list[_Free] = []  # what was used last comes last
        self._turns = asyncio.Semaphore(most)
        self._closing = set[asyncio.Task[None]]()

    @asynccontextmanager
    async def lent(self, desk: Desk) -> AsyncIterator[AsyncDevice]:
        """A device for one answer; one that failed is not used again.

        Raises:
            ApiError: all are busy.
            IsthmusError: it cannot be opened.
        """
        try:
            await asyncio.wait_for(self._turns.acquire(), self._wait_s)
        except TimeoutError:
            raise busy(f"{self._most} answers are under way") from None
        try:
            device = await self._taken(desk)
            sound = True
            try:
                yield device
            except Exception as error:
                sound = isinstance(error, DeviceError)  # the question's fault, as leaving early is nobody's
                raise
            finally:
                if sound:
                    self._free.append(_Free(desk, device, time.monotonic()))
                else:
                    closing = asyncio.create_task(device.close())  # even where this task is being cancelled
                    self._closing.add(closing)
                    closing.add_done_callback(self._closing.discard)
        finally:
            self._turns.release()

    async def sweep(self, owners: set[str] | None = None) -> None:
        """Closes free devices that nobody has needed for a while, and those of others than these owners."""
        ended = time.monotonic() - IDLE_S
        gone = [one for one in self._free if one.since_s < ended or not (owners is None or one.desk.owner in owners)]
        self._free = [one for one in self._free if one not in gone]
        for one in gone:
            await one.device.close()

    async def close(self) -> None:
        """Closes all free devices."""
        await self.sweep(set())

    async def _taken(self, desk: Desk) -> AsyncDevice:
        for place in range(len(self._free) - 1, -1, -1):
            if self._free[place].desk == desk:
                return self._free.pop(place).device
        return await self._make(desk)
