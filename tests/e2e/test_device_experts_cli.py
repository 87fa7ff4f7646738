"""Experts on flash with a cloud, through the command line: the text is the model's own, whoever answers."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.apps.cli.main import main
from isthmus.edge import Device, ExpertSettings
from isthmus.engine.binding import cpu_names
from isthmus.engine.config import ExpertsConfig
from isthmus.protocol.errors import BundleError
from isthmus.split.bundle import Bundle
from isthmus.split.manifest import expert_file
from tests.edge_bundle import CONFIG, write_tiny
from tests.stored_experts import record_bytes

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
QUESTION, TOKENS = "a fox and the sea", 24


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return write_tiny(tmp_path / "tiny", experts=ExpertsConfig(8, 2, CONFIG.d_ff))


def asked(folder: Path, *more: str) -> list[str]:
    mb = 8 * record_bytes(Bundle.open(folder)) / 1e6
    command = ["run", str(folder), "--prompt", QUESTION, "--raw", "--greedy", "--max-tokens", str(TOKENS), "--json"]
    return [*command, "--threads", "1", "--expert-mb", f"{mb:.3f}", *more]


def told(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, list[object]]:
    out, error = capsys.readouterr()
    assert code == 0, error
    found: dict[str, list[object]] = json.loads(out)
    return found


def truth(folder: Path) -> list[int]:
    with Device(folder, threads=1) as one:
        return [token.id for token in one.generate(QUESTION, max_tokens=TOKENS)]


@pytest.mark.parametrize("flash", ["0", "1"])
def test_the_text_is_the_models_whoever_answers(folder: Path, flash: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected, reasons = truth(folder), list[str]()
    with fresh_keys() as keys, CloudProcess(folder, keys, 1) as cloud:
        for _ in range(3):  # the first begins in the cloud, the next ones as flash was seen to be
            more = ["--cloud", cloud.address, "--keys", str(keys), "--experts", "cloud", "--flash-mb-s", flash]
            found = told(capsys, main(asked(folder, *more, "--explain")))
            assert found["tokens"] == expected
            assert set(found["sources"]) <= {"device", "cloud", "verified"}
            assert found["explain"]
            reasons += map(str, found["explain"])
    assert any(" ms a token" in why or "a round trip takes" in why for why in reasons)


def test_a_cloud_that_is_away_from_the_start(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with fresh_keys() as keys:
        more = ["--cloud", f"127.0.0.1:{port}", "--keys", str(keys), "--experts", "cloud"]
        found = told(capsys, main(asked(folder, *more)))
    assert found["tokens"] == truth(folder) and set(found["sources"]) == {"device"}


@pytest.mark.parametrize("how", ["cloud", "exact"])
def test_damaged_experts_are_left_for_the_cloud(
    folder: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, damaged = truth(folder), tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    path = damaged / expert_file(2)
    data = bytearray(path.read_bytes())
    start = Bundle.open(damaged).records(2).start
    data[start:] = bytes(255 - byte for byte in data[start:])  # of every expert; what the file says of them is whole
    path.write_bytes(data)
    with fresh_keys() as keys, CloudProcess(folder, keys, 1) as cloud:
        for _ in range(2):
            more = ["--cloud", cloud.address, "--keys", str(keys), "--experts", how, "--explain"]
            found = told(capsys, main(asked(damaged, *more)))
            assert found["tokens"] == expected and set(found["sources"]) <= {"cloud", "verified"}
        settings = ExpertSettings(8 * record_bytes(Bundle.open(folder)) / 1e6, mode=how)  # type: ignore[arg-type]
        with Device(damaged, cloud.address, keys=keys, experts=settings, threads=1) as one:
            for _ in range(2):
                assert [token.id for token in one.generate(QUESTION, max_tokens=TOKENS)] == expected
                knowledge = one._steering._controller._knowledge  # type: ignore[union-attr]
                knowledge.try_out()
                assert "was altered or is damaged" in knowledge.failed
        alone = Device(damaged, experts=replace(settings, mode="exact"), threads=1)
        with alone, pytest.raises(BundleError, match="was altered or is damaged"):
            list(alone.generate(QUESTION, max_tokens=TOKENS))


def test_what_does_not_go_with_it_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fresh_keys() as keys:
        there = ("--cloud", "127.0.0.1:1", "--keys", str(keys))
        for more, problem in (
            ((), "experts shall ask a cloud, and none is named"),
            ((*there, "--mode", "split"), "the mode is split"),
            ((*there, "--prefer", "privacy"), "privacy is preferred"),
            ((*there, "--expert-mb", "0.001"), "does not hold the experts that one layer needs at once"),
            ((*there, "--memory-mb", "1"), "and the budget is 1 MB"),
        ):
            assert main(asked(folder, "--experts", "cloud", *more)) == 2
            assert problem in capsys.readouterr().err


def test_from_python(folder: Path) -> None:
    settings = ExpertSettings(8 * record_bytes(Bundle.open(folder)) / 1e6, mode="cloud")
    with (
        fresh_keys() as keys,
        CloudProcess(folder, keys, 1) as cloud,
        Device(folder, cloud.address, keys=keys, experts=settings, threads=1) as one,
    ):
        text = [token.id for token in one.generate(QUESTION, max_tokens=TOKENS)]
        cloud.kill()
        text += [token.id for token in one.generate(max_tokens=TOKENS)]
    with Device(folder, threads=1) as alone:
        assert text == [token.id for token in alone.generate(QUESTION, max_tokens=2 * TOKENS)]
