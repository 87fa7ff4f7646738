"""Devices against a real service on loopback, over encrypted sockets: every mode, many devices, a cloud that dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud.models import serve_part
from isthmus.edge import AsyncDevice, Device, Timeouts
from isthmus.engine.sampling import Sampling
from isthmus.protocol.errors import DeviceError, IsthmusError, LinkError, ProtocolError
from isthmus.protocol.keys import AllowList, DeviceKeys, new_pair, write_pair
from tests.edge_service import Cloud
from tests.edge_toys import PROMPT, ids, local, toy_engine  # noqa: F401
from tests.edge_world import ToyBundle
from tests.toy_part import CONFIG, MODEL_ID, ToyPart


def toy_cloud(folder: Path, model_id: str = MODEL_ID) -> Cloud:
    return Cloud(folder, serve_part(ToyPart(), model_id, "toy"))


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    with toy_cloud(tmp_path) as running:
        yield running


def device(cloud: Cloud, mode: str = "auto", bundle: ToyBundle | None = None, **options: Any) -> Device:
    options.setdefault("keys", cloud.keys)
    return Device(bundle or ToyBundle(), cloud.address, mode=mode, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, seed=3)])
@pytest.mark.parametrize("mode", ["auto", "stream", "split"])
def test_every_mode_gives_the_same_text(cloud: Cloud, mode: str, sampling: Sampling) -> None:
    with device(cloud, mode) as one:
        assert ids(one.generate(PROMPT, max_tokens=40, sampling=sampling)) == local(max_tokens=40, sampling=sampling)
        if mode == "auto":  # begins in the cloud, and goes on as measured times say
            assert one.stats.sources[0] == "cloud"
        else:
            assert set(one.stats.sources) == {"split" if mode == "split" else "cloud"}
        assert one.stats.bytes_up > 0 and one.stats.bytes_down > 0


@pytest.mark.parametrize("cut", range(1, CONFIG.n_layers))
def test_every_cut_gives_the_same_text(cloud: Cloud, cut: int) -> None:
    prompt = [i * 7 % 256 for i in range(300)]
    with device(cloud, "split", cut=cut, codec="f32") as one:
        got = ids(one.generate(prompt, max_tokens=8))
        assert got == ids(one.generate(prompt, max_tokens=8, mode="local"))


def test_one_conversation_in_every_mode(cloud: Cloud) -> None:
    with device(cloud) as one:
        got = ids(one.generate(PROMPT, max_tokens=5, mode="stream"))
        for mode, cut in [("split", 2), ("local", None), ("split", 4), ("stream", None), ("split", 4)]:
            got += ids(one.generate(max_tokens=5, mode=mode, cut=cut))
    assert got == local(max_tokens=30)


def test_leaving_a_stream_early(cloud: Cloud) -> None:
    with device(cloud, "stream") as one:
        for start in range(1, 6):
            tokens = one.generate(PROMPT, max_tokens=300)
            head = [next(tokens).id for _ in range(start)]
            assert head + ids(one.generate(max_tokens=4)) == local(max_tokens=start + 4)


def test_a_sliding_conversation_is_alike_on_both_sides(cloud: Cloud) -> None:
    texts = []
    for mode in ("local", "stream", "split"):
        with device(cloud, mode, kv_tokens=32, overflow="slide") as one:
            texts.append(ids(one.generate(PROMPT, max_tokens=80)))
            stream = one.generate(PROMPT, max_tokens=80, mode="stream")
            texts[-1] += [next(stream).id for _ in range(50)]
            texts[-1] += ids(one.generate(max_tokens=3, mode=mode))
    assert texts[0] == texts[1] == texts[2]


def test_several_devices_at_once(cloud: Cloud) -> None:
    expected = local(max_tokens=30)
    results: dict[int, list[int]] = {}

    def run(index: int) -> None:
        with device(cloud, ("stream", "split")[index % 2], cut=1 + index % 5) as one:
            results[index] = ids(one.generate(PROMPT, max_tokens=30))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(6), expected)


def test_the_async_device(cloud: Cloud) -> None:
    import asyncio

    async def run() -> list[int]:
        async with AsyncDevice(ToyBundle(), cloud.address, keys=cloud.keys, mode="split") as one:
            return [token.id async for token in one.generate(PROMPT, max_tokens=20)]

    assert asyncio.run(run()) == local(max_tokens=20)


def test_a_cloud_that_dies_midway(tmp_path: Path) -> None:
    for mode in ("stream", "split"):
        (tmp_path / mode).mkdir()
        cloud = toy_cloud(tmp_path / mode)
        timeouts = Timeouts(give_up_ms=500, retry_ms=200)
        whole = device(cloud, mode, timeouts=timeouts)
        half = device(cloud, mode, ToyBundle(held=3), timeouts=timeouts)
        with whole, half:
            first, second = whole.generate(PROMPT, max_tokens=60), half.generate(PROMPT, max_tokens=60)
            seen, cut_off = [next(first), next(first)], [next(second)]
            cloud.stop()
            seen += list(first)
            assert ids(seen) == local(max_tokens=60)
            if mode == "split":
                assert [token.source for token in seen[1:]] == ["split"] + ["device"] * 58
                with pytest.raises(LinkError):
                    cut_off += list(second)


def test_keys_that_do_not_fit(cloud: Cloud, tmp_path: Path) -> None:
    stranger = DeviceKeys(new_pair(), cloud.keys.cloud)
    with device(cloud, "auto", keys=stranger) as one, pytest.raises(LinkError, match="does not know this device's key"):
        one.generate(PROMPT)
    mistaken = DeviceKeys(cloud.keys.pair, new_pair().public)
    with device(cloud, "stream", keys=mistaken, timeouts=Timeouts(connect_ms=1500)) as one, pytest.raises(LinkError):
        one.generate(PROMPT)
    with pytest.raises(ProtocolError, match=r"no key file .*isthmus keys"):
        device(cloud, keys=tmp_path / "nothing")
    write_pair(tmp_path / "mine", "device")
    with pytest.raises(ProtocolError, match="no key of the cloud"):
        device(cloud, keys=tmp_path / "mine")


def test_a_key_that_is_revoked_in_the_middle_of_a_chat(cloud: Cloud, tmp_path: Path) -> None:
    with device(cloud, "auto") as one:
        tokens = [token.id for token in one.generate(PROMPT, max_tokens=4)]
        assert set(one.stats.sources) == {"cloud"}
        AllowList(tmp_path / "allowed").revoke("tester")
        deadline = time.monotonic() + 20.0
        while cloud.service.health()["connections"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for problem in ("not allowed any more", ""):
            tokens += [token.id for token in one.generate(max_tokens=4)]
            assert set(one.stats.sources) == {"device"}
            assert problem in one.stats.note
            # Once it has been timed, auto may choose this device, and ask nobody.
            assert "by itself" in one.stats.note or (not problem and not one.stats.bytes_up)
        with pytest.raises(IsthmusError, match="or use mode local"):
            list(one.generate(max_tokens=4, mode="stream"))
    with device(cloud, "local") as alone:
        assert [token.id for token in alone.generate(PROMPT, max_tokens=12)] == tokens


def test_nobody_at_the_address(cloud: Cloud) -> None:
    nobody = Device(
        ToyBundle(),  # type: ignore[arg-type]
        "tcp://127.0.0.1:9",
        keys=cloud.keys,
        mode="stream",
        timeouts=Timeouts(connect_ms=500),
    )
    with nobody as one, pytest.raises(LinkError, match="isthmus serve"):
        one.generate(PROMPT)


def test_a_cloud_with_another_model(tmp_path: Path) -> None:
    with toy_cloud(tmp_path, "cd" * 16) as cloud:
        for _ in range(2):
            with device(cloud, "split") as one, pytest.raises(IsthmusError, match="serves toy"):
                one.generate(PROMPT)


def test_a_conversation_that_is_full(cloud: Cloud) -> None:
    for mode in ("stream", "split"):
        with device(cloud, mode, kv_tokens=20) as one, pytest.raises(DeviceError, match="room for 20"):
            list(one.generate(PROMPT, max_tokens=50))
