"""Nested planes: the three widths of one matrix."""

import numpy as np
import pytest

from isthmus.protocol.errors import QuantError
from isthmus.quant.groups import dequantize, quantize, unpack
from isthmus.quant.nested import view


def weights(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(11).standard_normal((rows, cols)).astype(np.float32)


def test_codes_follow_the_definition() -> None:
    w = weights(24, 64)
    a = unpack(quantize(w, "n8"))
    groups = w.reshape(24, 2, 32)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(2)[..., None], 2)[..., 0]
    s4 = (extreme / -8).astype(np.float16)
    assert np.array_equal(a["s4"], s4)
    exact = 16 * (groups / s4.astype(np.float64)[..., None] + 8.5)
    codes = (a["p0"] << 6 | a["p1"] << 4 | a["p2"]).reshape(24, 2, 32)
    sure = np.abs(exact - np.rint(exact)) > 1e-3
    assert np.array_equal(codes[sure], np.clip(np.floor(exact), 0, 255)[sure])
    basis = (codes >> 6) - 1.625
    s2 = (groups * basis).sum(2) / (basis**2).sum(2)
    assert np.allclose(a["s2"].astype(float), s2, rtol=1e-3)


def test_four_bits_are_q4() -> None:
    w = weights(24, 70)
    four, q4 = unpack(view(quantize(w, "n8"), "n4")), unpack(quantize(w, "q4"))
    assert np.array_equal(four["s4"], q4["scales"])
    assert np.array_equal(four["p0"] << 2 | four["p1"], q4["codes"])
    assert np.array_equal(dequantize(view(quantize(w, "n8"), "n4")), dequantize(quantize(w, "q4")))


def test_eight_bits_use_a_sixteenth_of_the_scale() -> None:
    matrix = quantize(weights(24, 64), "n8")
    a = unpack(matrix)
    codes = (a["p0"] << 6 | a["p1"] << 4 | a["p2"]).astype(np.float32)
    scales = np.repeat(a["s4"].astype(np.float32) / 16, 32, axis=1)
    assert np.array_equal(dequantize(matrix), scales * (codes - np.float32(135.5)))


def test_error_of_each_width() -> None:
    w = weights(256, 512)
    n8 = quantize(w, "n8")
    error = {f: np.mean((dequantize(view(n8, f)) - w) ** 2) / np.mean(w**2) for f in ("n2", "n4", "n8")}
    assert error["n2"] < 0.125 and error["n4"] < 0.01 and error["n8"] < 1e-4


def test_padded_columns_have_no_say_in_the_scale() -> None:
    w = weights(4, 40)
    a = unpack(quantize(w, "n2"))
    tail, basis = w[:, 32:], a["p0"][:, 32:] - 1.625
    assert np.allclose(a["s2"][:, 1].astype(float), (tail * basis).sum(1) / (basis**2).sum(1), rtol=1e-3)


def test_a_view_shares_its_arrays() -> None:
    n8 = quantize(weights(16, 32), "n8")
    n4 = view(n8, "n4")
    assert n4.format == "n4" and set(n4.arrays) == {"p0", "s2", "p1", "s4"}
    assert all(n4.arrays[name] is n8.arrays[name] for name in n4.arrays)
    assert n4.nbytes * 8 == 16 * 32 * 5  # 5.0 bits a weight
    with pytest.raises(QuantError, match="lacks the planes"):
        view(n4, "n8")
    with pytest.raises(QuantError, match="only n2, n4, n8"):
        view(quantize(weights(16, 32), "q4"), "n2")
