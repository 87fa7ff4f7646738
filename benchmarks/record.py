"""What a benchmark found, written so that others can judge it: machine, versions, commit, figures and tables.

A benchmark is a script beside this file (`make bench` runs those with a `__main__` guard). It makes one `Record`, adds
figures and tables while it measures, and writes it at the end:

    from record import Record

    record = Record("decode", settings={"context": 64})
    record.figure("native/q4/1", 231.0, "tok/s", target=0.95, of="prototype/q4/1")
    record.table("decode", ["engine", "1 thread", "2 threads"], [["isthmus", 231.0, 362.4]])
    record.write()
"""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from isthmus.apps.bench.machine import read_machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "isthmus",
    "numpy",
    "onnxruntime",
    "pyzmq",
    "msgspec",
    "tokenizers",
    "torch",
    "transformers",
    "llama-cpp-python",
)

Cell = str | int | float | None


@dataclass(slots=True)
class Record:
    """One benchmark's results.

    Attributes:
        name: the file is results/NAME.json.
        settings: what was asked for, and every emulated slow-down, memory limit or link.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def figure(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        target: float | None = None,
        of: str | None = None,
        at_most: bool = False,
    ) -> bool:
        """Adds a figure and tells whether it meets its target (True without one).

        Args:
            target: the value to reach, or with `of` the ratio to that earlier figure of this run.
            at_most: the target is an upper bound.
        """
        entry: dict[str, Any] = {"value": value, "unit": unit}
        met = True
        if target is not None:
            measured = value / float(self.figures[of]["value"]) if of else value
            met = measured <= target if at_most else measured >= target
            entry |= {"target": target, "sense": "at most" if at_most else "at least", "met": met}
            if of:
                entry |= {"of": of, "ratio": round(measured, 4)}
        self.figures[name] = entry
        return met

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, note: str = "") -> None:
        """Adds a table for the README's section of that name; None is an empty cell."""
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns: {row}")
        self.tables[name] = {"columns": list(columns), "rows": [list(row) for row in rows], "note": note}

    def skip(self, what: str, why: str) -> None:
        """Says what was not measured and why."""
        self.notes.append(f"not measured: {what} ({why})")
        print(self.notes[-1])

    def to_dict(self) -> dict[str, Any]:
        """As it is written."""
        machine = asdict(read_machine())
        for fleeting in ("load_1m", "python"):
            machine.pop(fleeting)
        return {
            "benchmark": self.name,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(),
            "machine": machine,
            "versions": versions(),
            "settings": dict(self.settings),
            "figures": self.figures,
            "tables": self.tables,
            "notes": self.notes,
        }

    def write(self, folder: Path = RESULTS) -> Path:
        """Writes results/NAME.json and gives its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        partial = path.with_suffix(".json.part")
        partial.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        partial.replace(path)
        missed = [name for name, entry in self.figures.items() if entry.get("met") is False]
        print(
            f"{self.name}: {len(self.figures)} figures, {len(missed)} below target"
            + "".join(f"\n  {m}" for m in missed)
        )
        return path


def versions() -> dict[str, str]:
    """Python and the packages that a figure may depend on."""
    import platform

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


RUNS = ("cloud", "edge", "engine", "protocol", "quant")  # what an answer may depend on
ROOMS = (*RUNS, "apps", "split")


def commit(rooms: Sequence[str] = ROOMS) -> str | None:
    """The last commit that changed these folders, with "+" when they differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *rooms)
        return git("log", "-1", "--format=%h", "--abbrev=12", "--", *rooms) + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
