"""A network of more than two gigabytes, whose weights lie beside it: planned, cut, and run in a cloud and here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.apps.bench.machine import read_machine

WIDTH, LAYERS = 14_000, 3  # 2.35 GB: more than one file of the format holds
NEEDED = 12 << 30  # of memory and of disk
ROOMY = read_machine().memory.available_bytes


def isthmus(*arguments: str, folder: Path) -> None:
    command = [sys.executable, "-m", "isthmus.apps.cli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr


def large(path: Path) -> Path:
    """Matrices one after the other, all zeros but the diagonal's first values; the file of weights is sparse."""
    names = ["x", *(f"y{at}" for at in range(LAYERS))]
    nodes = [helper.make_node("MatMul", [names[at], f"w{at}"], [names[at + 1]]) for at in range(LAYERS)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH]) for name in (names[0], names[-1])]
    size, weights = 4 * WIDTH * WIDTH, []
    with (path.parent / "model.weights").open("wb") as file:
        for at in range(LAYERS):
            tensor = TensorProto(name=f"w{at}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "model.weights"), ("offset", at * size), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
            weights.append(tensor)
            for row in range(8):
                file.seek(at * size + 4 * row * (WIDTH + 1))
                file.write(np.float32(at + row + 2).tobytes())
        file.truncate(LAYERS * size)
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(made.SerializeToString())
    return path


@pytest.mark.timeout(900)
def test_more_than_two_gigabytes(tmp_path: Path) -> None:
    if min(shutil.disk_usage(tmp_path).free, ROOMY or 0) < NEEDED:
        pytest.skip(f"it takes {NEEDED >> 30} GiB of memory and of disk")
    large(tmp_path / "model.onnx")
    assert onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).ByteSize() < 1 << 20
    x = np.zeros((1, WIDTH), np.float32)
    x[0, :8] = np.arange(1, 9)
    np.savez(tmp_path / "x.npz", x=x)
    isthmus("plan", "model.onnx", "--cloud", "4", "--link", "rtt=1,up=100,down=100", "--no-measure", folder=tmp_path)
    isthmus("split", "model.onnx", "--plan", "model.plan.json", "-o", "cut", folder=tmp_path)
    sizes = [(tmp_path / "cut" / side / "model.weights").stat().st_size for side in ("device", "cloud")]
    assert sum(sizes) >= LAYERS * 4 * WIDTH * WIDTH > 1 << 31
    (tmp_path / "model.weights").unlink()  # the parts have their own
    with fresh_keys("tests") as keys, CloudProcess(tmp_path / "cut", keys, 1) as cloud:
        asked = ["--cloud", cloud.address, "--keys", str(keys), "--mode", "split", "-o", "y.npz"]
        isthmus("run", "cut", "--input", "x.npz", *asked, folder=tmp_path)
    with np.load(tmp_path / "y.npz") as found:
        (y,) = found.values()
    wanted = x[0, :8] * np.prod([np.arange(8) + at + 2 for at in range(LAYERS)], axis=0)
    np.testing.assert_allclose(y[0, :8], wanted, rtol=1e-6)
    assert not y[0, 8:].any()
