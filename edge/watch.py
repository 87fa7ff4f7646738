"""What messages tell of the link and of the cloud as they pass the driver: when they went, when their answers came."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from isthmus.edge.estimator import BULK_BYTES
from isthmus.protocol import messages as m

ENVELOPE_BYTES = 100  # around a message
GLANCE_S = 0.02  # how often a waiting device looks whether it has waited too long
_MOST = 64  # questions that are remembered


class Told(Protocol):
    """Takes in what was seen; times in ms."""

    def trip(self, now_s: float, ms: float) -> None:
        """A question of one segment was answered; without the cloud's own time."""
        ...

    def moved(self, now_s: float, size: float, ms: float) -> None:
        """A question of so many bytes was answered; without the cloud's own time, with a trip."""
        ...

    def stepped(self, now_s: float, rows: int, prompt: int, ms: float, queue_ms: float, cut: int) -> None:
        """The cloud made a step of so many rows whose answers were wanted, and so many others, from layer `cut` on."""
        ...

    def checked(self, drafted: int, taken: int) -> None:
        """A block of drafts was checked."""
        ...


@dataclass(slots=True)
class _Question:
    sent_s: float
    size: int
    rows: int
    prompt: int
    cut: int


class Watch:
    """See the module; it has no clock of its own.

    Args:
        enters: the layer before which the rows of a lane enter, by its alias.

    Attributes:
        waits: called again and again while something is awaited, with the time; it may raise.
    """

    def __init__(self, told: Told, waits: Callable[[float], None], enters: Callable[[int], int]) -> None:
        self._told, self.waits, self._enters = told, waits, enters
        self._asked: dict[Hashable, _Question] = {}
        self._burst = 0  # bytes since something was last heard
        self._prompt = 0  # rows since something was last asked
        self._token_s = 0.0  # when a stream last gave something

    def sent(self, message: m.Message, now: float) -> None:
        """A message goes up."""
        self._burst += _size(message)
        match message:
            case m.Open() | m.Truncate():
                self._ask(("control", message.alias, message.epoch), now, 0)
            case m.Rows():
                if message.want & m.WANT_SAMPLE:
                    key, rest = ("rows", message.alias, message.epoch, message.position), len(message.tokens) - 1
                    self._ask(key, now, 1, rest, self._enters(message.alias))
                else:
                    self._prompt += len(message.tokens)
            case m.Fill():
                self._prompt += len(message.tokens)
            case m.Draft():
                key = ("rows", message.alias, message.epoch, message.position)
                self._ask(key, now, len(message.tokens), 0, self._enters(message.alias))
            case m.Generate():
                self._token_s = 0.0
                self._ask(("stream", message.alias, message.epoch), now, 1, len(message.tokens) - 1)
            case _:
                pass

    def heard(self, message: m.Message, came: float) -> None:
        """A message has come, and when."""
        match message:
            case m.Opened():
                self._answered(("control", message.alias, message.epoch), came, 0, 0)
            case m.Result():
                control = "control", message.alias, message.epoch
                if message.tokens or message.committed > message.position:  # of rows, whose cut was heard then, too
                    self._asked.pop(control, None)
                    key = ("rows", message.alias, message.epoch, message.position)
                    self._answered(key, came, message.engine_us, message.queue_us)
                else:
                    self._answered(control, came, 0, 0)
            case m.Verdict():
                key = ("rows", message.alias, message.epoch, message.position)
                asked = self._answered(key, came, message.engine_us, message.queue_us)
                if asked is not None and asked.rows > 1:
                    self._told.checked(asked.rows - 1, message.accepted - 1)
            case m.Tokens():
                self._streamed(message, came)
            case _:
                return
        self._burst = 0

    def forget(self) -> None:
        """What was asked is not awaited any more."""
        self._asked.clear()
        self._burst = self._prompt = 0

    def _ask(self, key: Hashable, now: float, rows: int, prompt: int = 0, cut: int = 0) -> None:
        if key in self._asked:
            return  # repeated: the answer may be to either
        if len(self._asked) >= _MOST:
            del self._asked[next(iter(self._asked))]
        self._asked[key] = _Question(now, self._burst, rows, prompt + self._prompt, cut)
        self._prompt = 0

    def _answered(self, key: Hashable, now: float, engine_us: int, queue_us: int) -> _Question | None:
        asked = self._asked.pop(key, None)
        if asked is None:
            return None
        ms = max(0.0, (now - asked.sent_s) * 1e3 - (engine_us + queue_us) * 1e-3)
        if asked.size < BULK_BYTES:
            self._told.trip(now, ms)
        else:
            self._told.moved(now, asked.size, ms)
        if engine_us:
            self._told.stepped(now, asked.rows, asked.prompt, engine_us * 1e-3, queue_us * 1e-3, asked.cut)
        return asked

    def _streamed(self, message: m.Tokens, now: float) -> None:
        first = self._answered(("stream", message.alias, message.epoch), now, message.engine_us, 0)
        if first is None and self._token_s and message.engine_us and len(message.tokens) == 1:
            queue_ms = (now - self._token_s) * 1e3 - message.engine_us * 1e-3
            self._told.stepped(now, 1, 0, message.engine_us * 1e-3, max(0.0, queue_ms), 0)
        self._token_s = now


def _size(message: m.Message) -> int:
    tokens = getattr(message, "tokens", ())
    tensor = getattr(message, "hidden", None)
    return ENVELOPE_BYTES + 3 * len(tokens) + (len(tensor.data) if tensor is not None else 0)
