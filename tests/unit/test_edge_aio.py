"""The async device: the same tokens and errors as the blocking one, and no generation outlives its reader."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.edge import AsyncDevice, Device
from isthmus.protocol.errors import DeviceError
from tests.edge_world import LossyWire, ToyBundle, ToyCloud, toy_open_part


@pytest.fixture(autouse=True, scope="module")
def toy_engine() -> Iterator[None]:
    """Parts are toys in this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isthmus.engine.open_part", toy_open_part)
        yield


def expected(count: int) -> list[int]:
    with Device(ToyBundle(), mode="local") as device:  # type: ignore[arg-type]
        return [token.id for token in device.generate("hello", max_tokens=count)]


def options(mode: str) -> dict[str, Any]:
    wire = LossyWire(ToyCloud())
    return {"mode": mode, "wire": wire, "clock": wire.clock}


@pytest.mark.parametrize("mode", ["local", "stream", "split"])
def test_tokens_are_those_of_the_blocking_device(mode: str) -> None:
    async def run() -> list[int]:
        async with AsyncDevice(ToyBundle(), **options(mode)) as device:
            tokens = [token async for token in device.generate("hello", max_tokens=12)]
            assert device.stats.tokens == [token.id for token in tokens]
            await device.reset()
            assert [t.id async for t in device.chat("hi", max_tokens=3)]
            return [token.id for token in tokens]

    assert asyncio.run(run()) == expected(12)


def test_two_devices_run_beside_each_other() -> None:
    async def one(mode: str) -> list[int]:
        async with AsyncDevice(ToyBundle(), **options(mode)) as device:
            return [token.id async for token in device.generate("hello", max_tokens=12)]

    async def run() -> list[list[int]]:
        return list(await asyncio.gather(one("stream"), one("split"), one("local")))

    assert asyncio.run(run()) == [expected(12)] * 3


def test_a_cancelled_reader_leaves_the_device_usable() -> None:
    async def run() -> list[int]:
        async with AsyncDevice(ToyBundle(), **options("split")) as device:
            seen: list[int] = []

            async def read() -> None:
                async for token in device.generate("hello", max_tokens=500):
                    seen.append(token.id)

            task = asyncio.create_task(read())
            while len(seen) < 3:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return [token.id async for token in device.generate("hello", max_tokens=6)]

    assert asyncio.run(run()) == expected(6)


def test_errors_are_those_of_the_blocking_device() -> None:
    async def run() -> None:
        async with AsyncDevice(ToyBundle(), **options("local")) as device:
            with pytest.raises(DeviceError, match="empty"):
                async for _ in device.generate(""):
                    pass

    asyncio.run(run())
    with pytest.raises(DeviceError, match="choose one of auto"):
        asyncio.run(AsyncDevice(ToyBundle(), mode="magic").__aenter__())


def test_a_conversation_is_taken_up_from_its_file(tmp_path: Path) -> None:
    async def begin() -> list[int]:
        async with AsyncDevice(ToyBundle(), resume=tmp_path / "talk", **options("stream")) as device:
            said = []
            async for token in device.chat("hi", max_tokens=20):
                said.append(token.id)
                if len(said) == 6:
                    break
            return said

    async def finish() -> list[int]:
        async with AsyncDevice(ToyBundle(), resume=tmp_path / "talk", **options("stream")) as device:
            cut_off = await device.unfinished()
            assert cut_off is not None and cut_off.question == "hi"
            rest = [token.id async for token in device.go_on()]
            assert await device.unfinished() is None
            return rest

    said = asyncio.run(begin())
    with Device(ToyBundle(), mode="local") as alone:  # type: ignore[arg-type]
        assert said + asyncio.run(finish()) == [token.id for token in alone.chat("hi", max_tokens=20)]
