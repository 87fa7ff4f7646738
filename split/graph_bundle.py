"""A bundle of a network that was cut, opened to be run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from isthmus.engine.graph_part import GraphPart
from isthmus.protocol.errors import BundleError, EngineError
from isthmus.split.bundle import AGAIN, read_manifest
from isthmus.split.files import open_regular, regular_size
from isthmus.split.graph_manifest import GraphManifest


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

    def try_part(self, part: str) -> None:
        """Opens a part in a child process with limits, unless it was cut or opened on this machine before.

        Raises:
            BundleError: a file is absent or was altered.
            PlanError: it is no model, or exceeds the limits.
        """
        from isthmus.split.tried import known, try_part

        sha256 = self.manifest.files[part].sha256
        if not known(sha256):
            self._whole(part)
            try_part(self.path / part, sha256)

    def part(self, part: str, threads: int = 0, slow_down: float = 1.0, limit_s: float = 0.0) -> GraphPart:
        """The cloud's part (`graph_manifest.CLOUD`) or a piece of the device's, its files compared with their hashes.

        A part that was neither cut nor opened on this machine before is first opened in a child process with limits.

        Args:
            part: the name of its file.
            threads, slow_down, limit_s: as in `GraphPart`.

        Raises:
            BundleError: a file is absent or was altered.
            PlanError: it is no model, its weights do not lie beside it, or it exceeds the limits.
            EngineError: nothing runs it here.
        """
        self._whole(part)
        try:
            from isthmus.split.onnx_file import read_model
        except ImportError as error:
            raise EngineError("onnx is not installed", "pip install 'isthmus[edge]'") from error
        read_model(self.path / part)  # weights beside it are where they should be
        self.try_part(part)
        return GraphPart(self.path / part, threads, slow_down, limit_s)

    def _whole(self, part: str) -> None:
        """Compares the files of a part with their hashes."""
        for name in self.manifest.files:
            if name.startswith(part.removesuffix("onnx")):
                if not self.holds(name):
                    raise BundleError(f"{self.path} has no {name}", "split or copy the model again")
                self._check(name)

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
