"""A part of a model: the one interface that every back end implements and that device and cloud use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntFlag
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig
from isthmus.engine.sampling import GREEDY, Sampling
from isthmus.quant.packed import PackedMatrix

KV_BLOCK = 16  # positions in one KV block
KV_SLACK = 32  # positions that a sliding window keeps beyond its own, so that as many can be taken back
KV_SINKS = 16  # positions at the front that a sliding window keeps in sight


class WeightSource(Protocol):
    """Where a part's weights come from; a bundle implements it.

    A layer maps names to matrices and vectors: `attn_norm` [d_model], `q` [n_heads * head_dim, d_model], `k` and
    `v` [n_kv_heads * head_dim, d_model], `o` [d_model, n_heads * head_dim], `ffn_norm` [d_model], `gate` and `up`
    [d_ff, d_model], `down` [d_model, d_ff]; with experts, instead of gate, up and down, `router` f32 [n_experts,
    d_model] and `experts.E.gate`, `experts.E.up`, `experts.E.down`. What a configuration's flags add to these, and
    each shape, stands in `engine.shapes`. Vectors and the router are float32 arrays. A part whose first layer has an
    `input` [d_model, d_model] takes hidden states only, which go through that linear map first.

    A source may have a method `head_tokens() -> NDArray[np.int32] | None` as well: ascending ids of the tokens that
    the head has rows for, None for all. Such a head chooses, and gives logits, among those tokens only.
    """

    @property
    def config(self) -> DecoderConfig: ...

    def embedding(self) -> PackedMatrix:
        """The token embedding [vocab_size, d_model]."""
        ...

    def layer(self, index: int) -> Mapping[str, PackedMatrix | NDArray[np.float32]]:
        """The weights of one layer, 0 <= index < n_layers."""
        ...

    def final_norm(self) -> NDArray[np.float32]:
        """The last norm's weight [d_model]."""
        ...

    def head(self) -> PackedMatrix:
        """The output head [vocab_size or len(head_tokens), d_model]; the embedding itself when they are tied."""
        ...


class Want(IntFlag):
    """What a row shall give."""

    NONE = 0
    HIDDEN = 1
    LOGITS = 2
    SAMPLE = 4
    CONFIDENCE = 8


@dataclass(frozen=True, slots=True)
class KvConfig:
    """How much KV a part holds and in which number format.

    Attributes:
        format: "f16" or "f32".
        max_tokens: positions of all sequences together, rounded up to blocks of 16.
    """

    format: str = "f16"
    max_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class Numerics:
    """What the bits of a result depend on.

    Attributes:
        id: two parts with the same id, weights and KV format give the same bits.
        varies_with: the circumstances out of {"batch", "threads", "isa"} that may change bits; empty is exact.
    """

    id: str
    varies_with: frozenset[str] = field(default_factory=frozenset)

    @property
    def exact(self) -> bool:
        """Whether batch, chunking, threads and instruction set leave every bit alone."""
        return not self.varies_with


class KvBlock(Protocol):
    """The KV of 16 positions in a row, which stays when the sequence that lent it goes."""

    @property
    def in_use(self) -> bool:
        """Whether a sequence uses it, too; if not, closing it frees its memory."""
        ...

    def data(self, enter: int = 0) -> bytes:
        """The bytes of the part's layers from `enter` on, in the part's KV format."""
        ...

    def close(self) -> None:
        """Gives it back; may be called twice."""
        ...


