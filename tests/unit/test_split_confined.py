"""Work in a child process: what it gives, and how it ends when it must."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from isthmus.protocol.errors import PlanError
from isthmus.split.confined import confined
from isthmus.split.onnx_file import digest, read_model
from tests.unit.test_split_onnx_file import saved

MEASURE = "isthmus.split.onnx_measure:measure"


def test_a_child_gives_what_the_function_gives(tmp_path: Path) -> None:
    path = saved(tmp_path)
    told = confined(MEASURE, str(path), 1, {"x": [4, 8]}, 0.05, what="measuring")
    assert told["model"] == digest(path, read_model(path))
    assert told["ops"] == ["MatMul"] * 3 and told["weights"] == [256] * 3
    assert told["tensors"]["y1"] == ["float32", [4, 8], 128]
    assert sum(told["nodes_ms"]) == pytest.approx(told["whole_ms"])


def test_an_error_of_ours_is_the_same_here(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"GGUF" * 9)
    with pytest.raises(PlanError, match="no ONNX file"):
        confined(MEASURE, str(path), 1, {}, 0.1, what="measuring")
    with pytest.raises(PlanError, match=r"No such file.*absent\.onnx"):
        confined(MEASURE, str(tmp_path / "absent.onnx"), 1, {}, 0.1, what="measuring")


def test_an_operator_that_nobody_knows_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = onnx.load(str(path))
    model.graph.node[1].op_type = "Frobnicate"
    onnx.save_model(model, str(path))
    with pytest.raises(PlanError, match="Frobnicate"):
        confined(MEASURE, str(path), 1, {"x": [4, 8]}, 0.1, what="measuring")

    model.graph.node[1].name = "conv/7"
    onnx.save_model(model, str(path))
    with pytest.raises(PlanError, match="conv/7"):  # by the name that its own file has
        confined(MEASURE, str(path), 1, {"x": [4, 8]}, 0.1, what="measuring")


def test_a_package_that_is_absent_is_named_with_what_brings_it() -> None:
    with pytest.raises(PlanError, match=r"nothing_such is not installed; pip install 'isthmus\[plan\]'"):
        confined("nothing_such:plan", what="planning")


@pytest.mark.parametrize(
    ("call", "limits", "problem"),
    [
        ("tests.runaways:spin", {"seconds": 1}, "more than 1 s of the processor"),
        ("tests.runaways:hoard", {"memory_bytes": 1 << 30}, "more than 1 GiB of memory"),
        ("tests.runaways:killed", {}, "was killed, most likely because memory ran out"),
        ("tests.runaways:crash", {}, "ended with signal 11"),
    ],
)
def test_a_child_that_takes_too_much_or_breaks_is_one_error(
    monkeypatch: pytest.MonkeyPatch, call: str, limits: dict[str, int], problem: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # where `tests` is
    with pytest.raises(PlanError, match=problem):
        confined(call, what="measuring", **limits)


def test_a_shell_with_lower_limits_may_plan_as_well(tmp_path: Path) -> None:
    """`ulimit -v` stands, where it is below what the child would be given."""
    path = saved(tmp_path)
    script = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from isthmus.split.confined import confined
print(confined({MEASURE!r}, {str(path)!r}, 1, {{"x": [4, 8]}}, 0.05, what="measuring")["name"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == path.stem, done.stderr


def test_what_sleeps_is_ended_as_well() -> None:
    with pytest.raises(PlanError, match="resting took more than 3 s"):
        confined("time:sleep", 60, what="resting", seconds=1)
