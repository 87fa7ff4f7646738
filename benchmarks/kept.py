"""What a long benchmark has done so far, in a file that grows: a run that was stopped is gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Kind = TypeVar("Kind", bound=DataclassInstance)
else:
    Kind = TypeVar("Kind")


class Kept(Generic[Kind]):
    """Findings, one on a line of JSON; a line that was torn when a run was stopped is left out.

    Args:
        path: of the file, which need not be there.
        read: makes a finding of a line's names and values.

    Attributes:
        found: what there is, the oldest first.
    """

    def __init__(self, path: Path, read: Callable[..., Kind]) -> None:
        self._path, self.found = path, list[Kind]()
        text = path.read_text() if path.exists() else ""
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                told: dict[str, Any] = json.loads(line)
                self.found.append(read(**told))
            except (ValueError, TypeError):
                continue

    def add(self, findings: Iterable[Kind]) -> None:
        """Keeps some more."""
        new = list(findings)
        self.found += new
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write("\n" * self._torn + "".join(json.dumps(asdict(one)) + "\n" for one in new))
        self._torn = False
