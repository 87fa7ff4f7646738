"""The exits that come with the package, for models that `isthmus fetch` brings."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from isthmus.protocol.errors import BundleError
from isthmus.split.exit_entry import ExitEntry
from isthmus.split.files import read_regular

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


def _checked(folder: Path, heads: Heads, entry: ExitEntry) -> bytes:
    name = Path(entry.file).name
    data = read_regular(folder / name)
    if hashlib.sha256(data).hexdigest() != heads.sha256.get(name):
        raise BundleError(f"{folder / name} was altered: its sha256 is not the listed one", "install isthmus again")
    return data
