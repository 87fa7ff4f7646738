"""Layers of a decoder as the C engine sees them: weights, the pinned table of experts, and a KV pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.binding import Memory, native
from isthmus.engine.experts import Expert, ExpertSource
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
            memory.matrix(part.embedding, source.embedding())
        if end == config.n_layers:
            part.has_head = 1
            memory.matrix(part.head, source.head())
            part.final_norm = memory.vector(source.final_norm())
        part.layers = memory.keep(ffi.new("im_layer[]", end - start))
        for i in range(start, end):
            self._layer(part.layers[i - start], source.layer(i), i)
        self.c_part = part

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
        for name in ("attn_norm", "ffn_norm", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias"):
            setattr(layer, name, memory.vector(cast("NDArray[np.float32] | None", weights.get(name))))
        layer.window = config.window(index)
        memory.matrix(layer.router, None)
        if config.experts:
            self._experts(layer, weights)

    def _experts(self, layer: Any, weights: Mapping[str, PackedMatrix | NDArray[np.float32]]) -> None:
        from isthmus.quant.groups import quantize

        assert self.config.experts is not None
        self._memory.matrix(layer.router, quantize(cast("NDArray[np.float32]", weights["router"]), "f32"))
        layer.experts = self._memory.keep(native().ffi.new("im_expert[]", self.config.experts.n_experts))
        if self.experts is None:
            for e in range(self.config.experts.n_experts):
                names = ("gate", "up", "down")
                gate, up, down = (cast(PackedMatrix, weights[f"experts.{e}.{name}"]) for name in names)
                self.place(layer, e, Expert(gate, up, down))

    def place(self, layer: Any, index: int, expert: Expert) -> None:
        """Puts an expert into the pinned table."""
        cell = layer.experts[index]
        for name in ("gate", "up", "down"):
            self._memory.matrix(getattr(cell, name), getattr(expert, name))
        cell.resident = 1

    def bring(self, layer: int, missing: list[int]) -> None:
        """Has the expert source load what a paused step needs."""
        if self.experts is None:
            raise EngineError(f"experts {missing} of layer {layer} are missing", "give the part an ExpertSource")
        brought = self.experts.bring(layer, missing)
        for other, index in brought.evicted:
            self.c_part.layers[other - self.start].experts[index].resident = 0
        for index, expert in brought.experts.items():
            self.place(self.c_part.layers[layer - self.start], index, expert)
