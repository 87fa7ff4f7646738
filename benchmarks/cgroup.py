"""A memory cgroup with a limit, of version 1 or 2, below the one that this process is in: page cache counts in it.

A page of a file is charged to the group whose process reads it first, and stays charged to it; so a file must have
left the page cache before processes of a group open it. No group gets swap.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
MEMBERSHIP = Path("/proc/self/cgroup")
ENDING_S = 5.0  # in which the processes of a group must have gone before it is removed


class CgroupUnavailableError(Exception):
    """This machine lends no memory cgroup; the text says why."""


@dataclass(frozen=True, slots=True)
class Version:
    """The names of a version's files: limits of memory and of swap, the most so far, and events."""

    number: int
    limit: str
    swap: str
    peak: str
    events: str


V1 = Version(
    1, "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"
)
V2 = Version(2, "memory.max", "memory.swap.max", "memory.peak", "memory.events")


def parents(mounts: str, membership: str) -> list[tuple[Version, Path]]:
    """Where groups might be made, best first: in this process's own group, and with version 2 beside it as well.

    Version 2 gives no memory controller to the children of a group that has processes itself.

    Args:
        mounts: lines of /proc/self/mounts.
        membership: lines of /proc/self/cgroup.
    """
    roots: dict[Version, Path] = {}
    for line in mounts.splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            roots[V1] = Path(place)
        elif kind == "cgroup2":
            roots[V2] = Path(place)
    found = list[tuple[Version, Path]]()
    for line in membership.splitlines():
        _, controllers, own = line.split(":", 2)
        version = V1 if "memory" in controllers.split(",") else V2 if not controllers else None
        if version is None or version not in roots:
            continue
        folder = roots[version] / own.lstrip("/")
        found.append((version, folder))
        if version is V2 and folder != roots[V2]:
            found.append((version, folder.parent))
    return sorted(found, key=lambda one: one[0].number)


class MemoryGroup:
    """A cgroup that is removed when it is closed.

    Args:
        name: told apart from other groups of this process by it.
        limit_bytes: of memory, page cache included.

    Attributes:
        folder: of the group; a process joins by writing its id to `folder / "cgroup.procs"`.
        version: of cgroups.

    Raises:
        CgroupUnavailableError: there is no memory controller, or this process may make no group.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        refused, self.limit_bytes = list[str](), limit_bytes
        for version, parent in parents(MOUNTS.read_text(), MEMBERSHIP.read_text()):
            folder = parent / f"isthmus-{os.getpid()}-{name}"
            try:
                folder.mkdir()
            except OSError as error:
                refused.append(f"version {version.number}: {error.strerror}")
                continue
            try:
                (folder / version.limit).write_text(str(limit_bytes))
            except OSError as error:
                folder.rmdir()
                refused.append(f"version {version.number}: no memory controller ({error.strerror})")
                continue
            self.folder, self.version = folder, version
            swap = 0 if version is V2 else limit_bytes  # version 1 counts memory and swap together
            with contextlib.suppress(OSError):  # a kernel without swap has no such file
                (folder / version.swap).write_text(str(swap))
            return
        raise CgroupUnavailableError("; ".join(refused) or "no memory cgroup is mounted")

    @property
    def peak_bytes(self) -> int:
        """The most memory so far."""
        return int((self.folder / self.version.peak).read_text())

    @property
    def killed(self) -> int:
        """Processes that the kernel ended because they needed more than the limit."""
        events = dict(line.split() for line in (self.folder / self.version.events).read_text().splitlines())
        return int(events.get("oom_kill", 0))

    def close(self) -> None:
        """Removes the group, whose processes must have been ended."""
        until = time.monotonic() + ENDING_S
        while True:
            try:
                return self.folder.rmdir()
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
