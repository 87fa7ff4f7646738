"""Changes to a bundle that is there already; whoever is killed meanwhile leaves a bundle that opens."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from isthmus.protocol.errors import BundleError
from isthmus.split.bundle import MANIFEST_FILE, Bundle
from isthmus.split.files import PARTIAL, locked
from isthmus.split.manifest import Manifest
from isthmus.split.tolerance import Tolerance


def changed(path: Path, change: Callable[[Bundle], Manifest]) -> Manifest:
    """Writes what a change makes of a bundle's manifest.

    Raises:
        BundleError: another process writes to the bundle, the change does not lead to a valid one, or it cannot be
            written.
    """
    try:
        with locked(path):
            manifest = change(Bundle.open(path))
            data = manifest.encode()
            Manifest.parse(data)
            put_file(path / MANIFEST_FILE, data)
    except BlockingIOError as error:
        raise BundleError(f"another process writes to {path}", "wait until it is done") from error
    except OSError as error:
        raise BundleError(f"cannot write to {path}: {error.strerror}", "free some space, or copy the bundle") from error
    return manifest


def put_file(target: Path, data: bytes) -> None:
    """Puts a whole file in a file's place."""
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(target.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


def put_tolerance(path: Path, tolerance: Tolerance | None) -> Manifest:
    """Writes into a bundle with how few bits its experts may be read; None takes that away.

    Raises:
        BundleError: it is of another model, or the bundle cannot be written.
    """
    return changed(path, lambda bundle: msgspec.structs.replace(bundle.manifest, tolerance=tolerance))
