"""Puts exits, their certificates and their codecs into a bundle that is there already."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import BundleError
from isthmus.split.bundle import MANIFEST_FILE, Bundle
from isthmus.split.certificate import Certificate
from isthmus.split.exit_entry import CodecChoice, ExitEntry
from isthmus.split.exits import HEAD_TOKENS, MODEL_ID
from isthmus.split.manifest import FileEntry, Manifest
from isthmus.split.rewriting import changed, put_file
from isthmus.split.roles import Weights
from isthmus.split.tensorfile import encode


def exit_bytes(model_id: str, weights: Weights, head_tokens: NDArray[np.int32] | None) -> bytes:
    """An exit's file.

    Args:
        model_id: of the model that it was trained for.
        weights: see `exits.ExitSource`.
    """
    arrays = dict(weights) if head_tokens is None else {**weights, HEAD_TOKENS: head_tokens}
    return b"".join(encode(arrays, {MODEL_ID: model_id}))


def put_exits(path: Path, model_id: str, exits: Sequence[tuple[ExitEntry, bytes]]) -> Manifest:
    """Writes exits into a bundle, in place of those before the same layers.

    Args:
        model_id: of the bundle for which they were trained.
        exits: what is said of each, and its file. One that is there already keeps its certificate and its codec.

    Raises:
        BundleError: the bundle is another model's, another process writes to it, or it cannot be written.
    """

    def change(bundle: Bundle) -> Manifest:
        if bundle.model_id != model_id:
            problem = f"the exits were trained for the model {model_id}, and {path} holds {bundle.model_id}"
            raise BundleError(problem, "train exits for this bundle: isthmus exits train")
        files, old = dict(bundle.manifest.files), bundle.manifest
        for entry, data in exits:
            files[entry.file] = FileEntry(len(data), hashlib.sha256(data).hexdigest())
        same = {one.file: one for one in old.exits if files[one.file] == old.files[one.file]}
        replaced = {entry.layer for entry, _ in exits}
        kept = tuple(entry for entry in old.exits if entry.layer not in replaced)
        if len(kept) < len(old.exits):  # a file is not replaced while bundle.json has its hash
            listed = {name: entry for name, entry in old.files.items() if name not in {e.file for e, _ in exits}}
            put_file(path / MANIFEST_FILE, msgspec.structs.replace(old, files=listed, exits=kept).encode())
        new = [_calibrated(entry, same.get(entry.file)) for entry, _ in exits]
        entries = tuple(sorted([*kept, *new], key=lambda entry: entry.layer))
        manifest = msgspec.structs.replace(old, files=files, exits=entries)
        Manifest.parse(manifest.encode())
        for entry, data in exits:
            put_file(path / entry.file, data)
        return manifest

    return changed(path, change)


def put_certificates(path: Path, certificates: Mapping[int, Certificate | None]) -> Manifest:
    """Writes the certificates of exits into a bundle, by layer; None takes one away.

    Raises:
        BundleError: there is no such exit, it has other weights by now, or the bundle cannot be written.
    """
    return _put(path, {layer: {"certificate": found} for layer, found in certificates.items()})


def put_codecs(path: Path, codecs: Mapping[int, CodecChoice | None]) -> Manifest:
    """Writes how states before exits travel into a bundle, by layer; None takes it away.

    Raises:
        BundleError: see `put_certificates`.
    """
    return _put(path, {layer: {"codec": found} for layer, found in codecs.items()})


def _put(path: Path, changes: Mapping[int, dict[str, Certificate | CodecChoice | None]]) -> Manifest:
    def change(bundle: Bundle) -> Manifest:
        old = bundle.manifest
        for layer in changes:
            old.exit(layer)
        entries = (msgspec.structs.replace(entry, **changes.get(entry.layer, {})) for entry in old.exits)
        return msgspec.structs.replace(old, exits=tuple(entries))

    return changed(path, change)


def _calibrated(entry: ExitEntry, old: ExitEntry | None) -> ExitEntry:
    """An exit with what was found of the same weights before."""
    if old is None:
        return entry
    return msgspec.structs.replace(
        entry, certificate=entry.certificate or old.certificate, codec=entry.codec or old.codec
    )
