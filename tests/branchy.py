"""A classifier with an early exit, and inputs of which it is sure of some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, CLASSES = 16, 4
EARLY, FINAL, SEAM = "early", "final", "h1"


def branchy(middle: bool = False) -> onnx.ModelProto:
    """x -> h1 -> early; h1 -> h2 -> h3 -> final. The classes are alike, so that who is sure is right.

    Args:
        middle: whether there is another exit, "middle", of probabilities, behind h2.
    """
    chance = np.random.default_rng(0)
    first = chance.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    head = 0.5 * chance.standard_normal((WIDTH, CLASSES)).astype(np.float32)
    turn = np.eye(WIDTH, dtype=np.float32) + 0.05 * chance.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a1"]),
        helper.make_node("Relu", ["a1"], [SEAM]),
        helper.make_node("MatMul", [SEAM, "head"], [EARLY]),
        helper.make_node("MatMul", [SEAM, "w2"], ["h2"]),
        helper.make_node("Relu", ["h2"], ["h3"]),
        helper.make_node("MatMul", ["h3", "w3"], ["h4"]),
        helper.make_node("MatMul", ["h4", "head"], [FINAL]),
    ]
    outputs = [EARLY, FINAL]
    if middle:
        nodes += [helper.make_node("MatMul", ["h3", "head"], ["m"]), helper.make_node("Softmax", ["m"], ["middle"])]
        outputs.insert(1, "middle")
    weights = {"w1": first, "head": head, "w2": turn, "w3": turn}
    fixed = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, WIDTH])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, CLASSES]) for name in outputs]
    graph = helper.make_graph(nodes, "branchy", [x], ends, fixed)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def inputs(count: int = 24) -> list[dict[str, Any]]:
    """Of all sizes: the larger, the surer."""
    chance = np.random.default_rng(1)
    return [{"x": (chance.standard_normal((1, 1, WIDTH)) * 0.05 * (at + 1)).astype(np.float32)} for at in range(count)]


def saved(folder: Path, middle: bool = False, count: int = 24) -> Path:
    """The model's file, with a folder `inputs` beside it."""
    (folder / "inputs").mkdir()
    for at, feeds in enumerate(inputs(count)):
        np.savez(folder / "inputs" / f"{at:02}.npz", **feeds)
    onnx.save_model(branchy(middle), str(folder / "branchy.onnx"))
    return folder / "branchy.onnx"
