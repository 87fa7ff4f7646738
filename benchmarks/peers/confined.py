"""Joins a cgroup, and becomes another program, whose every page is then charged to that group.

usage: python confined.py FOLDER COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    """See the module."""
    folder, *command = sys.argv[1:]
    (Path(folder) / "cgroup.procs").write_text(str(os.getpid()))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
