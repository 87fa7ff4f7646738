"""MiniLM (6 layers of BERT, width 384) in ONNX, written node by node (Wang et al., 2002.10957; Devlin et al., 2018)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TOKENS = 64
LAYERS, WIDTH, HEADS = 6, 384, 12
EPSILON, OPSET, IR = 1e-12, 17, 9


class MiniLm:
    """See the module: ids and mask [1, TOKENS] int64 in, the mean over a sentence's tokens [1, WIDTH] out, of length 1.

    Args:
        weights: by the package's names; the pooler, which the sentence encoder does not use, is left out.
    """

    def __init__(self, weights: dict[str, Any]) -> None:
        self._weights = {name: one for name, one in weights.items() if "pooler" not in name}
        self._weights.pop("embeddings.position_ids", None)
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []

    def model(self) -> onnx.ModelProto:
        """The whole network."""
        table = self._taken("embeddings.word_embeddings.weight")
        places = self._weights.pop("embeddings.position_embeddings.weight")[:TOKENS]
        kind = self._weights.pop("embeddings.token_type_embeddings.weight")[:1]
        name = self._node(
            "Add", [self._node("Gather", [table, "ids"], "words"), self._constant(places + kind, "places")]
        )
        name = self._norm(name, "embeddings.LayerNorm")
        mask = self._node("Cast", ["mask"], "real", to=TensorProto.FLOAT)
        hidden = self._node("Mul", [self._node("Sub", [mask, self._number(1.0)]), self._number(1e9)])
        hidden = self._node("Reshape", [hidden, self._sizes(1, 1, 1, TOKENS)], "hides")
        for layer in range(LAYERS):
            name = self._layer(name, hidden, f"encoder.layer.{layer}")
        column = self._node("Reshape", [mask, self._sizes(1, TOKENS, 1)])
        axis = self._constant(np.array([1], np.int64), "axis")
        total = self._node("ReduceSum", [self._node("Mul", [name, column]), axis], keepdims=0)
        mean = self._node("Div", [total, self._node("ReduceSum", [column, axis], keepdims=0)], "mean")
        self._node("LpNormalization", [mean], "y", axis=-1, p=2)
        if self._weights:
            raise ValueError(f"weights that the network does not use: {', '.join(self._weights)}")
        given = [helper.make_tensor_value_info(one, TensorProto.INT64, [1, TOKENS]) for one in ("ids", "mask")]
        made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, WIDTH])]
        graph = helper.make_graph(self._nodes, "minilm", given, made, self._initializers)
        found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
        onnx.checker.check_model(found, full_check=True)
        return found

    def _layer(self, name: str, hidden: str, layer: str) -> str:
        query, key, value = (self._heads(name, f"{layer}.attention.self.{what}") for what in ("query", "key", "value"))
        turned = self._node("Transpose", [key], perm=[0, 1, 3, 2])
        scores = self._node("MatMul", [query, turned])
        scaled = self._node("Add", [self._node("Mul", [scores, self._number((WIDTH / HEADS) ** -0.5)]), hidden])
        mixed = self._node("MatMul", [self._node("Softmax", [scaled], axis=-1), value])
        joined = self._node(
            "Reshape", [self._node("Transpose", [mixed], perm=[0, 2, 1, 3]), self._sizes(1, TOKENS, WIDTH)]
        )
        out = f"{layer}.attention.output"
        name = self._norm(self._node("Add", [self._dense(joined, f"{out}.dense"), name]), f"{out}.LayerNorm")
        inner = self._gelu(self._dense(name, f"{layer}.intermediate.dense"))
        return self._norm(
            self._node("Add", [self._dense(inner, f"{layer}.output.dense"), name]), f"{layer}.output.LayerNorm"
        )

    def _heads(self, name: str, dense: str) -> str:
        split = self._node("Reshape", [self._dense(name, dense), self._sizes(1, TOKENS, HEADS, WIDTH // HEADS)])
        return self._node("Transpose", [split], perm=[0, 2, 1, 3])

    def _dense(self, name: str, dense: str) -> str:
        weight = self._constant(self._weights.pop(f"{dense}.weight").T, f"{dense}.weight")
        return self._node("Add", [self._node("MatMul", [name, weight]), self._taken(f"{dense}.bias")], dense)

    def _gelu(self, name: str) -> str:
        bent = self._node("Erf", [self._node("Mul", [name, self._number(0.5**0.5)])])
        half = self._node("Mul", [name, self._number(0.5)])
        return self._node("Mul", [half, self._node("Add", [bent, self._number(1.0)])])

    def _norm(self, name: str, norm: str) -> str:
        scale, bias = self._taken(f"{norm}.weight"), self._taken(f"{norm}.bias")
        return self._node("LayerNormalization", [name, scale, bias], norm, axis=-1, epsilon=EPSILON)

    def _node(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or f"{kind.lower()}.{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _taken(self, name: str) -> str:
        return self._constant(self._weights.pop(name), name)

    def _number(self, value: float) -> str:
        return self._constant(np.array(value, np.float32), f"number {value:g}")

    def _sizes(self, *sizes: int) -> str:
        return self._constant(np.array(sizes, np.int64), "sizes " + " ".join(map(str, sizes)))

    def _constant(self, value: Any, name: str) -> str:
        if all(one.name != name for one in self._initializers):
            self._initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name
