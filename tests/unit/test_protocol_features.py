"""Codecs of a cut network's arrays: how near they come back, in how many bytes, and what is refused."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.protocol import features, rans
from isthmus.protocol.errors import ProtocolError

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "rans.json").read_text())
F32 = np.dtype(np.float32)


def back(array: Any, codec: str) -> Any:
    data = features.encode(array, codec)
    return features.decode(memoryview(data), codec, array.dtype, array.shape)


def normal(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


@given(
    hnp.arrays(
        st.sampled_from(["float32", "int64", "uint8", "bool", "float64", "int16"]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
    )
)
@pytest.mark.parametrize("codec", features.LOSSLESS)
def test_the_lossless_ones_lose_nothing(codec: str, array: Any) -> None:
    found = back(array, codec)
    assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()


@given(
    hnp.arrays(
        "float32",
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=20),
        elements=st.floats(-1e6, 1e6, width=32),
    )
)
@pytest.mark.parametrize("codec", features.STEPS)
def test_what_lies_within_the_scale_is_off_by_half_a_step_at_most(codec: str, array: Any) -> None:
    data = features.encode(array, codec)
    last, low, step = struct.unpack_from("<Bff", data)
    found = features.decode(memoryview(data), codec, F32, array.shape)
    assert last < round(2 ** float(codec[3:]))
    inside = np.clip(array.astype(np.float64), low, low + last * step)
    slack = 1e-5 * np.abs(array).max() + 1e-30
    assert (np.abs(found - inside) <= 0.5001 * step + slack).all()


@given(
    hnp.arrays(
        "float32",
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=20),
        elements=st.floats(-1e6, 1e6, width=32),
    )
)
def test_whole_numbers_are_off_by_half_of_one_where_there_are_few(array: Any) -> None:
    data = features.encode(array, features.UNIT)
    last, low, step = struct.unpack_from("<Bff", data)
    found: Any = features.decode(memoryview(data), features.UNIT, F32, array.shape)
    width = float(array.max()) - float(array.min())
    assert last < 256 and step == max(1, math.ceil(width / 254)) and low == round(low / step) * step
    assert (np.abs(found - array) <= 0.5001 * step + 1e-6 * np.abs(array).max()).all()
    assert (found == np.round(found)).all()


def test_whole_numbers_stay_themselves() -> None:
    array = np.arange(-100, 101, dtype=np.float32)
    assert np.array_equal(back(array, features.UNIT), array)
    assert np.array_equal(back(array / 3, features.UNIT), np.rint(array / 3))


@pytest.mark.parametrize("codec", features.STEPS)
def test_zero_stays_zero(codec: str) -> None:
    rectified = np.maximum(normal(5000), 0.0)
    assert (back(rectified, codec)[rectified == 0] == 0).all()
    both = np.where(np.arange(5000) % 3, normal(5000), 0.0).astype(np.float32)
    assert (back(both, codec)[both == 0] == 0).all()


def test_c_and_python_give_the_same_bytes_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [normal(4001, 1), np.maximum(normal(999, 2), 0), np.full(7, 3.25, np.float32), normal(5, 3) * 1e-20]
    names = (*features.STEPS, features.UNIT)
    codecs = [codec for codec in names for _ in arrays]
    pairs = list(zip(codecs, arrays * len(names), strict=True))
    compiled = [features.encode(array, codec) for codec, array in pairs]
    values = [back(array, codec) for codec, array in pairs]
    monkeypatch.setattr(rans, "native", lambda: None)
    assert [features.encode(array, codec) for codec, array in pairs] == compiled
    for (codec, array), mine in zip(pairs, values, strict=True):
        assert np.array_equal(back(array, codec), mine)


def test_fewer_levels_take_fewer_bytes() -> None:
    array = normal(100_000)
    sizes = [len(features.encode(array, codec)) for codec in ("", "f16", *features.STEPS)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(features.encode(array, "int4")) < array.nbytes / 10  # of 3 bits a value


def test_a_constant_array_takes_a_few_bytes() -> None:
    array = np.full((4, 1000), -2.5, np.float32)
    data = features.encode(array, "int4")
    assert len(data) == 9 + 2 + rans.STATES_BYTES and np.array_equal(back(array, "int4"), array)


def test_an_outlier_becomes_the_end_of_the_scale() -> None:
    array = normal(10_000)
    array[7] = 1e4
    assert np.abs(back(array, "int8") - array)[np.arange(10_000) != 7].max() < 4.0


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_widths_of_numbers_come_back_in_theirs(dtype: str) -> None:
    array = normal(100).astype(dtype)
    for codec in ("f16", "int8"):
        found = back(array, codec)
        assert found.dtype == array.dtype and np.allclose(found, array, atol=0.05)


def test_whole_numbers_are_not_coded_in_steps() -> None:
    assert features.applies("int4", np.dtype(np.int64), (0,)) == ""
    assert features.applies("zstd", np.dtype(np.int64), (0,)) == "zstd"
    with pytest.raises(ProtocolError, match="int64 in the codec 'int4'"):
        features.decode(memoryview(b""), "int4", np.dtype(np.int64), (0,))


@pytest.mark.parametrize("codec", ["f16", *features.STEPS, features.UNIT])
@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(codec: str, strange: float) -> None:
    array = normal(100)
    array[50] = strange
    with pytest.raises(ProtocolError, match="finite"):
        features.encode(array, codec)


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(ProtocolError, match="'int9'"):
        features.encode(normal(3), "int9")
    with pytest.raises(ProtocolError, match="'int1'"):
        features.decode(memoryview(b""), "int1", F32, (0,))


@pytest.mark.parametrize("case", VECTORS["arrays"], ids=lambda case: case["about"])
def test_vectors_for_other_languages(case: dict[str, Any]) -> None:
    found = features.decode(memoryview(bytes.fromhex(case["data"])), case["codec"], F32, case["dims"])
    assert [one.hex() for one in found.reshape(-1).astype(float).tolist()] == case["values"]


@pytest.mark.parametrize("cut", [0, 1, 8, 9, 10, 20, 26])
def test_what_was_cut_off_is_refused(cut: int) -> None:
    data = features.encode(normal(100), "int4")
    with pytest.raises(ProtocolError):
        features.decode(memoryview(data[:cut]), "int4", F32, (100,))


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        (struct.pack("<Bff", 15, np.nan, 1.0), "scale"),
        (struct.pack("<Bff", 15, 0.0, -1.0), "scale"),
        (struct.pack("<Bff", 255, 3e38, 1e38), "scale"),
        (struct.pack("<Bff", 1, 0.0, 1.0) + b"\xff\xff\0\0", "a frequency of 32767"),
        (struct.pack("<Bff", 1, 0.0, 1.0) + b"\0\xff", "frequencies"),
        (struct.pack("<Bff", 1, 0.0, 1.0) + b"\x01\x01" + bytes(16), "sum"),
    ],
)
def test_a_scale_or_frequencies_that_cannot_be(head: bytes, problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        features.decode(memoryview(head), "int4", F32, (4,))


def test_a_frame_of_another_size_is_not_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    with pytest.raises(ProtocolError, match="16777216 bytes, not 40"):
        features.decode(memoryview(bomb), "zstd", F32, (10,))
    with pytest.raises(ProtocolError, match="Zstandard"):
        features.decode(memoryview(b"none at all"), "zstd", F32, (10,))
    streamed = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(40))
    with pytest.raises(ProtocolError, match="Zstandard"):
        features.decode(memoryview(streamed), "zstd", F32, (10,))
