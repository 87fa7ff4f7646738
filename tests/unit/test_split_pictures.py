"""Pictures as a network takes them, and as they come out of JPEG and WebP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.protocol.errors import PlanError
from isthmus.split.pictures import (
    QUALITIES,
    Picture,
    Preprocess,
    called,
    coded,
    found_in,
    read_preprocess,
    smallest,
)


def gradient(height: int, width: int) -> Picture:
    """Red grows downwards, green to the right; a little noise."""
    rows, columns = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(3).integers(0, 30, (height, width))
    return np.stack([rows * 255 // height, columns * 255 // width, noise], axis=2).astype(np.uint8)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "one.png"
    Image.fromarray(gradient(60, 120)).save(path)
    return path


def test_the_middle_is_cut_out_of_the_shorter_side(picture: Path) -> None:
    found = Preprocess((16, 16), resize=30).shown(picture)
    assert found.shape == (16, 16, 3)
    assert 90 < found[8, 8, 0] < 165 and 100 < found[8, 8, 1] < 155  # red and green of the middle
    assert found[0, 8, 0] < found[15, 8, 0] and found[8, 0, 1] < found[8, 15, 1]


def test_without_a_cut_the_whole_is_brought_to_the_size(picture: Path) -> None:
    found = Preprocess((10, 20)).shown(picture)
    assert found.shape == (10, 20, 3) and found[0, 0, 1] < 20 and found[0, -1, 1] > 235


def test_values_layout_and_order_of_channels(picture: Path) -> None:
    shown = Preprocess((10, 20)).shown(picture)
    plain = Preprocess((10, 20), mean=(127, 127, 127), std=(128, 128, 128)).array(shown)
    assert plain.shape == (1, 3, 10, 20) and plain.dtype == np.float32
    assert np.allclose(plain[0, 1], (shown[:, :, 1].astype(np.float32) - 127) / 128)
    other = Preprocess((10, 20), layout="NHWC", channels="BGR", dtype="uint8").array(shown)
    assert other.shape == (1, 10, 20, 3) and other.dtype == np.uint8
    assert np.array_equal(other[0, :, :, 2], shown[:, :, 0])


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ({"size": [0, 16]}, "sides of 1 to 8192"),
        ({"size": [64, 64], "resize": 32}, "cannot be cut out of 32"),
        ({"size": [8, 8], "std": [1, 0, 1]}, "std above 0"),
        ({"size": [8, 8], "crop": 3}, "is no preprocessing.*crop"),
        ({"resize": 3}, "is no preprocessing.*size"),
        ({"size": [8, 8], "layout": "HWCN"}, "is no preprocessing"),
        ([], "is no preprocessing"),
    ],
)
def test_a_preprocessing_that_cannot_be(tmp_path: Path, told: object, problem: str) -> None:
    path = tmp_path / "how.json"
    path.write_text(json.dumps(told))
    with pytest.raises(PlanError) as raised:
        read_preprocess(path)
    import re

    assert re.search(problem, f"{raised.value.problem} {raised.value.remedy}")


def test_a_preprocessing_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "how.json"
    path.write_text('{"size": [224, 224], "resize": 256, "mean": [127, 127, 127], "std": [128, 128, 128]}')
    assert read_preprocess(path) == Preprocess((224, 224), 256, (127, 127, 127), (128, 128, 128))
    with pytest.raises(PlanError, match="cannot be read"):
        read_preprocess(tmp_path / "none.json")


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(b"\xff\xd8 nothing more")
    with pytest.raises(PlanError, match=r"x\.jpg is no picture"):
        Preprocess((8, 8)).shown(path)
    path.write_text("P6 100000 100000 255\n")  # a header that promises 30 GB
    with pytest.raises(PlanError, match=r"x\.jpg"):
        Preprocess((8, 8)).shown(path)


def test_a_folder_gives_some_of_all_parts(tmp_path: Path) -> None:
    for at in range(10):
        (tmp_path / f"{at}.png").touch()
    (tmp_path / "notes.txt").touch()
    assert [path.stem for path in found_in(tmp_path, 4)] == ["0", "2", "5", "7"]
    assert len(found_in(tmp_path, 64)) == 10
    with pytest.raises(PlanError, match="no pictures"):
        found_in(tmp_path / "..", 4)
    with pytest.raises(PlanError, match="cannot be read"):
        found_in(tmp_path / "none", 4)


@pytest.mark.parametrize("format", ["JPEG", "WebP"])
def test_a_higher_quality_is_nearer_and_larger(format: str) -> None:
    pictures = [gradient(64, 64)]
    low, high = coded(pictures, format, 10), coded(pictures, format, 95)
    assert low.sizes[0] < high.sizes[0] < pictures[0].nbytes
    near, far = (np.abs(sent.pictures[0].astype(int) - pictures[0]).mean() for sent in (high, low))
    assert near < far and high.encode_ms > 0 and high.decode_ms > 0


@pytest.mark.parametrize("wanted", QUALITIES)
def test_the_lowest_quality_that_is_good_enough_is_found(wanted: int) -> None:
    pictures = [gradient(32, 32)]
    bound = coded(pictures, "JPEG", wanted).sizes[0]

    def agrees(back: list[Picture]) -> float:
        quality = next(q for q in QUALITIES if np.array_equal(coded(pictures, "JPEG", q).pictures[0], back[0]))
        return 1.0 if coded(pictures, "JPEG", quality).sizes[0] >= bound else 0.5

    assert smallest(pictures, "JPEG", agrees, 0.99).sizes[0] == bound
    assert smallest(pictures, "JPEG", lambda _: 0.0, 0.99).codec == "jpeg100"
    last = smallest(pictures, "WebP", lambda _: 0.0, 0.99)
    assert last.codec == "webp-lossless" and np.array_equal(last.pictures[0], pictures[0])
    assert [called(one) for one in ("jpeg90", "webp5", last.codec)] == ["JPEG 90", "WebP 5", "WebP lossless"]
