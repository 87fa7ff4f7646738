"""A bundle's files as devices may fetch them: only what the manifest lists, in ranges."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import NamedTuple

from isthmus.protocol.errors import BundleError
from isthmus.protocol.messages import MAX_MANIFEST_BYTES, MAX_RANGE_BYTES

_MAX_OPEN = 64


class Listed(NamedTuple):
    """A file of the manifest."""

    size: int
    sha256: str


class BundleFiles:
    """The bytes behind GetManifest and GetRange.

    Args:
        folder: the bundle's.

    Raises:
        BundleError: bundle.json is missing, too large or lists no files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._open: dict[str, int] = {}
        path = self._folder / "bundle.json"
        try:
            self.manifest = path.read_bytes()
            listed = json.loads(self.manifest)["files"]
            self._listed = {name: Listed(int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}", "name a bundle's folder") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path} is no bundle's manifest: {error}", "make the bundle again") from error
        if len(self.manifest) > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} has {len(self.manifest)} bytes", f"at most {MAX_MANIFEST_BYTES} can be sent")

    def read(self, name: str, sha256: str, offset: int, length: int) -> tuple[bytes, int] | None:
        """Up to `length` bytes from `offset`, and the file's size; None when there is no such file.

        The device checks the whole file's hash; `sha256` only makes sure that both mean the same file.
        """
        entry = self._listed.get(name)
        if entry is None or entry.sha256 != sha256:
            return None
        try:
            return os.pread(self._descriptor(name), min(length, MAX_RANGE_BYTES), offset), entry.size
        except OSError:
            return None

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _descriptor(self, name: str) -> int:
        descriptor = self._open.get(name)
        if descriptor is None:
            path = (self._folder / name).resolve()
            if not path.is_relative_to(self._folder):
                raise FileNotFoundError(name)
            while len(self._open) >= _MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise FileNotFoundError(name)
            self._open[name] = descriptor
        return descriptor
