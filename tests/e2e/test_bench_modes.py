"""`isthmus bench modes` as people call it, over a small bundle, a cloud process and a relay; speeds are not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.split.bundle import Bundle
from isthmus.split.exit_writer import put_exits
from tests.edge_bundle import an_exit, write_tiny

SMALL = ["--rtt-ms", "1", "--prompts", "2", "--tokens", "6"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With exits before layers 1 and 2, which nobody certified."""
    folder = write_tiny(tmp_path_factory.mktemp("bundles") / "tiny")
    model_id = Bundle.open(folder).model_id
    put_exits(folder, model_id, [an_exit(model_id, 1), an_exit(model_id, 2)])
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bundles") / "plain")


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isthmus.apps.cli", "bench", "modes", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def test_every_way_answers_every_prompt(bundle: Path) -> None:
    done = bench(bundle, *SMALL, "--rtt-ms", "1,2", "--threshold", "0.02", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["bundle"], found["cut"], found["threshold"], found["prompts"]) == ("tiny", 2, 0.02, 2)
    assert [link["link"]["delay_up_ms"] for link in found["links"]] == [0.5, 1.0]
    for link in found["links"]:
        rows = {row["way"]: row for row in link["rows"]}
        assert len(rows) == 11
        for name, row in rows.items():
            assert row["prompts"] == 2 and 2 <= row["tokens"] <= 12 and row["tok_s"] > 0 and row["notes"] == []
            assert 0 <= row["agreement"] <= 1 and row["of_best"] > 0
            if "local" in name:
                assert row["up_bytes_per_token"] == row["requests_per_token"] == row["cloud_ms_per_token"] == 0
            elif name != "auto":  # which may do without the cloud
                assert row["up_bytes_per_token"] > 0
                assert row["cloud_ms_per_token"] > 0 or name.startswith("exit")  # which may be sure of everything
            if name.startswith(("verify", "cloud", "device", "auto")):
                assert row["same"] == 2 and row["agreement"] == 1.0
        assert rows["CE-CoLLM's policy"]["up_bytes_per_token"] > rows["exit"]["up_bytes_per_token"]


def test_the_table_and_the_plot(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    picture = tmp_path / "modes.png"
    done = bench(bundle, *SMALL, "--only", "stream,n-grams", "--temperature", "0.8", "--plot", picture)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[0].startswith("round trip 1 ms") and "asks/tok" in lines[0]
    assert "agrees" not in lines[0]  # nothing is greedy
    assert [line.split("  ")[0] for line in lines[1:]] == ["cloud only (stream)", "verify, n-grams"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_bundle_without_exits_goes_without(plain: Path) -> None:
    done = bench(plain, *SMALL, "--device-slowdown", "1.5", "--cloud-step", "2", "--rate-mbps", "50", "--json")
    assert done.returncode == 0, done.stderr
    assert "tiny has no exits: the ways that need one are left out" in done.stderr
    found = json.loads(done.stdout)
    assert len(found["links"][0]["rows"]) == 5 and found["cut"] is None and found["cloud_step"] == 2.0
    assert found["links"][0]["link"]["rate_up_bps"] == 50_000_000


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--only", "teleport"], "--only 'teleport' names no way"),
        (["--device-slowdown", "0.5"], "the slow-down is 0.5"),
        (["--cloud-step", "nan"], "the slow-down is nan"),
        (["--trace", "somewhere", "--rate-mbps", "1"], "--trace and --rate-mbps are both given"),
        (["--trace", "nowhere/at-all"], "nowhere/at-all.up"),
        (["--rtt-ms", "soon"], "--rtt-ms is 'soon'"),
        (["--rtt-ms", "5,,50"], "--rtt-ms is '5,,50'"),
        (["--rate-mbps", "0"], "--rate-mbps is 0"),
        (["--rate-mbps", "nan"], "--rate-mbps is nan"),
        (["--cut", "3"], "no exit before layer 3"),
        (["--threshold", "1.5"], "the threshold is 1.5"),
        (["--only", "stream", "--temperature", "-1"], "--temperature is -1"),
        (["--plot", "no-such-folder/modes.png"], "there is no folder no-such-folder"),
        ([], "has no certificate"),
    ],
)
def test_bad_input(bundle: Path, arguments: list[str], problem: str) -> None:
    done = bench(bundle, *SMALL, *arguments, "--json")
    assert done.returncode == 2 and problem in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
