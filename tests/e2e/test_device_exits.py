"""Exit mode against a real cloud: hidden states travel as the exit was calibrated with."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.edge import Device
from isthmus.edge.exits import UNMEASURED
from isthmus.split.bundle import Bundle
from isthmus.split.exit_entry import CodecChoice
from isthmus.split.exit_writer import put_codecs, put_exits
from tests.edge_bundle import an_exit, write_tiny

LAYER = 2
SAME = 0.1  # of the bytes: how many guesses travel along depends on time; codecs are at least a quarter apart


@pytest.fixture(scope="module")
def keys() -> Iterator[Path]:
    with fresh_keys() as folder:
        yield folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without an exit."""
    return write_tiny(tmp_path_factory.mktemp("plain") / "tiny")


@pytest.fixture(scope="module")
def bundle(plain: Path) -> Path:
    """With an exit for which nobody has tried codecs."""
    path = shutil.copytree(plain, plain.with_name("exits"))
    model_id = Bundle.open(path).model_id
    put_exits(path, model_id, [an_exit(model_id, LAYER)])
    return path


@pytest.fixture(scope="module")
def cloud(bundle: Path, keys: Path) -> Iterator[CloudProcess]:
    with CloudProcess(bundle, keys, 1) as running:
        yield running


def calibrated(bundle: Path, codec: str, to: Path) -> Path:
    """A copy whose exit is calibrated with a codec."""
    path = shutil.copytree(bundle, to)
    opened = Bundle.open(path)
    file = opened.manifest.exit(LAYER).file
    sha256 = hashlib.sha256(opened.read(file)).hexdigest()
    put_codecs(path, {LAYER: CodecChoice(codec, sha256, "cd" * 32, 9000, 0.02, 0.96, 0.97, 40.0)})
    return path


def uploaded(bundle: Path, cloud: CloudProcess, keys: Path, codec: str = "") -> int:
    """Bytes up of an answer of which the exit says nothing itself."""
    with Device(bundle, cloud.address, keys=keys, threads=1, mode="exit", cut=LAYER, codec=codec, threshold=1.0) as one:
        list(one.generate("tell me of the sea, and of the rain that falls on it", max_tokens=24))
        assert set(one.stats.sources) <= {"cloud", "verified"}
        return one.stats.bytes_up


def test_the_codec_of_the_calibration_is_used(bundle: Path, cloud: CloudProcess, keys: Path, tmp_path: Path) -> None:
    named = {codec: uploaded(bundle, cloud, keys, codec) for codec in ("ecsq2", UNMEASURED, "ecsq32", "f16")}
    assert all((1 + SAME) ** 2 * one < other for one, other in pairwise(named.values()))
    assert uploaded(bundle, cloud, keys) == pytest.approx(named[UNMEASURED], rel=SAME)
    for codec in ("ecsq2", "ecsq32", "f16"):
        folder = calibrated(bundle, codec, tmp_path / codec)
        assert uploaded(folder, cloud, keys) == pytest.approx(named[codec], rel=SAME)
        assert uploaded(folder, cloud, keys, UNMEASURED) == pytest.approx(named[UNMEASURED], rel=SAME)


def test_a_cloud_without_its_statistics_gets_what_needs_none(
    bundle: Path, plain: Path, keys: Path, tmp_path: Path
) -> None:
    folder = calibrated(bundle, "ecsq2", tmp_path / "b")
    with CloudProcess(plain, keys, 1) as bare:
        assert uploaded(folder, bare, keys) == pytest.approx(uploaded(folder, bare, keys, UNMEASURED), rel=SAME)
        assert uploaded(folder, bare, keys, "ecsq2") < 0.8 * uploaded(folder, bare, keys)
        halves = calibrated(bundle, "f16", tmp_path / "f16")  # which needs none
        assert uploaded(halves, bare, keys) == pytest.approx(uploaded(halves, bare, keys, "f16"), rel=SAME)
