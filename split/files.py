"""Files and folders of which nothing is known: opened without waiting, written aside, and by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

PARTIAL = ".part"  # ends the name of what is not whole yet
_MOST_NAME = 50  # characters of a file's in that of what is written aside


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading; a FIFO or a device is refused and never waited for.

    Raises:
        OSError: nothing is there, or something that is no regular file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null byte in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # another one by now
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """All bytes of a regular file.

    Raises:
        OSError: as `open_regular`.
    """
    with open_regular(path) as file:
        return file.read()


def digest_of(*paths: Path) -> str:
    """The sha256 of the sha256s of regular files: 64 hex digits.

    Raises:
        OSError: as `open_regular`.
    """
    found = hashlib.sha256()
    for path in paths:
        with open_regular(path) as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def regular_size(path: Path) -> int | None:
    """Bytes of a regular file; None when nothing is there.

    Raises:
        OSError: something else is there, or it cannot be looked at.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return found.st_size


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file aside and puts it in its place, so that what stands there is whole at all times.

    Raises:
        OSError: it cannot be written; what stood there stands.
    """
    aside = path.with_name(f".{path.name[:_MOST_NAME]}.{os.getpid()}{PARTIAL}")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def is_there(path: Path) -> bool:
    """Whether anything is there; a name that no file can have is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Holds a folder's lock, which ends with this process at the latest.

    Yields:
        Whether it is held: not every file system has locks.

    Raises:
        BlockingIOError: somebody else holds it.
        OSError: there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def remove_left(parent: Path, prefix: str) -> None:
    """Removes the work folders (see `work_folder`) of processes that were killed; those in use stay."""
    name = re.compile(re.escape(prefix) + "[a-z0-9_]{8}" + re.escape(PARTIAL))
    for left in [path for path in parent.glob(f"*{PARTIAL}") if name.fullmatch(path.name)]:
        with suppress(OSError), locked(left) as unused:
            if unused:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def work_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder to write in, its name between `prefix` and PARTIAL; removed at the end, unless it was renamed.

    Raises:
        OSError: it cannot be made.
    """
    remove_left(parent, prefix)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with locked(work):
            work = work.rename(work.with_name(work.name + PARTIAL))  # only now may others look at it
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
