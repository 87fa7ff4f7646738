"""A device's world without sockets or clocks: a toy model and cloud, and a link that loses, repeats and overtakes."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from isthmus.cloud.models import serve_part
from isthmus.cloud.service import Service
from isthmus.engine.part import KvConfig, Rows, Want
from isthmus.engine.sampling import Sampling
from isthmus.protocol import messages as m
from isthmus.protocol import tensors
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import LinkError
from isthmus.split.tokenizer import TextStream
from tests.fakes import MemoryServer
from tests.toy_part import CONFIG, D_MODEL, EOS, MODEL_ID, N_LAYERS, VOCAB, ToyPart


class ToyTokenizer:
    """A token a byte."""

    def encode(self, text: str, *, special: bool = True, bos: bool | None = None) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(text.split("</s>")):
            ids += ([EOS] if i else []) + list(piece.encode())
        return ids

    def decode(self, ids: Any, *, special: bool = False) -> str:
        return b"".join(bytes([i]) if i < EOS else b"</s>" if special else b"" for i in ids).decode(errors="replace")

    def stream(self) -> TextStream:
        return TextStream(self, False)  # type: ignore[arg-type]

    def render(self, messages: Any, *, answer: bool = True) -> str:
        return "".join(f"<{x['role']}>{x['content']}</s>\n" for x in messages) + ("<assistant>" if answer else "")


class ToyBundle:
    """What a device asks of a bundle."""

    def __init__(self, held: int = N_LAYERS, model_id: str = MODEL_ID) -> None:
        self.config, self.model_id, self.name, self.held_layers = CONFIG, model_id, "toy", held
        self.exits: tuple[Any, ...] = ()
        files = {f"weights/layer-{i:03d}.safetensors": SimpleNamespace(bytes=10_000_000) for i in range(N_LAYERS)}
        rest = (("embed", 5_000_000), ("norm", 1_000))
        files |= {f"weights/{name}.safetensors": SimpleNamespace(bytes=size) for name, size in rest}
        self.manifest = SimpleNamespace(
            files=files,
            exit_bytes=lambda layer: 10_000_000 * (layer + 1) + 5_000_000,
            tokenizer=SimpleNamespace(eos=(EOS,), file="tokenizer.json"),
            part_files=lambda start, end: list(files),
        )

    def holds(self, name: str) -> bool:
        return self.held_layers == N_LAYERS or "norm" not in name

    tokenizer = ToyTokenizer

    def prefetch(self, start: int, end: int) -> Callable[[], bool]:
        return lambda: True


class ToyCloud:
    """The protocol's other side as the messages document it, one device at a time."""

    def __init__(self, model_id: str = MODEL_ID, window: int = 0) -> None:
        self.model_id = model_id
        self.part = ToyPart()
        self.sessions: dict[bytes, dict[str, Any]] = {}
        self.aliases: dict[int, dict[str, Any]] = {}
        self.files: Mapping[str, bytes] = {}
        self.manifest = b""
        self.computed = 0
        self.codecs: tuple[str, ...] = ("f32", "f16", "int8")
        self.version = (1, 1)

    def receive(self, message: Any) -> list[tuple[float, Any]]:
        """Answers with (delay in seconds, message)."""
        if isinstance(message, m.Hello):
            self.aliases.clear()
            offer = m.Offer(
                self.model_id,
                "toy",
                N_LAYERS,
                D_MODEL,
                VOCAB,
                "toy",
                True,
                ("f16",),
                self.codecs,
                CONFIG.context_length,
            )
            return [(0.0, m.Welcome(*self.version, (), (offer,), m.Limits(1 << 20, 1 << 20, 300, 64)))]
        if isinstance(message, m.Ping):
            return [(0.0, m.Pong(message.sent_us))]
        if isinstance(message, m.GetManifest):
            return [(0.0, m.Manifest(self.model_id, self.manifest))]
        if isinstance(message, m.GetRange):
            data = self.files[message.name]
            part = data[message.offset : message.offset + message.length]
            return [(0.0, m.Range(message.model_id, message.name, message.offset, len(data), part))]
        if isinstance(message, m.Open):
            return [(0.0, self._open(message))]
        session = self.aliases.get(message.alias)
        if session is None:
            return [(0.0, self._fault(m.Code.UNKNOWN_SESSION, message, None))]
        if isinstance(message, m.Truncate):
            if message.epoch < session["epoch"]:
                return [(0.0, self._fault(m.Code.STALE_EPOCH, message, session))]
            if message.epoch > session["epoch"]:
                self._cut(session, message.length)
                session["epoch"] = message.epoch
            return [(0.0, self._result(message, session, message.length, []))]
        if message.epoch != session["epoch"]:
            return [(0.0, self._fault(m.Code.STALE_EPOCH, message, session))]
        if isinstance(message, m.Rows):
            return [(0.0, self._rows(message, session))]
        if isinstance(message, m.Generate):
            return self._generate(message, session)
        if isinstance(message, m.Close):
            self.sessions = {k: s for k, s in self.sessions.items() if s is not session}
            del self.aliases[message.alias]
        return []

    def forget(self) -> None:
        """Loses its memory, as a cloud that was started again."""
        self.sessions.clear()
        self.aliases.clear()

    def _open(self, message: m.Open) -> Any:
        session = self.sessions.get(message.session)
        if session is None:
            session = self.sessions[message.session] = {"log": Chain(), "enter": message.enter, "epoch": -1, "said": {}}
            session["sequence"] = self.part.open(window=message.window)
        if message.epoch < session["epoch"]:
            return self._fault(m.Code.STALE_EPOCH, message, session)
        if session["enter"] != message.enter:
            self._cut(session, 0)
            session["enter"] = message.enter
        session["epoch"] = message.epoch
        self.aliases[message.alias] = session
        log = session["log"]
        return m.Opened(message.alias, message.epoch, len(log), log.head, "toy", "f16")

    def _rows(self, message: m.Rows, session: dict[str, Any]) -> Any:
        log, at, n = session["log"], message.position, len(message.tokens)
        if at > len(log):
            return self._fault(m.Code.GAP, message, session)
        if at + n <= len(log):
            if log.tokens[at : at + n] != message.tokens or at + n - 1 not in session["said"]:
                return self._fault(m.Code.DIVERGED, message, session)
            return self._result(message, session, at, session["said"][at + n - 1])
        if at < len(log) or log.at(at) != message.prefix_hash:
            return self._fault(m.Code.DIVERGED, message, session)
        want = Want.SAMPLE if message.want & m.WANT_SAMPLE else Want.NONE
        rows, sampling = Rows(), _sampling(message.sampler)
        if message.hidden is not None:
            states = tensors.decode(message.hidden, D_MODEL)
            rows.hidden(session["sequence"], at, states, enter=session["enter"], want=want, sampling=sampling)
        else:
            rows.tokens(session["sequence"], at, message.tokens, want=want, sampling=sampling)
        tokens = self.part.step(rows).tokens
        self.computed += n
        log.extend(message.tokens)
        session["said"][at + n - 1] = tokens
        return self._result(message, session, at, tokens)

    def _generate(self, message: m.Generate, session: dict[str, Any]) -> list[tuple[float, Any]]:
        log, at = session["log"], message.position
        if at > len(log):
            return [(0.0, self._fault(m.Code.GAP, message, session))]
        known = log.tokens[at:]
        if known[: len(message.tokens)] != message.tokens[: len(known)]:
            return [(0.0, self._fault(m.Code.DIVERGED, message, session))]
        first, answers = at + len(message.tokens), []
        text = [*log.tokens[:at], *message.tokens]
        self._cut(session, min(len(log), first - 1))
        token, delay = -1, 0.0
        for i in range(message.max_tokens):
            rest = text[len(log) :]
            sampling = _sampling(message.sampler)
            rows = Rows().tokens(session["sequence"], len(log), rest, want=Want.SAMPLE, sampling=sampling)
            token = self.part.step(rows).tokens[0]
            self.computed += len(rest)
            log.extend(rest)
            text.append(token)
            done = token in message.stop or i == message.max_tokens - 1
            reason = ("stop" if token in message.stop else "length") if done else ""
            delay += 0.002
            news = m.Tokens(message.alias, message.epoch, first + i, [token], done, reason, len(log), log.head)
            answers.append((delay, news))
            if done:
                break
        return answers

    def _cut(self, session: dict[str, Any], length: int) -> None:
        length = min(length, len(session["log"]))
        session["log"].truncate(length)
        session["sequence"].truncate(length)
        session["said"] = {p: t for p, t in session["said"].items() if p < length}

    def _result(self, message: Any, session: dict[str, Any], position: int, tokens: list[int]) -> m.Result:
        log = session["log"]
        return m.Result(message.alias, message.epoch, position, tokens, len(log), log.head)

    def _fault(self, code: m.Code, message: Any, session: dict[str, Any] | None) -> m.Fault:
        position = getattr(message, "position", 0)
        held = len(session["log"]) if session else 0
        return m.Fault(code, code.name.lower(), "", 0, message.alias, message.epoch, position, held)


