"""Linear maps of every weight format on every kernel family, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.engine.binding import Memory, Workers, check, cpu_names, native
from isthmus.protocol.errors import EngineError
from isthmus.quant.groups import dequantize
from isthmus.quant.packed import FORMATS, PackedMatrix
from tests.random_model import random_matrix

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")

SIZES = [(16, 32), (1, 1), (40, 200), (133, 77), (33, 1040)]  # rows, cols
BATCHES = range(1, 18)
FLOATS = ("f32", "f16", "bf16")


def activations(rows: int, cols: int, seed: int = 0) -> NDArray[np.float32]:
    """[rows, cols] f32 of very different sizes, with a group of zeros, one below the smallest step and an outlier."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, cols)) * 10.0 ** rng.uniform(-3, 3, (rows, 1))).astype(np.float32)
    x[rows // 2, : min(32, cols)] = 0
    x[0, : min(32, cols)] = 1e-31
    x[-1, -1] = -500
    return x


def padded(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """[rows, cols] -> [rows, 32 G], zeros behind."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % 32)))


def quantized(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """What `quantize` of kernels_body.h makes of [rows, cols] f32: int8 times a scale per 32, in float64."""
    groups = padded(x).reshape(len(x), -1, 32)
    top = np.abs(groups).max(axis=2)
    flat = ~(top > np.float32(1e-30))
    factor = np.divide(np.float32(127), top, out=np.zeros_like(top), where=~flat)
    q = np.rint(groups * factor[..., None])
    scale = np.where(flat, np.float32(0), top / np.float32(127)).astype(np.float64)
    back: NDArray[np.float64] = q.astype(np.float64) * scale[..., None]
    return back.reshape(len(x), -1)[:, : x.shape[1]]


def linear(workers: Workers, matrix: PackedMatrix, x: NDArray[np.float32], fine: int) -> NDArray[np.float32]:
    """im_linear: [n, cols] f32 -> [n, rows padded to 16] f32."""
    module, memory = native(), Memory()
    cell = module.ffi.new("im_matrix *")
    memory.matrix(cell[0], matrix)
    x, y = padded(x), np.full((len(x), -(-matrix.rows // 16) * 16), np.nan, np.float32)
    pointers = [module.ffi.cast("float *", a.ctypes.data) for a in (x, y)]
    assert module.lib.im_linear(workers.engine, cell, pointers[0], len(x), fine, pointers[1]) == 0
    return y


@pytest.fixture(scope="module")
def all_workers() -> list[Workers]:
    """Every kernel family with one, two and three threads."""
    return [Workers(threads, cpu) for cpu in cpu_names() for threads in (1, 2, 3)]


def error(y: NDArray[np.float32], x: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Largest error in units of what the products of a row add up to."""
    size = np.abs(x) @ np.abs(weights).T + 1e-30
    return float((np.abs(y[:, : len(weights)] - x @ weights.T) / size).max())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_linear_is_the_float64_product(format: str, rows: int, cols: int, all_workers: list[Workers]) -> None:
    matrix = random_matrix(format, rows, cols, np.random.default_rng(rows))
    weights = dequantize(matrix).astype(np.float64)
    x, tolerance = activations(17, cols), 4e-6 if "mins" in matrix.arrays else 1e-6  # s q and m cancel
    for fine in (0, 1):
        y = linear(all_workers[0], matrix, x, fine)
        if format in FLOATS or fine:
            # 16 bits of an activation leave 1 / 64516 of its group's largest, which is not its own size
            slack = np.abs(padded(x)).reshape(len(x), -1, 32).max(axis=2).repeat(32, axis=1)[:, :cols] / 64000
            bound = 0 if format in FLOATS else slack.astype(np.float64) @ np.abs(weights).T
            size = np.abs(x).astype(np.float64) @ np.abs(weights).T
            off = np.abs(y[:, :rows] - x.astype(np.float64) @ weights.T)
            assert (off <= bound + tolerance * size + 1e-28).all(), (fine, off.max())
        else:
            assert error(y, quantized(x), weights) < tolerance
        assert not y[:, rows:].any()  # padded rows are zero, not left over


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(133, 77), (40, 200)])
def test_families_threads_and_batches_give_the_same_bits(
    format: str, rows: int, cols: int, all_workers: list[Workers]
) -> None:
    matrix = random_matrix(format, rows, cols, np.random.default_rng(cols))
    x = activations(17, cols, 3)
    for fine in (0, 1):
        expected = np.concatenate([linear(all_workers[0], matrix, x[i : i + 1], fine) for i in range(17)])
        for workers in all_workers:
            for n in BATCHES if workers.threads == 1 else (1, 5, 17):
                y = linear(workers, matrix, x[17 - n :], fine)
                assert y.tobytes() == expected[17 - n :].tobytes(), (workers.cpu, workers.threads, n, fine)


@pytest.mark.parametrize("format", [f for f in FORMATS if f not in FLOATS])
def test_the_largest_codes_do_not_saturate(format: str, all_workers: list[Workers]) -> None:
    """All codes and activations at their limits: 16-bit sums of products would overflow here."""
    matrix = random_matrix(format, 16, 64, np.random.default_rng(0))
    for array in matrix.arrays.values():
        if array.dtype == np.uint8:
            array.view(np.uint8)[...] = 255
    weights = dequantize(matrix).astype(np.float64)
    x = np.ones((2, 64), np.float32)
    x[1] = -1
    for workers in all_workers:
        for fine in (0, 1):
            assert error(linear(workers, matrix, x, fine), x.astype(np.float64), weights) < 1e-6


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cols", [1, 32, 77, 96])
def test_embedding_rows_are_the_dequantized_weights(format: str, cols: int) -> None:
    matrix = random_matrix(format, 37, cols, np.random.default_rng(cols))
    expected, module, memory = dequantize(matrix), native(), Memory()
    cell = module.ffi.new("im_matrix *")
    memory.matrix(cell[0], matrix)
    for token in range(37):
        x = np.full(-(-cols // 32) * 32, np.nan, np.float32)
        module.lib.im_embed(cell, token, module.ffi.cast("float *", x.ctypes.data))
        assert x[:cols].tobytes() == expected[token].tobytes()
        assert not x[cols:].any()


@pytest.mark.parametrize("format", FORMATS)
def test_arrays_of_another_size_are_refused(format: str) -> None:
    matrix = random_matrix(format, 20, 40, np.random.default_rng(0))
    check(matrix)
    for name, array in matrix.arrays.items():
        if name == "s2" and format != "n2":
            continue  # the scales of the narrower view, which this width never reads
        wrong: dict[str, Any] = {**matrix.arrays, name: array[:1]}
        with pytest.raises(EngineError, match=f"{name} of a {format} matrix"):
            check(PackedMatrix(format, 20, 40, wrong))
        del wrong[name]
        with pytest.raises(EngineError, match=f"{name} of a {format} matrix"):
            check(PackedMatrix(format, 20, 40, wrong))
    with pytest.raises(EngineError, match="format"):
        check(PackedMatrix("q3", 20, 40, matrix.arrays))


def test_an_unknown_family_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="'mmx' kernels"):
        Workers(1, "mmx")
    monkeypatch.setenv("ISTHMUS_CPU", "plain")
    assert Workers(1).cpu == "plain"
    monkeypatch.setenv("ISTHMUS_CPU", "mmx")
    with pytest.raises(EngineError, match="choose among"):
        Workers(1)
    monkeypatch.delenv("ISTHMUS_CPU")
    assert Workers(1).cpu == cpu_names()[0]
    for threads in (0, 257):
        with pytest.raises(EngineError, match="threads"):
            Workers(threads)
