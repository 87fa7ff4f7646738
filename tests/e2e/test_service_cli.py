"""`isthmus keys` and `isthmus serve` as a person meets them."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.apps.cli.main import main
from isthmus.cloud.models import Model, serve_part
from isthmus.engine.part import KvConfig
from isthmus.protocol.keys import AllowList, new_pair, read_device, read_pair
from isthmus.protocol.link import connect
from tests.fakes import FakePart


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISTHMUS_KEYS", str(tmp_path / "keys"))
    return tmp_path / "keys"


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that exits with 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_keys_are_made_listed_allowed_and_revoked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new"]) == 0
    pair = read_pair(folder, "device")
    said = capsys.readouterr().out
    assert pair.public in said
    assert pair.secret not in said
    other = new_pair().public
    assert main(["keys", "allow", other, "bert"]) == 0
    (folder / "other.pub").write_text(new_pair().public)
    assert main(["keys", "allow", str(folder / "other.pub"), "bert"]) == 0
    capsys.readouterr()
    assert main(["keys", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{pair.public} device", f"{other} bert"]
    assert main(["keys", "revoke", "bert"]) == 0
    assert "2 keys" in capsys.readouterr().out
    assert AllowList(folder / "allowed").entries() == [(pair.public, "device")]
    assert main(["keys", "trust", other]) == 0
    assert read_device(folder).cloud == other


def test_mistakes_with_keys_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no CURVE key" in failed(capsys, "keys", "allow", "short", "anna")
    assert "no name" in failed(capsys, "keys", "new", "../up")
    assert "server" in failed(capsys, "keys", "new", "server")
    assert "not on the list" in failed(capsys, "keys", "revoke", "nobody")
    assert "no key file" in failed(capsys, "keys", "trust", "absent.pub")
    assert not folder.exists()
    assert main(["keys", "list"]) == 0
    assert f"no device is allowed in by {folder}" in capsys.readouterr().err
    assert main(["keys", "new"]) == 0
    error = failed(capsys, "keys", "new", "other")
    assert f"{folder}/device.key exists already" in error and "calls device" in error
    assert read_pair(folder, "device").public in error
    assert "File name too long" in failed(capsys, "keys", "new", "--keys", "a" * 5000)
    (folder / "binary.pub").write_bytes(b"\xff" * 40)
    assert "holds no CURVE key" in failed(capsys, "keys", "allow", str(folder / "binary.pub"), "anna")
    (folder / "allowed").write_bytes(b"\xff")
    assert "is not text; mend or remove it" in failed(capsys, "keys", "list")


def test_any_name_makes_the_key_that_run_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "phone"]) == 0
    pair = read_pair(folder, "device")
    assert f"isthmus keys allow '{pair.public}' phone" in capsys.readouterr().out
    assert AllowList(folder / "allowed").entries() == [(pair.public, "phone")]
    assert main(["keys", "new", "phone"]) == 0
    again = capsys.readouterr().out
    assert "exists already" in again and pair.public in again.splitlines()
    assert read_pair(folder, "device") == pair
    assert main(["keys", "revoke", "phone"]) == 0
    assert main(["keys", "new", "phone"]) == 0
    assert "no cloud on this machine lets it in" in capsys.readouterr().out
    assert AllowList(folder / "allowed").entries() == []


@pytest.mark.parametrize("start", ["-", "--", "-=", "-k", "-#"])
def test_keys_that_look_like_options_are_taken(folder: Path, start: str) -> None:
    key = start + "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"[len(start) :]
    assert main(["keys", "allow", key, "anna"]) == 0
    assert AllowList(folder / "allowed").entries() == [(key, "anna")]
    assert main(["keys", "revoke", key]) == 0
    assert main(["keys", "trust", key]) == 0
    assert (folder / "server.pub").read_text().strip() == key


def test_a_cloud_that_cannot_start_says_why(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    anywhere = ("--listen", "tcp://127.0.0.1:0")
    error = failed(capsys, "serve", str(tmp_path), *anywhere)
    assert "isthmus keys allow 'KEY' NAME (or, on one machine: isthmus keys new device)" in error
    other = tmp_path / "other keys"
    error = failed(capsys, "serve", str(tmp_path), *anywhere, "--keys", str(other))
    assert f"isthmus keys allow 'KEY' NAME --keys '{other}'" in error
    assert not folder.exists()
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    assert "isthmus split" in failed(capsys, "serve", str(model), *anywhere)
    assert main(["keys", "new"]) == 0
    assert "no bundle" in failed(capsys, "serve", str(tmp_path / "absent"), *anywhere)
    (tmp_path / "bundle.json").write_text("{")
    assert "bundle.json" in failed(capsys, "serve", str(tmp_path), *anywhere)
    (folder / "server.pub").unlink()
    assert "server.pub" in failed(capsys, "serve", str(tmp_path), *anywhere)
    (folder / "server.key").unlink()
    assert main(["keys", "trust", new_pair().public]) == 0
    assert "key of another cloud" in failed(capsys, "serve", str(tmp_path), *anywhere)


@pytest.fixture
def fake_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Model]]:
    """Every bundle is the fake model; signal handlers are put back."""
    made: list[Model] = []

    def load(path: Path, *, kv: KvConfig | None = None, **_: Any) -> Model:
        made.append(serve_part(FakePart(kv=kv), path.name, path.name, kv=kv))
        return made[-1]

    monkeypatch.setattr("isthmus.cloud.models.load", load)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_cloud_serves_until_a_signal_comes(
    folder: Path, capsys: pytest.CaptureFixture[str], fake_models: list[Model], number: signal.Signals
) -> None:
    assert main(["keys", "new"]) == 0
    address = f"127.0.0.1:{free_port()}"
    offers: list[Any] = []

    def visit() -> None:
        try:
            deadline = time.monotonic() + 20.0
            while not (folder / "server.pub").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.3)
            link = connect(address, read_device(folder))
            offers.extend(link.welcome.offers if link.welcome else ())
            link.close()
        finally:
            os.kill(os.getpid(), number)

    visitor = threading.Thread(target=visit)
    visitor.start()
    status = f"127.0.0.1:{free_port()}"
    assert main(["serve", "one", "two", "--listen", address, "--kv-tokens", "64", "--http", status]) == 0
    visitor.join()
    assert [offer.name for offer in offers] == ["one", "two"]
    said = capsys.readouterr().out
    assert address in said
    assert f"on the device: isthmus keys trust '{read_pair(folder, 'server').public}'" in said.splitlines()
    assert said.endswith("stopped\n")
    assert all(model.kv.max_tokens == 64 and model.closed for model in fake_models)


def test_a_port_in_use_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], fake_models: list[Model], tmp_path: Path
) -> None:
    assert main(["keys", "new"]) == 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert "taken" in failed(capsys, "serve", "one", "--listen", f"tcp://{address}")
        free = f"tcp://127.0.0.1:{free_port()}"
        assert "--http" in failed(capsys, "serve", "one", "--listen", free, "--http", address)
    assert "outside" in failed(capsys, "serve", "one", "--listen", "tcp://0.0.0.0:0", "--no-keys")
    assert "cannot listen" in failed(capsys, "serve", "one", "--listen", "tcp://no-such-interface:1")
    assert "twice" in failed(capsys, "serve", "one", "two/../one", "--listen", free)
    assert all(model.closed for model in fake_models)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--listen", "nonsense"], "has no port"),
        (["--listen", "tcp://:5"], "no host"),
        (["--listen", "tcp://0.0.0.0:0", "--no-keys"], "outside"),
        (["--http", "nonsense"], "--http"),
        (["--http", "::1:9090"], "or [::1]:9090"),
        (["--http", "[::1:9090"], "no address for --http"),
        (["--http", "[no-ip]:9090"], "no address for --http"),
        (["--http", "127.0.0.1:70000"], "no address for --http"),
        (["--kv-share", "nan"], "--kv-share is nan"),
        (["--slow-down", "0.5"], "the slow-down is 0.5"),
        (["--slow-down", "nan"], "the slow-down is nan"),
        (["--kv-format", "f8"], "KV format is 'f8'"),
        (["--listen", "TAKEN"], "taken"),
        (["one"], "twice"),
    ],
)
def test_options_are_checked_before_keys_and_weights(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    fake_models: list[Model],
    arguments: list[str],
    problem: str,
) -> None:
    assert main(["keys", "new"]) == 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        given = [address if argument == "TAKEN" else argument for argument in arguments]
        assert problem in failed(capsys, "serve", "one", "--listen", "tcp://127.0.0.1:0", *given)
    assert fake_models == []
    assert not (folder / "server.key").exists()
