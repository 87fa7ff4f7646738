"""The engine's threads under a thread sanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "engine" / "native"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build with a thread sanitizer")
@pytest.mark.timeout(300)
def test_no_races(tmp_path: Path) -> None:
    program = tmp_path / "races"
    flags = ["-O1", "-g", "-std=gnu11", "-fsanitize=thread", "-pthread", f"-I{NATIVE}"]
    sources = [str(HERE / "pool_races.c"), str(NATIVE / "pool.c")]
    built = subprocess.run(["gcc", *flags, "-o", str(program), *sources], capture_output=True, text=True)
    if "tsan" in built.stderr:
        pytest.skip("this gcc has no thread sanitizer (libtsan)")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=250)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel (randomized addresses)")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["4000", "8000", "12000", "16000"]
