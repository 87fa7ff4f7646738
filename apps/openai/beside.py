"""OpenAI's API beside a cloud, in a process of its own: what it does, and if it fails, keeps no device waiting."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from importlib.util import find_spec
from typing import IO

import msgspec

from isthmus.apps.openai.settings import Lent, News, Settings
from isthmus.protocol.errors import ProtocolError, ServiceError
from isthmus.protocol.keys import AllowList

_END_S = 5.0
_log = logging.getLogger("isthmus.openai")


class Beside:
    """A process that answers OpenAI's API.

    Args:
        allowed: where the cloud looks whose key it is; None for a cloud in the clear.

    Attributes:
        port: where it listens.

    Raises:
        ServiceError: it cannot listen, or a package is missing.
    """

    def __init__(self, settings: Settings, allowed: AllowList | None) -> None:
        check_installed()
        self._allowed = allowed
        command = [sys.executable, "-m", "isthmus.apps.openai"]
        pipe = subprocess.PIPE
        # A session of its own: who interrupts the cloud ends this through the cloud, when that has ended its answers.
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._closed = False
        try:
            self._send(settings)
            self.port = self._began(self._out)
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._listen, name="openai", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it: answers under way are given a moment."""
        self._closed = True
        try:
            self._in.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _began(self, out: IO[bytes]) -> int:
        line = out.readline()
        if not line:
            raise ServiceError("the process for OpenAI's API ended at once", "see what it says above")
        news = msgspec.json.decode(line, type=News)
        if news.problem:
            raise ServiceError(news.problem, news.remedy)
        return news.port

    def _listen(self) -> None:
        for line in self._out:
            news = msgspec.json.decode(line, type=News)
            if self._allowed is None:
                continue
            if news.back:
                self._allowed.give_back(news.owner)
                continue
            try:
                self._allowed.lend(news.key, news.owner)
                self._send(Lent(news.key))
            except (ProtocolError, OSError) as error:
                _log.warning("%s", error)
        if not self._closed:
            _log.error("OpenAI's API is not answered any more: its process has ended; devices are served on")

    def _send(self, line: Settings | Lent) -> None:
        try:
            self._in.write(msgspec.json.encode(line) + b"\n")
            self._in.flush()
        except BrokenPipeError:
            pass  # what it says last tells why


def check_installed() -> None:
    """Makes sure that the packages are there which OpenAI's API takes.

    Raises:
        ServiceError: one is not.
    """
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ServiceError(f"OpenAI's API takes {' and '.join(missing)}", "pip install 'isthmus[cloud]'")
