"""The README: its tables are the measured ones, its links and commands exist."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from isthmus.apps.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def load(path: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tables = load("scripts/readme_tables.py")
record = load("benchmarks/record.py")


def test_tables_are_what_was_measured() -> None:
    assert tables.rewrite(README, ROOT / "benchmarks" / "results") == README


def test_pictures_show_what_was_measured() -> None:
    results = ROOT / "benchmarks" / "results"
    assert [path for path, table in tables.plots(README, results).items() if not tables.drawn(path, table)] == []


def test_first_screen() -> None:
    """One sentence, two commands, at most eight lines of Python, one measured table."""
    head = README.partition("\n## ")[0]
    title, sentence, commands = head.split("\n\n")[:3]
    assert title == "# isthmus"
    assert sentence.endswith(".")
    assert [line.split("#")[0].strip() for line in commands.splitlines()] == ["make demo", "make test"]
    code = head.partition("```python\n")[2].partition("```")[0]
    assert 1 <= len([line for line in code.splitlines() if line.strip()]) <= 8
    assert len(tables.SECTION.findall(head)) == 1


def test_commands_that_are_named_exist() -> None:
    known = {name for commands in COMMANDS.values() for name in commands}
    named = set(re.findall(r"(?:^    |`)isthmus (\w+)", README, re.M))
    assert named
    assert named <= known
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^    |`)make (\w+)", README, re.M)) <= targets


def test_links_lead_somewhere() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name


def test_imports_that_are_shown_work() -> None:
    for package, names in re.findall(r"^\s*from (isthmus[\w.]*) import ([\w, ]+)$", README, re.M):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(package), name)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder with one result."""
    results = record.Record("speed", settings={"context": 64})
    assert results.figure("peer", 100.0, "tok/s")
    assert results.figure("ours", 160.0, "tok/s", target=1.5, of="peer")
    assert not results.figure("bytes", 12.0, "MB", target=10.0, at_most=True)
    results.table("decode", ["engine", "1 thread"], [["peer", 100.0], ["ours", 160.25]], note="Best of 5.")
    results.write(tmp_path)
    return tmp_path


def test_a_result_names_its_machine_and_targets(written: Path) -> None:
    result = json.loads((written / "speed.json").read_text())
    assert result["machine"]["processor"]
    assert result["versions"]["numpy"]
    assert result["figures"]["ours"] == {
        "value": 160.0,
        "unit": "tok/s",
        "target": 1.5,
        "sense": "at least",
        "met": True,
        "of": "peer",
        "ratio": 1.6,
    }
    assert result["figures"]["bytes"]["met"] is False
    assert not list(written.glob("*.part"))


def test_a_table_is_written_with_its_hardware(written: Path) -> None:
    page = "before\n<!-- table: speed.decode -->\nold\n<!-- end -->\nafter\n"
    new = tables.rewrite(page, written)
    assert "| engine | 1 thread |\n| --- | ---: |\n| peer | 100 |\n| ours | 160 |\n" in new
    assert "Best of 5. Measured on: " in new
    assert "old" not in new
    assert tables.rewrite(new, written) == new
    assert "Not measured yet" in tables.rewrite(page.replace("speed.", "other."), written)


def test_a_picture_names_the_table_that_it_shows(written: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    results = record.Record("trips")
    results.table("trips", ["way", "5 ms", "50 ms"], [["local", 80.0, 80.0], ["split", 40.0, 15.0]], note="Tokens.")
    results.write(written)
    page = "before\n<!-- plot: trips.trips -->\nold\n<!-- end -->\nafter\n"
    assert "![Tokens.](benchmarks/results/trips.png)\n<!-- end -->" in tables.rewrite(page, written)
    assert "Not measured yet" in tables.rewrite(page.replace("trips.trips", "other.trips"), written)
    ((path, table),) = tables.plots(page, written).items()
    assert not tables.drawn(path, table)
    tables.draw(path, table)
    assert tables.drawn(path, table)
    first = path.read_bytes()
    tables.draw(path, table)
    assert path.read_bytes() == first  # the same figures give the same picture
    table["rows"][0][1] = 81.0
    assert not tables.drawn(path, table)


def test_a_table_keeps_its_shape() -> None:
    with pytest.raises(ValueError, match="1 cells in a table of 2"):
        record.Record("speed").table("decode", ["a", "b"], [["only one"]])


def test_what_is_missed_is_listed(tmp_path: Path) -> None:
    figures = {
        "met": {"value": 9.0, "unit": "ms", "target": 10, "sense": "at most", "met": True},
        "late": {"value": 12.5, "unit": "ms", "target": 10, "sense": "at most", "met": False},
        "slow": {
            "value": 80,
            "unit": "tok/s",
            "target": 0.9,
            "sense": "at least",
            "met": False,
            "of": "a",
            "ratio": 0.8,
        },
    }
    assert tables.missed(tmp_path) == "None.\n"
    (tmp_path / "bench.json").write_text(json.dumps({"figures": figures}))
    said = tables.rewrite("before\n<!-- missed -->\nold\n<!-- end -->\nafter", tmp_path).splitlines()
    assert said[:2] == ["before", "<!-- missed -->"] and said[-2:] == ["<!-- end -->", "after"]
    assert said[4:-2] == ["| bench | late | 12.5 ms | at most 10 |", "| bench | slow | 0.8000 of a | at least 0.9000 |"]
