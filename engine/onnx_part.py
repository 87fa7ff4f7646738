"""Parts run by onnxruntime: the portable fallback where there is no compiler, and the float32 oracle in tests.

Rows run span by span, so results may depend on batch and threads in the last bits. The KV is always float32,
whatever `KvConfig.format` asks for. Mixtures of experts are left to the native back end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.binding import default_threads
from isthmus.engine.config import DecoderConfig
from isthmus.engine.head import head_tokens
from isthmus.engine.onnx_graph import Builder, Weights
from isthmus.engine.onnx_kv import SLACK, OnnxSequence, blocks, no_blocks
from isthmus.engine.onnx_proto import Graph
from isthmus.engine.onnx_session import Session, bind_input, bind_output, onnxruntime
from isthmus.engine.part import (
    KV_BLOCK,
    NO_CONFIDENCE,
    KvBlock,
    KvConfig,
    Numerics,
    Rows,
    Span,
    StepResult,
    Want,
    WeightSource,
)
from isthmus.engine.sampler import sample
from isthmus.protocol.errors import EngineError, OutOfBlocks
from isthmus.quant.groups import dequantize
from isthmus.quant.packed import LANES, PackedMatrix

PRECISIONS = ("f32", "q4")
CHUNK = 256  # rows that run together, so that long prompts do not hold large activations
SESSIONS = 8  # layer ranges that stay ready
NEEDS_HEAD: Want = Want.LOGITS | Want.SAMPLE | Want.CONFIDENCE


def open_onnx(
    source: WeightSource, start: int, end: int, *, threads: int, kv: KvConfig, precision: str = "f32"
) -> OnnxPart:
    """Opens layers [start, end) on onnxruntime.

    Args:
        threads: threads of a step, 0 for one per core.
        kv: `max_tokens` bounds the positions of all sequences; the KV itself is float32.
        precision: "f32" dequantizes every matrix; "q4" multiplies quantized matrices as they are, with
            activations rounded to 8 bits, and needs a quarter of the memory.

    Raises:
        EngineError: onnxruntime is missing, the range or an argument does not fit, or the model has experts.
    """
    return OnnxPart(source, start, end, threads=threads, kv=kv, precision=precision)


class OnnxPart:
    """Implements `engine.part.Part`; see `open_onnx`. Not for several threads at once."""

    def __init__(
        self, source: WeightSource, start: int, end: int, *, threads: int, kv: KvConfig, precision: str
    ) -> None:
        config = source.config
        if not 0 <= start <= end <= config.n_layers:
            raise EngineError(f"layers [{start}, {end}) were asked for", f"the model has [0, {config.n_layers})")
        if precision not in PRECISIONS:
            raise EngineError(f"precision is {precision!r}", f"choose one of {', '.join(PRECISIONS)}")
        if threads < 0 or kv.max_tokens < 1:
            raise EngineError(f"threads are {threads} and KV positions {kv.max_tokens}", "neither can be that small")
        if config.experts is not None:
            raise EngineError("the onnx back end cannot run mixtures of experts", "use the native back end")
        if config.special:
            raise EngineError(f"the onnx back end has no {', '.join(config.special)}", "use the native back end")
        self._ort = onnxruntime()
        self._source: WeightSource | None = source
        self._config = config
        self._start, self._end = start, end
        self._threads, self._precision = threads or default_threads(), precision
        self._max_blocks = blocks(kv.max_tokens)
        self._kv_shape = (config.n_kv_heads, -(-config.head_dim // 8) * 8)
        self._sequences: list[OnnxSequence] = []
        self._weights: Weights = {}
        self._sessions: OrderedDict[tuple[int, int, int], Session] = OrderedDict()
        self._head: tuple[Session, Any] | None = None
        self._embedding = source.embedding() if start == 0 else None
        self._head_tokens = head_tokens(source) if end == config.n_layers else None

    @property
    def config(self) -> DecoderConfig:
        """The whole model's configuration."""
        return self._config

    @property
    def start(self) -> int:
        """First layer."""
        return self._start

    @property
    def end(self) -> int:
        """One past the last layer."""
        return self._end

    @property
    def numerics(self) -> Numerics:
        """Not exact: onnxruntime chooses kernels by rows, threads and instruction set."""
        return Numerics(f"ort-{self._ort.__version__}-{self._precision}", frozenset({"batch", "threads", "isa"}))

    @property
    def free_tokens(self) -> int:
        """Positions that the KV can still take, in whole blocks."""
        return (self._max_blocks - sum(s.n_blocks for s in self._sequences)) * KV_BLOCK

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV of one position, in all its layers."""
        return (self._end - self._start) * self.config.n_kv_heads * self.config.head_dim * 2 * 4

    def open(self, *, window: int = 0, sinks: int | None = None) -> OnnxSequence:
        """A new, empty sequence; see `engine.part.Part.open`. There are no sinks here.

        Raises:
            EngineError: a negative window, sinks, or the part is closed.
        """
        self._open_source()
        if window < 0:
            raise EngineError(f"window is {window}", "choose 0 (all positions) or more")
        if sinks:
            raise EngineError("ONNX Runtime cannot keep attention sinks", "open with sinks=0, or use the native engine")
        sequence = OnnxSequence(self, self._end - self._start, window)
        self._sequences.append(sequence)
        return sequence

    def restore(self, data: bytes, enter: int = 0) -> KvBlock:
        """See `engine.part.Part.restore`; there are no blocks here."""
        raise no_blocks()

    def forget(self, sequence: OnnxSequence) -> None:
        """Stops counting a sequence (which closes itself)."""
        self._sequences = [s for s in self._sequences if s is not sequence]

    def reserve(self, n_blocks: int) -> None:
        """Checks that so many blocks are free.

        Raises:
            OutOfBlocks: they are not.
        """
        if n_blocks * KV_BLOCK > self.free_tokens:
            raise OutOfBlocks(
                f"{n_blocks * KV_BLOCK} positions do not fit into the {self.free_tokens} free ones of the KV",
                "close sequences, open with a window, or give the part a larger max_tokens",
            )

    def close(self) -> None:
        """Frees KV, weights and sessions; a second time does nothing."""
        for sequence in list(self._sequences):
            sequence.close()
        self._sessions.clear()
        self._weights.clear()
        self._source = self._head = self._embedding = None

    def step(self, rows: Rows) -> StepResult:
        """Computes the rows span by span and commits their KV.

        Raises:
            OutOfBlocks: the KV is full; nothing was computed or committed.
            EngineError: a row does not fit, or onnxruntime failed; nothing was committed (a sequence whose window
                had moved on by then is closed).
        """
        self._open_source()
        self._check(rows)
        before = [(s, list(s.held), list(s.base)) for s in self._sequences]
        tokens: list[int] = []
        hidden: list[NDArray[np.float32]] = []
        logits: list[NDArray[np.float32]] = []
        confidence: list[NDArray[np.float32]] = []
        try:
            for span in rows.spans:
                self._span(span, tokens, hidden, logits, confidence)
        except BaseException as error:
            for sequence, held, base in before:
                sequence.held = held
                if sequence.base != base:  # a window moved on; its past cannot be brought back
                    sequence.close()
            if isinstance(error, Exception) and not isinstance(error, EngineError):
                raise EngineError(f"onnxruntime could not run the step: {error}") from error
            raise
        c = self._config
        return StepResult(
            tokens,
            np.concatenate(hidden) if hidden else np.empty((0, c.d_model), np.float32),
            np.concatenate(logits) if logits else np.empty((0, c.vocab_size), np.float32),
            np.concatenate(confidence) if confidence else NO_CONFIDENCE,
        )

    def _span(
        self,
        span: Span,
        tokens: list[int],
        hidden: list[NDArray[np.float32]],
        logits: list[NDArray[np.float32]],
        confidence: list[NDArray[np.float32]],
    ) -> None:
        sequence, leave = cast(OnnxSequence, span.sequence), self._leave(span)
        for at in range(0, len(span), CHUNK):
            n = min(CHUNK, len(span) - at)
            if span.tokens is not None:
                x = self._embed(span.tokens[at : at + n])
            else:
                x = np.ascontiguousarray(cast("NDArray[np.float32]", span.hidden_in)[at : at + n])
            if leave > span.enter:
                x = self._layers(sequence, span.position + at, x, span.enter, leave)
            if not span.want_all:
                x = x[-1:] if at + n == len(span) else x[:0]
            if not len(x) or not span.want:
                continue
            if span.want & Want.HIDDEN:
                hidden.append(x.copy())
            if span.want & NEEDS_HEAD:
                y = self._logits(x)
                if span.want & Want.LOGITS:
                    logits.append(y)
                if span.want & Want.SAMPLE:
                    first = span.position + at + n - len(x)
                    tokens.extend(sample(row, span.sampling, first + i) for i, row in enumerate(self._spread(y)))
                if span.want & Want.CONFIDENCE:
                    below = y.astype(np.float64) - y.max(axis=1, keepdims=True)
                    confidence.append((1 / np.exp(below).sum(axis=1)).astype(np.float32))

    def _spread(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [n, rows of the head] f32 by token, minus infinity where the head has none: [n, vocab_size] f32."""
        if self._head_tokens is None:
            return logits
        spread = np.full((len(logits), self._config.vocab_size), -np.inf, np.float32)
        spread[:, self._head_tokens] = logits
        return spread

    def _layers(
        self, sequence: OnnxSequence, position: int, x: NDArray[np.float32], enter: int, leave: int
    ) -> NDArray[np.float32]:
        """x [n, d_model] f32 at `position`... through layers [enter, leave): [n, d_model] f32."""
        n, low, high = len(x), enter - self._start, leave - self._start
        sequence.make_room(low, high, position, n, self._kv_shape)
        session = self._range_session(enter, leave, sequence.window)
        bound_session, binding = sequence.bindings.get((enter, leave), (None, None))
        if bound_session is not session:
            binding = session.binding()
            sequence.bindings[enter, leave] = session, binding
            for layer in range(low, high):
                for name, buffer in zip("kv", cast(Any, sequence.buffers[layer]), strict=True):
                    bind_input(binding, f"past_{name}.{layer + self._start}", buffer)
                    bind_output(binding, f"{name}.{layer + self._start}", buffer)
        total = position + n - sequence.base[low]  # the same in all these layers
        cos, sin = self._rotary(position, n)
        feeds: dict[str, NDArray[np.generic]] = {
            "hidden": np.ascontiguousarray(x[None]),
            "cos": cos,
            "sin": sin,
            "place": np.arange(n, dtype=np.int64)[None],
            "last": np.array([total - 1], np.int32),
            "total": np.array(total, np.int32),
        }
        out = np.empty((1, n, self._config.d_model), np.float32)
        session.run(binding, feeds, "out", out)
        for layer in range(low, high):
            sequence.held[layer] = max(sequence.held[layer], position + n)
        return cast(NDArray[np.float32], out[0])

    def _logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The last layer's state [n, d_model] f32 -> logits [n, rows of the head] f32."""
        if self._head is None:
            session = self._session(lambda builder: builder.head())
            self._head = session, session.binding()
        session, binding = self._head
        tokens = self._head_tokens
        width = self._config.vocab_size if tokens is None else len(tokens)
        out = np.empty((1, len(x), width), np.float32)
        session.run(binding, {"hidden": np.ascontiguousarray(x[None])}, "logits", out)
        return cast(NDArray[np.float32], out[0])

    def _rotary(self, position: int, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosine and sine [n, padded head_dim / 2] f32 of positions from `position` on."""
        angle = np.zeros((n, self._kv_shape[1] // 2), np.float32)
        inverse = np.array(self._config.rope_inv_freq, np.float32)
        angle[:, : len(inverse)] = np.arange(position, position + n, dtype=np.float32)[:, None] * inverse
        scale = self._config.rope_scale
        wide = angle.astype(np.float64)
        return (np.cos(wide) * scale).astype(np.float32), (np.sin(wide) * scale).astype(np.float32)

    def _embed(self, tokens: list[int]) -> NDArray[np.float32]:
        """Token ids -> [n, d_model] f32, unpacking only the blocks of rows that are asked for."""
        matrix = cast(PackedMatrix, self._embedding)
        ids = np.array(tokens, np.int64)
        needed, place = np.unique(ids // LANES, return_inverse=True)
        arrays = {name: array[needed] for name, array in matrix.arrays.items()}
        part = dequantize(PackedMatrix(matrix.format, LANES * len(needed), matrix.cols, arrays))
        return cast(NDArray[np.float32], part[place * LANES + ids % LANES])

    def _check(self, rows: Rows) -> None:
        held: dict[int, tuple[OnnxSequence, list[int]]] = {}
        for span in rows.spans:
            sequence = span.sequence
            if not isinstance(sequence, OnnxSequence) or sequence.part is not self:
                raise EngineError("a row's sequence is closed or belongs to another part", "open one with part.open()")
            if not len(span):
                raise EngineError("a span has no rows", "leave it out")
            self._check_input(span)
            leave = self._leave(span)
            if not self._start <= span.enter <= leave <= self._end:
                raise EngineError(
                    f"a row goes through layers [{span.enter}, {leave})", f"the part has [{self._start}, {self._end})"
                )
            if span.want & NEEDS_HEAD and leave != self._config.n_layers:
                raise EngineError(f"logits were asked for before layer {leave}", "only the last layer's state has them")
            counts = held.setdefault(id(sequence), (sequence, list(sequence.held)))[1]
            low, high = span.enter - self._start, leave - self._start
            first, last = sequence.first(low, high), min(counts[low:high], default=span.position)
            if not first <= span.position <= last:
                raise EngineError(
                    f"a row has position {span.position}",
                    f"layers [{span.enter}, {leave}) can go on at {first}..{last}",
                )
            counts[low:high] = [max(count, span.position + len(span)) for count in counts[low:high]]
        self._check_room(list(held.values()))

    def _check_input(self, span: Span) -> None:
        c = self._config
        if span.tokens is not None:
            if self._start > 0 or span.enter > 0:
                raise EngineError(f"tokens enter at layer {max(self._start, span.enter)}", "give hidden states there")
            wrong = [t for t in span.tokens if not 0 <= t < c.vocab_size]
            if wrong:
                raise EngineError(f"token {wrong[0]} does not exist", f"the vocabulary has {c.vocab_size}")
            return
        hidden = cast("NDArray[np.float32]", span.hidden_in)
        if hidden.ndim != 2 or hidden.shape[1] != c.d_model or hidden.dtype != np.float32:
            raise EngineError(f"hidden states are {hidden.dtype}{list(hidden.shape)}", f"give float32 [n, {c.d_model}]")
        if not np.isfinite(hidden).all():
            raise EngineError("a hidden state is not finite", "check the codec of the side it came from")

    def _check_room(self, planned: list[tuple[OnnxSequence, list[int]]]) -> None:
        extra = 0
        for sequence, counts in planned:
            after = max((h - b for h, b in zip(counts, sequence.base, strict=True)), default=0)
            if sequence.window:  # what a window holds at most, with the chunk that is being computed
                after = min(after, sequence.window + SLACK + 4 * KV_BLOCK + CHUNK)
            extra += max(0, blocks(after) - sequence.n_blocks)
        self.reserve(extra)

    def _leave(self, span: Span) -> int:
        return self._end if span.leave is None else span.leave

    def _open_source(self) -> WeightSource:
        if self._source is None:
            raise EngineError("the part is closed", "open it again")
        return self._source

    def _range_session(self, enter: int, leave: int, window: int) -> Session:
        key = (enter, leave, window)
        if key not in self._sessions:
            while len(self._sessions) >= SESSIONS:
                _, gone = self._sessions.popitem(last=False)
                for sequence in self._sequences:  # whose bindings would keep its weights
                    sequence.bindings = {at: one for at, one in sequence.bindings.items() if one[0] is not gone}
            self._sessions[key] = self._session(lambda builder: builder.layers(enter, leave, window))
        self._sessions.move_to_end(key)
        return self._sessions[key]

    def _session(self, build: Callable[[Builder], Graph]) -> Session:
        packed = self._precision == "q4"
        weights: Weights = {} if packed else self._weights  # packed ones are copied by the session
        graph = build(Builder(self._open_source(), packed=packed, weights=weights))
        return Session(self._ort, graph, self._threads)
