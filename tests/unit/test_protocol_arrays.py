"""Arrays on the wire: they come back as they were, and what is none is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol import messages as m
from isthmus.protocol.arrays import DTYPES, MAX_ARRAYS, Array, Shape, pack, unpack
from isthmus.protocol.errors import ProtocolError


def drawn(dtype: str, shape: tuple[int, ...], seed: int) -> Array:
    values = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 100, shape)
    return values.astype(dtype)


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)), max_size=6),
    st.integers(0, 1 << 30),
)
def test_they_come_back_as_they_were(kinds: list[tuple[str, list[int]]], seed: int) -> None:
    arrays = [drawn(dtype, tuple(shape), seed + at) for at, (dtype, shape) in enumerate(kinds)]
    shapes, data = pack(arrays)
    message = m.decode(m.encode(m.Infer(7, "ab", shapes, data)))
    assert isinstance(message, m.Infer) and message.request == 7
    for mine, came in zip(arrays, unpack(message.shapes, message.data), strict=True):
        assert mine.dtype == came.dtype and mine.shape == came.shape and np.array_equal(mine, came)


def test_large_ones_follow_as_a_frame_of_their_own() -> None:
    array = np.arange(m.INLINE_BYTES, dtype=np.float32)
    frames = m.encode(m.Inferred(1, *pack([array])))
    assert len(frames) == 2 and len(frames[0]) < 100 and len(frames[1]) == 4 * m.INLINE_BYTES
    message = m.decode(frames)
    assert isinstance(message, m.Inferred) and np.array_equal(unpack(message.shapes, message.data)[0], array)
    inline = m.encode(m.Inferred(1, *pack([array[:10]])))
    with pytest.raises(ProtocolError, match="second frame beside"):
        m.decode([inline[0], b"more"])


def test_arrays_that_lie_otherwise_in_memory() -> None:
    array = np.arange(24, dtype=">i4").reshape(4, 6)[::2, ::-1].T
    shapes, data = pack([array])
    assert shapes == (Shape("int32", (6, 2)),) and np.array_equal(unpack(shapes, data)[0], array)


@pytest.mark.parametrize(
    ("shapes", "data", "problem"),
    [
        ([Shape("float32", (2,))], b"1234567", "7 bytes for arrays that need 8"),
        ([Shape("float32", (2**31, 2**31))], b"", "0 bytes for arrays that need"),
        ([Shape("object", (1,))], b"12345678", "type 'object'"),
        ([Shape("bool", (2,))], b"\1\2", "another byte than 0 and 1"),
    ],
)
def test_what_is_no_array(shapes: list[Shape], data: bytes, problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        unpack(shapes, data)


def test_what_cannot_travel() -> None:
    with pytest.raises(ProtocolError, match="complex"):
        pack([np.zeros(1, np.complex64)])
    with pytest.raises(ProtocolError, match="arrays"):
        pack([np.zeros(1)] * (MAX_ARRAYS + 1))


def test_a_codec_is_for_real_numbers_and_what_comes_back_is_near() -> None:
    arrays: list[Array] = [drawn("float32", (4, 50), 1), drawn("int64", (3,), 2), drawn("float64", (2, 9), 3)]
    shapes, data = pack(arrays, "int8")
    assert [one.codec for one in shapes] == ["int8", "", "int8"] and shapes[1].size == 0
    message = m.decode(m.encode(m.Infer(1, "ab", shapes, data)))
    assert isinstance(message, m.Infer)
    found = unpack(message.shapes, message.data)
    assert np.array_equal(found[1], arrays[1])
    for mine, came in ((arrays[0], found[0]), (arrays[2], found[2])):
        assert mine.dtype == came.dtype and np.allclose(mine, came, atol=0.5)


@pytest.mark.parametrize(
    ("shapes", "data", "problem"),
    [
        ([Shape("float32", (2,), "int4", 3)], b"12", "2 bytes for arrays that need 3"),
        ([Shape("float32", (1 << 25,), "int4", 3)], b"123", "134217728 bytes, coded in 3"),
        ([Shape("int32", (2,), "int4", 2)], b"12", "int32 in the codec 'int4'"),
        ([Shape("float32", (2,), "mp3", 2)], b"12", "in the codec 'mp3'"),
        ([Shape("float32", (2,), "int4", 2)], b"12", "2 bytes for 2 coded values"),
    ],
)
def test_what_no_codec_wrote(shapes: list[Shape], data: bytes, problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        unpack(shapes, data)


def test_bools_that_travelled_in_a_frame_are_looked_at() -> None:
    shapes, data = pack([np.array([2, 1], np.uint8)], "zstd")
    with pytest.raises(ProtocolError, match="another byte than 0 and 1"):
        unpack([Shape("bool", (2,), "zstd", shapes[0].size)], data)
