"""The routes of OpenAI's API, over devices."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from isthmus.apps.openai import errors
from isthmus.apps.openai.answers import END, Answers, Choice, event
from isthmus.apps.openai.bodies import BodyLimit
from isthmus.apps.openai.door import Door
from isthmus.apps.openai.errors import ApiError
from isthmus.apps.openai.pool import Desk, DevicePool
from isthmus.apps.openai.requests import Ask, ChatAsk, CompletionAsk
from isthmus.edge.aio import AsyncDevice
from isthmus.edge.options import MOST
from isthmus.edge.token import Token
from isthmus.engine.sampling import Sampling
from isthmus.protocol.address import is_local
from isthmus.protocol.errors import ConversationFullError, IsthmusError

MAX_BODY_BYTES = 4 << 20
_CHORES_S = 1.0
_log = logging.getLogger("isthmus.openai")


@dataclass(frozen=True, slots=True)
class Served:
    """A model that is there.

    Attributes:
        name: what clients call it.
        fingerprint: of its weights and what computes them.
    """

    name: str
    fingerprint: str


class Face:
    """Answers OpenAI's API.

    Args:
        models: by name.
        pool: devices that answer.
        door: who may ask.
        chore: called every second.
    """

    def __init__(
        self,
        models: Mapping[str, Served],
        pool: DevicePool,
        door: Door,
        chore: Callable[[], None],
    ) -> None:
        self._models, self._pool, self._door, self._chore = models, pool, door, chore
        self._began = int(time.time())

    def application(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(title="isthmus", docs_url=None, redoc_url=None, lifespan=self._lifespan)
        app.add_middleware(BodyLimit, most=MAX_BODY_BYTES)
        app.add_exception_handler(ApiError, _told)
        app.add_exception_handler(IsthmusError, _told)
        app.add_exception_handler(RequestValidationError, _invalid)
        app.add_exception_handler(HTTPException, _nowhere)
        app.add_exception_handler(Exception, _failed)
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        app.add_api_route("/v1/completions", self.complete, methods=["POST"], response_model=None)
        return app

    async def health(self) -> dict[str, str]:
        """Whether it answers at all."""
        return {"status": "ok"}

    async def models(self, request: Request) -> dict[str, Any]:
        """What is served."""
        self._asker(request)
        return {"object": "list", "data": [self._card(name) for name in self._models]}

    async def model(self, request: Request, name: str) -> dict[str, Any]:
        """One of them."""
        self._asker(request)
        return self._card(self._served(name).name)

    async def chat(self, request: Request, ask: ChatAsk) -> Response:
        """The next message of a chat."""
        messages, stops = [message.plain() for message in ask.messages], ask.stops()

        def start(device: AsyncDevice, sampling: Sampling) -> AsyncGenerator[Token]:
            return device.chat(messages, max_tokens=ask.most or MOST, sampling=sampling, stop=stops)

        return await self._respond(request, ask, chat=True, starts=[start])

    async def complete(self, request: Request, ask: CompletionAsk) -> Response:
        """What follows a text."""
        stops = ask.stops()

        def starting(prompt: str | list[int]) -> _Start:
            def start(device: AsyncDevice, sampling: Sampling) -> AsyncGenerator[Token]:
                return device.generate(prompt, max_tokens=ask.max_tokens or 16, sampling=sampling, stop=stops)

            return start

        return await self._respond(request, ask, chat=False, starts=[starting(one) for one in ask.prompts()])

    # Inside

    async def _respond(self, request: Request, ask: Ask, *, chat: bool, starts: Sequence[_Start]) -> Response:
        owner, model = self._asker(request), self._served(ask.model)
        ask.check()
        desk, answers = Desk(owner, model.name), Answers(chat, model.name, model.fingerprint)
        samplings = ask.sampling()
        choices = [Choice(index, not index % len(samplings)) for index in range(len(starts) * len(samplings))]
        running = [
            self._answer(desk, choice, starts[choice.index // len(samplings)], samplings[choice.index % len(samplings)])
            for choice in choices
        ]
        if ask.stream:
            return await _streamed(answers, choices, running, ask.usage_follows)
        await _while_connected(request, _drained(_merged(running)))
        return JSONResponse(answers.whole(choices))

    async def _answer(
        self, desk: Desk, choice: Choice, start: _Start, sampling: Sampling
    ) -> AsyncGenerator[tuple[Choice, Token]]:
        """Tokens of one answer, which ends where its owner's last token is withdrawn."""
        async with self._pool.lent(desk) as device, aclosing(start(device, sampling)) as tokens:
            finish = ""
            try:
                async for token in tokens:
                    owners = self._door.owners()
                    if owners is not None and desk.owner not in owners:
                        raise errors.refused()
                    choice.add(token)
                    finish = token.finish
                    yield choice, token
            except ConversationFullError:
                if not choice.sources:
                    raise
                finish = "length"
            choice.end(finish, device.stats)

    def _asker(self, request: Request) -> str:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        owner = self._door.owner(token.strip() if kind.lower() == "bearer" else "")
        if owner is None:
            raise errors.refused()
        if self._door.open and not is_local(f"tcp://{request.headers.get('host', '')}"):
            # A page of somebody else's, whose name leads to this machine now, must not speak for who reads it.
            raise ApiError(403, "without tokens this answers to localhost alone", "invalid_request_error")
        return owner

    def _served(self, name: str) -> Served:
        model = self._models.get(name)
        if model is None:
            problem = f"there is no model {name[:80]!r} here: {', '.join(self._models)}"
            raise ApiError(404, problem, "invalid_request_error", "model", "model_not_found")
        return model

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "isthmus"}

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async def chores() -> None:
            while True:
                await asyncio.sleep(_CHORES_S)
                self._chore()
                await self._pool.sweep(self._door.owners())

        task = asyncio.create_task(chores())
        yield
        task.cancel()
        await self._pool.close()


