"""Where a command writes: refused before anything is measured, if nothing can or should be written there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def check_target(target: Path, reads: Iterable[Path] = ()) -> None:
    """Refuses a place where no file may be put.

    Args:
        reads: files that the command reads, or writes beside this one.

    Raises:
        PlanError: there is no such folder, or none that files can be put in; something else than a file is there; or it
            would replace one of those, a bundle's file, or one that no command has written so.
    """
    import os
    import tempfile

    from isthmus.protocol.errors import PlanError
    from isthmus.split.files import is_there

    remedy = "choose another file with -o"
    if not target.name:
        raise PlanError(f"{str(target)!r} names no file", remedy)
    if not target.parent.is_dir():
        raise PlanError(f"there is no folder {target.parent}", "make it, or choose another file with -o")
    if os.path.lexists(target) and not target.is_file():
        raise PlanError(f"{target} is no file that could be replaced", remedy)
    place = Path(os.path.realpath(target))  # which no loop of links ends with an error
    if any(str(place) == os.path.realpath(one) for one in reads):
        raise PlanError(f"{target} would be replaced, which this command needs", remedy)
    if inside := next((folder for folder in place.parents if is_there(folder / "bundle.json")), None):
        raise PlanError(f"{target} lies in the bundle {inside.name}", remedy)
    if target.is_file() and not _is_ours(target):
        raise PlanError(f"{target} would be replaced, and is no file of this kind", f"{remedy}, or remove it")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise PlanError(f"no file can be written in {target.parent} ({error.strerror})", remedy) from error


def _is_ours(path: Path) -> bool:
    """Whether a file is JSON, as all are that commands write where they are told, or empty."""
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] in (b"", b"{")
