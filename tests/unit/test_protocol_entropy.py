"""Entropy coder: every code comes back, every stream is the only one of its row, and nothing else gets through."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol.entropy import MAX_CODE, MAX_K, RowCoder, max_bytes
from isthmus.protocol.errors import ProtocolError

SPREADS = st.lists(st.integers(0, MAX_K), min_size=1, max_size=40)
BROKEN = (b"", bytes(1), bytes(500), b"\x00\x01", b"\xff" * 3, b"\xff" * 200, b"\x00" * 2 + b"\xff" * 30)


def by_hand(codes: list[int], spreads: list[int]) -> bytes:
    """The stream as the module's text describes it, bit by bit."""
    unary, places = "", ""
    for code, k in zip(codes, spreads, strict=True):
        first, rest = (k + 1) // 2, k // 2
        u = 2 * code if code >= 0 else -2 * code - 1
        bucket = 0 if u < 2**first else 1 + (u - 2**first) // 2**rest
        if bucket == 0:
            places += f"{u:0{first}b}" if first else ""
        elif bucket < 15:
            places += f"{(u - 2**first) % 2**rest:0{rest}b}" if rest else ""
        else:
            bucket, places = 15, places + f"{u:016b}"
        unary += "0" * bucket + "1"
    bits = unary + places
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))


@given(SPREADS, st.data())
def test_every_code_comes_back_from_the_bits_that_the_text_describes(spreads: list[int], data: st.DataObject) -> None:
    code = st.one_of(st.integers(-MAX_CODE, MAX_CODE), st.integers(-9, 9))
    codes = data.draw(st.lists(code, min_size=len(spreads), max_size=len(spreads)))
    coder = RowCoder(tuple(spreads))
    stream = coder.encode(np.array(codes, np.int64))
    assert stream == by_hand(codes, spreads)
    assert len(stream) <= max_bytes(len(spreads))
    assert coder.decode(stream).tolist() == codes


@pytest.mark.parametrize("k", [4, 5, 9, 12])
def test_normal_codes_take_a_tenth_of_a_bit_more_than_their_entropy(k: int) -> None:
    deviation = 2.0 ** (k / 2)
    codes = np.rint(np.random.default_rng(k).standard_normal(20_000) * deviation).astype(np.int64)
    entropy = np.log2(deviation * np.sqrt(2 * np.pi * np.e))
    assert entropy - 0.03 < 8 * len(RowCoder((k,) * 20_000).encode(codes)) / 20_000 < entropy + 0.12


def test_the_longest_row_is_as_long_as_is_said() -> None:
    stream = RowCoder((0,) * 11).encode(np.full(11, MAX_CODE, np.int64))
    assert len(stream) == max_bytes(11)


def test_bytes_of_one_row_are_golden() -> None:
    codes = (np.arange(64) * 37 % 61 - 30) * (1 + np.arange(64) % 7 // 6 * 40)
    stream = RowCoder(tuple((np.arange(64) % 9).tolist())).encode(codes)
    assert stream[:8].hex() == "0001000400040005"
    assert hashlib.sha256(stream).hexdigest() == "f23f9483ee46077388c6662d9f6e09c3dc51fc074099bfce65be4edaa62276bc"


@pytest.mark.parametrize("stream", BROKEN)
def test_what_encode_does_not_write_is_refused(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        RowCoder((3,) * 24).decode(stream)


@given(st.binary(max_size=120))
def test_any_bytes_are_refused_or_the_only_stream_of_their_codes(stream: bytes) -> None:
    coder = RowCoder((0, 1, 2, 3, 5, 8, 11, 20))
    try:
        codes = coder.decode(stream)
    except ProtocolError:
        return
    assert np.abs(codes).max() <= MAX_CODE
    assert coder.encode(codes) == stream


@given(st.integers(0, 399), st.integers(0, 7), st.booleans())
def test_altered_rows_are_refused_or_other_rows(at: int, bit: int, cut: bool) -> None:
    coder = RowCoder((6,) * 400)
    codes = np.rint(np.random.default_rng(1).standard_t(3, 400) * 8).astype(np.int64)
    stream = bytearray(coder.encode(codes))
    at %= len(stream)
    stream[at] ^= 1 << bit
    given_bytes = bytes(stream[:at]) if cut else bytes(stream)
    try:
        decoded = coder.decode(given_bytes)
    except ProtocolError:
        return
    assert not cut
    assert coder.encode(decoded) == given_bytes
    assert not np.array_equal(decoded, codes)
