"""A network with an early exit from the command line: planned, cut, and run to where it is sure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.branchy import EARLY, FINAL, inputs, saved
from tests.e2e.test_network_cli import isthmus

PLANNED = ("plan", "branchy.onnx", "--link", "rtt=20,up=1,down=1", "--inputs", "inputs", "--min-agreement", "0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = saved(tmp_path_factory.mktemp("exits")).parent
    done = isthmus("profile", "branchy.onnx", "--seconds", "0.05", "--threads", "1", folder=made)
    assert done.returncode == 0, done.stderr
    return made


def test_ways_with_exits_are_compared_cut_and_run(folder: Path) -> None:
    done = isthmus(*PLANNED, "--exit", f"{EARLY}=0.8", folder=folder)
    assert done.returncode == 0, done.stderr
    assert f"all on the device, exit at {EARLY}: " in done.stdout
    plan = json.loads((folder / "branchy.plan.json").read_text())
    mine = [row for row in plan["rows"] if row["leaves"]]
    splits = [row for row in mine if row["kind"] == "split"]
    assert splits and all(0.1 < row["leaves"][0]["share"] < 0.9 and row["leaves"][0]["ms"] > 0 for row in mine)
    way = next(row for row in splits if row["crossing"] == ["h1"])
    cut = ("split", "branchy.onnx", "--plan", "branchy.plan.json", "-o", "cut", "--force", "--way", way["name"])
    done = isthmus(*cut, folder=folder)
    assert done.returncode == 0 and f"exit at {EARLY}: where it is sure to 0.8" in done.stdout, done
    shown = isthmus("inspect", "cut", folder=folder)
    assert f"exit     at {EARLY}, where it is sure to 0.8" in shown.stdout
    left = 0
    for at in (0, len(inputs()) - 1):  # the least sure and the surest
        done = isthmus("run", "cut", "--input", f"inputs/{at:02}.npz", "-o", "out.npz", "--json", folder=folder)
        told = json.loads(done.stdout)
        with np.load(folder / "out.npz") as found:
            assert set(found.files) == ({EARLY} if told["exit"] else {EARLY, FINAL})
        left += told["left_early"]
    assert left == 1
    sure = ("run", "cut", "--input", f"inputs/{len(inputs()) - 1:02}.npz")
    assert f"and no more: {EARLY} is sure" in isthmus(*sure, folder=folder).stderr
    assert FINAL in isthmus(*sure, "--no-exits", folder=folder).stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--exit", "early"), "--exit is 'early'"),
        (("--exit", "early=0.9", "--exit", "early=0.8"), "give each output once"),
        (("--exit", "late=0.9"), "makes no output 'late'"),
        (("--exit", "early=2"), "sure from 2 on"),
        (("--exit", "final=0.9"), "is the network's last answer"),
    ],
)
def test_what_is_no_exit_is_one_line(folder: Path, arguments: tuple[str, ...], problem: str) -> None:
    if "final=0.9" in arguments:
        arguments = ("--exit", "early=0.9", *arguments)
    done = isthmus(*PLANNED, *arguments, "-o", "none.json", folder=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and problem in done.stderr, done
    assert not (folder / "none.json").exists()


def test_exits_need_inputs(folder: Path) -> None:
    done = isthmus("plan", "branchy.onnx", "--link", "rtt=20,up=1,down=1", "--exit", "early=0.9", folder=folder)
    assert done.returncode == 2 and "no inputs to see how often each is sure on" in done.stderr
