"""Where a command writes: refused before anything is measured, if nothing can or should be written there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def check_target(target: Path, reads: Iterable[Path] = ()) -> None:
    """Refuses a place where no file may be put.

    Args:
        reads: files that the command reads, or writes beside this one.

    Raises:
        PlanError: there is no such folder, something else than a file is there, or it would replace one of those.
    """
    from isthmus.protocol.errors import PlanError

    remedy = "choose another file with -o"
    if not target.name:
        raise PlanError(f"{str(target)!r} names no file", remedy)
    if not target.parent.is_dir():
        raise PlanError(f"there is no folder {target.parent}", "make it, or choose another file with -o")
    if target.exists() and not target.is_file():
        raise PlanError(f"{target} is no file that could be replaced", remedy)
    if any(target.resolve() == one.resolve() for one in reads):
        raise PlanError(f"{target} would be replaced, which this command needs", remedy)
