"""Pictures as files: what comes back, what is refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from isthmus.protocol.arrays import pack, unpack
from isthmus.protocol.errors import ProtocolError
from isthmus.protocol.features import applies, is_codec
from isthmus.protocol.pictures import decode_picture, encode_picture

HEIGHT, WIDTH = 24, 40


def picture() -> Any:
    down, across = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([down * 10, across * 6, down + across], axis=-1).astype(np.uint8)[None]


@pytest.mark.parametrize(("codec", "off"), [("jpeg95", 12), ("webp90", 12), ("webp-lossless", 0)])
def test_a_picture_comes_back(codec: str, off: int) -> None:
    shapes, data = pack([picture()], codec)
    assert shapes[0].codec == codec and shapes[0].size == len(data) < picture().nbytes
    (found,) = unpack(shapes, data)
    assert found.shape == picture().shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - picture()).max() <= off


@pytest.mark.parametrize(
    "name", ["jpeg", "jpeg0", "jpeg101", "jpeg090", "png50", "webp", "webp-", "jpeg-lossless", "JPEG90"]
)
def test_what_is_no_codec(name: str) -> None:
    assert not is_codec(name)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((1, 4, 4, 3), np.float32),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((1, 0, 4, 3), np.uint8),
    ],
)
def test_what_is_no_picture_travels_as_it_is(array: Any) -> None:
    assert applies("jpeg90", array.dtype, array.shape) == ""
    shapes, data = pack([array], "jpeg90")
    assert shapes[0].codec == "" and np.array_equal(unpack(shapes, data)[0], array)


def test_a_file_of_another_size_or_kind_is_refused_before_it_is_unpacked() -> None:
    data = encode_picture(picture(), "jpeg90")
    for dims in ((1, HEIGHT + 1, WIDTH, 3), (1, 1, 1, 3)):
        with pytest.raises(ProtocolError, match="a picture of 24 x 40 came"):
            decode_picture(memoryview(data), "jpeg90", dims)
    with pytest.raises(ProtocolError, match="no WEBP file"):
        decode_picture(memoryview(data), "webp90", (1, HEIGHT, WIDTH, 3))
    with pytest.raises(ProtocolError, match="cannot be sent as webp90"):
        encode_picture(np.zeros((1, 1, 20_000, 3), np.uint8), "webp90")


@pytest.mark.parametrize("how", [{"progressive": True}, {"progressive": True, "quality": 10}])
def test_a_file_of_several_scans_is_refused(how: dict[str, Any]) -> None:
    data = io.BytesIO()
    Image.fromarray(picture()[0]).save(data, "JPEG", **how)
    with pytest.raises(ProtocolError, match="several scans"):
        decode_picture(memoryview(data.getvalue()), "jpeg90", (1, HEIGHT, WIDTH, 3))


@given(at=st.integers(0, 400), cut=st.integers(0, 400), byte=st.integers(0, 255))
def test_damaged_files_are_refused_or_of_the_size(at: int, cut: int, byte: int) -> None:
    for codec in ("jpeg50", "webp50"):
        data = bytearray(encode_picture(picture(), codec))
        data[at % len(data)] = byte
        try:
            found = decode_picture(memoryview(bytes(data[: len(data) - cut % len(data)])), codec, (1, HEIGHT, WIDTH, 3))
        except ProtocolError:
            continue
        assert found.shape == (1, HEIGHT, WIDTH, 3)
