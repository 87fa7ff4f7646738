"""A real bundle of a tiny random model: fetched from a real service, run by the real engine in every mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud.models import load
from isthmus.edge import Device
from isthmus.engine.part import KvConfig
from isthmus.engine.sampling import Sampling
from isthmus.protocol.errors import BundleError, DeviceError
from isthmus.split.bundle import Bundle
from tests.edge_bundle import CONFIG, write_tiny
from tests.edge_service import Cloud


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def cloud(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    model = load(bundle, threads=1, kv=KvConfig(max_tokens=4096))
    with Cloud(tmp_path_factory.mktemp("keys"), model) as running:
        yield running


def ids(tokens: Any) -> list[int]:
    return [token.id for token in tokens]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=40, top_p=0.9, seed=5)])
def test_every_mode_and_cut_gives_the_same_tokens(bundle: Path, cloud: Cloud, sampling: Sampling) -> None:
    prompt = "once upon a time " * 12
    with Device(bundle, **cloud.options, threads=1, kv_tokens=512) as device:
        local = ids(device.generate(prompt, max_tokens=24, sampling=sampling, mode="local"))
        assert len(set(local)) > 3
        assert ids(device.generate(prompt, max_tokens=24, sampling=sampling)) == local
        for cut in range(1, CONFIG.n_layers):
            options: dict[str, Any] = {"mode": "split", "cut": cut, "codec": "f32"}
            assert ids(device.generate(prompt, max_tokens=24, sampling=sampling, **options)) == local
        for codec in ("f16", "int8"):
            assert len(ids(device.generate(prompt, max_tokens=24, sampling=sampling, mode="split", codec=codec))) > 0


def test_one_chat_in_every_mode(bundle: Path, cloud: Cloud) -> None:
    texts = []
    for modes in (["local"] * 4, ["stream", "split", "local", "stream"]):
        with Device(bundle, **cloud.options, threads=1, kv_tokens=512, codec="f32", cut=2) as device:
            for mode in modes:
                texts.append([device.tokens, ids(device.chat("tell me", max_tokens=9, mode=mode))])
    assert texts[:4] == texts[4:]


def test_a_sliding_conversation_is_alike_on_both_sides(bundle: Path, cloud: Cloud) -> None:
    texts = []
    for mode in ("local", "stream", "split"):
        options: dict[str, Any] = {"mode": mode, "codec": "f32", "kv_tokens": 48, "overflow": "slide"}
        with Device(bundle, **cloud.options, threads=1, **options) as device:
            texts.append(ids(device.generate("a b c", max_tokens=150, sampling=Sampling(1.0, seed=2))))
    assert len(texts[0]) > 60
    assert texts[0] == texts[1] == texts[2]


def test_a_device_without_a_bundle_fetches_its_part(bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    with Device(bundle, threads=1) as device:
        local = ids(device.generate("hello", max_tokens=8))
    for mode, held in (("split", 2), ("stream", 0), ("auto", 4)):
        seen: list[str] = []
        folder = tmp_path / mode
        with Device(
            folder,
            **cloud.options,
            mode=mode,
            cut=2,
            codec="f32",
            threads=1,
            progress=lambda name, done, total, seen=seen: seen.append(name),  # type: ignore[misc]
        ) as device:
            assert ids(device.generate("hello", max_tokens=8)) == local
            assert device.stats.bytes_down < 10_000  # the answer's, not the bundle's
            assert "tokenizer.json" in seen
        fetched = Bundle.open(folder)
        fetched.verify()
        assert fetched.held_layers == held
        assert fetched.whole == (mode == "auto")
    part = Device(tmp_path / "split", **cloud.options, mode="split", cut=2)
    with part as device, pytest.raises(DeviceError, match=r"bundle holds layers \[0, 2\) of 4"):
        device.generate("hello", mode="local")


def test_another_model_and_an_altered_file(bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", seed=1)
    stranger = Device(other, **cloud.options, mode="stream")
    with stranger as device, pytest.raises(DeviceError, match=r"serves tiny \(\w+\) and not this bundle's model"):
        device.generate("hello")
    file = other / "weights" / "layer-001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match="altered"):
        Device(other)


def test_a_device_chooses_among_several_models(bundle: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", seed=1)
    first, second = (load(folder, threads=1, kv=KvConfig(max_tokens=512)) for folder in (bundle, other))
    with Cloud(tmp_path, first, second) as cloud:
        one, another = cloud.service.models
        options: dict[str, Any] = {**cloud.options, "threads": 1}
        with pytest.raises(DeviceError, match=r"serves 2 models: tiny \(.*\w{12}\), tiny \(.*\w{12}\); choose one"):
            Device(tmp_path / "b", **options)
        with Device(tmp_path / "b", model=another[:8], **options) as device:
            assert Bundle.open(tmp_path / "b").model_id == another
            assert ids(device.generate("hello", max_tokens=2))
        with pytest.raises(DeviceError, match="the bundle holds tiny"):
            Device(tmp_path / "b", model=one, **options)
