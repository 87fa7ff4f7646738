"""Decoder layers as ONNX graphs of onnxruntime's own operators; weights stand beside the graph, by name.

Two precisions: `f32` dequantizes every matrix (the oracle); `q4` runs packed matrices as they are through
MatMulNBits (activations are rounded to 8 bits there) and only float matrices as float32.

Heads are padded with zeros to a multiple of 8, which GroupQueryAttention wants. That changes no result: zeros
rotate to zeros, add nothing to a score, and meet zero columns of the output matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.head import check_head, head_tokens
from isthmus.engine.onnx_proto import MICROSOFT, Graph
from isthmus.engine.part import WeightSource
from isthmus.quant.groups import dequantize, unpack
from isthmus.quant.layout import groups
from isthmus.quant.nested import decode
from isthmus.quant.packed import GROUP, PackedMatrix

Weights = dict[str, NDArray[np.generic]]

_ZERO = {"q8": (8, 128.0), "q8x": (8, 128.0), "q4": (4, 8.0), "q4m": (4, 0.0), "q4x": (4, 0.0)}
_NESTED_BITS = {"n2": 4, "n4": 4, "n8": 8}  # MatMulNBits takes 2-bit codes in 4-bit cells


@dataclass(frozen=True, slots=True)
class Cells:
    """A matrix as MatMulNBits takes it: value = scale (code - 2^(bits - 1)) + offset of its group.

    Attributes:
        codes: u8 [n, K], one a byte.
        scales: f32 [n, K / block].
        offsets: f32 [n, G] for groups of 32, or None for formats that have none.
    """

    bits: int
    block: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32] | None


def cells(matrix: PackedMatrix) -> Cells:
    """The codes of a quantized matrix without rounding anything anew."""
    arrays = unpack(matrix)
    if matrix.format in _NESTED_BITS:
        bits = _NESTED_BITS[matrix.format]
        codes, scales, zero = decode(matrix.format, arrays)
        if matrix.format == "n2":  # in the middle of a 4-bit cell, or its far zero would magnify rounding
            codes, zero = codes + np.uint8(6), zero + 6
    else:
        bits, zero = _ZERO[matrix.format]
        codes, scales = arrays["codes"].astype(np.uint8, copy=False), arrays["scales"].astype(np.float32)
    block = GROUP * groups(matrix.cols) // scales.shape[1]
    shift, mins = 2 ** (bits - 1) - zero, arrays.get("mins")
    offsets = scales * np.float32(shift) if shift else None
    if mins is not None:
        offsets = mins.astype(np.float32) + (0 if offsets is None else offsets)
    return Cells(bits, block, codes, scales[:, : -(-matrix.cols // block)], offsets)


class Builder:
    """Writes one graph.

    Args:
        packed: whether quantized matrices stay quantized.
        weights: finished tensors by name; what is missing is made and added, so that graphs over the same
            layers share memory.
    """

    def __init__(self, source: WeightSource, *, packed: bool, weights: Weights) -> None:
        self.graph = Graph()
        self._source = source
        self._config = source.config
        self._packed = packed
        self._weights = weights
        self._head_dim = -(-source.config.head_dim // 8) * 8

    def layers(self, enter: int, leave: int, window: int) -> Graph:
        """Layers [enter, leave) with a window of `window` positions (0 for all) on top of the layers' own.

        Inputs: hidden [1, s, d_model]; cos, sin [s, head_dim / 2] and place [1, s] = 0..s-1; last [1] i32, the
        index of the last position; total [] i32, positions with these; for layer i `past_k.i`, `past_v.i`
        [1, n_kv_heads, capacity, head_dim], whose buffers serve as `k.i`, `v.i` as well. Output: out.
        """
        c, g = self._config, self.graph
        width = (1, "s", c.d_model)
        hidden = g.input("hidden", np.float32, width)
        for name in ("cos", "sin"):
            g.input(name, np.float32, ("s", self._head_dim // 2))
        g.input("place", np.int64, (1, "s"))
        g.input("last", np.int32, (1,))
        g.input("total", np.int32, ())
        g.output("out", np.float32, width)
        buffer = (1, c.n_kv_heads, "capacity", self._head_dim)
        for i in range(enter, leave):
            for which in ("k", "v"):
                g.input(f"past_{which}.{i}", np.float32, buffer)
                g.output(f"{which}.{i}", np.float32, buffer)
            layer = self._source.layer(i)
            if i == enter and "input" in layer:
                (hidden,) = self._project(f"{i}.input", hidden, [_matrix(layer, "input")])
            spans = [w for w in (c.window(i), window) if w]
            attended = self._attention(i, layer, hidden, min(spans, default=-1))
            normed, total = f"{i}.ffn_in", f"{i}.mid"
            self.graph.node(
                "SkipSimplifiedLayerNormalization",
                [attended, hidden, self._vector(f"{i}.ffn_norm", layer["ffn_norm"])],
                [normed, "", "", total],
                MICROSOFT,
                epsilon=c.norm_eps,
            )
            gated = self._feed_forward(i, layer, normed)
            hidden = g.node("Add", [total, gated], ["out" if i == leave - 1 else f"{i}.out"])
        return g

    def head(self) -> Graph:
        """The last norm and the output head: hidden [1, s, d_model] -> logits [1, s, rows of the head]."""
        c, g, matrix = self._config, self.graph, self._source.head()
        check_head(matrix.rows, matrix.cols, head_tokens(self._source), c.vocab_size, c.d_model)
        g.input("hidden", np.float32, (1, "s", c.d_model))
        g.output("logits", np.float32, (1, "s", matrix.rows))
        normed = self._norm("hidden", self._vector("final_norm", self._source.final_norm()), c.norm_eps, "normed")
        (logits,) = self._project("head", normed, [matrix])
        g.node("Identity", [logits], ["logits"])
        return g

    def _attention(self, i: int, layer: Mapping[str, object], hidden: str, window: int) -> str:
        c, g, d = self._config, self.graph, self._head_dim
        normed = self._norm(hidden, self._vector(f"{i}.attn_norm", layer["attn_norm"]), c.norm_eps, f"{i}.attn_in")
        matrices: list[PackedMatrix | NDArray[np.float32]] = []
        for name in ("q", "k", "v"):
            matrix = _matrix(layer, name)
            matrices.append(matrix if d == c.head_dim else _pad_heads(dequantize(matrix), c.head_dim, d))
        states = self._project(f"{i}.qkv", normed, matrices)
        for at, name in enumerate(("q", "k", "v")):
            if c.qkv_bias:
                bias = np.asarray(layer[f"{name}_bias"], np.float32)
                bias = _pad_heads(bias[:, None], c.head_dim, d)[:, 0]
                states[at] = g.node("Add", [states[at], self._vector(f"{i}.{name}_bias", bias)], [f"{i}.{name}_biased"])
            if name == "v":
                continue
            if c.qk_norm:
                states[at] = self._head_norm(f"{i}.{name}", states[at], np.asarray(layer[f"{name}_norm"], np.float32))
            states[at] = g.node(
                "RotaryEmbedding", [states[at], "place", "cos", "sin"], [f"{i}.{name}_rotated"], MICROSOFT
            )
        attended = g.node(
            "GroupQueryAttention",
            [*states, f"past_k.{i}", f"past_v.{i}", "last", "total"],
            [f"{i}.attended", f"k.{i}", f"v.{i}"],
            MICROSOFT,
            num_heads=c.n_heads,
            kv_num_heads=c.n_kv_heads,
            local_window_size=window,
            scale=1.0 / sqrt(c.head_dim),
        )
        o = _matrix(layer, "o")
        out = o if d == c.head_dim else _pad_heads(dequantize(o).T, c.head_dim, d).T
        return self._project(f"{i}.o", attended, [out])[0]

    def _feed_forward(self, i: int, layer: Mapping[str, object], normed: str) -> str:
        g = self.graph
        gate, up = self._project(f"{i}.gate_up", normed, [_matrix(layer, "gate"), _matrix(layer, "up")])
        silu = g.node("QuickGelu", [gate], [f"{i}.silu"], MICROSOFT, alpha=1.0)  # x sigmoid(alpha x)
        return self._project(f"{i}.down", g.node("Mul", [silu, up], [f"{i}.gated"]), [_matrix(layer, "down")])[0]

    def _norm(self, x: str, weight: str, epsilon: float, out: str) -> str:
        return self.graph.node("SimplifiedLayerNormalization", [x, weight], [out], epsilon=epsilon)

    def _head_norm(self, name: str, x: str, weight: NDArray[np.float32]) -> str:
        """RMS norm of every head. The operator divides by the padded width: weight and epsilon make up for it."""
        c, g, d = self._config, self.graph, self._head_dim
        share = c.head_dim / d
        padded = _pad_heads((weight * np.float32(sqrt(share)))[:, None], c.head_dim, d)[:, 0]
        heads = g.node("Reshape", [x, self._shape("heads", (0, 0, -1, d))], [f"{name}_heads"])
        normed = self._norm(heads, self._vector(f"{name}_norm", padded), c.norm_eps * share, f"{name}_normed")
        return g.node("Reshape", [normed, self._shape("flat", (0, 0, -1))], [f"{name}_flat"])

    def _project(self, name: str, x: str, matrices: list[PackedMatrix | NDArray[np.float32]]) -> list[str]:
        """x times each matrix: one product for all of them where their formats allow it, then a split."""
        rows = [m.rows if isinstance(m, PackedMatrix) else len(m) for m in matrices]
        kinds = {_kind(m, self._packed) for m in matrices}
        if len(kinds) > 1:
            return [self._project(f"{name}.{n}", x, [m])[0] for n, m in enumerate(matrices)]
        if kinds == {None}:
            out = self._float_product(name, x, matrices)
        else:
            out = self._packed_product(name, x, [m for m in matrices if isinstance(m, PackedMatrix)])
        if len(matrices) == 1:
            return [out]
        outs = [f"{name}.part{n}" for n in range(len(matrices))]
        sizes = self._constant(f"split.{rows}", lambda: np.array(rows, np.int64))
        self.graph.node("Split", [out, sizes], outs, axis=-1)
        return outs

    def _float_product(self, name: str, x: str, matrices: list[PackedMatrix | NDArray[np.float32]]) -> str:
        def transposed() -> NDArray[np.float32]:
            dense = [dequantize(m) if isinstance(m, PackedMatrix) else m for m in matrices]
            return np.ascontiguousarray(np.concatenate(dense).T)

        return self.graph.node("MatMul", [x, self._constant(f"{name}.w", transposed)], [f"{name}.y"])

    def _packed_product(self, name: str, x: str, matrices: list[PackedMatrix]) -> str:
        """MatMulNBits; offsets of groups (minima, fractional zeros) times the sums of x over the groups on top."""
        g, k = self.graph, matrices[0].cols
        parts = [cells(m) for m in matrices]
        bits, block = parts[0].bits, parts[0].block
        codes = self._constant(f"{name}.codes", lambda: _nbits(np.concatenate([p.codes for p in parts]), bits, block))
        scales = self._constant(f"{name}.scales", lambda: np.concatenate([p.scales.reshape(-1) for p in parts]))
        rows = sum(m.rows for m in matrices)
        out = g.node(
            "MatMulNBits",
            [x, codes, scales],
            [f"{name}.product"],
            MICROSOFT,
            K=k,
            N=rows,
            bits=bits,
            block_size=block,
            accuracy_level=4,
        )
        offsets = [p.offsets for p in parts if p.offsets is not None]
        if not offsets:
            return out
        weight = self._constant(f"{name}.offsets", lambda: np.ascontiguousarray(np.concatenate(offsets).T))
        correction = g.node("MatMul", [self._group_sums(name, x, k), weight], [f"{name}.correction"])
        return g.node("Add", [out, correction], [f"{name}.y"])

    def _group_sums(self, name: str, x: str, k: int) -> str:
        """x [1, s, k] -> [1, s, G]."""
        g = self.graph
        if k % GROUP:
            pads = self._constant(f"pad.{k}", lambda: np.array([0, 0, 0, 0, 0, -k % GROUP], np.int64))
            x = g.node("Pad", [x, pads], [f"{name}.padded"])
        grouped = g.node("Reshape", [x, self._shape("groups", (0, 0, -1, GROUP))], [f"{name}.grouped"])
        axis = self._constant("axis", lambda: np.array([-1], np.int64))
        return g.node("ReduceSum", [grouped, axis], [f"{name}.sums"], keepdims=0)

    def _shape(self, name: str, shape: tuple[int, ...]) -> str:
        return self._constant(f"shape.{name}", lambda: np.array(shape, np.int64))

    def _vector(self, name: str, value: object) -> str:
        return self._constant(name, lambda: np.ascontiguousarray(value, np.float32))

    def _constant(self, name: str, make: Callable[[], NDArray[np.generic]]) -> str:
        if name in self.graph.bound or name in self.graph.initializers:
            return name
        if name not in self._weights:
            self._weights[name] = make()
        value = self._weights[name]
        if value.dtype == np.float32 and not self._packed:
            return self.graph.weight(name, value)
        return self.graph.constant(name, value)


def _matrix(layer: Mapping[str, object], name: str) -> PackedMatrix:
    matrix = layer[name]
    assert isinstance(matrix, PackedMatrix)
    return matrix


def _kind(matrix: PackedMatrix | NDArray[np.float32], packed: bool) -> str | None:
    """The format as far as it matters for multiplying together; None is float32."""
    if not packed or not isinstance(matrix, PackedMatrix) or matrix.format in ("f32", "f16", "bf16"):
        return None
    return matrix.format


def _pad_heads(w: NDArray[np.float32], head_dim: int, padded: int) -> NDArray[np.float32]:
    """Rows [heads * head_dim, n] -> [heads * padded, n]; each rotated half is padded at its end."""
    halves = w.reshape(-1, head_dim // 2, w.shape[1])
    out = np.zeros((len(halves), padded // 2, w.shape[1]), np.float32)
    out[:, : head_dim // 2] = halves
    return out.reshape(-1, w.shape[1])


def _nbits(codes: NDArray[np.uint8], bits: int, block: int) -> NDArray[np.uint8]:
    """Codes [n, K] -> [n, K / block, block * bits / 8], the lower nibble first, padded with zeros."""
    n, k = codes.shape
    padded = np.pad(codes, ((0, 0), (0, -k % block)))
    if bits == 4:
        padded = padded[:, 0::2] | padded[:, 1::2] << np.uint8(4)
    return np.ascontiguousarray(padded.reshape(n, -1, block * bits // 8))
