"""Writes the README's measured tables and plots from benchmarks/results/*.json; --check only compares.

A section of the README begins with `<!-- table: NAME.TABLE -->` (benchmark and table) and ends with `<!-- end -->`. One
that begins with `<!-- plot: NAME.TABLE -->` shows results/NAME.png: a line for each row of the table, over the numbers
in its titles. One that begins with `<!-- missed -->` lists every figure of all files that is not what it should be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    kind: re.compile(rf"(<!-- {kind}: (?P<benchmark>[\w-]+)\.(?P<table>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.S)
    for kind in ("table", "plot")
}
SECTION, PLOT = KINDS["table"], KINDS["plot"]
MISSED = re.compile(r"(<!-- missed -->\n).*?(<!-- end -->)", re.S)


def cell(value: object) -> str:
    """A number with three to four significant digits, text as it is; shares and cosines show what lacks to one."""
    if value is None:
        return ""
    if isinstance(value, float):
        if 0 < abs(value) < 1e-4:
            return f"{value:.1e}"
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
        if match["table"] not in result["tables"]:
            what = "picture" if match.re is PLOT else "table"
            body = f"Not measured yet: `make bench` writes `benchmarks/results/{path.name}` and this {what}.\n"
        elif match.re is PLOT:
            body = f"![{result['tables'][match['table']]['note']}](benchmarks/results/{match['benchmark']}.png)\n"
        else:
            body = render(result, match["table"])
        return f"{match[1]}{body}{match[5]}"

    for kind in KINDS.values():
        readme = kind.sub(section, readme)
    return MISSED.sub(lambda match: f"{match[1]}{missed(results)}{match[2]}", readme)


def missed(results: Path) -> str:
    """The figures that are not what they should be, in Markdown."""
    lines = ["| benchmark | figure | is | should be |", "| --- | --- | ---: | ---: |"]
    for path in sorted(results.glob("*.json")):
        for name, figure in json.loads(path.read_text())["figures"].items():
            if figure.get("met") is False:
                of = f" of {figure['of']}" if "of" in figure else f" {figure['unit']}"
                value = cell(figure.get("ratio", figure["value"]))
                lines.append(f"| {path.stem} | {name} | {value}{of} | {figure['sense']} {cell(figure['target'])} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "None.\n"


def plots(readme: str, results: Path) -> dict[Path, dict[str, Any]]:
    """The pictures that the README shows, and the tables that they are drawn from."""
    found = {}
    for match in PLOT.finditer(readme):
        path = results / f"{match['benchmark']}.json"
        tables = json.loads(path.read_text())["tables"] if path.exists() else {}
        if match["table"] in tables:
            found[path.with_suffix(".png")] = tables[match["table"]]
    return found


def digest(table: dict[str, Any]) -> str:
    """Names a table's content, in its picture."""
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def drawn(path: Path, table: dict[str, Any]) -> bool:
    """Whether a picture shows a table as it is."""
    return path.exists() and digest(table).encode() in path.read_bytes()


def draw(path: Path, table: dict[str, Any]) -> None:
    """Draws a table whose titles are numbers with a unit."""
    from isthmus.apps.bench.plot import draw as draw_lines

    trips = [float(title.split()[0]) for title in table["columns"][1:]]
    speeds = {row[0]: row[1:] for row in table["rows"]}
    draw_lines(path, trips, speeds, metadata={"Source": digest(table)})


def main() -> int:
    """Rewrites README.md, or with --check says whether that would change it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 when the README is out of date")
    arguments = parser.parse_args()
    path, results = ROOT / "README.md", ROOT / "benchmarks" / "results"
    old = path.read_text()
    new = rewrite(old, results)
    late = {picture: table for picture, table in plots(new, results).items() if not drawn(picture, table)}
    if arguments.check:
        if new != old or late:
            print("README.md differs from benchmarks/results: run scripts/readme_tables.py", file=sys.stderr)
        return int(new != old or bool(late))
    path.write_text(new)
    for picture, table in late.items():
        draw(picture, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
