"""`isthmus bench experts` and what it leaves for others, as people call it; no time is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.engine.binding import cpu_names
from isthmus.engine.config import ExpertsConfig
from tests.edge_bundle import CONFIG, write_tiny

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A mixture's bundle, and an environment with a cache of its own."""
    folder = write_tiny(tmp_path_factory.mktemp("bundles") / "mixture", experts=ExpertsConfig(8, 2, CONFIG.d_ff))
    return folder, {**os.environ, "ISTHMUS_CACHE": str(tmp_path_factory.mktemp("cache")), "COLUMNS": "200"}


def run(world: tuple[Path, dict[str, str]], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isthmus.apps.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=world[1])


def test_what_is_measured_is_kept_for_a_look_and_a_run(world: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder = str(world[0])
    few = ("--tokens", "60", "--flash-mb-s", "50", "--json", "--threads", "1")
    done = run(world, "bench", "experts", folder, *few)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["text"] == "the model's own answer" and found["tokens"] == 60 and 0 <= found["foresight"] <= 1
    assert found["facts"]["flash_mb_s"] > 0 and found["facts"]["token_ms"] > 0
    rows = found["rows"]
    assert [row["share"] for row in rows] == sorted(row["share"] for row in rows)
    for row in rows:
        assert row["tok_s"] > 0 and row["predicted_tok_s"] > 0 and row["read_mb"] >= 0
        assert row["hits"]["belady"] >= max(row["hits"]["lru"], row["hits"]["lfru"]) - 1e-9
    looked = run(world, "inspect", "--experts", folder, "--json")
    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout)["tokens"] == 60  # the recording, not another one
    shown = run(world, "inspect", "--experts", folder, "--expert-mb", "2")
    assert shown.returncode == 0 and "hits over time" in shown.stdout
    answered = run(
        world, "run", folder, "--expert-mb", "2", "--prompt", "hello", "--raw", "--greedy", "--max-tokens", "3"
    )
    assert (answered.returncode, answered.stderr.count("foretold")) == (0, 0)  # no terminal reads along


def test_the_table_has_a_row_for_each_budget(world: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Of letters and of those who carry them from one town to the next. " * 3)
    chosen = ("--expert-mb", "2,1.5", "--tokens", "48", "--text", str(text), "--threads", "1")
    done = run(world, "bench", "experts", str(world[0]), *chosen)
    assert done.returncode == 0, done.stderr
    assert "tiny: 48 tokens of text.txt" in done.stdout and "past the page cache" in done.stdout.replace(
        "dropped from the page cache behind", "past the page cache"
    )
    rows = [line.split() for line in done.stdout.splitlines() if "%" in line and " ms " in line]
    assert [row[0] for row in rows] == ["1.5", "2.0"]
    damaged = run(world, "bench", "experts", str(world[0]), "--text", str(tmp_path / "none"))
    assert damaged.returncode == 2 and "cannot be read as text" in damaged.stderr
