"""Tensor codecs: exact or within half a step, and nothing that does not fit gets through."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol import tensors
from isthmus.protocol.errors import ProtocolError
from isthmus.protocol.messages import Tensor

HIDDEN = np.random.default_rng(5).standard_normal((7, 96)).astype(np.float32) * 3.0


def test_f32_is_exact() -> None:
    tensor = tensors.encode(HIDDEN, "f32")
    assert len(tensor.data) == tensors.coded_bytes("f32", 7, 96) == HIDDEN.nbytes
    assert np.array_equal(tensors.decode(tensor, 96), HIDDEN)


def test_f16_is_numpys_rounding() -> None:
    tensor = tensors.encode(HIDDEN, "f16")
    assert len(tensor.data) == tensors.coded_bytes("f16", 7, 96)
    assert np.array_equal(tensors.decode(tensor, 96), HIDDEN.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("plain", [0, 1])
def test_int8_is_within_half_a_step_of_each_row(rows: int, plain: int) -> None:
    hidden = HIDDEN[:rows].copy()
    hidden[0] *= 1000.0  # what the first position of a real model looks like
    tensor = tensors.encode(hidden, "int8", plain=plain)
    assert len(tensor.data) == tensors.coded_bytes("int8", rows, 96, plain)
    decoded = tensors.decode(tensor, 96)
    step = np.abs(hidden).max(axis=1, keepdims=True) / 127.0
    if plain:
        step[:plain] = np.abs(hidden[:plain]).max() / 1024.0
    assert (np.abs(decoded - hidden) <= 0.5001 * step).all()


def test_one_row_is_coded_as_it_is_among_others() -> None:
    together = tensors.decode(tensors.encode(HIDDEN, "int8"), 96)
    for index in range(len(HIDDEN)):
        alone = tensors.decode(tensors.encode(HIDDEN[index : index + 1], "int8"), 96)
        assert np.allclose(alone[0], together[index], rtol=1e-6, atol=0.0)


def test_a_row_of_zeros_stays_zero() -> None:
    hidden = np.zeros((3, 8), np.float32)
    hidden[1] = 1e-38
    assert not tensors.decode(tensors.encode(hidden, "int8"), 8)[[0, 2]].any()


@pytest.mark.parametrize("codec", tensors.CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("width", [8, 9000])
def test_what_is_not_finite_does_not_pass(codec: str, value: float, width: int) -> None:
    hidden = np.ones((1, width), np.float32)
    hidden[0, 3] = value
    with pytest.raises(ProtocolError, match="finite"):
        tensors.decode(tensors.encode(hidden, codec), width)


@pytest.mark.parametrize("width", [8, 9000])
def test_f16_says_that_it_overflows(width: int) -> None:
    hidden = np.full((1, width), 70000.0, np.float32)
    with pytest.raises(ProtocolError, match="codec f32"):
        tensors.encode(hidden, "f16")
    hidden[:] = 65504.0
    assert np.array_equal(tensors.decode(tensors.encode(hidden, "f16"), width), hidden)


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (Tensor("f16", (1, 8), 0, bytes(15)), "15 bytes"),
        (Tensor("f16", (1, 8), 0, bytes(17)), "17 bytes"),
        (Tensor("f16", (1, 9), 0, bytes(18)), "shape"),
        (Tensor("f16", (0, 8), 0, b""), "shape"),
        (Tensor("f16", (2**31, 8), 0, bytes(16)), "shape"),
        (Tensor("f16", (8,), 0, bytes(16)), "shape"),
        (Tensor("f16", (1, 8), 1, bytes(16)), "plain"),
        (Tensor("int8", (1, 8), 2, bytes(32)), "plain"),
        (Tensor("int8", (1, 8), 0, np.float32(-1.0).tobytes() + bytes(8)), "scale"),
        (Tensor("int8", (1, 8), 0, np.float32("nan").tobytes() + bytes(8)), "scale"),
        (Tensor("int8", (1, 8), 0, np.float32(3e38).tobytes() + bytes(8)), "scale"),
        (Tensor("zip", (1, 8), 0, bytes(16)), "codec"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tensor: Tensor, problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        tensors.decode(tensor, 8)


def test_an_unknown_codec_is_refused_when_coding() -> None:
    with pytest.raises(ProtocolError, match="zip"):
        tensors.encode(HIDDEN, "zip")


@given(st.sampled_from(tensors.CODECS), st.integers(1, 4), st.integers(0, 4), st.binary(max_size=300))
def test_any_bytes_give_finite_numbers_or_an_error(codec: str, rows: int, plain: int, data: bytes) -> None:
    plain = min(plain, rows) if codec == "int8" else 0
    size = tensors.coded_bytes(codec, rows, 16, plain)
    tensor = Tensor(codec, (rows, 16), plain, (data * (size // max(1, len(data)) + 1) or bytes(size))[:size])
    try:
        hidden = tensors.decode(tensor, 16)
    except ProtocolError as error:
        assert "finite" in str(error)
    else:
        assert hidden.shape == (rows, 16)
        assert np.isfinite(hidden).all()
