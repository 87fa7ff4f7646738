"""A network that is given a picture: what is done with pictures before it, as its first nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from isthmus.protocol.errors import PlanError
from isthmus.split.pictures import Preprocess

_OF_PICTURE = {"layout": "NHWC", "channels": "RGB", "dtype": "uint8", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def pictured(model: onnx.ModelProto, how: Preprocess) -> tuple[onnx.ModelProto, Preprocess]:
    """The model with uint8 [1, height, width, 3] in place of the input that is made of a picture, and what is left to
    be done with pictures before it: they are resized and cut out.

    Args:
        how: with the name of that input.

    Raises:
        PlanError: it has no such input, or another of the name that the picture gets.
    """
    name = f"{how.input}/picture"
    found = onnx.ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    known = {one.name for one in (*graph.input, *graph.initializer)} | {
        one for node in graph.node for one in node.output
    }
    if how.input not in {one.name for one in graph.input} or name in known:
        raise PlanError(f"the model has no input {how.input!r}, or a {name!r} already", "plan again: isthmus plan")
    nodes = list(graph.node)
    inputs = [one for one in graph.input if one.name != how.input]
    del graph.node[:], graph.input[:]
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.UINT8, [1, *how.size, 3]))
    graph.input.extend(inputs)
    at = name

    def then(kind: str, *values: np.ndarray, **options: Any) -> str:
        made = f"{name}/{len(graph.node)}"
        names = [f"{made}/{number}" for number in range(len(values))]
        for value, called in zip(values, names, strict=True):
            graph.node.append(helper.make_node("Constant", [], [called], value=numpy_helper.from_array(value)))
        graph.node.append(helper.make_node(kind, [at, *names], [made], **options))
        return made

    if how.channels == "BGR":
        at = then("Gather", np.array([2, 1, 0], np.int64), axis=3)
    if how.dtype != "uint8":
        at = then("Cast", to=TensorProto.FLOAT)
        at = then("Sub", np.array(how.mean, np.float32))
        at = then("Div", np.array(how.std, np.float32))
        if how.dtype != "float32":
            at = then("Cast", to=_TYPES[how.dtype])
    at = then("Transpose", perm=[0, 3, 1, 2]) if how.layout == "NCHW" else then("Identity")
    graph.node[-1].output[0] = how.input
    graph.node.extend(nodes)
    return found, Preprocess(how.size, how.resize, **_OF_PICTURE, input=name)  # type: ignore[arg-type]
