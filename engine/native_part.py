"""The native back end: a part of a decoder run by the C kernels, one call a step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.binding import Workers, native
from isthmus.engine.config import DecoderConfig
from isthmus.engine.experts import ExpertSource
from isthmus.engine.kv import BlockTable, Forecast, KvPool
from isthmus.engine.native_block import NativeBlock
from isthmus.engine.native_decode import NOTHING, ROW, DecodeRow
from isthmus.engine.native_layers import Layers
from isthmus.engine.native_sequence import NativeSequence
from isthmus.engine.part import (
    KV_BLOCK,
    KV_SINKS,
    KV_SLACK,
    NO_CONFIDENCE,
    KvConfig,
    Numerics,
    Rows,
    Span,
    StepResult,
    Want,
    WeightSource,
)
from isthmus.engine.routing import Routing
from isthmus.engine.sampling import GREEDY, Sampling
from isthmus.protocol.errors import EngineError, IsthmusError, OutOfBlocks

NUMERICS = Numerics("native-1")
STEP_ROWS = 256  # rows of one native call; longer prefills are cut, which changes no bit
_F32 = np.dtype(np.float32)
_HIDDEN, _LOGITS, _SAMPLE = int(Want.HIDDEN), int(Want.LOGITS), int(Want.SAMPLE)
_CONFIDENCE = int(Want.CONFIDENCE)
_NEEDS_HEAD = _LOGITS | _SAMPLE | _CONFIDENCE
_NOT_READ = -4
_FAILURES = {
    -1: ("no memory for the step's scratch", "use fewer rows or a shorter context"),
    -2: ("a row does not fit the part", "check its token, hidden state, layers and what it wants"),
    -3: ("a hidden state is not finite", "check the other side's codec and weights"),
}


class NativePart:
    """Layers run natively; see `engine.part.Part`. Several `Layers` that follow each other run in one call."""

    numerics = NUMERICS

    def __init__(self, layers: list[Layers], workers: Workers) -> None:
        if any(a.end != b.start for a, b in pairwise(layers)):
            raise EngineError(
                "the parts of a chain do not follow each other", "let each start where the one before ends"
            )
        for piece in layers:
            if piece.experts is not None:
                piece.experts.attach(piece.c_part, workers)
                if piece.experts.tolerance is not None:
                    piece.tolerate(piece.experts.tolerance[piece.start : piece.end])
        module = native()
        self._ffi, self._lib, self._workers, self._layers = module.ffi, module.lib, workers, layers
        self._im_step, self._engine = module.lib.im_step, workers.engine
        self.lock = workers.lock  # of the threads that a step, and whatever changes its tables, must have to itself
        self.config: DecoderConfig = layers[0].config
        self.start, self.end = layers[0].start, layers[-1].end
        self._ahead = self.config.experts is not None and self.config.experts.pre_gate
        self._call = module.ffi.new("im_step_call *")
        self._rows_c = module.ffi.new("im_row[]", STEP_ROWS)
        self._rows_raw = module.ffi.buffer(self._rows_c)
        self._rows = np.frombuffer(self._rows_raw, np.int32).reshape(STEP_ROWS, 8)
        self._samplings = module.ffi.new("im_sampling[]", STEP_ROWS + 1)
        self._samplings[0].top_p = 1.0
        self._tokens = module.ffi.new("int32_t[]", STEP_ROWS)
        self._parts = module.ffi.new("im_part *[]", [piece.c_part for piece in layers])
        call = self._call
        call.parts, call.n_parts, call.rows = self._parts, len(layers), self._rows_c
        call.samplings, call.tokens_out = self._samplings, self._tokens
        self._decode = DecodeRow(module.ffi, call, self.config.vocab_size, self.config.d_model, self.end)
        self._seats: list[NativeSequence | None] = []
        self._grow_seats(16)

    @property
    def threads(self) -> int:
        """Threads that compute a step."""
        return self._workers.threads

    @property
    def cpu(self) -> str:
        """The kernel family in use."""
        return self._workers.cpu

    @property
    def waited(self) -> float:
        """Seconds that steps of this part's threads waited for experts so far."""
        return float(self._lib.im_engine_waited(self._engine)) / 1e9

    @property
    def free_tokens(self) -> int:
        """Positions that the KV pool can still take."""
        return min(layers.pool.free_blocks for layers in self._layers) * KV_BLOCK

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV of one position, in all its layers."""
        return int(sum(pool.memory.shape[1] for pool in self.pools)) // KV_BLOCK

    @property
    def pools(self) -> list[KvPool]:
        """KV of each of the chained layers."""
        return [layers.pool for layers in self._layers]

    def skipped_bytes(self, enter: int) -> list[int]:
        """Bytes at the front of a block, in each pool, of layers before `enter`."""
        return [
            min(max(0, enter - one.start), one.end - one.start) * one.pool.memory.shape[1] // (one.end - one.start)
            for one in self._layers
        ]

    def restore(self, data: bytes, enter: int = 0) -> NativeBlock:
        """A block with what `NativeBlock.data` gave; see `engine.part.Part.restore`."""
        with self.lock:
            sizes = [
                pool.memory.shape[1] - skipped
                for pool, skipped in zip(self.pools, self.skipped_bytes(enter), strict=True)
            ]
            if len(data) != sum(sizes):
                raise EngineError(f"a KV block of {len(data)} bytes", f"give the {sum(sizes)} that were read")
            if not all(pool.free_blocks for pool in self.pools):
                raise OutOfBlocks("the KV cache is full", "close a session, or raise kv_tokens")
            blocks, at = [], 0
            for pool, size in zip(self.pools, sizes, strict=True):
                block = pool.take()
                pool.memory[block, pool.memory.shape[1] - size :] = np.frombuffer(data, np.uint8, size, at)
                blocks.append(block)
                at += size
            return NativeBlock(self, blocks)

    def _grow_seats(self, count: int) -> None:
        new = self._ffi.new
        self._seats += [None] * (count - len(self._seats))
        self._tables = [new("im_sequence[]", count) for _ in self._layers]
        self._table_pointers = new("im_sequence *[]", self._tables)
        self._call.tables = self._decode.call.tables = self._table_pointers
        for sequence in self._seats:
            if sequence is not None:
                self.seat(sequence)

    def seat(self, sequence: NativeSequence) -> int:
        """Shows a sequence's block tables to C, again when they moved; returns its place in C's tables."""
        if sequence in self._seats:
            slot = self._seats.index(sequence)
        else:
            if None not in self._seats:
                self._grow_seats(2 * len(self._seats))
            slot = self._seats.index(None)
            self._seats[slot] = sequence
        for cells, table in zip(self._tables, sequence.tables, strict=True):
            cells[slot].blocks = self._ffi.cast("int32_t *", table.blocks.ctypes.data)
            cells[slot].window, cells[slot].sinks = sequence.window, table.sinks
        return slot

    def unseat(self, sequence: NativeSequence) -> None:
        """Frees a closed sequence's place."""
        self._seats[sequence.slot] = None

    def tolerate(self, tolerance: NDArray[np.float32] | None) -> None:
        """Takes only the planes of experts that their shares ask for; see `Layers.tolerate`. For parts that are no
        chain."""
        with self.lock:
            self._layers[0].tolerate(tolerance)

    def record(self, positions: int) -> Routing | None:
        """Writes down what routers say; see `Layers.record`. For parts that are no chain."""
        with self.lock:
            return self._layers[0].record(positions)

    def replay(self, routing: Routing | None) -> None:
        """Takes experts from a record; see `Layers.replay`. For parts that are no chain."""
        with self.lock:
            self._layers[0].replay(routing)

    def open(self, *, window: int = 0, sinks: int | None = None) -> NativeSequence:
        """A new, empty sequence; see `engine.part.Part.open`."""
        if self._call is None:
            raise EngineError("the part is closed", "open another one")
        if sinks is None:
            sinks = KV_SINKS if window else 0
        if min(window, sinks) < 0 or (sinks and not window):
            raise EngineError(f"the attention window is {window}, its sinks {sinks}", "choose 0 (none) or more of both")
        with self.lock:
            tables = [BlockTable(layers.pool, sinks=-(-sinks // KV_BLOCK)) for layers in self._layers]
            return NativeSequence(self, window, tables, [0] * (self.end - self.start))

    def step(self, rows: Rows) -> StepResult:
        """Computes the rows and commits their KV; see `engine.part.Part.step`."""
        spans = rows.spans
        if self._workers.lost:
            raise EngineError("the part was opened before this process was forked", "open it in the child")
        with self.lock:
            if len(spans) == 1 and (span := spans[0]).count == 1:
                return self._step_one(span)
            if not spans:
                raise EngineError("a step without rows", "give it at least one")
            total, ends, fills = 0, dict[int, int](), dict[int, list[int]]()
            for span in spans:
                key = id(span.sequence)
                first, last = self._check(span, fills.get(key), ends.get(key, -1))
                ends[key] = span.position + span.count
                filled = fills.setdefault(key, list(cast(NativeSequence, span.sequence).filled))
                filled[first:last] = [ends[key]] * (last - first)
                total += span.count
            steps = [spans] if total <= STEP_ROWS else pieces(spans, STEP_ROWS)
            self._admit(steps)
            if total <= STEP_ROWS:
                return self._run(spans)
            if any(span.hidden_in is not None and not np.isfinite(span.hidden_in).all() for span in spans):
                raise EngineError(*_FAILURES[-3])  # before the first piece is committed
            return self._run_pieces(steps)

    def _step_one(self, span: Span) -> StepResult:
        sequence, position, want, sampling = cast(NativeSequence, span.sequence), span.position, span.want, 0
        if (
            isinstance(sequence, NativeSequence)
            and sequence.going == (position, span.enter, span.leave, want)
            and position < sequence.high
            and sequence.part is self
        ):
            if span.sampling is not GREEDY and want & _SAMPLE:
                self._set_sampling(sampling := 1, span.sampling)
            if self._decode.put(span, sequence.slot, sampling):
                if status := self._im_step(self._engine, self._decode.call):
                    raise self._failed(self._decode.call, status, [span])
                sequence.fill(span)
                sequence.going = position + 1, span.enter, span.leave, want
                return self._decode.result(want)
        self._check(span, None, -1)
        if not sequence.low <= position < sequence.high:
            self._admit([[span]])
        result = self._run([span])
        if not want & _LOGITS:  # from here on, one row after the other needs no more checks
            sequence.going = position + 1, span.enter, span.leave, want
        return result

    def _check(self, span: Span, filled: list[int] | None, before: int) -> tuple[int, int]:
        """Refuses a span that does not fit; gives its layers, counted from the part's first.

        Args:
            filled: what the sequence's layers hold after the spans before it, None for what they hold now.
            before: the end of the sequence's span before it, -1 if none.
        """
        sequence, count, position, leave = span.sequence, span.count, span.position, span.leave
        if not isinstance(sequence, NativeSequence) or sequence.part is not self:
            raise EngineError("a row's sequence is closed or belongs to another part", "open it on this part")
        if leave is None:
            leave = self.end
        if not self.start <= span.enter <= leave <= self.end:
            raise EngineError(f"rows of layers [{span.enter}, {leave})", f"this part has [{self.start}, {self.end})")
        if span.enter and self._ahead:
            problem = f"rows enter at layer {span.enter}, whose experts are chosen in the layer before"
            raise EngineError(problem, "this model runs whole on one side: use local or stream mode")
        first, last = span.enter - self.start, leave - self.start
        held = min((filled or sequence.filled)[first:last], default=sequence.length)
        if count < 1 or not 0 <= position <= held:
            layers = f"layers [{span.enter}, {leave}) of the sequence hold {held}"
            raise EngineError(f"{count} rows at position {position}", f"{layers}: give the positions before it first")
        if position < before:
            raise EngineError(f"position {position} after {before - 1} of a sequence", "let the rows of a step ascend")
        if sequence.window and position < sequence.least:
            raise EngineError(f"position {position} is behind the window", f"start at {sequence.least} or later")
        tokens = span.tokens
        if tokens is not None:
            if span.enter or self.start:
                raise EngineError(f"tokens cannot enter at layer {span.enter or self.start}", "give hidden states")
            low, high = (tokens[0], tokens[0]) if count == 1 else (min(tokens), max(tokens))
            if low < 0 or high >= self.config.vocab_size:
                raise EngineError(f"token {low if low < 0 else high}", f"the vocabulary has {self.config.vocab_size}")
        else:
            hidden = cast("NDArray[np.float32]", span.hidden_in)
            if hidden.shape != (count, self.config.d_model) or hidden.dtype != _F32:
                raise EngineError(
                    f"hidden states are {hidden.dtype} {hidden.shape}", f"give float32 [n, {self.config.d_model}]"
                )
        if span.want & _NEEDS_HEAD and leave != self.config.n_layers:
            raise EngineError(f"logits after layer {leave}", f"only layer {self.config.n_layers} has a head")
        return first, last

    def _admit(self, steps: list[list[Span]]) -> None:
        for i, layers in enumerate(self._layers):
            forecast, ready = Forecast(layers.pool), dict[int, tuple[int, int]]()
            for step in steps:
                firsts: dict[int, int] = {}
                for span in step:
                    sequence, start = cast(NativeSequence, span.sequence), span.position
                    key, end = id(sequence), start + span.count
                    first = firsts.setdefault(key, start)
                    low, high = ready.get(key, (sequence.low, sequence.high))
                    if start < low or end > high:
                        keep = first + 1 - sequence.window - KV_SLACK if sequence.window else 0
                        forecast.take(sequence.tables[i], start, end, keep)
                        ready[key] = start, -(-end // KV_BLOCK) * KV_BLOCK
            if forecast.least < 0:
                free = layers.pool.free_blocks
                raise OutOfBlocks(
                    f"{(free - forecast.least) * KV_BLOCK} more tokens of KV are needed, {free * KV_BLOCK} are free",
                    "close a session, shorten the prompt, raise kv_tokens, or choose a sliding window",
                )

    def _run_pieces(self, steps: list[list[Span]]) -> StepResult:
        results = [self._run(step) for step in steps]
        return StepResult(
            [token for result in results for token in result.tokens],
            join([result.hidden for result in results if len(result.hidden)]),
            join([result.logits for result in results if len(result.logits)]),
            np.concatenate([result.confidence for result in results]),
        )

    def _run(self, spans: list[Span]) -> StepResult:
        call, row, n_hidden, n_logits, n_tokens, n_inputs, n_samplings = self._call, 0, 0, 0, 0, 0, 1
        n_confidences = 0
        inputs: list[NDArray[np.float32]] = []
        firsts: dict[int, int] = {}  # the first position of each sequence in this call
        for span in spans:
            sequence, count, start = cast(NativeSequence, span.sequence), span.count, span.position
            end, leave, want, sampling = start + count, span.leave, span.want, 0
            if start < sequence.low or end > sequence.high:
                sequence.reserve(start, end, firsts.setdefault(id(sequence), start))
            elif sequence.window:
                firsts.setdefault(id(sequence), start)
            if want & _SAMPLE and span.sampling is not GREEDY:
                self._set_sampling(n_samplings, span.sampling)
                sampling, n_samplings = n_samplings, n_samplings + 1
            if leave is None:
                leave = self.end
            if count == 1:
                token = -1 if span.tokens is None else span.tokens[0]
                ROW.pack_into(
                    self._rows_raw, 32 * row, sequence.slot, start, token, n_inputs, span.enter, leave, want, sampling
                )
            else:
                block = self._rows[row : row + count]
                block[:] = (sequence.slot, 0, -1, 0, span.enter, leave, want if span.want_all else 0, sampling)
                block[:, 1] = np.arange(start, end)
                if span.tokens is not None:
                    block[:, 2] = span.tokens
                else:
                    block[:, 3] = np.arange(n_inputs, n_inputs + count)
                block[-1, 6] = want
            if span.hidden_in is not None:
                inputs.append(span.hidden_in)
                n_inputs += count
            wanting = count if span.want_all else 1
            n_hidden += wanting if want & _HIDDEN else 0
            n_logits += wanting if want & _LOGITS else 0
            n_tokens += wanting if want & _SAMPLE else 0
            n_confidences += wanting if want & _CONFIDENCE else 0
            row += count
        hidden, logits, confidence = NOTHING, NOTHING, NO_CONFIDENCE
        pointer = self._ffi.from_buffer
        if inputs:
            stacked = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
            if not stacked.flags.c_contiguous:
                stacked = np.ascontiguousarray(stacked)
            call.hidden_in, call.n_hidden = pointer("float[]", stacked), n_inputs
        if n_hidden:
            hidden = np.empty((n_hidden, self.config.d_model), np.float32)
            call.hidden_out = pointer("float[]", hidden)
        if n_logits:
            logits = np.empty((n_logits, self._parts[len(self._layers) - 1].head.rows), np.float32)
            call.logits_out = pointer("float[]", logits)
        if n_confidences:
            confidence = np.empty(n_confidences, np.float32)
            call.confidence_out = pointer("float[]", confidence)
        call.n_rows = row
        if status := self._im_step(self._engine, call):
            raise self._failed(call, status, spans)
        for span in spans:
            cast(NativeSequence, span.sequence).fill(span)
        return StepResult(self._ffi.unpack(self._tokens, n_tokens) if n_tokens else [], hidden, logits, confidence)

    def _failed(self, call: Any, status: int, spans: list[Span]) -> IsthmusError:
        """Why a call failed; gives back what was reserved for it."""
        for span in spans:
            cast(NativeSequence, span.sequence).give_back()
        if status != _NOT_READ:
            return EngineError(*_FAILURES.get(status, (f"the native step failed ({status})", "")))
        source = self._holding(call.layer).experts
        return source.failure(call.layer) if source else EngineError(f"experts of layer {call.layer} are missing")

    def _holding(self, layer: int) -> Layers:
        for layers in self._layers:
            if layers.start <= layer < layers.end:
                return layers
        raise EngineError(f"layer {layer} is none of this part", f"it has [{self.start}, {self.end})")

    def _set_sampling(self, index: int, sampling: Sampling) -> None:
        cell = self._samplings[index]
        cell.temperature, cell.top_k, cell.top_p = sampling.temperature, sampling.top_k, sampling.top_p
        cell.seed, cell.stream = sampling.seed, sampling.stream

    def close(self) -> None:
        """Frees KV and weights; sequences of this part can no longer be stepped."""
        with self.lock:
            for sequence in self._seats:
                if sequence is not None:
                    sequence.close()
            self._layers = []
            self._call = None


def pieces(spans: list[Span], limit: int) -> list[list[Span]]:
    """Spans cut into steps of at most `limit` rows, in order."""
    steps: list[list[Span]] = [[]]
    room = limit
    for span in spans:
        at, count = 0, len(span)
        while at < count:
            n = min(room, count - at)
            last = at + n == count
            tokens = span.tokens[at : at + n] if span.tokens is not None else None
            hidden = span.hidden_in[at : at + n] if span.hidden_in is not None else None
            want = span.want if last or span.want_all else 0
            steps[-1].append(
                Span(
                    span.sequence,
                    span.position + at,
                    n,
                    tokens,
                    hidden,
                    span.enter,
                    span.leave,
                    want,
                    span.want_all,
                    span.sampling,
                )
            )
            at, room = at + n, room - n
            if not room:
                steps.append([])
                room = limit
    return [step for step in steps if step]


def join(arrays: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The arrays one below the other."""
    return np.concatenate(arrays) if arrays else NOTHING


def open_native(
    source: WeightSource,
    start: int,
    end: int,
    *,
    threads: int = 0,
    kv: KvConfig | None = None,
    cpu: str | None = None,
    experts: ExpertSource | None = None,
) -> NativePart:
    """Loads layers [start, end); see `isthmus.engine.open_part`."""
    return NativePart([Layers(source, start, end, kv or KvConfig(), experts)], Workers.shared(threads, cpu))


def chain(parts: list[NativePart]) -> NativePart:
    """Parts that follow each other as one, run by one native call a step; it shares their weights and KV pools."""
    return NativePart([layers for part in parts for layers in part._layers], parts[0]._workers)
