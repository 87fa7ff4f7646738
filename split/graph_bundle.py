"""A bundle of a network that was cut, opened to be run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from isthmus.engine.graph_part import GraphPart
from isthmus.protocol.errors import BundleError
from isthmus.split import tried
from isthmus.split.bundle import AGAIN, read_manifest
from isthmus.split.files import open_regular, regular_size
from isthmus.split.graph_manifest import GraphManifest, part_files


class GraphBundle:
    """See the module. It may be partial: hold only one of the two parts.

    Attributes:
        path: the folder.
        manifest: what bundle.json says.
    """

    def __init__(self, path: Path, manifest: GraphManifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path) -> GraphBundle:
        """Reads bundle.json and compares the sizes of the files that are there.

        Raises:
            BundleError: no bundle of a network that was cut, or a damaged one.
        """
        folder = Path(path)
        bundle = cls(folder, GraphManifest.parse(read_manifest(folder)))
        for name in bundle.manifest.files:
            bundle.holds(name)
        return bundle

    def holds(self, name: str) -> bool:
        """Whether a file is here.

        Raises:
            BundleError: it has another size than it should.
        """
        try:
            size = regular_size(self.path / name)
        except OSError as error:
            raise BundleError(f"{self.path / name} cannot be read ({error.strerror})", AGAIN) from error
        if size is not None and size != self.manifest.files[name].bytes:
            wanted = self.manifest.files[name].bytes
            raise BundleError(f"{self.path / name} has {size} bytes, not {wanted}", AGAIN)
        return size is not None

    def has(self, part: str) -> bool:
        """Whether all files of the device's (`DEVICE`) or the cloud's part (`CLOUD`) are here."""
        folder = part.partition("/")[0] + "/"
        return all(self.holds(name) for name in self.manifest.files if name.startswith(folder))

    def part(self, part: str, threads: int = 0, slow_down: float = 1.0, limit_s: float = 0.0) -> GraphPart:
        """The cloud's part (`graph_manifest.CLOUD`) or a piece of the device's, its files compared with their hashes.

        A part that was neither cut nor opened on this machine before is first opened in a child process with limits.

        Args:
            part: the name of its file.
            threads, slow_down, limit_s: as in `GraphPart`.

        Raises:
            BundleError: a file is absent, was altered, or has weights that bundle.json does not list.
            PlanError: it is no model, its weights do not lie beside it, or it exceeds the limits.
            EngineError: nothing runs it here.
        """
        self._compare(part)
        self.try_part(part)
        return GraphPart(self.path / part, threads, slow_down, limit_s)

    def try_part(self, part: str) -> None:
        """Opens a part in a child process with limits, unless it was cut or opened on this machine before.

        Raises:
            BundleError, PlanError: as in `part`.
        """
        key = tried.key(part, self.manifest.files)
        if tried.known(key):
            return
        names, folder = self._compare(part), part.rpartition("/")[0]
        for name in tried.weights_of(self.path / part):
            if f"{folder}/{name}" not in names:
                raise BundleError(f"{self.path / part} has weights in {name!r}, which bundle.json does not list", AGAIN)
        tried.remember(key)

    def _compare(self, part: str) -> list[str]:
        """Compares a part's files with their hashes; their names."""
        names = part_files(part, self.manifest.files)
        absent = next((name for name in (part, *names) if name not in names or not self.holds(name)), None)
        if absent is not None:
            raise BundleError(f"{self.path} has no {absent}", "split or copy the model again")
        for name in names:
            self._check(name)
        return names

    def verify(self) -> None:
        """Compares the hash of every file that is here.

        Raises:
            BundleError: one was altered.
        """
        for name in self.manifest.files:
            if self.holds(name):
                self._check(name)

    def _check(self, name: str) -> None:
        try:
            with open_regular(self.path / name) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BundleError(f"{self.path / name} cannot be read ({error.strerror})", AGAIN) from error
        if found != self.manifest.files[name].sha256:
            raise BundleError(f"{self.path / name} was altered", AGAIN)
