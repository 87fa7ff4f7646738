"""The safetensors container: ours read by the official package, theirs by ours, and damaged ones refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from isthmus.protocol.errors import BundleError, ModelError
from isthmus.quant.groups import dequantize, quantize
from isthmus.quant.packed import FORMATS, PackedMatrix
from isthmus.split.tensorfile import ALIGN, TensorFile, encode

RNG = np.random.default_rng(0)
WEIGHTS = {format: quantize(RNG.standard_normal((33, 40)).astype(np.float32), format)
           for format in ("f32", "f16", "bf16", "q8", "q4", "q4m", "n8")}  # fmt: skip
NORM = RNG.standard_normal(7).astype(np.float32)


def write(path: Path) -> Path:
    path.write_bytes(b"".join(encode({"norm": NORM, **WEIGHTS})))
    return path


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    file = TensorFile(write(tmp_path / "a.safetensors"))
    found = file.weights()
    assert set(found) == {"norm", *WEIGHTS}
    assert np.array_equal(np.asarray(found["norm"]), NORM)
    for format, matrix in WEIGHTS.items():
        back = found[format]
        assert isinstance(back, PackedMatrix) and (back.format, back.rows, back.cols) == (format, 33, 40)
        assert set(back.arrays) == set(FORMATS[format])
        assert np.array_equal(dequantize(back), dequantize(matrix))


def test_arrays_are_views_of_the_mapped_file_and_aligned(tmp_path: Path) -> None:
    file = TensorFile(write(tmp_path / "a.safetensors"))
    start = np.frombuffer(file.buffer, np.uint8).ctypes.data
    for name in ("q4m.codes", "q4m.scales", "n8.p1", "f16.w"):
        array = file.array(name)
        assert not array.flags.writeable and not array.flags.owndata
        assert (array.ctypes.data - start) % (64 if array.nbytes % 64 == 0 else 32) == 0
    assert struct.unpack_from("<Q", file.buffer)[0] % ALIGN == ALIGN - 8


def test_the_official_package_reads_it(tmp_path: Path) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    found = numpy_files.load_file(write(tmp_path / "a.safetensors"))
    assert np.array_equal(found["q4m.codes"], WEIGHTS["q4m"].arrays["codes"])
    assert np.array_equal(np.asarray(found["norm"]), NORM)


def test_the_official_packages_files_are_read(tmp_path: Path) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    tensors: dict[str, NDArray[Any]] = {
        "a": NORM,
        "b": RNG.integers(-5, 5, (3, 4)).astype(np.int8),
        "c": np.ones((2, 1, 2), np.float16),
    }
    numpy_files.save_file(tensors, tmp_path / "t.safetensors")
    file = TensorFile(tmp_path / "t.safetensors", ModelError)
    for name, expected in tensors.items():
        assert np.array_equal(file.array(name), expected) and file.array(name).dtype == expected.dtype


def header(fields: object, data: bytes = b"\0" * 64) -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "cannot read"),
        (b"\0" * 5, "5 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "claims"),
        (struct.pack("<Q", 4) + b"nope", "header cannot be read"),
        (header([1]), "header cannot be read"),
        (header({"a": {"dtype": "F32", "shape": [4]}}), "header cannot be read"),
        (header({"a": {"dtype": "F8", "shape": [4], "data_offsets": [0, 4]}}), "has type F8"),
        (header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}), "stands at"),
        (header({"a": {"dtype": "F32", "shape": [400], "data_offsets": [0, 1600]}}), "stands at"),
        (header({"a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}), "stands at"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}), "stands at"),
        (header({"a": {"dtype": "F32", "shape": [0, 10**300], "data_offsets": [0, 0]}}), "stands at"),
        (header({"a": {"dtype": "F32", "shape": [0] * 99_999, "data_offsets": [0, 0]}}), "stands at"),
        (header({"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 0]}}), "header cannot be read"),
        (header({"__metadata__": {"matrices": "7"}}), "not described"),
        (header({"__metadata__": {"matrices": "[" * 100_000}}), "not described"),
        (header({"__metadata__": {"matrices": '{"m":{"format":"q8","rows":1e999,"cols":1}}'}}), "not described"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=says) as caught:
        TensorFile(path).weights()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("described", "says"),
    [
        ({"format": "q3", "rows": 1, "cols": 1}, "unknown"),
        ({"format": "q8", "rows": 0, "cols": 1}, "0 rows"),
        ({"format": "q8", "rows": 64, "cols": 40}, "does not fit format q8"),
        ({"format": "q4", "rows": 33, "cols": 40}, "does not fit format q4"),
        ({"format": "q8", "rows": 33, "cols": 41, "shift": 1}, "is not aligned"),
        ({"format": "n2", "rows": 33, "cols": 40}, "no tensor"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(tmp_path: Path, described: dict[str, object], says: str) -> None:
    data = b"".join(encode({"m": WEIGHTS["q8"]}))
    length = struct.unpack_from("<Q", data)[0]
    fields = json.loads(data[8 : 8 + length])
    for entry in [e for name, e in fields.items() if name.startswith("m.") and described.get("shift")]:
        entry["data_offsets"] = [at + 1 for at in entry["data_offsets"]]
    fields["__metadata__"]["matrices"] = json.dumps({"m": described})
    path = tmp_path / "bad.safetensors"
    path.write_bytes(header(fields, data[8 + length :] + b"\0"))
    with pytest.raises(BundleError, match=says):
        TensorFile(path).weights()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_headers_never_read_beyond_the_file(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(b"".join(encode({"norm": NORM, "m": WEIGHTS["q4m"]})))
    end = raw.index(b"   ")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    path = tmp_path / "fuzzed.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1, 100]))])
    try:
        found = TensorFile(path).weights()
    except BundleError as error:
        assert error.remedy
    else:
        for value in found.values():
            if isinstance(value, PackedMatrix):
                assert all(array.tobytes() for array in value.arrays.values())
            else:
                value.tobytes()
