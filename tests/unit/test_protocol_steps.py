"""Entropy-coded tensors: within half a step, the same everywhere, and only with the statistics that they name."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol import messages as m
from isthmus.protocol import tensors
from isthmus.protocol.channels import ChannelStats
from isthmus.protocol.errors import ProtocolError
from isthmus.protocol.messages import Tensor

WIDTH = 96
RNG = np.random.default_rng(5)
SPREAD = np.geomspace(0.3, 90, WIDTH).astype(np.float32)
MEAN = RNG.standard_normal(WIDTH).astype(np.float32) * 20
HIDDEN = (RNG.standard_normal((7, WIDTH)) * SPREAD + MEAN).astype(np.float32)
STATS = ChannelStats(MEAN, SPREAD)
GOLDEN = {
    "ecsq2": (
        "cf3fce3f0a00264d169a6969b40ee664265a2d34d169b70ed064",
        "790e1fbf5fe005d1",
    ),
    "ecsq3": (
        "8a3f8a3f0b002c9c75a7168d516b3d8a202cb8eb4e168d7d4b390e20",
        "010065383067f9d5",
    ),
    "ecsq4": (
        "4f3f4e3f0d000b268b4d3969a5841a3c78e9802cb4d4c9c5a6bbdb092d148a",
        "5fd880aa3fa86aa1",
    ),
    "ecsq5": (
        "263f253f0d0016b9cb4e79cfc3aa20c9fc99781cb9cb5c726ccb3a2a37998b02",
        "0b80bf0d30ebd850",
    ),
    "ecsq6": (
        "0a3f0a3f0e00164d1c9a7164d3a09950f8d0b220165a3964e3934fe25644c3b9a0c0",
        "0015114946ec7ed3",
    ),
    "ecsq7": (
        "ec3eeb3e0f00165a75a5969a18e0cece366751b128165a72d3969a2ad0aaee3a278a3138",
        "87d638200c65c490",
    ),
    "ecsq8": (
        "cf3ece3e0f00164d396965a686e03bbb8fc1f66c4e165a6964d169a2cf1ec0e22a21271580",
        "b67934527e44cb26",
    ),
    "ecsq12": (
        "8a3e8a3e11000b268e5a7169a1ec02ad5e1fb5e92b11401cb472c9c726b4fe8c4b3c670bef3b09c0",
        "4c3173f8df114edd",
    ),
    "ecsq16": (
        "4f3e4e3e1300164d3969a2c9a297805cf77e1fbd1163aa4880165a6964d164d05cf82d605e19569922741540",
        "939524947b251a17",
    ),
    "ecsq32": (
        "cf3dce3d1600164d3969a2c9a126e8257af3adc1fef2185a76495080165a6964d164d057a770da642fc24b5514884f604b40",
        "c301c3824ddb3ca7",
    ),
}


def steps_of(tensor: Tensor) -> np.ndarray:
    """The step of each coded row."""
    coded = tensor.shape[0] - tensor.plain
    halves = np.frombuffer(tensor.data, "<u2", coded, tensor.plain * tensor.shape[1] * 2)
    return (halves.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("codec", tensors.ENTROPY_CODECS)
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("plain", [0, 1])
@pytest.mark.parametrize("stats", [None, STATS])
def test_values_are_within_half_a_step(codec: str, rows: int, plain: int, stats: ChannelStats | None) -> None:
    hidden = HIDDEN[:rows].copy()
    hidden[0] *= 50.0  # what the first position of a real model looks like
    tensor = tensors.encode(hidden, codec, plain=plain, stats=stats)
    assert len(tensor.data) <= tensors.coded_bytes(codec, rows, WIDTH, plain)
    assert tensor.stats == (STATS.digest if stats else b"")
    decoded = tensors.decode(tensor, WIDTH, stats=stats)
    assert np.array_equal(decoded[:plain], hidden[:plain].astype(np.float16).astype(np.float32))
    error = np.abs(decoded[plain:] - hidden[plain:])
    assert (error <= 0.501 * steps_of(tensor)[:, None] + 1e-6 * np.abs(hidden[plain:])).all()


def test_more_steps_take_more_bytes_for_smaller_errors() -> None:
    found = []
    for codec in tensors.ENTROPY_CODECS:
        tensor = tensors.encode(HIDDEN, codec, stats=STATS)
        found.append((len(tensor.data), -float(np.abs(tensors.decode(tensor, WIDTH, stats=STATS) - HIDDEN).mean())))
    assert found == sorted(found)


def test_a_row_is_coded_as_it_is_among_others() -> None:
    tensor = tensors.encode(HIDDEN, "ecsq6", stats=STATS)
    together, steps = tensors.decode(tensor, WIDTH, stats=STATS), steps_of(tensor)
    for index in range(len(HIDDEN)):
        alone = tensors.encode(HIDDEN[index : index + 1], "ecsq6", stats=STATS)
        assert steps_of(alone) == steps[index]
        assert np.array_equal(tensors.decode(alone, WIDTH, stats=STATS)[0], together[index])


@pytest.mark.parametrize("codec", GOLDEN)
def test_bytes_and_values_are_golden(codec: str) -> None:
    channel = np.arange(24, dtype=np.float32)
    stats = ChannelStats((channel - 12).astype(np.float32), (2.0 ** (channel % 5)).astype(np.float32))
    hidden = ((np.arange(72).reshape(3, 24) * 29 % 41 - 20) * stats.spread / 16 + stats.mean).astype(np.float32)
    tensor = tensors.encode(hidden, codec, plain=1, stats=stats)
    decoded = tensors.decode(tensor, 24, stats=stats)
    found = (tensor.data[48:].hex(), hashlib.sha256(decoded.tobytes()).hexdigest()[:16])
    assert found == GOLDEN[codec]
    assert tensors.encode(hidden, codec, plain=1, stats=stats) == tensor


@pytest.mark.parametrize(
    ("codec", "digest"), [("f32", "4ffa1f8dd9ba752b"), ("f16", "8542d486924d2bd0"), ("int8", "8ad0377733df1bde")]
)
def test_bytes_of_the_older_codecs_stay(codec: str, digest: str) -> None:
    hidden = ((np.arange(72).reshape(3, 24) * 29 % 41 - 20) / 16).astype(np.float32)
    ones = np.ones(24, np.float32)
    tensor = tensors.encode(hidden, codec, plain=1, stats=ChannelStats(ones, ones))
    assert (hashlib.sha256(tensor.data).hexdigest()[:16], tensor.stats) == (digest, b"")


def test_zeros_and_the_mean_itself_come_back() -> None:
    assert not tensors.decode(tensors.encode(np.zeros((2, 8), np.float32), "ecsq4"), 8).any()
    rows = np.stack([MEAN, MEAN])
    assert np.array_equal(tensors.decode(tensors.encode(rows, "ecsq4", stats=STATS), WIDTH, stats=STATS), rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_not_finite_is_not_coded(value: float) -> None:
    hidden = HIDDEN.copy()
    hidden[2, 3] = value
    with pytest.raises(ProtocolError, match="finite"):
        tensors.encode(hidden, "ecsq8", stats=STATS)


def test_only_the_statistics_that_it_names_decode_a_tensor() -> None:
    tensor = tensors.encode(HIDDEN, "ecsq8", stats=STATS)
    other = ChannelStats(MEAN, SPREAD * 2)
    with pytest.raises(ProtocolError, match=f"{STATS.digest.hex()}, and there are none here"):
        tensors.decode(tensor, WIDTH)
    with pytest.raises(ProtocolError, match=f"not {other.digest.hex()}"):
        tensors.decode(tensor, WIDTH, stats=other)
    plain = tensors.encode(HIDDEN, "ecsq8")
    assert np.array_equal(tensors.decode(plain, WIDTH), tensors.decode(plain, WIDTH, stats=STATS))
    with pytest.raises(ProtocolError, match="names channel statistics"):
        tensors.decode(Tensor("f16", (1, 8), 0, bytes(16), STATS.digest), 8)


def test_statistics_of_another_width_are_refused() -> None:
    with pytest.raises(ProtocolError, match="96 channels"):
        tensors.encode(np.ones((1, 8), np.float32), "ecsq8", stats=STATS)
    with pytest.raises(ProtocolError, match="96 channels"):
        tensors.decode(Tensor("ecsq8", (1, 8), 0, bytes(9), STATS.digest), 8, stats=STATS)
    with pytest.raises(ProtocolError, match="16383"):
        tensors.encode(np.ones((1, 16_384), np.float32), "ecsq8")


def test_the_digest_travels_and_an_older_tensor_has_none() -> None:
    message = m.Rows(1, 2, 0, bytes(16), [4] * 7, tensors.encode(HIDDEN, "ecsq4", stats=STATS))
    decoded = m.decode(m.encode(message))
    assert isinstance(decoded, m.Rows)
    assert decoded.hidden is not None
    assert decoded.hidden.stats == STATS.digest
    assert Tensor("f16", (1, 8), 0, bytes(16)).stats == b""


@given(st.sampled_from(tensors.ENTROPY_CODECS), st.integers(1, 4000), st.integers(0, 2), st.binary(max_size=300))
def test_any_bytes_give_finite_numbers_or_an_error(codec: str, rows: int, plain: int, data: bytes) -> None:
    try:
        hidden = tensors.decode(Tensor(codec, (rows, 4), min(plain, rows), data), 4)
    except ProtocolError:
        return
    assert hidden.shape == (rows, 4)
    assert np.isfinite(hidden).all()


@given(st.integers(0, 10_000), st.integers(0, 255), st.booleans())
def test_altered_tensors_give_finite_numbers_or_an_error(at: int, byte: int, cut: bool) -> None:
    tensor = tensors.encode(HIDDEN, "ecsq4", plain=1, stats=STATS)
    data = bytearray(tensor.data)
    at %= len(data)
    data[at] = byte
    tensor.data = bytes(data[:at]) if cut else bytes(data)
    try:
        hidden = tensors.decode(tensor, WIDTH, stats=STATS)
    except ProtocolError:
        return
    assert not cut
    assert np.isfinite(hidden).all()


def test_a_huge_count_allocates_nothing() -> None:
    with pytest.raises(ProtocolError, match="truncated"):
        tensors.decode(Tensor("ecsq4", (4096, 16_000), 0, bytes(100)), 16_000)
    with pytest.raises(ProtocolError, match="rows are cut"):
        tensors.decode(Tensor("ecsq4", (2, WIDTH), 0, b"\0" * 4 + b"\xff\xff" + bytes(60)), WIDTH)
