"""A cloud that is killed and begun again behind a relay, and devices in processes of their own, for benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from isthmus.apps.bench.cloud_process import CloudProcess
from isthmus.apps.bench.relay import Relay
from isthmus.apps.bench.shaping import LinkProfile

QUESTION = "Tell me a story about a fox and the sea."
TOKENS = 64


class Cloud:
    """A cloud process that is killed and begun again on its port, and the relay before it."""

    def __init__(self, folder: Path, keys: Path, rtt_ms: float) -> None:
        self._folder, self._keys = folder, keys
        self._process = CloudProcess(folder, keys, 1)
        self._process.__enter__()
        self.relay = Relay(self._process.address, LinkProfile.of_rtt(rtt_ms))
        self.relay.__enter__()

    def restart(self) -> None:
        """SIGKILL, and another one."""
        self._process.kill()
        self._process = CloudProcess(self._folder, self._keys, 1, port=int(self._process.address.rpartition(":")[2]))
        self._process.__enter__()

    def close(self) -> None:
        """Ends both."""
        self.relay.close()
        self._process.__exit__(None, None, None)


def run(
    folder: Path,
    key_folder: Path,
    address: str,
    mode: str,
    temperature: str,
    talk: Path | None,
    question: str = QUESTION,
) -> subprocess.Popen[str]:
    """Begins `isthmus run`.

    Args:
        temperature: "" for greedy.
        talk: the conversation's file; None without a cloud.
    """
    command = [sys.executable, "-m", "isthmus.apps.cli", "run", str(folder), "--prompt", question, "--json"]
    command += ["--mode", mode, "--threads", "1", "--max-tokens", str(TOKENS)]
    command += ["--temperature", temperature, "--seed", "5"] if temperature else ["--greedy"]
    if mode != "local":
        command += ["--cloud", address, "--keys", str(key_folder), "--resume", str(talk)]
    command += ["--codec", "f32"] if mode == "split" else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a device printed at its end; "error" where it failed."""
    return told_by(*process.communicate(timeout=120))


def told_by(out: str, err: str) -> dict[str, Any]:
    """The same, out of what it wrote."""
    try:
        told: dict[str, Any] = json.loads(out)
    except json.JSONDecodeError:
        return {"tokens": [], "error": err}
    return told
