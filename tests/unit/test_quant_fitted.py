"""Nested codes that are fitted to their inputs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.protocol.errors import QuantError
from isthmus.quant.fitted import Aim, fit
from isthmus.quant.groups import decode_rows, encode_rows, pack, unpack
from isthmus.quant.nested import WIDTHS, view
from isthmus.quant.rounding import Arrays

N, ROWS, COLS = 3, 20, 88  # the last group has 24 columns


@pytest.fixture(scope="module")
def weights() -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.random.default_rng(1).standard_normal((N, ROWS, COLS)).astype(np.float32)
    found *= np.float32(0.1)
    return found


@pytest.fixture(scope="module")
def moments() -> NDArray[np.float32]:
    rng = np.random.default_rng(2)
    mixing = rng.standard_normal((COLS, COLS)) * np.exp(rng.standard_normal(COLS))[:, None]
    inputs = rng.standard_normal((N, 400, COLS)) @ mixing
    found: NDArray[np.float32] = np.einsum("nti,ntj->nij", inputs, inputs).astype(np.float32)
    return found


def apart(arrays: Arrays, format: str, w: NDArray[np.float32], moments: NDArray[np.float32]) -> float:
    """Squared error of the outputs, as a share of the outputs'."""
    shares = []
    for i in range(len(w)):
        off = decode_rows(format, {name: array[i] for name, array in arrays.items()}, w.shape[2]) - w[i]
        error, whole = (np.einsum("ri,ij,rj->", x, moments[i], x, dtype=np.float64) for x in (off, w[i]))
        shares.append(error / whole)
    return float(np.mean(shares))


def rounded(w: NDArray[np.float32]) -> Arrays:
    each = [encode_rows(one, "n8") for one in w]
    return {name: np.stack([one[name] for one in each]) for name in each[0]}


def test_fitting_lessens_the_error_of_rounding(weights: NDArray[np.float32], moments: NDArray[np.float32]) -> None:
    plain, found = rounded(weights), fit(weights, moments, "n8")
    for format, share in (("n2", 0.8), ("n4", 0.5)):
        assert apart(found, format, weights, moments) < share * apart(plain, format, weights, moments)
    assert apart(found, "n8", weights, moments) < 0.02 * apart(found, "n4", weights, moments) + 1e-3


def test_each_width_is_best_where_it_alone_counts(weights: NDArray[np.float32], moments: NDArray[np.float32]) -> None:
    alone = {
        format: fit(weights, moments, "n8", aim)
        for format, aim in zip(WIDTHS, (Aim(1, 0, 0), Aim(0, 1, 0), Aim(0, 0, 1)), strict=True)
    }
    for format in WIDTHS:
        errors = {other: apart(arrays, format, weights, moments) for other, arrays in alone.items()}
        assert min(errors, key=lambda name: errors[name]) == format


def test_what_is_not_used_does_not_matter(weights: NDArray[np.float32]) -> None:
    """Only the inputs that come decide: here every second column is never used, and may be as wrong as it likes."""
    used = np.zeros((N, COLS, COLS), np.float32)
    used[:, np.arange(0, COLS, 2), np.arange(0, COLS, 2)] = 1
    found = fit(weights, used, "n4", Aim(0, 1, 0))
    off = [decode_rows("n4", {name: array[i] for name, array in found.items()}, COLS) - weights[i] for i in range(N)]
    errors = np.mean(np.square(off), axis=(0, 1))
    assert errors[::2].mean() < errors[1::2].mean()


@pytest.mark.parametrize("format", WIDTHS)
def test_arrays_pack_and_are_read_with_fewer_bits(format: str, weights: NDArray[np.float32]) -> None:
    found = fit(weights, None, format)
    matrix = pack(format, ROWS, COLS, {name: array[0] for name, array in found.items()})
    for name, array in unpack(matrix).items():
        assert np.array_equal(array, found[name][0])
    narrow = unpack(view(matrix, "n2"))
    assert np.array_equal(narrow["p0"], found["p0"][0])


def test_without_inputs_it_is_no_worse_than_rounding(weights: NDArray[np.float32]) -> None:
    plain, found = rounded(weights), fit(weights, None, "n8")
    same = np.broadcast_to(np.eye(COLS, dtype=np.float32), (N, COLS, COLS))
    for format in ("n2", "n4"):
        assert apart(found, format, weights, same) <= apart(plain, format, weights, same)


def test_zeros_stay_zeros() -> None:
    found = fit(np.zeros((1, 16, 32), np.float32), np.zeros((1, 32, 32), np.float32), "n8")
    for format in WIDTHS:
        assert not decode_rows(format, {name: array[0] for name, array in found.items()}, 32).any()


def test_it_does_not_change_what_it_is_given(weights: NDArray[np.float32], moments: NDArray[np.float32]) -> None:
    w, m = weights.copy(), moments.copy()
    fit(w, m, "n8")
    assert np.array_equal(w, weights)
    assert np.array_equal(m, moments)


def test_bad_input(weights: NDArray[np.float32]) -> None:
    with pytest.raises(QuantError, match="cannot fit 'q4'"):
        fit(weights, None, "q4")
    with pytest.raises(QuantError, match="moments are"):
        fit(weights, np.zeros((N, COLS, 4), np.float32), "n8")
    broken = weights.copy()
    broken[0, 0, 0] = np.nan
    with pytest.raises(QuantError, match="not finite"):
        fit(broken, None, "n8")
    with pytest.raises(QuantError, match="f16"):
        fit(weights * np.float32(1e8), None, "n8")
