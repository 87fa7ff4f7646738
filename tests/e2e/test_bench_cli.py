"""`isthmus bench decode` as people call it; what it measures is not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.edge_bundle import write_tiny

SMALL = ["--threads", "1", "--context", "16", "--batch", "1,2", "--prefill", "32", "--turns", "1"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bundles") / "tiny")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isthmus.apps.cli", "bench", "decode", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_json_has_a_row_for_each_case(bundle: Path) -> None:
    done = bench(str(bundle), *SMALL, "--json", "--reference", str(bundle))
    assert done.returncode == 0, done.stderr
    assert "has no engine.py" in done.stderr  # a reference that is none is left out, not fatal
    found = json.loads(done.stdout)
    assert [row["case"] for row in found["rows"]] == ["1 at context 16", "2 at context 16", "prefill of 32"]
    for row in found["rows"]:
        assert row["tok_s"] > 0 and row["threads"] == 1 and "ratio" not in row
        assert 0.99999 < row["cosine"] <= 1.00001  # of float32 weights with half-precision KV
    assert "roofline_share" in found["rows"][0] and found["weight_bytes"] > 0


def test_the_table_leaves_out_what_was_not_measured(bundle: Path) -> None:
    with_cosine, without = bench(str(bundle), *SMALL), bench(str(bundle), *SMALL, "--no-cosine")
    assert "cosine" in with_cosine.stdout and "prefill of 32" in with_cosine.stdout
    assert without.returncode == 0 and "cosine" not in without.stdout and "ratio" not in without.stdout


def test_rows_appear_as_they_are_measured(bundle: Path) -> None:
    """Also where the output is no terminal: a pipe is written before the next row is done."""
    program = """
import itertools, os, sys
from isthmus.apps.bench import turns
from isthmus.apps.cli.main import main
real, asked = turns.measure, itertools.count()
turns.measure = lambda *given, **named: real(*given, **named) if next(asked) < 1 else os._exit(3)
sys.exit(main())
"""
    command = [sys.executable, "-c", program, "bench", "decode", str(bundle), *SMALL, "--no-cosine"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=buffered, timeout=250)
    assert done.returncode == 3 and "\n1 at context 16" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--threads", "0"], "--threads is '0'"),
        (["--context", "x"], "--context is 'x'"),
        (["--batch", "1,,2"], "--batch is '1,,2'"),
        (["--context", "5000"], "--context is 5000"),
        (["--cpu", "abacus"], "'abacus' kernels"),
        (["--bits", "3"], "3"),
    ],
)
def test_bad_input(bundle: Path, arguments: list[str], problem: str) -> None:
    done = bench(str(bundle), *SMALL, *arguments)
    assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout
