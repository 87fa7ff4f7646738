"""A device that holds a part of a bundle gets more of it from a cloud that serves the same model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.apps.cli.main import main
from isthmus.cloud.models import load
from isthmus.edge import Device, Timeouts
from isthmus.engine.part import KvConfig
from isthmus.protocol.errors import DeviceError, LinkError
from isthmus.split.bundle import Bundle
from tests.edge_bundle import CONFIG, write_tiny
from tests.edge_service import Cloud


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def cloud(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    model = load(bundle, threads=1, kv=KvConfig(max_tokens=2048))
    with Cloud(tmp_path_factory.mktemp("keys"), model) as running:
        yield {**running.options, "threads": 1, "codec": "f32"}


def answer(folder: Path, **options: Any) -> list[int]:
    with Device(folder, **options) as device:
        return [token.id for token in device.generate("hello", max_tokens=6)]


def test_a_deeper_cut_fetches_what_is_missing(bundle: Path, cloud: dict[str, Any], tmp_path: Path) -> None:
    local = answer(bundle, threads=1)
    folder = tmp_path / "b"
    assert answer(folder, mode="split", cut=1, **cloud) == local
    assert Bundle.open(folder).held_layers == 1
    seen: list[str] = []
    options: dict[str, Any] = {**cloud, "progress": lambda name, *_: seen.append(name)}
    assert answer(folder, mode="split", cut=3, **options) == local
    assert Bundle.open(folder).held_layers == 3
    assert set(seen) == {"weights/layer-001.safetensors", "weights/layer-002.safetensors"}
    seen.clear()
    assert answer(folder, mode="split", cut=2, **options) == answer(folder, **options) == local
    assert seen == [] and not Bundle.open(folder).whole
    assert answer(folder, mode="local", **options) == local
    assert Bundle.open(folder).whole
    Bundle.open(folder).verify()
    assert answer(folder, threads=1) == local


def test_a_folder_with_the_tokenizer_alone_becomes_a_part(cloud: dict[str, Any], tmp_path: Path) -> None:
    local = answer(tmp_path / "b", mode="stream", **cloud)
    assert Bundle.open(tmp_path / "b").held_layers == 0
    assert answer(tmp_path / "b", mode="split", **cloud) == local
    assert Bundle.open(tmp_path / "b").held_layers == CONFIG.n_layers // 2


def test_from_the_command_line(
    cloud: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "b"
    local = answer(folder, mode="split", cut=1, **cloud)
    monkeypatch.setattr("isthmus.edge.opening._device_keys", lambda keys: cloud["keys"])
    asked = [
        "run",
        str(folder),
        "--cloud",
        cloud["cloud"],
        "--prompt",
        "hello",
        "--max-tokens",
        "4",
        "--raw",
        "--greedy",
    ]
    assert main([*asked, "--mode", "split", "--cut", "2", "--codec", "f32", "--json"]) == 0
    assert f'"tokens": {local[:4]}' in capsys.readouterr().out
    assert Bundle.open(folder).held_layers == 2
    assert main([*asked, "--mode", "split", "--cut", "3"]) == 0
    assert Bundle.open(folder).held_layers == 3
    capsys.readouterr()
    assert main([*asked, "--mode", "split", "--cut", "4"]) == 2
    assert "cut is 4 and the model has 4 layers" in capsys.readouterr().err


def test_an_empty_folder_gets_the_middle_or_nothing(cloud: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "b"
    with pytest.raises(DeviceError, match=f"cut is {CONFIG.n_layers} and the model has {CONFIG.n_layers} layers"):
        answer(folder, mode="split", cut=CONFIG.n_layers, **cloud)
    assert not folder.exists()
    answer(folder, mode="split", **cloud)
    assert Bundle.open(folder).held_layers == CONFIG.n_layers // 2


def test_without_the_cloud_or_with_another_model(cloud: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "b"
    answer(folder, mode="split", cut=1, **cloud)
    away: dict[str, Any] = {**cloud, "cloud": "tcp://127.0.0.1:9", "timeouts": Timeouts(connect_ms=200)}
    with pytest.raises(LinkError, match=r"tcp://127\.0\.0\.1:9"):
        Device(folder, mode="split", cut=2, **away)
    Device(folder, cut=2, **away).close()
    said = r"layers \[0, 2\) are wanted .*; open it with a cloud and cut 2 to fetch the rest"
    with Device(folder, mode="split", cut=1, **cloud) as device, pytest.raises(DeviceError, match=said):
        device.generate("hello", cut=2)
    assert Bundle.open(folder).held_layers == 1
    other = write_tiny(tmp_path / "other", seed=1)
    (other / "weights" / "layer-002.safetensors").unlink()
    with pytest.raises(DeviceError, match="not this bundle's model"):
        Device(other, mode="split", cut=3, **cloud)
