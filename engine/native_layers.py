"""Layers of a decoder as the C engine sees them: weights, the pinned table of experts, and a KV pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.binding import Memory, native
from isthmus.engine.config import SCORES
from isthmus.engine.expert_table import ExpertTables
from isthmus.engine.experts import Expert, ExpertSource
from isthmus.engine.head import check_head, head_tokens
from isthmus.engine.kv import KvPool
from isthmus.engine.part import KvConfig, WeightSource
from isthmus.engine.routing import Routing
from isthmus.engine.shapes import array_shapes, matrix_shapes
from isthmus.protocol.errors import EngineError
from isthmus.quant import planes
from isthmus.quant.packed import PackedMatrix

MATRICES = (  # of an `im_layer`
    *("q", "k", "v", "o", "gate", "up", "down", "router"),
    *("shared_gate", "q_down", "latent", "k_up", "v_up"),
)

PATIENCE = 30.0  # seconds that a step waits for experts that are being read
HALF_LIFE = 16.0  # steps after which the use of an expert counts half


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
        self._describe(part)
        if config.experts:
            self.tables = experts.tables if experts else ExpertTables(config, start, end)
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

    def _describe(self, part: Any) -> None:
        """What 0 turns off in C."""
        config = self.config
        part.layer_norm, part.attention_scale = config.layer_norm, config.attention_scale
        for name in ("embedding_scale", "residual_scale", "logit_scale"):
            setattr(part, name, 0.0 if getattr(config, name) == 1 else getattr(config, name))
        if latent := config.latent:
            part.kv_rank, part.q_rank, part.latent_eps = latent.kv_rank, latent.q_rank, latent.norm_eps
            part.head_nope, part.head_v = latent.d_plain, latent.d_value
        if experts := config.experts:
            for name in (
                *("n_experts", "top_k", "d_expert", "renormalize", "n_groups", "top_groups", "group_best"),
                *("d_shared", "jitter", "swiglu_alpha", "swiglu_limit"),
            ):
                setattr(part, name, getattr(experts, name))
            part.unweighed, part.pre_gate = not experts.weigh, experts.pre_gate
            part.score = SCORES.index(experts.score)
            part.patience_ns, part.half_life = int(PATIENCE * 1e9), HALF_LIFE
            if self.experts is not None:
                part.foresee, part.store = self.experts.foresee, self.experts.store
                part.reader = self.experts.reader.pointer
            scale = experts.scale * config.residual_scale  # of the shared expert the residual's alone
            part.expert_scale = 0.0 if scale == 1 else scale

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
        for name in MATRICES:
            memory.matrix(getattr(layer, name), None)
        for name, shape in matrix_shapes(config, index).items():
            if not name.startswith("experts."):
                matrix = cast(PackedMatrix | None, weights.get(name))
                if matrix is None:
                    problem = f"layer {index} has no {name!r}"
                    raise EngineError(problem, "the bundle is incomplete: split the model again")
                if (matrix.rows, matrix.cols) != shape:
                    problem = f"{name!r} of layer {index} is {matrix.rows} x {matrix.cols}, not {shape[0]} x {shape[1]}"
                    raise EngineError(problem)
                shared, _, own = name.rpartition(".")
                memory.matrix(getattr(layer.shared if shared else layer, own), matrix)
        experts = config.experts_of(index)
        if experts:
            table = self.tables.layer(index)
            layer.experts, layer.use, layer.traffic = table.cells, table.use, table.traffic
        for name, size in array_shapes(config, index).items():
            self._array(layer, name, sized(weights.get(name), size, f"{name!r} of layer {index}"))
        layer.window = config.window(index)
        if experts:
            for e in range(experts.n_experts if self.experts is None else 0):
                table.place(
                    e, Expert(*(cast(PackedMatrix, weights[f"experts.{e}.{name}"]) for name in planes.MATRICES))
                )
            layer.n_planes = table.n_planes

    def _array(self, layer: Any, name: str, array: NDArray[np.float32]) -> None:
        from isthmus.quant.groups import quantize

        memory = self._memory
        if name in ("router", "shared_gate"):
            memory.matrix(getattr(layer, name), quantize(array, "f32"))
        elif array.ndim == 2:  # biases of all experts, resident or not
            for e, row in enumerate(array):
                setattr(layer.experts[e], name, memory.vector(row))
        elif name in ("final_norm_bias", "head_bias"):
            setattr(self.c_part, name, memory.vector(array))
        else:
            whole = "_whole" if self.config.qk_norm_whole and name in ("q_norm", "k_norm") else ""
            setattr(layer, name + whole, memory.vector(array))

    def tolerate(self, tolerance: NDArray[np.float32] | None) -> None:
        """Takes only as many planes of an expert as its share in its row asks for.

        Args:
            tolerance: float32 [layers, planes], the least share that takes a plane, ascending with the planes; a share
                is a weight divided by the sum of its row's. None for all planes.

        Raises:
            EngineError: another shape, or shares that do not ascend.
        """
        ffi, layers = native().ffi, range(self.end - self.start)
        if tolerance is None:
            for i in layers:
                self.c_part.layers[i].tolerance = ffi.NULL
            return
        most = max(self.c_part.layers[i].n_planes for i in layers)
        if tolerance.shape != (len(layers), most) or not (np.diff(tolerance, axis=1) >= 0).all():
            raise EngineError(
                f"tolerances are {tolerance.shape}", f"give [{len(layers)}, {most}], ascending with the planes"
            )
        held = self._tolerance = np.ascontiguousarray(tolerance, np.float32)
        for i in layers:
            self.c_part.layers[i].tolerance = ffi.cast("float *", held[i].ctypes.data)

    def record(self, positions: int) -> Routing | None:
        """Writes down what routers say of positions [0, positions) from now on, in the arrays of the `Routing` that it
        returns; 0 ends that. What is foreseen is asked for as well.

        Raises:
            EngineError: no layer has experts.
        """
        experts, ffi = self.config.experts, native().ffi
        self.c_part.record = ffi.NULL
        if not positions:
            self.c_part.foresee = self.experts is not None and self.experts.foresee
            return None
        if experts is None:
            raise EngineError("no layer has experts", "record the routing of a mixture")
        shape = (positions, self.end - self.start, experts.top_k)
        found = Routing(np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.int32))
        memory = Memory()
        record = memory.keep(ffi.new("im_record *"))
        record.positions = positions
        record.chosen = memory.pointer(found.chosen, "int32_t *")
        record.foreseen = memory.pointer(found.foreseen, "int32_t *")
        record.weights = memory.pointer(found.weights, "float *")
        self.c_part.record, self._written = record, memory
        self.c_part.foresee = 1
        return found

    def replay(self, routing: Routing | None) -> None:
        """Takes experts and weights from a record, position by position and from its beginning again behind its end;
        None for what the routers say.

        Raises:
            EngineError: the record is of other layers or experts.
        """
        experts, ffi = self.config.experts, native().ffi
        if routing is None:
            self.c_part.replay = ffi.NULL
            return
        shape = (self.end - self.start, experts.top_k if experts else 0)
        named = np.concatenate([routing.chosen.ravel(), routing.foreseen.ravel()])
        if routing.chosen.shape[1:] != shape or named.min() < 0 or not experts or named.max() >= experts.n_experts:
            raise EngineError(
                f"recorded routing is {routing.chosen.shape}", f"this part has {shape} layers and experts"
            )
        memory = Memory()
        record = memory.keep(ffi.new("im_replay *"))
        record.positions = len(routing.chosen)
        record.chosen = memory.pointer(np.ascontiguousarray(routing.chosen, np.int32), "int32_t *")
        record.foreseen = memory.pointer(np.ascontiguousarray(routing.foreseen, np.int32), "int32_t *")
        record.weights = memory.pointer(np.ascontiguousarray(routing.weights, np.float32), "float *")
        self.c_part.replay, self._record = record, memory


def sized(vector: object, size: int | tuple[int, ...], name: str) -> NDArray[np.float32]:
    """The array, which must have `size` numbers or that shape.

    Raises:
        EngineError: it is missing or has another size.
    """
    shape = (size,) if isinstance(size, int) else size
    if not isinstance(vector, np.ndarray) or vector.shape != shape:
        found = f"of shape {vector.shape}" if isinstance(vector, np.ndarray) else "missing"
        expected = f"of {shape[0]} numbers" if len(shape) == 1 else f"of shape {shape}"
        raise EngineError(f"{name} is {found}, not {expected}", "the bundle is broken: split the model again")
    return vector