_Start = Callable[[AsyncDevice, Sampling], AsyncGenerator[Token]]
_Running = AsyncGenerator[tuple[Choice, Token]]


async def _drained(running: _Running) -> None:
    async for _ in running:
        pass


async def _while_connected(request: Request, asked: Coroutine[Any, Any, None]) -> None:
    """Waits for work, and gives it up when whoever asked is gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, leaving = asyncio.create_task(asked), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        leaving.cancel()
        if not work.done():
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


async def _streamed(
    answers: Answers, choices: Sequence[Choice], running: Sequence[_Running], usage: bool
) -> StreamingResponse:
    """A stream of all answers as they come. What fails before the first token is an error of its own."""
    merged = _merged(running)
    try:
        first = await anext(merged, None)
    except BaseException:
        await merged.aclose()
        raise

    async def chunks() -> AsyncIterator[bytes]:
        begun, news = set[int](), first
        try:
            while news is not None:
                choice, token = news
                if choice.index not in begun:
                    begun.add(choice.index)
                    if opening := answers.begun(choice):
                        yield opening
                if token.text:
                    yield answers.more(choice, token)
                news = await anext(merged, None)
            for choice in choices:
                yield answers.ended(choice)
            if usage:
                yield answers.cost(choices)
            yield END
        except (ApiError, IsthmusError) as error:
            yield event(_api(error).body())
        except Exception:
            _log.exception("a stream failed")
            yield event(ApiError(500, "this failed; the server's log says why", "server_error").body())
        finally:
            await merged.aclose()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(chunks(), media_type="text/event-stream", headers=headers)


async def _merged(running: Sequence[_Running]) -> _Running:
    """What several give, as it comes; none runs far ahead of who reads."""
    waiting = {asyncio.ensure_future(anext(one)): one for one in running}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                one = waiting.pop(task)
                try:
                    news = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(one))] = one
                yield news
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for one in running:
            await one.aclose()


def _api(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    assert isinstance(error, IsthmusError)
    return errors.of(error)


async def _told(request: Request, error: Exception) -> Response:
    found = _api(error)
    return JSONResponse(found.body(), found.status, found.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return await _told(request, errors.invalid(f"{where or 'the body'}: {first['msg']}", where))


async def _nowhere(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = f"{request.method} {request.url.path}: {error.detail}"
    return await _told(request, ApiError(error.status_code, problem, "invalid_request_error"))


async def _failed(request: Request, error: Exception) -> Response:
    return await _told(request, ApiError(500, "this failed; the server's log says why", "server_error"))
