"""The coder of symbols by their frequencies: what was written is read, in C and in Python, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol import rans
from isthmus.protocol.errors import ProtocolError

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "rans.json").read_text())


@pytest.fixture(params=["compiled", "python"])
def coder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute it; the compiled one must be there."""
    if request.param == "python":
        monkeypatch.setattr(rans, "native", lambda: None)
    else:
        assert rans.native() is not None
    return str(request.param)


def drawn(count: int, symbols: int, skew: float, seed: int) -> rans.Codes:
    shares = np.arange(1, symbols + 1, dtype=np.float64) ** -skew
    chance = np.random.default_rng(seed)
    return chance.choice(symbols, count, p=shares / shares.sum()).astype(np.uint8)


def table_of(codes: rans.Codes, symbols: int) -> rans.Frequencies:
    return rans.frequencies(np.bincount(codes, minlength=symbols).astype(np.int64))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 64, 1000])
@pytest.mark.parametrize("symbols", [1, 2, 16, 256])
def test_what_was_written_is_read(coder: str, count: int, symbols: int) -> None:
    codes = drawn(count, symbols, 1.5, count)
    table = table_of(codes, symbols)
    stream = rans.encode(codes, table)
    assert np.array_equal(rans.decode(memoryview(stream), table, count), codes)


@given(st.integers(1, 400), st.integers(1, 256), st.floats(0.0, 4.0), st.integers(0, 1 << 30))
def test_c_and_python_write_the_same(count: int, symbols: int, skew: float, seed: int) -> None:
    codes = drawn(count, symbols, skew, seed)
    table = table_of(codes, symbols)
    stream = rans.encode(codes, table)
    assert rans._encode(codes, table) == stream
    states, words = np.frombuffer(stream, "<u4", 4), np.frombuffer(stream, "<u2", offset=16)
    assert np.array_equal(rans._decode(states, words, table, count), codes)


def test_it_takes_hardly_more_than_the_entropy() -> None:
    codes = drawn(100_000, 16, 1.0, 5)
    shares = np.bincount(codes, minlength=16) / len(codes)
    entropy = float(-(shares * np.log2(shares)).sum()) * len(codes) / 8
    assert entropy <= len(rans.encode(codes, table_of(codes, 16))) < 1.002 * entropy + 32


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=256).filter(any))
def test_frequencies_have_their_sum_and_no_symbol_is_lost(counts: list[int]) -> None:
    table = rans.frequencies(np.array(counts, np.int64))
    assert int(table.sum(dtype=np.int64)) == rans.TOTAL
    assert [bool(one) for one in table] == [bool(one) for one in counts]


@pytest.mark.parametrize("case", VECTORS["streams"], ids=lambda case: case["about"])
def test_vectors_for_other_languages(coder: str, case: dict[str, object]) -> None:
    codes = np.array(case["codes"], np.uint8)
    table = np.array(case["frequencies"], np.uint16)
    stream = bytes.fromhex(str(case["stream"]))
    assert rans.encode(codes, table) == stream
    assert np.array_equal(rans.decode(memoryview(stream), table, len(codes)), codes)


def test_what_was_altered_is_refused_or_of_the_same_length(coder: str) -> None:
    codes = drawn(200, 16, 1.0, 1)
    table = table_of(codes, 16)
    stream = rans.encode(codes, table)
    refused = 0
    for at in range(len(stream)):
        broken = bytearray(stream)
        broken[at] ^= 0x55
        try:
            assert len(rans.decode(memoryview(bytes(broken)), table, 200)) == 200
        except ProtocolError:
            refused += 1
    assert refused > 0.99 * len(stream)  # the coders end where they began


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 17, 18])
def test_what_was_cut_off_is_refused(coder: str, cut: int) -> None:
    codes = drawn(200, 16, 1.0, 1)
    table = table_of(codes, 16)
    with pytest.raises(ProtocolError):
        rans.decode(memoryview(rans.encode(codes, table)[:cut]), table, 200)


@pytest.mark.parametrize("table", [[1], [4096, 1], [0] * 16, [4095]])
def test_frequencies_of_another_sum_are_refused(coder: str, table: list[int]) -> None:
    with pytest.raises(ProtocolError, match="sum"):
        rans.decode(memoryview(bytes(16)), np.array(table, np.uint16), 4)


def test_more_words_than_values_are_refused(coder: str) -> None:
    with pytest.raises(ProtocolError, match="20 bytes for 1"):
        rans.decode(memoryview(bytes(20)), np.array([4096], np.uint16), 1)
