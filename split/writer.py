"""Writes a bundle: into a folder of another name beside the target, renamed when it is whole."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from isthmus.engine.config import DecoderConfig
from isthmus.engine.part import WeightSource
from isthmus.protocol.errors import BundleError
from isthmus.split.exit_entry import ExitEntry
from isthmus.split.expert_file import encode_experts
from isthmus.split.files import is_there, locked, open_regular, remove_left, work_folder
from isthmus.split.manifest import (
    EMBEDDING,
    HEAD,
    NORM,
    FileEntry,
    Manifest,
    TokenizerEntry,
    check_model_name,
    check_name,
    check_tokenizer,
    expert_file,
    layer_file,
    model_id,
)
from isthmus.split.roles import EXPERTS, Weights
from isthmus.split.shipped import shipped
from isthmus.split.tensorfile import encode

Progress = Callable[[str, int, int], None]  # what was done, how many steps are done, how many there are


class BundleWriter:
    """A bundle being written; leave the `with` block without `finish` and nothing remains.

    A process that is killed leaves its work behind, which the next writer to the same place removes.

    Args:
        path: the bundle's folder to be, or a link to it.
        force: whether a bundle that stands there is replaced.

    Raises:
        BundleError: something stands there already, or the place cannot be written.
    """

    _work: Path

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.files: dict[str, FileEntry] = {}
        self._held = ExitStack()
        self._force = force
        try:
            self.path = path.resolve()
            self._prefix = f".{self.path.name}."
            remove_left(self.path.parent, self._prefix)
            self._put_back()
            occupied = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise _unwritable(path, error) from error
        if self.path.exists() and not force:
            raise _taken(path)
        if occupied and not is_there(self.path / "bundle.json"):
            raise BundleError(f"{path} is not a bundle", "choose another folder; it is not replaced")

    def __enter__(self) -> BundleWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._work = self._held.enter_context(work_folder(self.path.parent, self._prefix))
            self._work.chmod(0o777 & ~_umask())
        except OSError as error:
            self._held.close()
            raise _unwritable(self.path.parent, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def _put_back(self) -> None:
        """Undoes what a process that was killed within `finish` left: the bundle that was to be replaced."""
        name = re.compile(re.escape(self._prefix) + r"[a-z0-9_]{8}\.old")
        for old in [path for path in self.path.parent.glob("*.old") if name.fullmatch(path.name)]:
            with suppress(OSError), locked(old):  # while a `finish` holds it, it is not lost
                if self.path.exists():
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.replace(self.path)

    def add(self, name: str, pieces: Iterable[bytes | memoryview], *, header: bool = False) -> None:
        """Writes a file piece by piece.

        Args:
            header: whether the first piece is a header that is read without the rest.

        Raises:
            BundleError: a name that leads out of the bundle, or a full disk.
        """
        target = self._work / check_name(name)
        digest, size, first = hashlib.sha256(), 0, ""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
                    first = first or (digest.hexdigest() if header else "")
                    size += len(piece)
        except OSError as error:
            raise BundleError(f"cannot write {self.path / name}: {error.strerror}", "free some space") from error
        self.files[name] = FileEntry(size, digest.hexdigest(), first)

    def place(self, name: str) -> Path:
        """Where to write a file of that name; `take` it when it is there.

        Raises:
            BundleError: a name that leads out of the bundle, or a full disk.
        """
        target = self._work / check_name(name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BundleError(f"cannot write {self.path / name}: {error.strerror}", "free some space") from error
        return target

    def take(self, name: str) -> None:
        """Takes in a file that was written to its `place`."""
        target = self._work / check_name(name)
        with open_regular(target) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.files[name] = FileEntry(target.stat().st_size, digest)

    def add_weights(self, name: str, weights: Weights) -> None:
        """Writes matrices and vectors into one safetensors file."""
        self.add(name, encode(weights))

    def finish(
        self,
        name: str,
        config: DecoderConfig,
        weights: str,
        tokenizer: TokenizerEntry,
        exits: tuple[ExitEntry, ...] = (),
    ) -> Manifest:
        """Writes bundle.json and gives the folder its name.

        Raises:
            BundleError: the rename failed, or another process writes to the folder or has made it meanwhile.
        """
        files = dict(self.files)
        manifest = Manifest(name, model_id(config, files), config, weights, tokenizer, files, exits)
        Manifest.parse(manifest.encode())
        self.commit(manifest.encode())
        return manifest

    def commit(self, manifest: bytes) -> None:
        """Writes bundle.json and gives the folder its name.

        Raises:
            BundleError: as `finish`.
        """
        self.add("bundle.json", [manifest])
        old = self._work.with_suffix(".old")
        try:
            if self.path.exists():
                if not self._force:
                    raise _taken(self.path)
                self._held.enter_context(locked(self.path))
                self.path.replace(old)
            self._work.replace(self.path)
        except BlockingIOError as error:
            raise BundleError(f"another process writes to {self.path}", "wait until it is done") from error
        except OSError as error:
            raise BundleError(f"cannot rename to {self.path}: {error.strerror}", "choose another folder") from error
        finally:
            if old.exists() and not self.path.exists():
                old.replace(self.path)
        shutil.rmtree(old, ignore_errors=True)


def _taken(path: Path) -> BundleError:
    return BundleError(f"{path} exists already", "choose another folder, or replace it with --force")


def _unwritable(path: Path, error: Exception) -> BundleError:
    reason = error.strerror if isinstance(error, OSError) else error
    return BundleError(f"cannot write to {path}: {reason}", "choose another folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bundle(
    path: Path,
    source: WeightSource,
    *,
    name: str,
    weights: str,
    tokenizer: bytes,
    entry: TokenizerEntry,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Writes every weight of a source, one file a layer, and the exits that come with isthmus for this very model.

    Args:
        name: for people.
        weights: the format that the source's matrices were asked for ("keep", "q4", ...).
        tokenizer: the bytes of tokenizer.json.
        entry: what tokenizer.json cannot say.

    Raises:
        BundleError: the place is taken or cannot be written, or `name` or `entry` does not fit.
    """
    config = source.config
    check_model_name(name)
    check_tokenizer(entry, config.vocab_size)
    total = config.n_layers + 2
    with BundleWriter(path, force=force) as writer:
        writer.add(entry.file, [tokenizer])
        writer.add_weights(EMBEDDING, {"embedding": source.embedding()})
        if progress:
            progress("embedding", 1, total)
        for index in range(config.n_layers):
            layer = source.layer(index)
            if config.experts_of(index):
                writer.add(expert_file(index), encode_experts(layer, config), header=True)
            rest = {role: weight for role, weight in layer.items() if not role.startswith(EXPERTS)}
            writer.add_weights(layer_file(index), rest)
            if progress:
                progress(f"layer {index}", index + 2, total)
        writer.add_weights(NORM, {"final_norm": source.final_norm()})
        if not config.tied:
            writer.add_weights(HEAD, {"head": source.head()})
        exits = shipped(model_id(config, writer.files))
        for one, data in exits:
            writer.add(one.file, [data])
        manifest = writer.finish(name, config, weights, entry, tuple(one for one, _ in exits))
        if progress:
            progress("done", total, total)
        return manifest
