"""Standard streams that are closed, full, or read by nobody any more: never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.edge_bundle import write_tiny

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
ISTHMUS = f"'{sys.executable}' -m isthmus.apps.cli"
COMMANDS = [
    "--help",
    "--version",
    "run --help",
    "run {bundle} --prompt hello --greedy --max-tokens 5 --threads 1",
    "run {bundle} --prompt hello --greedy --max-tokens 5 --threads 1 --json",
    "run {bundle} --greedy --max-tokens 5 --threads 1 <{said}",
    "inspect {bundle}",
    "inspect {bundle} --json",
    "keys list --keys {keys}",
]
SERVE = "serve {bundle} --no-keys --listen tcp://127.0.0.1:0 --threads 1"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("streams")
    write_tiny(folder / "tiny")
    (folder / "said").write_text("hello\n/mode\nhello\n")
    (folder / "keys").mkdir()
    (folder / "keys" / "allowed").write_text("rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7 anna\n")
    return {"bundle": str(folder / "tiny"), "said": str(folder / "said"), "keys": str(folder / "keys")}


def shell(command: str, stdout: int = subprocess.PIPE) -> tuple[int, str]:
    """Exit code and standard error of a command line in which @ stands for isthmus."""
    environment = {**os.environ, "NO_COLOR": "1"}
    environment.pop("PYTHONUNBUFFERED", None)
    line = ["bash", "-c", command.replace("@", ISTHMUS)]
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120, env=environment
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", [*COMMANDS, SERVE, f"{COMMANDS[3]} #PYTHONUNBUFFERED"])
def test_a_full_disk_is_one_line(command: str, places: dict[str, str]) -> None:
    before = "PYTHONUNBUFFERED=1 " if "#" in command else ""
    code, said = shell(f"{before}@ {command.partition('#')[0].format(**places)} >/dev/full")
    assert code == 2
    assert said.startswith("error: cannot write to standard output: No space left on device; ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", [*COMMANDS, SERVE])
def test_a_reader_that_has_gone_ends_it_quietly(command: str, places: dict[str, str]) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    try:
        assert shell(f"@ {command.format(**places)}", writes) == (141, "")
    finally:
        os.close(writes)


@pytest.mark.parametrize("command", COMMANDS[3:])
def test_closed_streams_are_like_dev_null(command: str, places: dict[str, str]) -> None:
    line = f"@ {command.format(**places)}"
    assert shell(f"{line} >&-") == (0, "")
    if "<" not in command:
        assert shell(f"{line} <&- >&- 2>&-") == (0, "")


def test_errors_are_told_by_the_exit_code_alone_when_nobody_listens() -> None:
    assert shell("@ inspect /nowhere 2>&-") == (2, "")
    assert shell("@ inspect /nowhere 2>/dev/full") == (2, "")
    code, said = shell("@ run /nowhere --prompt - <&-")
    assert (code, said.count("\n")) == (2, 1)


def test_characters_that_the_terminal_lacks_are_replaced(places: dict[str, str]) -> None:
    code, said = shell(f"PYTHONIOENCODING=ascii @ run {places['bundle']} --prompt hello --max-tokens 40 --threads 1")
    assert (code, said) == (0, "")
