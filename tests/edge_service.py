"""A real service on loopback that devices in tests may use."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from isthmus.cloud.models import Model
from isthmus.cloud.service import Service
from isthmus.protocol.keys import AllowList, DeviceKeys, new_pair
from isthmus.protocol.transport import RouterTransport


class Cloud:
    """A service on a thread, with keys of its own and one device's; a context manager.

    Args:
        folder: where its list of allowed keys lies.
        models: what it serves.
    """

    def __init__(self, folder: Path, *models: Model) -> None:
        server, mine = new_pair(), new_pair()
        self.keys = DeviceKeys(mine, server.public)
        allowed = AllowList(folder / "allowed")
        allowed.allow(mine.public, "tester")
        transport = RouterTransport("tcp://127.0.0.1:0", server, allowed)
        self.address = transport.address
        self.service = Service(list(models), transport, allowed)
        self._thread = threading.Thread(target=self.service.run)
        self._thread.start()

    @property
    def options(self) -> dict[str, Any]:
        """What a device needs to be told of it."""
        return {"cloud": self.address, "keys": self.keys}

    def stop(self) -> None:
        self.service.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def __enter__(self) -> Cloud:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
