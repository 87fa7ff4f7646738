"""The README's Python runs: the real model, a real cloud on loopback, nothing changed but the port."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.protocol.keys import AllowList, write_pair
from isthmus.split.fetch import fetch

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
PORT = "5757"
API = "8080"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle `smollm2`, and keys that belong together."""
    folder = tmp_path_factory.mktemp("readme")
    command = [sys.executable, "-m", "isthmus.apps.cli", "split", str(fetch("smollm2")), "-o", "smollm2"]
    subprocess.run(command, cwd=folder, check=True)
    keys = folder / "keys"
    write_pair(keys, "server")
    AllowList(keys / "allowed").allow(write_pair(keys, "device").public, "reader")
    return folder


@pytest.fixture(scope="module")
def ports(place: Path) -> Iterator[tuple[str, str]]:
    """The port of a cloud that serves it, and that of OpenAI's API."""
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        free, api = probe.getsockname()[1], other.getsockname()[1]
    command = [sys.executable, "-m", "isthmus.apps.cli", "serve", "smollm2", "--listen", f"tcp://127.0.0.1:{free}"]
    command += ["--openai", f"127.0.0.1:{api}"]
    with (place / "cloud.log").open("w") as log:
        cloud = subprocess.Popen(
            [*command, "--keys", "keys"], cwd=place, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", api)) == 0:  # which comes last
                    break
            said = (place / "cloud.log").read_text()
            assert cloud.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        yield str(free), str(api)
    finally:
        cloud.terminate()
        cloud.wait(20)


def test_python_of_the_readme_runs(place: Path, ports: tuple[str, str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
    assert len(blocks) == 3
    for first, block in zip((True, False, False), blocks, strict=True):
        assert (PORT in block) != (API in block)
        environment = {**os.environ, "ISTHMUS_KEYS": str(place / "keys")}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", block.replace(PORT, ports[0]).replace(API, ports[1])],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        if API in block:
            assert done.stdout.strip()
        if not first:
            continue  # it checks itself
        costs = dict(re.findall(r"^(local|split|stream): \d+ tokens/s, (\d+) bytes up$", done.stdout, re.M))
        assert costs["local"] == "0"
        assert int(costs["split"]) > int(costs["stream"]) > 0
        answers = [part.strip() for part in re.split(r"^\w+: \d+ tokens/s, \d+ bytes up$", done.stdout, flags=re.M)]
        assert answers[0] == answers[2] != ""
