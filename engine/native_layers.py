"""Layers of a decoder as the C engine sees them: weights, the pinned table of experts, and a KV pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.binding import Memory, native
from isthmus.engine.experts import Expert, ExpertSource
from isthmus.engine.head import check_head, head_tokens
from isthmus.engine.kv import KvPool
from isthmus.engine.part import KvConfig, WeightSource
from isthmus.protocol.errors import EngineError
from isthmus.quant.packed import PackedMatrix


class Layers:
    """Loaded layers [start, end) as C structs, with the KV pool of their own."""

    def __init__(self, source: WeightSource, start: int, end: int, kv: KvConfig, experts: ExpertSource | None) -> None:
        config = source.config
        if not 0 <= start < end <= config.n_layers:
            raise EngineError(f"layers [{start}, {end}) of {config.n_layers}", "choose 0 <= start < end <= n_layers")
        self.config, self.start, self.end, self.experts = config, start, end, experts
        self.pool = KvPool(config, end - start, kv)
        self._held: dict[tuple[int, int], Memory] = {}  # (layer, expert) -> what its cell points to
        module, self._memory = native(), Memory()
        memory, ffi = self._memory, module.ffi
        part = memory.keep(ffi.new("im_part *"))
        for name in ("d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size", "norm_eps", "rope_scale"):
            setattr(part, name, getattr(config, name))
        part.start, part.end = start, end
        part.inv_freq = memory.vector(np.asarray(config.rope_inv_freq, np.float32))
        if config.experts:
            part.n_experts, part.top_k = config.experts.n_experts, config.experts.top_k
            part.renormalize, part.d_expert = config.experts.renormalize, config.experts.d_expert
        part.kv_f32 = kv.format == "f32"
        part.kv = memory.pointer(self.pool.memory, "uint8_t *")
        part.kv_block_bytes = self.pool.memory.shape[1]
        if start == 0:
            part.has_embedding = 1
            memory.matrix(part.embedding, self._embedding(source.embedding()))
        if end == config.n_layers:
            part.has_head = 1
            self._head(part, source)
            part.final_norm = memory.vector(sized(source.final_norm(), config.d_model, "the final norm"))
        part.layers = memory.keep(ffi.new("im_layer[]", end - start))
        self.c_part = part
        for i in range(start, end):
            weights = source.layer(i)
            self._layer(part.layers[i - start], weights, i)
            if i == start and "input" in weights:
                self._input(cast(PackedMatrix, weights["input"]))

    def _embedding(self, matrix: PackedMatrix) -> PackedMatrix:
        shape = self.config.vocab_size, self.config.d_model
        if (matrix.rows, matrix.cols) != shape:
            raise EngineError(f"the embedding is {matrix.rows} x {matrix.cols}, not {shape[0]} x {shape[1]}")
        return matrix

    def _head(self, part: Any, source: WeightSource) -> None:
        tokens, matrix = head_tokens(source), source.head()
        check_head(matrix.rows, matrix.cols, tokens, self.config.vocab_size, self.config.d_model)
        self._memory.matrix(part.head, matrix)
        if tokens is not None:
            part.head_tokens = self._memory.pointer(tokens, "int32_t *")

    def _input(self, matrix: PackedMatrix) -> None:
        shape = self.config.d_model, self.config.d_model
        if (matrix.rows, matrix.cols) != shape:
            raise EngineError(f"the input map is {matrix.rows} x {matrix.cols}, not {shape[0]} x {shape[1]}")
        self.c_part.has_input = 1
        self._memory.matrix(self.c_part.input, matrix)

    def _layer(self, layer: Any, weights: Mapping[str, PackedMatrix | NDArray[np.float32]], index: int) -> None:
        config, memory = self.config, self._memory
        shapes = {
            "q": (config.n_heads * config.head_dim, config.d_model),
            "k": (config.n_kv_heads * config.head_dim, config.d_model),
            "v": (config.n_kv_heads * config.head_dim, config.d_model),
            "o": (config.d_model, config.n_heads * config.head_dim),
            "gate": (config.d_ff, config.d_model),
            "up": (config.d_ff, config.d_model),
            "down": (config.d_model, config.d_ff),
        }
        for name, shape in shapes.items():
            matrix = cast(PackedMatrix | None, weights.get(name))
            if matrix is None and not (config.experts and name in ("gate", "up", "down")):
                raise EngineError(f"layer {index} has no {name!r}", "the bundle is incomplete: split the model again")
            if matrix is not None and (matrix.rows, matrix.cols) != shape:
                raise EngineError(
                    f"{name!r} of layer {index} is {matrix.rows} x {matrix.cols}, not {shape[0]} x {shape[1]}"
                )
            memory.matrix(getattr(layer, name), matrix)
        vectors = {"attn_norm": config.d_model, "ffn_norm": config.d_model}
        if config.qk_norm:
            vectors |= {"q_norm": config.head_dim, "k_norm": config.head_dim}
        if config.qkv_bias:
            vectors |= {f"{name}_bias": shapes[name][0] for name in ("q", "k", "v")}
        for name, size in vectors.items():
            vector = cast("NDArray[np.float32] | None", weights.get(name))
            setattr(layer, name, memory.vector(sized(vector, size, f"{name!r} of layer {index}")))
        layer.window = config.window(index)
        memory.matrix(layer.router, None)
        if config.experts:
            self._experts(layer, weights, index)

    def _experts(self, layer: Any, weights: Mapping[str, PackedMatrix | NDArray[np.float32]], index: int) -> None:
        from isthmus.quant.groups import quantize

        assert self.config.experts is not None
        self._memory.matrix(layer.router, quantize(cast("NDArray[np.float32]", weights["router"]), "f32"))
        layer.experts = self._memory.keep(native().ffi.new("im_expert[]", self.config.experts.n_experts))
        if self.experts is None:
            for e in range(self.config.experts.n_experts):
                names = ("gate", "up", "down")
                gate, up, down = (cast(PackedMatrix, weights[f"experts.{e}.{name}"]) for name in names)
                self.place(index, e, Expert(gate, up, down))

    def place(self, layer: int, index: int, expert: Expert) -> None:
        """Puts an expert into the pinned table; its memory is held until it is evicted.

        Raises:
            EngineError: no such expert, or a matrix of another shape.
        """
        experts, d = self.config.experts, self.config.d_model
        if experts is None or not 0 <= index < experts.n_experts:
            raise EngineError(f"layer {layer} has no expert {index}", "check the expert source")
        cell, memory = self.c_part.layers[layer - self.start].experts[index], Memory()
        for name, shape in (
            ("gate", (experts.d_expert, d)),
            ("up", (experts.d_expert, d)),
            ("down", (d, experts.d_expert)),
        ):
            matrix: PackedMatrix = getattr(expert, name)
            if (matrix.rows, matrix.cols) != shape:
                raise EngineError(
                    f"{name!r} of expert {index} in layer {layer} is {matrix.rows} x {matrix.cols}, "
                    f"not {shape[0]} x {shape[1]}"
                )
            memory.matrix(getattr(cell, name), matrix)
        cell.resident = 1
        self._held[layer, index] = memory

    def evict(self, layer: int, index: int) -> None:
        """Takes an expert out of the table and lets go of its memory."""
        if self._held.pop((layer, index), None) is None:
            raise EngineError(f"expert {index} of layer {layer} is not held, so it cannot be evicted")
        self.c_part.layers[layer - self.start].experts[index].resident = 0

    def bring(self, layer: int, missing: list[int]) -> list[tuple[int, int]]:
        """Has the expert source load what a paused step needs; returns what it evicted for that.

        Raises:
            EngineError: the source did not bring all of `missing`, or evicted from the same layer.
        """
        if self.experts is None:
            raise EngineError(f"experts {missing} of layer {layer} are missing", "give the part an ExpertSource")
        brought = self.experts.bring(layer, missing)
        absent = [index for index in missing if index not in brought.experts]
        if absent:
            raise EngineError(f"the expert source did not bring experts {absent} of layer {layer}", "check its memory")
        same = [index for other, index in brought.evicted if other == layer]
        if same:
            raise EngineError(
                f"the expert source evicted experts {same} of layer {layer} while it is computed",
                "give it room for all experts of one layer, or use smaller steps",
            )
        for index, expert in brought.experts.items():
            self.place(layer, index, expert)
        return list(brought.evicted)


def sized(vector: NDArray[np.float32] | None, size: int, name: str) -> NDArray[np.float32]:
    """The vector, which must have `size` numbers.

    Raises:
        EngineError: it is missing or has another size.
    """
    if vector is None or vector.shape != (size,):
        found = "missing" if vector is None else f"of shape {vector.shape}"
        raise EngineError(f"{name} is {found}, not of {size} numbers", "the bundle is broken: split the model again")
    return vector
