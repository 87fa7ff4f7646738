"""Fakes: a part of a model whose tokens and hidden states are hashes of the prefix, alike whichever way it is split;
a link that loses, repeats and reorders; a service's transport without sockets."""

from __future__ import annotations

import random
import struct
import time
from collections import deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig
from isthmus.engine.part import KV_BLOCK, KvConfig, Numerics, Rows, Span, StepResult, Want
from isthmus.engine.sampling import Sampling
from isthmus.protocol.errors import EngineError, LinkError, OutOfBlocks
from isthmus.protocol.messages import Hello, Message, Welcome, decode, encode
from isthmus.protocol.transport import Incoming, Transport

_ROOT = bytes(16)


def fake_config(*, n_layers: int = 6, d_model: int = 64, vocab_size: int = 1000) -> DecoderConfig:
    """A small decoder's configuration; d_model is at least 34."""
    return DecoderConfig(
        family="fake",
        n_layers=n_layers,
        d_model=d_model,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        d_ff=128,
        vocab_size=vocab_size,
        context_length=2048,
        norm_eps=1e-5,
        rope_inv_freq=(1.0, 0.5, 0.25, 0.125),
        tied=True,
    )


def _hash(*pieces: bytes) -> bytes:
    return blake2b(b"".join(pieces), digest_size=16).digest()


