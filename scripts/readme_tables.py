"""Writes the README's measured tables from benchmarks/results/*.json; --check only compares.

A section of the README begins with `<!-- table: NAME.TABLE -->` (benchmark and table) and ends with `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r"(<!-- table: (?P<benchmark>[\w-]+)\.(?P<table>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.S)


def cell(value: object) -> str:
    """A number with three to four significant digits, text as it is; shares and cosines show what lacks to one."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) > 2 else f"{value:.4f}"
    return str(value)


def render(result: dict[str, Any], table: str) -> str:
    """One table in Markdown, with the hardware it was measured on under it."""
    content = result["tables"][table]
    columns: list[str] = content["columns"]
    rows: list[list[object]] = content["rows"]
    number = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(" ---: " if n else " --- " for n in number) + "|"]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    machine = result["machine"]
    features = ", ".join(f for f in machine["features"] if "VNNI" in f or "NEON" in f) or "plain"
    where = (
        f"{machine['processor']} ({features}), {machine['threads']} processors, {machine['system']}; {result['date']}"
    )
    lines += ["", " ".join(part for part in (content["note"], f"Measured on: {where}.") if part)]
    return "\n".join(lines) + "\n"


def rewrite(readme: str, results: Path) -> str:
    """The README's text with every marked section made anew."""

    def section(match: re.Match[str]) -> str:
        path = results / f"{match['benchmark']}.json"
        result = json.loads(path.read_text()) if path.exists() else {"tables": {}}
        if match["table"] in result["tables"]:
            body = render(result, match["table"])
        else:
            body = f"Not measured yet: `make bench` writes `benchmarks/results/{path.name}` and this table.\n"
        return f"{match[1]}{body}{match[5]}"

    return SECTION.sub(section, readme)


def main() -> int:
    """Rewrites README.md, or with --check says whether that would change it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 when the README is out of date")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text()
    new = rewrite(old, ROOT / "benchmarks" / "results")
    if arguments.check:
        if new != old:
            print("README.md differs from benchmarks/results: run scripts/readme_tables.py", file=sys.stderr)
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
