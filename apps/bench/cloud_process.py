"""`isthmus serve` in a process of its own, for demos and measurements on one machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from isthmus.protocol.errors import ServiceError
from isthmus.protocol.keys import AllowList, write_pair

START_S = 60.0
ERROR = "error: "


@contextmanager
def fresh_keys(owner: str = "bench") -> Iterator[Path]:
    """A folder with new keys of a cloud and of a device that it lets in, thrown away afterwards."""
    with TemporaryDirectory(prefix=f"isthmus-{owner}-") as temporary:
        folder = Path(temporary)
        write_pair(folder, "server")
        AllowList(folder / "allowed").allow(write_pair(folder, "device").public, owner)
        yield folder


class CloudProcess:
    """`isthmus serve` in a process of its own. It keeps no KV of sessions that ended: each is measured from cold.

    Args:
        bundle: what it serves; None for nothing.
        port: where it listens on this machine; 0 is any free port.
        more: options of `isthmus serve`.
    """

    def __init__(
        self,
        bundle: Path | None,
        keys: Path,
        threads: int,
        slow_down: float = 1.0,
        port: int = 0,
        more: Sequence[str] = (),
    ) -> None:
        self._bundle, self._keys, self._threads, self._slow_down = bundle, keys, threads, slow_down
        self._port, self._more = port, more
        self._process: Any = None
        self.address = ""

    def __enter__(self) -> CloudProcess:
        port = self._port or _free_port()
        self.address = f"tcp://127.0.0.1:{port}"
        command = [sys.executable, "-m", "isthmus.apps.cli", "serve", "--listen", self.address]
        command += [] if self._bundle is None else [str(self._bundle)]
        command += ["--keys", str(self._keys), "--threads", str(self._threads)]
        command += ["--slow-down", str(self._slow_down), "--context-s", "0", *self._more]
        self._log = (self._keys / "cloud.log").open("w+")
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        try:
            self._wait(port)
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid)

    def kill(self) -> None:
        """Ends it without a word, as a crash does."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _wait(self, port: int) -> None:
        """Until the cloud listens.

        Raises:
            ServiceError: it ended, or took too long.
        """
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as probe:
                probe.settimeout(1.0)
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.02)
        self._log.seek(0)
        said = self._log.read().strip().splitlines()
        if said and said[-1].startswith(ERROR):
            raise ServiceError(said[-1].removeprefix(ERROR))
        raise ServiceError(f"the cloud process did not start: {said[-1] if said else 'it said nothing'}", "try again")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