class FakeSequence:
    """Holds two chains: of the inputs (what lower layers know) and of the states (what upper layers know)."""

    def __init__(self, part: FakePart, window: int) -> None:
        self._part = part
        self.window = window
        self.lower: list[bytes] = []
        self.upper: list[bytes] = []
        self.closed = False
        self.shared: list[FakeBlock] = []  # with a context, from the first block on
        part.sequences.append(self)

    @property
    def length(self) -> int:
        return len(self.upper)

    @property
    def held(self) -> int:
        """Positions of KV blocks in use."""
        length = min(self.length, self.window + KV_BLOCK) if self.window else self.length
        return -(-length // KV_BLOCK) * KV_BLOCK

    def truncate(self, length: int) -> None:
        del self.lower[length:]
        del self.upper[length:]
        for block in self.shared[length // KV_BLOCK :]:
            block.users -= 1
        del self.shared[length // KV_BLOCK :]

    def lend(self, index: int) -> FakeBlock:
        first, end = index * KV_BLOCK, (index + 1) * KV_BLOCK
        if end > self.length:
            raise EngineError(f"block {index} of {self.length} positions")
        block = FakeBlock(self._part, self.lower[first:end], self.upper[first:end])
        self.shared.append(block)
        block.users += 1
        return block

    def adopt(self, blocks: Iterable[Any], enter: int) -> None:
        if self.upper:
            raise EngineError("not empty")
        for block in blocks:
            self.lower += block.lower
            self.upper += block.upper
            self.shared.append(block)
            block.users += 1

    def fork(self) -> FakeSequence:
        twin = FakeSequence(self._part, self.window)
        twin.lower, twin.upper = self.lower.copy(), self.upper.copy()
        return twin

    def close(self) -> None:
        if not self.closed:
            self.truncate(0)
            self.closed = True
            self._part.sequences.remove(self)


class FakeBlock:
    """Sixteen positions of both chains. `users` are the sequences that have it."""

    def __init__(self, part: FakePart, lower: list[bytes], upper: list[bytes]) -> None:
        self._part, self.lower, self.upper, self.users, self.closed = part, lower, upper, 0, False
        part.blocks.append(self)

    @property
    def in_use(self) -> bool:
        return self.users > 0

    def data(self, enter: int = 0) -> bytes:
        return b"".join(self.lower + self.upper)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._part.blocks.remove(self)


class FakePart:
    """Implements `engine.part.Part`.

    Args:
        step_s: seconds that a step sleeps, as if it were computing.

    Attributes:
        steps: rows of each step so far.
    """

    def __init__(
        self,
        start: int = 0,
        end: int | None = None,
        *,
        config: DecoderConfig | None = None,
        kv: KvConfig | None = None,
        step_s: float = 0.0,
    ) -> None:
        self.config = config or fake_config()
        self.start = start
        self.end = self.config.n_layers if end is None else end
        self.numerics = Numerics("fake-1")
        self.kv = kv or KvConfig()
        self.step_s = step_s
        self.steps: list[int] = []
        self.sequences: list[FakeSequence] = []
        self.blocks: list[FakeBlock] = []
        self.closed = False

    @property
    def free_tokens(self) -> int:
        kept = {id(block) for block in self.blocks if not block.users} | {
            id(block) for sequence in self.sequences for block in sequence.shared
        }
        own = sum(max(0, sequence.held - KV_BLOCK * len(sequence.shared)) for sequence in self.sequences)
        return self.kv.max_tokens - own - KV_BLOCK * len(kept)

    @property
    def kv_bytes_per_token(self) -> int:
        return 32

    def open(self, *, window: int = 0, sinks: int | None = None) -> FakeSequence:
        return FakeSequence(self, window)

    def restore(self, data: bytes, enter: int = 0) -> FakeBlock:
        each = [data[at : at + 16] for at in range(0, len(data), 16)]
        return FakeBlock(self, each[:KV_BLOCK], each[KV_BLOCK:])

    def step(self, rows: Rows) -> StepResult:
        before = [(span.sequence, span.sequence.length) for span in rows.spans]
        tokens: list[int] = []
        hidden: list[NDArray[np.float32]] = []
        try:
            for span in rows.spans:
                self._span(span, tokens, hidden)
            if self.free_tokens < 0:
                raise OutOfBlocks("the fake pool is full")
        except EngineError:
            for sequence, length in reversed(before):
                sequence.truncate(length)
            raise
        self.steps.append(len(rows))
        if self.step_s:
            time.sleep(self.step_s)
        width = self.config.d_model
        states = np.stack(hidden) if hidden else np.empty((0, width), np.float32)
        return StepResult(tokens, states, np.empty((0, self.config.vocab_size), np.float32))

    def close(self) -> None:
        self.closed = True

    def _span(self, span: Span, tokens: list[int], hidden: list[NDArray[np.float32]]) -> None:
        sequence, leave = span.sequence, self.end if span.leave is None else span.leave
        if not isinstance(sequence, FakeSequence) or sequence.closed or span.position != sequence.length:
            raise EngineError(f"row at {span.position} does not fit a sequence of {sequence.length}")
        if not self.start <= span.enter < leave <= self.end:
            raise EngineError(f"rows run [{span.enter}, {leave}) in a part [{self.start}, {self.end})")
        if span.hidden_in is not None and span.hidden_in.shape[1:] != (self.config.d_model,):
            raise EngineError(f"hidden states are {span.hidden_in.shape}")
        for index in range(len(span)):
            if span.tokens is not None:
                before = sequence.lower[-1] if sequence.lower else _ROOT
                lower = _hash(before, struct.pack("<I", span.tokens[index]))
            else:
                assert span.hidden_in is not None
                lower = self._unpack(span.hidden_in[index], span.enter)
            upper = _hash(sequence.upper[-1] if sequence.upper else _ROOT, lower)
            sequence.lower.append(lower)
            sequence.upper.append(upper)
            if not (span.want_all or index == len(span) - 1):
                continue
            if span.want & Want.SAMPLE:
                tokens.append(self._sample(upper, span.sampling))
            if span.want & Want.HIDDEN:
                hidden.append(self._pack(lower, leave))

    def _sample(self, state: bytes, sampling: Sampling) -> int:
        noise = struct.pack("<QI", sampling.seed, sampling.stream) if sampling.temperature else b""
        return int.from_bytes(_hash(state, noise)[:4], "little") % self.config.vocab_size

    def _pack(self, digest: bytes, layer: int) -> NDArray[np.float32]:
        # Integers up to 127 with a 127 among them survive f16 and int8 without loss.
        state = np.zeros(self.config.d_model, np.float32)
        state[0], state[1] = 127.0, layer
        state[2:34] = [nibble for byte in digest for nibble in (byte >> 4, byte & 15)]
        return state

    def _unpack(self, state: NDArray[np.float32], layer: int) -> bytes:
        nibbles = [round(float(value)) for value in state[2:34]]
        if int(state[1]) != layer or not all(0 <= nibble <= 15 for nibble in nibbles):
            raise EngineError(f"this hidden state is not one before layer {layer}")
        return bytes(high << 4 | low for high, low in zip(nibbles[::2], nibbles[1::2], strict=True))


def fake_text(prompt: list[int], count: int, sampling: Sampling | None = None) -> list[int]:
    """What a fake model generates after a prompt: `count` tokens."""
    part, out = FakePart(), []
    sequence, feed = part.open(), prompt
    for _ in range(count):
        feed = part.step(Rows().tokens(sequence, sequence.length, feed, sampling=sampling or Sampling())).tokens
        out += feed
    return out


class FaultyTransport:
    """A `protocol.transport.Transport` that loses, repeats, delays and reorders messages both ways.

    Args:
        inner: the transport in question.
        drop, repeat, delay: probability of each for a message.
        delay_s: how long a delayed message is held back; later ones overtake it.
    """

    def __init__(
        self,
        inner: Transport,
        seed: int,
        *,
        drop: float = 0.0,
        repeat: float = 0.0,
        delay: float = 0.0,
        delay_s: float = 0.02,
    ) -> None:
        self.inner = inner
        self.faults = 0
        self._random = random.Random(seed)
        self._drop, self._repeat, self._delay, self._delay_s = drop, repeat, delay, delay_s
        self._up: list[tuple[float, list[bytes]]] = []
        self._down: list[tuple[float, list[bytes]]] = []
        self._ready: deque[list[bytes]] = deque()

    def send(self, frames: Sequence[bytes]) -> bool:
        self._move()
        # The greeting goes through, so that what is tested is the sessions.
        if msgpack.unpackb(frames[0])[0] == Hello.__struct_config__.tag:
            return self.inner.send(frames)
        for copy in self._fate(list(frames), self._up):
            self.inner.send(copy)
        return True

    def poll(self, timeout_ms: float, *, sending: bool = False) -> bool:
        until = time.monotonic() + timeout_ms * 1e-3
        while True:
            self._move()
            if self._ready:
                return True
            left_ms = (until - time.monotonic()) * 1e3
            if left_ms <= 0.0:
                return False
            if self.inner.poll(min(left_ms, 5.0), sending=sending) and sending:
                return True

    def recv(self) -> list[bytes] | None:
        self._move()
        return self._ready.popleft() if self._ready else None

    def close(self) -> None:
        self.inner.close()

    def _fate(self, frames: list[bytes], held: list[tuple[float, list[bytes]]]) -> list[list[bytes]]:
        chance = self._random.random()
        if chance < self._drop:
            self.faults += 1
            return []
        if chance < self._drop + self._repeat:
            self.faults += 1
            return [frames, frames]
        if chance < self._drop + self._repeat + self._delay:
            self.faults += 1
            held.append((time.monotonic() + self._random.random() * self._delay_s, frames))
            return []
        return [frames]

    def _move(self) -> None:
        now = time.monotonic()
        for held in (self._up, self._down):
            due = [entry for entry in held if entry[0] <= now]
            for entry in due:
                held.remove(entry)
                if held is self._up:
                    self.inner.send(entry[1])
                else:
                    self._ready.append(entry[1])
        while (frames := self.inner.recv()) is not None:
            if msgpack.unpackb(frames[0])[0] == Welcome.__struct_config__.tag:
                self._ready.append(frames)
            else:
                self._ready.extend(self._fate(frames, self._down))


class MemoryServer:
    """A `cloud.peers.ServerTransport` without sockets: tests put messages in and take answers out.

    Attributes:
        sent: answers by route.
        gone: routes that cannot be reached.
        full: routes whose queue takes nothing.
        ended: routes whose connection ended, until the service was told.
    """

    address = "memory"

    def __init__(self) -> None:
        self.waiting: deque[Incoming] = deque()
        self.sent: dict[bytes, list[Any]] = {}
        self.gone: set[bytes] = set()
        self.full: set[bytes] = set()
        self.ended: list[bytes] = []
        self.closed = False

    def put(self, message: Message, route: bytes = b"a", key: str = "") -> None:
        self.waiting.append(Incoming(route, key, encode(message)))

    def take(self, route: bytes = b"a") -> list[Any]:
        return self.sent.pop(route, [])

    def poll(self, timeout_ms: float) -> bool:
        return bool(self.waiting)

    def stirs(self, timeout_s: float) -> bool:
        return bool(self.waiting)

    def recv(self) -> Incoming | None:
        return self.waiting.popleft() if self.waiting else None

    def send(self, route: bytes, frames: list[bytes]) -> bool:
        if route in self.gone:
            raise LinkError("the device is gone")
        if route in self.full:
            return False
        self.sent.setdefault(route, []).append(decode(frames))
        return True

    def lost(self) -> list[bytes]:
        lost, self.ended = self.ended, []
        return lost

    def close(self) -> None:
        self.closed = True
