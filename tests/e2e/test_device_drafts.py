"""A small model on the device drafts, and a real cloud's model checks: the text is the cloud's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.edge import Device
from isthmus.engine.sampling import Sampling
from isthmus.protocol.errors import DeviceError
from isthmus.split.manifest import TokenizerEntry
from isthmus.split.writer import write_bundle
from tests.edge_bundle import TEMPLATE, Weights, tokenizer_json, write_tiny

PROMPT = "tell me"
TOKENS = 60


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("large") / "tiny")


@pytest.fixture(scope="module")
def keys() -> Iterator[Path]:
    with fresh_keys() as folder:
        yield folder


@pytest.fixture(scope="module")
def cloud(bundle: Path, keys: Path) -> Iterator[CloudProcess]:
    with CloudProcess(bundle, keys, 1) as running:
        yield running


@pytest.mark.parametrize("depth", [1, 8])
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=5)])
def test_the_text_is_the_clouds(
    bundle: Path, keys: Path, cloud: CloudProcess, tmp_path: Path, seed: int, depth: int, sampling: Sampling
) -> None:
    small = write_tiny(tmp_path / "small", seed)
    options = {"keys": keys, "threads": 1, "draft": small, "draft_depth": depth}
    with Device(bundle, cloud.address, mode="verify", **options) as one:  # type: ignore[arg-type]
        said = [token.id for token in one.generate(PROMPT, max_tokens=TOKENS, sampling=sampling)]
        drafted, accepted = one.stats.drafted, one.stats.accepted
        streamed = [token.id for token in one.generate(PROMPT, max_tokens=TOKENS, sampling=sampling, mode="stream")]
    assert said == streamed
    assert drafted > 0
    assert accepted == drafted if not seed else accepted < drafted  # the same model is always right


def test_auto_weighs_it(bundle: Path, keys: Path, tmp_path: Path) -> None:
    small, reasons = write_tiny(tmp_path / "small"), list[str]()
    with (
        CloudProcess(bundle, keys, 1, 40.0) as slow,
        Device(
            shutil.copytree(bundle, tmp_path / "part", ignore=shutil.ignore_patterns("layer-002*", "layer-003*")),
            slow.address,
            keys=keys,
            threads=1,
            draft=small,
            explain=reasons.append,
        ) as one,
    ):
        said = [token.id for token in one.generate(PROMPT, max_tokens=200)]
        assert said == [token.id for token in one.generate(PROMPT, max_tokens=200, mode="stream")]
    assert any("verify model x" in reason for reason in reasons)


def other_tokenizer(folder: Path) -> Path:
    """A small model that writes in other tokens."""
    text = tokenizer_json().replace(b"<a>", b"<b>")
    entry = TokenizerEntry("tokenizer.json", TEMPLATE, None, (256,), False)
    write_bundle(folder, Weights(3), name="other", weights="f32", tokenizer=text, entry=entry)
    return folder


def test_a_model_with_another_tokenizer_is_refused(
    bundle: Path, keys: Path, cloud: CloudProcess, tmp_path: Path
) -> None:
    other = other_tokenizer(tmp_path / "other")
    with pytest.raises(DeviceError, match="other has another tokenizer than tiny"):
        Device(bundle, cloud.address, mode="verify", keys=keys, draft=other)
    command = [sys.executable, "-m", "isthmus.apps.cli", "run", str(bundle), "--cloud", cloud.address]
    command += ["--keys", str(keys), "--mode", "verify", "--draft", str(other), "--prompt", PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "another tokenizer" in done.stderr