class ToyService:
    """The real service over a toy part, in place of a `ToyCloud`; each Hello is a new connection.

    Args:
        token_s: time between the tokens of a stream.
    """

    def __init__(self, token_s: float = 0.0) -> None:
        self._token_s = token_s
        self.connections = 0
        self.forget()

    def forget(self) -> None:
        """Is started again."""
        self.part = ToyPart()
        self._wire = MemoryServer()
        self._service = Service([serve_part(self.part, MODEL_ID, "toy")], self._wire, None, clock=lambda: 0.0)

    def receive(self, message: Any) -> list[tuple[float, Any]]:
        """Answers with (delay in seconds, message)."""
        self.connections += isinstance(message, m.Hello)
        route = b"%d" % self.connections
        self._wire.put(message, route)
        self._service.turn(0.0)
        while any(model.ready for model in self._service.models.values()):
            self._service.turn(0.0)
        answers = self._wire.take(route)
        streamed = itertools.accumulate(isinstance(answer, m.Tokens) for answer in answers)
        return [(count * self._token_s, answer) for count, answer in zip(streamed, answers, strict=True)]


class LossyWire:
    """A link in simulated time; every message is encoded, and may be dropped, repeated or late.

    Args:
        seed: of the losses.
        drop, repeat: probability for each message, each way.
        delay_s: of each message, uniformly from this range; a wide one reorders.

    Attributes:
        dark: (from, until) seconds in which everything that is sent or arrives is lost.
        poll_s: what a look for messages takes, so that time passes for a device that does not wait.
    """

    def __init__(
        self,
        cloud: ToyCloud | ToyService,
        seed: int = 0,
        *,
        drop: float = 0.0,
        repeat: float = 0.0,
        delay_s: tuple[float, float] = (0.005, 0.005),
    ) -> None:
        self.cloud: ToyCloud | ToyService | None = cloud
        self.now, self.heard_s, self.poll_s, self.connections, self._asked = 100.0, 0.0, 0.0, 1, 0
        self.sent: list[Any] = []
        self.die_after = 1 << 60  # messages from the cloud until it is gone
        self.restart_after = 1 << 60  # messages until the cloud loses its memory
        self._random = random.Random(seed)
        self._drop, self._repeat, self._delay_s = drop, repeat, delay_s
        self.reconnect_every = 1 << 60  # messages from the device that are no pings
        self.greeted = False
        self.welcome: m.Welcome | None = None
        self.rtt: tuple[int, float] | None = None
        self.bytes_up = self.bytes_down = 0
        self.asked_s: float | None = None
        self.probed: tuple[float, float] | None = None
        self._probes: dict[int, float] = {}
        self.dark: list[tuple[float, float]] = []
        self._air: list[tuple[float, int, bool, list[bytes]]] = []
        self._count = itertools.count()

    @property
    def up(self) -> bool:
        return (
            self.greeted
            and self.cloud is not None
            and not any(start + 2.0 <= self.now < end for start, end in self.dark)
        )

    @property
    def failure(self) -> LinkError | None:
        return None

    def clock(self) -> float:
        return self.now

    def spoil(self, drop: float, repeat: float, delay_s: tuple[float, float]) -> None:
        """Becomes as bad as that."""
        self._drop, self._repeat, self._delay_s = drop, repeat, delay_s

    def reconnect(self) -> None:
        """What is under way is gone, and a Welcome stands for the new connection."""
        self.connections += 1
        self._air.clear()
        self.greeted = False

    def send(self, message: Any) -> None:
        if not self.greeted or self.cloud is None:
            return
        frames = m.encode(message)
        self.bytes_up += sum(map(len, frames))
        self.sent.append(m.decode([bytes(frame) for frame in frames]))
        self._put(True, frames, self.now)
        if not isinstance(message, m.Ping):
            self._asked += 1
            if self._asked % self.reconnect_every == 0:
                self.reconnect()

    def receive(self, timeout_ms: float) -> Any:
        deadline = self.now + max(timeout_ms / 1e3, self.poll_s)
        if not self.greeted and self.cloud is not None and not self._is_dark(self.now):
            self.greeted = True
            self.now += 0.01
            self.heard_s, self.asked_s = self.now, None
            return m.decode(m.encode(self.cloud.receive(m.Hello(1, 1))[0][1]))
        while self._air and self._air[0][0] <= deadline:
            at, _, up, frames = heapq.heappop(self._air)
            self.now = max(self.now, at)
            if self._is_dark(at):
                continue
            message = m.decode(frames)
            if not up:
                self.heard_s, self.asked_s = self.now, None
                self.bytes_down += sum(map(len, frames))
                if isinstance(message, m.Pong):
                    if asked := self._probes.pop(message.sent_us, None):
                        self.probed = asked, self.now
                    self.rtt = self.rtt if asked else (message.sent_us, self.now * 1e3 - message.sent_us * 1e-3)
                    continue
                return message
            for delay, answer in self.cloud.receive(message) if self.cloud is not None else ():
                self._answered(answer, at + delay)
        self.now = max(self.now, deadline)
        return None

    def probe(self) -> None:
        if self.asked_s is None:
            self.asked_s = self.now
            self._probes[name := len(self.sent) % 127 + 1] = self.now
            self.send(m.Ping(name))

    def renew(self) -> None:
        pass  # connections are made at once here

    def close(self) -> None:
        self._air.clear()

    def _is_dark(self, at: float) -> bool:
        return any(start <= at < end for start, end in self.dark)

    def _answered(self, answer: Any, at: float) -> None:
        self.die_after -= 1
        self.restart_after -= 1
        if self.die_after < 0:
            self.cloud = None
        if self.cloud is not None:
            self._put(False, m.encode(answer), at)
            if self.restart_after == 0:
                self.cloud.forget()

    def _put(self, up: bool, frames: list[bytes], sent_s: float) -> None:
        copies = 0 if self._random.random() < self._drop else 2 if self._random.random() < self._repeat else 1
        for _ in range(copies):
            at = sent_s + self._random.uniform(*self._delay_s)
            if not self._is_dark(sent_s):
                heapq.heappush(self._air, (at, next(self._count), up, list(frames)))


def _sampling(sampler: m.Sampler) -> Sampling:
    return Sampling(sampler.temperature, sampler.top_k, sampler.top_p, sampler.seed, sampler.stream)


def toy_open_part(source: Any, start: int, end: int, *, kv: KvConfig | None = None, **_: Any) -> ToyPart:
    """In place of `isthmus.engine.open_part`."""
    return ToyPart(end, kv.max_tokens if kv else 100_000)
