"""The exits that come with the package, for models that `isthmus fetch` brings."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from isthmus.protocol.errors import BundleError
from isthmus.split.exit_entry import ExitEntry
from isthmus.split.files import read_regular

if TYPE_CHECKING:
    from isthmus.split.bundle import Bundle

FOLDER = Path(__file__).parent / "heads"
LIST = "heads.json"


class Heads(msgspec.Struct, frozen=True):
    """What `heads.json` beside a model's heads says.

    Attributes:
        model_id: of the bundle that they were trained for.
        commands: what made them.
        sha256: of each file, by its name in the folder.
        exits: as they stand in the bundle.
    """

    model_id: str
    commands: tuple[str, ...]
    sha256: dict[str, str]
    exits: tuple[ExitEntry, ...]


def shipped(model_id: str, folder: Path = FOLDER) -> list[tuple[ExitEntry, bytes]]:
    """The exits of a model and their files; none for a model that has none here.

    Raises:
        BundleError: a file is missing or was altered.
    """
    for listed in sorted(folder.glob(f"*/{LIST}")):
        try:
            heads = msgspec.json.decode(read_regular(listed), type=Heads)
            if heads.model_id == model_id:
                return [(entry, _checked(listed.parent, heads, entry)) for entry in heads.exits]
        except (OSError, msgspec.MsgspecError) as error:
            raise BundleError(f"{listed.parent} cannot be read: {error}", "install isthmus again") from error
    return []


def export(bundle: Bundle, folder: Path, commands: tuple[str, ...]) -> None:
    """Writes a bundle's exits into a folder, as `shipped` reads them.

    Args:
        commands: what made them.

    Raises:
        BundleError: a file of theirs is absent or was altered, or the folder cannot be written.
    """
    files = {Path(entry.file).name: bundle.read(entry.file) for entry in bundle.exits}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    listed = msgspec.json.encode(Heads(bundle.model_id, commands, hashes, bundle.exits))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        (folder / LIST).write_bytes(msgspec.json.format(listed, indent=1) + b"\n")
    except OSError as error:
        raise BundleError(f"cannot write to {folder}: {error.strerror}", "choose another folder") from error


def _checked(folder: Path, heads: Heads, entry: ExitEntry) -> bytes:
    name = Path(entry.file).name
    data = read_regular(folder / name)
    if hashlib.sha256(data).hexdigest() != heads.sha256.get(name):
        raise BundleError(f"{folder / name} was altered: its sha256 is not the listed one", "install isthmus again")
    return data
