"""Keys with which devices speak for owners of tokens: lent by the cloud, as long as this process runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from isthmus.apps.openai.settings import News
from isthmus.protocol.errors import LinkError
from isthmus.protocol.keys import DeviceKeys, new_pair

_WAIT_S = 10.0


class Keyring:
    """See the module; for one event loop.

    Args:
        cloud_key: the cloud's public key.
        say: tells the process that runs the cloud.
    """

    def __init__(self, cloud_key: str, say: Callable[[News], None]) -> None:
        self._cloud_key, self._say = cloud_key, say
        self._keys: dict[str, DeviceKeys] = {}
        self._asked: dict[str, asyncio.Future[None]] = {}

    async def keys(self, owner: str) -> DeviceKeys:
        """The keys that speak for an owner.

        Raises:
            LinkError: the cloud does not lend any.
        """
        found = self._keys.get(owner)
        if found is None:
            found = DeviceKeys(new_pair(), self._cloud_key)
            self._asked[found.pair.public] = asyncio.get_running_loop().create_future()
            self._say(News(key=found.pair.public, owner=owner))
            self._keys[owner] = found
        asked = self._asked[found.pair.public]
        try:
            await asyncio.wait_for(asyncio.shield(asked), _WAIT_S)
        except TimeoutError:
            raise LinkError("the cloud lends no key", "try again later") from None
        return found

    def lent(self, key: str) -> None:
        """The cloud lets a key in."""
        if (asked := self._asked.get(key)) is not None and not asked.done():
            asked.set_result(None)

    def keep(self, owners: set[str] | None) -> None:
        """Gives back what was lent for others than these."""
        for owner in [owner for owner in self._keys if owners is not None and owner not in owners]:
            del self._asked[self._keys.pop(owner).pair.public]
            self._say(News(owner=owner, back=True))
