"""The process that answers OpenAI's API beside a cloud: settings come on standard input, news go to standard output.

It ends when standard input does, as it does when the process that began it is gone.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import uvicorn

from isthmus.apps.openai.door import Door
from isthmus.apps.openai.face import Face, Served
from isthmus.apps.openai.keyring import Keyring
from isthmus.apps.openai.pool import Desk, DevicePool
from isthmus.apps.openai.settings import Lent, News, Settings
from isthmus.apps.openai.sockets import bound
from isthmus.edge.aio import AsyncDevice
from isthmus.protocol.bearer import TokenList
from isthmus.protocol.errors import IsthmusError, ServiceError
from isthmus.split.bundle import Bundle

_GRACE_S = 2


def main() -> int:
    """Runs until standard input ends."""
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=Settings)
    try:
        asyncio.run(_serve(settings))
    except IsthmusError as error:
        _say(News(problem=error.problem, remedy=error.remedy))
        return 2
    return 0


async def _serve(settings: Settings) -> None:
    bundles = [Bundle.open(Path(path)) for path in settings.bundles]
    door = Door(TokenList(Path(settings.tokens)), settings.open)
    keyring = Keyring(settings.cloud_key, _say) if settings.cloud_key else None
    by_name = {bundle.name: bundle for bundle in bundles}
    if len(by_name) < len(bundles):
        raise ServiceError("two models have one name", "serve them on ports of their own")

    async def device(desk: Desk) -> AsyncDevice:
        keys = None if keyring is None else await keyring.keys(desk.owner)
        found = AsyncDevice(
            by_name[desk.model],
            settings.cloud,
            keys=keys,
            encrypted=keys is not None,
            mode="stream",
            threads=1,
            fallback=False,
            standby=False,
        )
        return await found.__aenter__()

    def chore() -> None:
        door.refresh()
        if keyring is not None:
            keyring.keep(door.owners())

    pool = DevicePool(device, settings.most, settings.wait_s)
    served = {name: Served(name, f"isthmus-{bundle.model_id[:12]}") for name, bundle in by_name.items()}
    listening = bound(settings.listen)
    server = _server(settings, Face(served, pool, door, chore))
    loop = asyncio.get_running_loop()

    def end() -> None:
        server.should_exit = True

    _reads(loop, keyring, end)
    _say(News(port=listening.getsockname()[1]))
    await server.serve([listening])


def _server(settings: Settings, face: Face) -> uvicorn.Server:
    config = uvicorn.Config(
        face.application(),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
        ssl_certfile=settings.certificate or None,
        ssl_keyfile=settings.certificate_key or None,
        limit_concurrency=16 * settings.most,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        why = error.strerror or str(error)
        raise ServiceError(f"cannot use {settings.certificate}: {why}", "name a certificate and its key") from error
    return uvicorn.Server(config)


def _reads(loop: asyncio.AbstractEventLoop, keyring: Keyring | None, end: Callable[[], None]) -> None:
    """Takes in what the other process says, on a thread of its own, and its end."""

    def read() -> None:
        for line in sys.stdin.buffer:
            lent = msgspec.json.decode(line, type=Lent)
            if keyring is not None:
                loop.call_soon_threadsafe(keyring.lent, lent.key)
        loop.call_soon_threadsafe(end)

    threading.Thread(target=read, name="news", daemon=True).start()


def _say(news: News) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(news) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("isthmus").setLevel(logging.INFO)
    sys.exit(main())
