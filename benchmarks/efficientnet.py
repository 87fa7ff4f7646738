"""EfficientNet-Lite0 in ONNX, written node by node (Tan and Le, 1905.11946; Lite: Liu, 2020)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 224  # pixels of a side
EPSILON, OPSET, IR = 1e-3, 17, 9
# Of each stage: blocks, kernel, stride of its first block, expansion, channels out.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNet:
    """See the module.

    Args:
        weights: by the package's names; every one is taken once.
    """

    def __init__(self, weights: dict[str, Any]) -> None:
        self._weights = dict(weights)
        self._nodes: list[onnx.NodeProto] = []
        self._initializers = [
            numpy_helper.from_array(np.array(bound, np.float32), name) for name, bound in (("0", 0), ("6", 6))
        ]
        self._side = SIZE

    def model(self) -> onnx.ModelProto:
        """The whole network: x [1, 3, 224, 224] in, y [1, 1000] out."""
        name = self._relu(self._conv("x", "_conv_stem", "_bn0", 2))
        at, channels = 0, 32
        for blocks, kernel, stride, expansion, out in STAGES:
            for block in range(blocks):
                name = self._block(name, f"_blocks.{at}", kernel, stride if not block else 1, expansion, channels, out)
                at, channels = at + 1, out
        name = self._relu(self._conv(name, "_conv_head", "_bn1", 1))
        self._node("GlobalAveragePool", [name], "pooled")
        self._node("Flatten", ["pooled"], "flat")
        self._node("Gemm", ["flat", self._taken("_fc.weight"), self._taken("_fc.bias")], "y", transB=1)
        if self._weights:
            raise ValueError(f"weights that the network does not use: {', '.join(self._weights)}")
        ends = [
            helper.make_tensor_value_info(end, TensorProto.FLOAT, dims)
            for end, dims in (("x", [1, 3, SIZE, SIZE]), ("y", [1, 1000]))
        ]
        graph = helper.make_graph(self._nodes, "efficientnet-lite0", ends[:1], ends[1:], self._initializers)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
        onnx.checker.check_model(made, full_check=True)
        return made

    def _block(self, name: str, block: str, kernel: int, stride: int, expansion: int, channels: int, out: int) -> str:
        given = name
        if expansion > 1:
            name = self._relu(self._conv(name, f"{block}._expand_conv", f"{block}._bn0", 1))
        depthwise = f"{block}._depthwise_conv"
        name = self._relu(self._conv(name, depthwise, f"{block}._bn1", stride, channels * expansion))
        name = self._conv(name, f"{block}._project_conv", f"{block}._bn2", 1)
        if stride == 1 and channels == out:
            name = self._node("Add", [name, given], f"{block}.sum")
        return name

    def _conv(self, name: str, conv: str, norm: str, stride: int, groups: int = 1) -> str:
        weight = self._weights[f"{conv}.weight"]
        kernel = weight.shape[-1]
        after = -(-self._side // stride)
        pad = max(0, (after - 1) * stride + kernel - self._side)  # as TensorFlow's "same": the larger half behind
        pads, self._side = [pad // 2] * 2 + [pad - pad // 2] * 2, after
        found = self._node(
            "Conv", [name, self._taken(f"{conv}.weight")], conv, strides=[stride] * 2, pads=pads, group=groups
        )
        rest = [self._taken(f"{norm}.{what}") for what in ("weight", "bias", "running_mean", "running_var")]
        return self._node("BatchNormalization", [found, *rest], f"{norm}.{conv}", epsilon=EPSILON)

    def _relu(self, name: str) -> str:
        return self._node("Clip", [name, "0", "6"], f"{name}.relu6")

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _taken(self, name: str) -> str:
        self._initializers.append(numpy_helper.from_array(np.ascontiguousarray(self._weights.pop(name)), name))
        return name
