"""Lists in files that say what belongs to whom, one `WHAT OWNER` a line; edits count from the next `refresh`."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path

from isthmus.protocol.errors import ProtocolError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


def check_owner(name: str) -> str:
    """The name itself when it is fit for a key file or a principal.

    Raises:
        ProtocolError: other than letters, digits and . _ @ -, or too long.
    """
    if not _NAME.fullmatch(name):
        raise ProtocolError(f"{name[:80]!r} is no name", "use up to 64 letters, digits, and . _ @ -")
    return name


class OwnerList:
    """What belongs to whom.

    Args:
        path: the file; a missing one is an empty list.
        pattern: of what belongs to somebody.
        what: its name, for people.

    Raises:
        ProtocolError: the file cannot be read, or a line is no entry.
    """

    def __init__(self, path: Path, pattern: re.Pattern[str], what: str) -> None:
        self.path = path
        self._pattern, self._what = pattern, what
        self._names: dict[str, str] = {}
        self._stamp: tuple[int, int, int] | None = None
        self.refresh()

    def principal(self, entry: str) -> str | None:
        """Whose it is, or None when it is not on the list."""
        return self._names.get(entry)

    def entries(self) -> list[tuple[str, str]]:
        """(what, principal) in the file's order."""
        return list(self._names.items())

    def refresh(self) -> bool:
        """Reads the file again if it changed; whether it did. A missing file is an empty list.

        Raises:
            ProtocolError: a line that is no entry; the list before stays in force.
        """
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if stamp == self._stamp:
                return False
            text = self.path.read_text()
        except FileNotFoundError:
            changed, self._names, self._stamp = bool(self._names), {}, None
            return changed
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            problem = f"cannot read the list of {self._what}s {self.path}: {why}"
            raise ProtocolError(problem, "mend or remove it") from error
        names: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            # A key may itself begin with '#', so a comment needs the space.
            if not line.strip() or line.startswith("# "):
                continue
            entry, _, name = line.strip().partition(" ")
            if not self._pattern.fullmatch(entry) or not _NAME.fullmatch(name.strip()):
                problem = f"line {number} of {self.path} is no entry"
                raise ProtocolError(problem, f"write: {self._what.upper()} PRINCIPAL")
            names[entry] = name.strip()
        self._names, self._stamp = names, stamp
        return True

    def put(self, entry: str, name: str) -> None:
        """Adds an entry, or gives it to somebody else, and writes the file.

        Raises:
            ProtocolError: no name, or the file cannot be written.
        """
        self._names[entry] = check_owner(name)
        self._save()

    def revoke(self, entry_or_name: str) -> int:
        """Takes an entry, or all of a principal, off the list and writes the file; how many.

        Raises:
            ProtocolError: the file cannot be written.
        """
        return self._remove([entry for entry, name in self._names.items() if entry_or_name in (entry, name)])

    def _remove(self, gone: Collection[str]) -> int:
        for entry in gone:
            del self._names[entry]
        if gone:
            self._save()
        return len(gone)

    def _save(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_private(self.path, "".join(f"{entry} {name}\n" for entry, name in self._names.items()), 0o600)
        except OSError as error:
            raise ProtocolError(f"cannot write {self.path}: {error.strerror}", "choose a folder of yours") from error


def write_private(path: Path, text: str, mode: int) -> None:
    """Writes a file as a whole, with that mode from the first byte on.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            os.fchmod(handle, mode)
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
