"""Packing, quantizing and dequantizing, against formulas written out here."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.protocol.errors import QuantError
from isthmus.quant.groups import QUANTIZABLE, dequantize, pack, quantize, shapes, unpack
from isthmus.quant.packed import FORMATS

SIZES = [(16, 32), (48, 96), (5, 40), (33, 7), (1, 1), (17, 64)]


def weights(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def random_values(format: str, rows: int, cols: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    n_groups = -(-cols // 32)
    out = {}
    for name, (dtype, _) in shapes(format, rows, cols).items():
        if name in ("w",):
            out[name] = rng.integers(0, 2**15, (rows, cols)).astype(dtype)
        elif name in ("scales", "mins", "s2", "s4"):
            out[name] = rng.standard_normal((rows, n_groups * (2 if format == "q8x" else 1))).astype(dtype)
        else:
            top = {"p0": 4, "p1": 4, "p2": 16, "codes": 256 if format in ("q8", "q8x") else 16}[name]
            out[name] = rng.integers(0, top, (rows, cols)).astype(np.uint8)
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_unpack_gives_back_what_was_packed(format: str, size: tuple[int, int]) -> None:
    values = random_values(format, *size, seed=1)
    matrix = pack(format, *size, values)
    assert set(matrix.arrays) == set(FORMATS[format])
    for name, array in unpack(matrix).items():
        assert np.array_equal(array, values[name]), name


def test_a_chunk_of_rows_unpacks_alone() -> None:
    values = random_values("q4m", 50, 64, seed=2)
    part = unpack(pack("q4m", 50, 64, values), 16, 40)
    assert np.array_equal(part["codes"], values["codes"][16:40])
    assert np.array_equal(part["mins"], values["mins"][16:40])


def test_bytes_stand_where_the_layout_says() -> None:
    rows, cols = 32, 64
    codes = (np.arange(rows * cols).reshape(rows, cols) * 7 % 256).astype(np.uint8)
    scales = np.arange(rows * 2).reshape(rows, 2).astype(np.float16)
    q8 = pack("q8", rows, cols, {"codes": codes, "scales": scales})
    q4 = pack("q4", rows, cols, {"codes": codes & 15, "scales": scales})
    planes = {"p0": codes >> 6, "s2": scales}
    n2 = pack("n2", rows, cols, planes)
    f32 = pack("f32", rows, cols, {"w": codes.astype(np.float32)})
    for r, c in [(0, 0), (1, 5), (17, 33), (31, 63), (20, 14)]:
        block, byte, vec = r // 16, 4 * (r % 16) + c % 4, c // 4
        assert q8.arrays["codes"][block, vec, byte] == codes[r, c]
        assert q4.arrays["codes"][block, vec // 2, byte] >> (4 * (vec % 2)) & 15 == codes[r, c] & 15
        assert n2.arrays["p0"][block, vec // 4, byte] >> (2 * (vec % 4)) & 3 == codes[r, c] >> 6
        assert q8.arrays["scales"][block, c // 32, r % 16] == scales[r, c // 32]
        assert f32.arrays["w"][block, c, r % 16] == codes[r, c]


@pytest.mark.parametrize("format", [f for f in FORMATS if f not in ("f32", "f16", "bf16")])
def test_padding_rows_have_no_scale(format: str) -> None:
    matrix = pack(format, 5, 40, random_values(format, 5, 40, seed=3))
    for name, array in matrix.arrays.items():
        if name in ("scales", "mins", "s2", "s4"):
            assert array[0, 0, :5].any() and not array[:, :, 5:].any()


def test_q8_is_absmax_over_127() -> None:
    w = weights(20, 96)
    values = unpack(quantize(w, "q8"))
    groups = w.reshape(20, 3, 32)
    scales = (np.abs(groups).max(2) / 127).astype(np.float16)
    assert np.array_equal(values["scales"], scales)
    error = np.abs(dequantize(quantize(w, "q8")).reshape(20, 3, 32) - groups)
    assert (error <= scales.astype(np.float32)[..., None] * 0.56).all()


def test_q4_maps_the_extreme_to_code_0() -> None:
    w = weights(20, 96)
    values = unpack(quantize(w, "q4"))
    groups, codes = w.reshape(20, 3, 32), values["codes"].reshape(20, 3, 32)
    extreme = np.abs(groups).argmax(2)[..., None]
    assert (np.take_along_axis(codes, extreme, 2) == 0).all()
    wide = values["scales"].astype(np.float64)[..., None]
    assert (codes == np.clip(np.floor(groups / wide + 8.5), 0, 15)).mean() > 0.9999


def test_q4m_reaches_minimum_and_maximum() -> None:
    w = weights(20, 96) + 3
    values = unpack(quantize(w, "q4m"))
    groups, codes = w.reshape(20, 3, 32), values["codes"].reshape(20, 3, 32)
    assert np.array_equal(values["mins"], groups.min(2).astype(np.float16))
    assert (np.take_along_axis(codes, groups.argmin(2)[..., None], 2) == 0).all()
    assert (np.take_along_axis(codes, groups.argmax(2)[..., None], 2) == 15).all()


@pytest.mark.parametrize(("format", "limit"), [("f32", 0), ("bf16", 2e-3), ("f16", 3e-4), ("q8", 8e-3), ("q4", 0.11),
                                               ("q4m", 0.1), ("n8", 0.03), ("n4", 0.11), ("n2", 0.6)])  # fmt: skip
@pytest.mark.parametrize("size", SIZES)
def test_rounding_error_is_what_the_width_allows(format: str, limit: float, size: tuple[int, int]) -> None:
    w = weights(*size, seed=7)
    back = dequantize(quantize(w, format))
    assert back.shape == w.shape and back.dtype == np.float32
    assert np.linalg.norm(back - w) <= limit * np.linalg.norm(w)


def test_bf16_ties_go_to_even() -> None:
    bits = np.array([[0x3F808000, 0x3F818000, 0x3F808001, 0xC0000000]], np.uint32)
    assert unpack(quantize(bits.view(np.float32), "bf16"))["w"].tolist() == [[0x3F80, 0x3F82, 0x3F81, 0xC000]]


@pytest.mark.parametrize("format", QUANTIZABLE)
def test_zeros_stay_zeros(format: str) -> None:
    assert not dequantize(quantize(np.zeros((16, 32), np.float32), format)).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.floats(-30, 3), st.integers(0, 2**31), st.sampled_from(QUANTIZABLE))
def test_any_size_and_magnitude_survives(rows: int, cols: int, power: float, seed: int, format: str) -> None:
    w = weights(rows, cols, seed) * np.float32(10.0**power)
    back = dequantize(quantize(w, format))
    assert np.isfinite(back).all()
    assert np.abs(back - w).max() <= np.abs(w).max() + 1e-6


def test_what_cannot_be_quantized_is_refused() -> None:
    w = weights(2, 32)
    with pytest.raises(QuantError, match="choose one of"):
        quantize(w, "q4x")
    with pytest.raises(QuantError, match="unknown"):
        shapes("q3", 1, 1)
    with pytest.raises(QuantError, match="exceeds f16"):
        quantize(w * np.float32(1e9), "q4")
    w[1, 3] = np.nan
    with pytest.raises(QuantError, match="not finite"):
        quantize(w, "q8")
    with pytest.raises(QuantError, match="must have shape"):
        pack("q8", 2, 32, {"codes": np.zeros((2, 32), np.uint8), "scales": np.zeros((2, 2), np.float16)})
    with pytest.raises(QuantError, match="missing"):
        pack("q8", 2, 32, {"codes": np.zeros((2, 32), np.uint8)})