class Sequence(Protocol):
    """A row of positions with its KV."""

    @property
    def length(self) -> int:
        """Positions whose KV is held; the next row's position."""
        ...

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on; under a sliding window the last `KV_SLACK` at most."""
        ...

    def fork(self) -> Sequence:
        """Another sequence with the same past; blocks are shared until one of them writes."""
        ...

    def lend(self, index: int) -> KvBlock:
        """The block of positions 16 `index` to 16 `index` + 15, to be kept by others; nothing is copied.

        Raises:
            EngineError: not all of them are held, or the back end keeps no blocks.
        """
        ...

    def adopt(self, blocks: Iterable[KvBlock], enter: int) -> None:
        """Begins with the positions of such blocks, of layers from `enter` on; they are shared until it writes there.

        Raises:
            EngineError: it is not empty, a block is closed or another part's, or the back end keeps no blocks.
        """
        ...

    def close(self) -> None:
        """Gives the blocks back. A closed sequence cannot be stepped."""
        ...


class Rows:
    """The rows of one step, in the order in which their results come back.

    A row carries one position of one sequence from layer `enter` to layer `leave`. Rows of several sequences, of
    prefill and of decode, of tokens and of hidden states mix freely; within one sequence positions ascend.
    """

    __slots__ = ("spans",)

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def tokens(
        self,
        sequence: Sequence,
        position: int,
        tokens: list[int],
        *,
        leave: int | None = None,
        want: Want = Want.SAMPLE,
        want_all: bool = False,
        sampling: Sampling = GREEDY,
    ) -> Rows:
        """Adds rows for tokens at position, position + 1, ... entering at layer 0.

        Args:
            leave: the layer before which the rows stop; None is the part's end.
            want: what the last row (every row with `want_all`) gives. HIDDEN is the state before layer `leave`.
        """
        self.spans.append(Span(sequence, position, len(tokens), tokens, None, 0, leave, int(want), want_all, sampling))
        return self

    def hidden(
        self,
        sequence: Sequence,
        position: int,
        hidden: NDArray[np.float32],
        *,
        enter: int,
        leave: int | None = None,
        want: Want = Want.SAMPLE,
        want_all: bool = False,
        sampling: Sampling = GREEDY,
    ) -> Rows:
        """Adds rows for hidden states [n, d_model] f32 entering before layer `enter`."""
        self.spans.append(
            Span(sequence, position, len(hidden), None, hidden, enter, leave, int(want), want_all, sampling)
        )
        return self

    def __len__(self) -> int:
        return sum(span.count for span in self.spans)


@dataclass(slots=True)
class Span:
    """Consecutive positions of one sequence that go the same way."""

    sequence: Sequence
    position: int
    count: int
    tokens: list[int] | None
    hidden_in: NDArray[np.float32] | None  # [n, d_model] f32
    enter: int
    leave: int | None
    want: int  # of Want, as a plain number: enum operations would cost as much as the rest of a step's bookkeeping
    want_all: bool
    sampling: Sampling

    def __len__(self) -> int:
        return self.count


NO_CONFIDENCE: NDArray[np.float32] = np.zeros(0, np.float32)
NO_CONFIDENCE.flags.writeable = False


class StepResult(NamedTuple):
    """What the rows gave, each list in row order, only of the rows that wanted it.

    Attributes:
        tokens: sampled token ids.
        hidden: [n, d_model] f32, a copy.
        logits: [n, vocab_size] f32, a copy; [n, len(head_tokens)] where the head has rows for some tokens only.
        confidence: [n] f32, the softmax probability, at temperature 1 and over the whole head, of the largest logit.
    """

    tokens: list[int]
    hidden: NDArray[np.float32]
    logits: NDArray[np.float32]
    confidence: NDArray[np.float32] = NO_CONFIDENCE


class Part(Protocol):
    """Layers [start, end) of a decoder, with the embedding when start is 0 and the head when end is n_layers."""

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def numerics(self) -> Numerics: ...

    @property
    def free_tokens(self) -> int:
        """Positions that the KV pool can still take."""
        ...

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV of one position, in all its layers."""
        ...

    def open(self, *, window: int = 0, sinks: int | None = None) -> Sequence:
        """A new, empty sequence.

        Args:
            window: positions that attention sees, the last ones; older blocks are given back. With 0 it sees all,
                and running out of KV raises OutOfBlocks.
            sinks: positions at the front, rounded up to blocks of 16, that a window keeps and sees as if they stood
                just before it; without them a model writes nonsense once its first tokens are out of sight
                (attention sinks, Xiao et al., 2309.17453). The window then begins with a whole block. None is
                `KV_SINKS` where the back end can keep them, else none.

        Raises:
            EngineError: a negative number, sinks without a window, or sinks that the back end cannot keep.
        """
        ...

    def restore(self, data: bytes, enter: int = 0) -> KvBlock:
        """A block that was read with `KvBlock.data`, bit for bit.

        Raises:
            OutOfBlocks: the pool is full.
            EngineError: not as many bytes as a block of those layers has, or the back end keeps no blocks.
        """
        ...

    def step(self, rows: Rows) -> StepResult:
        """Computes the rows and commits their KV.

        Raises:
            OutOfBlocks: the pool is full; nothing was computed or committed.
            EngineError: a row does not fit (position, layer range, closed sequence, hidden shape).
        """
        ...

    def close(self) -> None:
        """Frees KV, weights and threads."""
        ...


def waited(part: Part) -> float:
    """Seconds that steps of a part waited for experts so far; 0 for one whose experts are all in memory."""
    return float(getattr(part, "waited", 0.0))
