"""The async device: the blocking one on a thread of its own, so that its hot path is the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from isthmus.edge.device import Device, Prompt
from isthmus.edge.token import CutOff, Stats, Token

T = TypeVar("T")


class AsyncDevice:
    """A `Device` for asyncio: the same arguments and errors, and asynchronous iterators of tokens.

    Everything runs in order on one thread. Leaving an iterator early, or being cancelled in one, ends its generation
    at the next token.

    Example:
        async with AsyncDevice("smollm2") as device:
            async for token in device.chat("Why is the sky blue?"):
                print(token.text, end="")
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._arguments, self._options = arguments, options
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="isthmus-device")
        self._device: Device | None = None

    @property
    def stats(self) -> Stats:
        """What the last generation cost."""
        return self._device.stats if self._device is not None else Stats()

    def generate(self, prompt: Prompt = None, **options: Any) -> AsyncGenerator[Token]:
        """As `Device.generate`."""
        return self._tokens(lambda device: device.generate(prompt, **options))

    def chat(self, messages: str | Sequence[Mapping[str, str]], **options: Any) -> AsyncGenerator[Token]:
        """As `Device.chat`."""
        return self._tokens(lambda device: device.chat(messages, **options))

    async def unfinished(self) -> CutOff | None:
        """As `Device.unfinished`."""
        device = await self._opened()
        return await self._call(lambda: device.unfinished)

    def go_on(self) -> AsyncGenerator[Token]:
        """As `Device.go_on`."""
        return self._tokens(lambda device: device.go_on())

    async def reset(self) -> None:
        """As `Device.reset`."""
        device = await self._opened()
        await self._call(device.reset)

    async def close(self) -> None:
        """As `Device.close`."""
        if self._device is not None:
            await self._call(self._device.close)
        self._thread.shutdown(wait=False)

    async def __aenter__(self) -> AsyncDevice:
        await self._opened()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _tokens(self, start: Callable[[Device], Iterator[Token]]) -> AsyncGenerator[Token]:
        device = await self._opened()
        tokens: Any = await self._call(lambda: start(device))
        try:
            while (token := await self._call(lambda: next(tokens, None))) is not None:
                yield token
        finally:
            await self._call(tokens.close)

    async def _opened(self) -> Device:
        if self._device is None:
            self._device = await self._call(lambda: Device(*self._arguments, **self._options))
        return self._device

    async def _call(self, work: Callable[[], T]) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # The thread is still inside the device: let it come out before anything else is asked of it.
            await asyncio.wait([future])
            raise
