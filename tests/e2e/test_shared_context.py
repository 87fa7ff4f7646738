"""Two devices with one prompt against a real cloud: the second one sends and has computed hardly anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.edge import Device
from isthmus.protocol.errors import ServiceError
from isthmus.split.bundle import Bundle
from isthmus.split.exit_writer import put_exits
from tests.edge_bundle import an_exit, write_tiny

LAYER, TOKENS = 2, 12
PROMPT = " ".join(f"tell me of sea number {i} and of the rain that falls on it" for i in range(6))


@pytest.fixture(scope="module")
def keys() -> Iterator[Path]:
    with fresh_keys() as folder:
        yield folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny(tmp_path_factory.mktemp("context") / "tiny")
    model_id = Bundle.open(path).model_id
    put_exits(path, model_id, [an_exit(model_id, LAYER)])
    return path


def serving(bundle: Path, keys: Path, *options: str) -> CloudProcess:
    return CloudProcess(bundle, keys, 1, more=["--context-s", "600", *options])


def answered(
    bundle: Path, cloud: CloudProcess, keys: Path, prompt: str = PROMPT, **fields: Any
) -> tuple[list[int], int]:
    """The tokens of an answer, and the bytes that it sent."""
    with Device(bundle, cloud.address, keys=keys, threads=1, **fields) as one:
        tokens = [token.id for token in one.generate(prompt, max_tokens=TOKENS)]
        return tokens, one.stats.bytes_up


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"mode": "stream"}, 0.5),
        ({"mode": "verify"}, 0.8),
        ({"mode": "split", "cut": LAYER}, 0.2),
        ({"mode": "split", "cut": LAYER, "codec": "f32"}, 0.2),
        ({"mode": "exit", "cut": LAYER, "threshold": 1.0}, 0.3),
        ({"mode": "stream", "overflow": "slide", "kv_tokens": 448}, 0.5),
    ],
    ids=["stream", "verify", "split", "split f32", "exit", "window"],
)
def test_the_second_device_sends_little(bundle: Path, keys: Path, fields: dict[str, Any], most: float) -> None:
    with serving(bundle, keys) as cloud:
        first, whole = answered(bundle, cloud, keys, **fields)
        second, rest = answered(bundle, cloud, keys, **fields)
        assert second == first and len(first) == TOKENS
        assert rest < most * whole
        longer, _ = answered(bundle, cloud, keys, PROMPT + ", and of all that lives in it", **fields)
    with CloudProcess(bundle, keys, 1) as fresh:
        assert answered(bundle, fresh, keys, PROMPT + ", and of all that lives in it", **fields)[0] == longer


def test_a_cloud_without_room_for_both_forgets_the_first(bundle: Path, keys: Path) -> None:
    with CloudProcess(bundle, keys, 1) as cloud:
        expected = {n: answered(bundle, cloud, keys, f"{n} {PROMPT}", mode="stream")[0] for n in range(3)}
    with serving(bundle, keys, "--kv-tokens", "512") as small:
        for _ in range(2):
            for n, tokens in expected.items():
                assert answered(bundle, small, keys, f"{n} {PROMPT}", mode="stream")[0] == tokens


def test_what_memory_does_not_hold_comes_back_from_disk(bundle: Path, keys: Path, tmp_path: Path) -> None:
    prompts = [f"{n} {PROMPT}" for n in range(4)]
    with CloudProcess(bundle, keys, 1) as cloud:
        expected = [answered(bundle, cloud, keys, prompt, mode="stream") for prompt in prompts]
    with serving(bundle, keys, "--kv-tokens", "512", "--spill", str(tmp_path)) as small:
        for prompt in prompts:
            answered(bundle, small, keys, prompt, mode="stream")
        for prompt, (tokens, whole) in zip(prompts, expected, strict=True):
            again, sent = answered(bundle, small, keys, prompt, mode="stream")
            assert again == tokens and sent < 0.5 * whole
    assert not list(tmp_path.iterdir())


def test_a_place_on_disk_that_cannot_be_had_is_told(bundle: Path, keys: Path) -> None:
    for options, told in (
        (["--spill", "/dev/null/x"], "cannot write into /dev/null/x"),
        (["--spill", "/tmp", "--context-s", "0"], "keeps no KV"),
        (["--spill", "/tmp", "--spill-mb", "0"], "--spill-mb"),
    ):
        with pytest.raises(ServiceError, match=told), serving(bundle, keys, *options):
            pass


def test_a_system_prompt_that_is_pinned_is_there_for_the_first(bundle: Path, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text(PROMPT + "\n")
    asked = [{"role": "system", "content": PROMPT}, {"role": "user", "content": "why?"}]

    def told(cloud: CloudProcess) -> tuple[str, int]:
        with Device(bundle, cloud.address, keys=keys, threads=1, mode="stream") as one:
            text = "".join(token.text for token in one.chat(asked, max_tokens=TOKENS))
            return text, one.stats.bytes_up

    with CloudProcess(bundle, keys, 1) as cloud:
        expected, whole = told(cloud)
    with serving(bundle, keys, "--pin", str(tmp_path / "system.txt")) as cloud:
        text, sent = told(cloud)
    assert text == expected and sent < 0.6 * whole


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "cannot read"), (b"\xff\xfe", "no UTF-8 text"), (b"sea " * 300, "does not fit into KV for 512")],
)
def test_system_prompts_that_cannot_be_pinned_are_told(
    bundle: Path, keys: Path, tmp_path: Path, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / "system.txt").write_bytes(content)
    options = ("--kv-tokens", "512", "--pin", str(tmp_path / "system.txt"))
    with pytest.raises(ServiceError, match=told), serving(bundle, keys, *options):
        pass


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "stream"},
        {"mode": "verify"},
        {"mode": "split", "cut": LAYER},
        {"mode": "exit", "cut": LAYER, "threshold": 1.0},
    ],
    ids=["stream", "verify", "split", "exit"],
)
def test_a_device_goes_from_one_conversation_to_another_and_back(
    bundle: Path, keys: Path, fields: dict[str, Any]
) -> None:
    """Back in the first one, and in one that another device had, it sends what is new alone."""
    prompts = [f"{name} {PROMPT}" for name in ("one", "two", "three")]
    with serving(bundle, keys) as cloud:
        elsewhere = [answered(bundle, cloud, keys, prompt, **fields) for prompt in prompts[1:]]
        with Device(bundle, cloud.address, keys=keys, threads=1, **fields) as device:
            said, sent = [], []
            for prompt in (*prompts, prompts[0]):
                said.append([token.id for token in device.generate(prompt, max_tokens=TOKENS)])
                sent.append(device.stats.bytes_up)
    assert said[1:3] == [tokens for tokens, _ in elsewhere] and said[3] == said[0]
    assert max(sent[1:]) < 0.6 * min(sent[0], *(size for _, size in elsewhere))
