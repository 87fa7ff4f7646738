"""One simulated answer: how far it is, what each side holds, what travels, and what the device gets to see of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from isthmus.apps.bench.facts import Answer
from isthmus.apps.bench.shaping import MS
from isthmus.apps.bench.virtual import Engine, Note, Way, World
from isthmus.edge.costs import Candidate, Standing
from isthmus.edge.estimator import BULK_BYTES, Estimator
from isthmus.edge.figures import CloudFigures, DeviceFigures
from isthmus.edge.pace import Pace, guessing_pace
from isthmus.edge.rhythm import PING_S, Pulse
from isthmus.protocol.limits import LinkLimits

PING_BYTES = 14
FRAME_BYTES = 35  # that encryption and framing add to a message; headers of TCP and IP do not count, as in the relay
HEARTBEAT_S = LinkLimits().heartbeat_ms * 1e-3  # of silence, after which the link asks for a sign of life
DOWN_S = HEARTBEAT_S * LinkLimits().silent_intervals  # and after which the cloud does not answer
CHUNK = 128  # rows of a prompt that a device computes and sends at once
Patience = Callable[[], int]  # says until when to wait before it is asked again, in ns; may raise `GaveUp`


class GaveUp(Exception):
    """Another way of working is better than to wait on."""


@dataclass
class Cloud:
    """What the cloud holds of the answer.

    Attributes:
        tokens: rows with KV computed from tokens.
        hidden: rows with KV computed from hidden states, by cut.
        epoch: of the stream or the drafts that are not stale.
    """

    engine: Engine
    tokens: int = 0
    hidden: dict[int, int] = field(default_factory=dict)
    epoch: int = 0


@dataclass
class Sight:
    """What a device makes of what it sees, from one answer to the next: nothing, in a fixed mode.

    Attributes:
        pulse: when the link is asked for nothing but an answer.
        pings: when those that are not answered were sent, and their bytes, by tag.
        seen_s: when the link last showed its trip.
        heard_s, beat_s: when anything last arrived, and when the link itself last asked for it.
        tags: questions so far.
        pace: how far exit mode goes on by itself.
    """

    estimator: Estimator | None = None
    patience: Patience | None = None
    pulse: Pulse = field(default_factory=Pulse)
    pings: dict[int, tuple[int, int]] = field(default_factory=dict)
    seen_s: float = float("-inf")
    heard_s: float = 0.0
    beat_s: float = 0.0
    tags: int = 0
    pace: Pace = field(default_factory=guessing_pace)


class Conversation:
    """An answer under way.

    Args:
        device, cloud: their true times.
        answer: what is said, and what exits and n-grams foresee of it.

    Attributes:
        made: tokens that the user has.
        filled: rows whose KV the device holds, by depth.
        sent: rows that were sent as hidden states, by cut.
        wrong: tokens emitted by an exit that are not the model's.
    """

    def __init__(
        self,
        world: World,
        ways: tuple[Way, Way],
        engine: Engine,
        device: DeviceFigures,
        cloud: CloudFigures,
        answer: Answer,
        sight: Sight,
    ) -> None:
        self.world, self.device, self.costs, self.answer, self.sight = world, device, cloud, answer, sight
        self.up, self.down = ways
        self.cloud = Cloud(engine)
        self.made = self.wrong = 0
        self.filled: dict[int, int] = {}
        self.sent: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Tokens of the log."""
        return self.answer.prompt + self.made

    @property
    def left(self) -> int:
        """Tokens to come."""
        return self.answer.tokens - self.made

    @property
    def now_s(self) -> float:
        """The time."""
        return self.world.now / 1e9

    def tag(self) -> int:
        """A new question's mark."""
        self.sight.tags += 1
        return self.sight.tags

    def emit(self, count: int) -> None:
        """The user gets tokens."""
        self.made += min(count, self.left)

    def fill(self, depth: int, rows: int) -> None:
        """The device has KV of layers [0, depth) for so many rows."""
        self.filled[depth] = rows
        for other in self.filled:
            if other < depth:
                self.filled[other] = max(self.filled[other], rows)

    def held(self, depth: int) -> int:
        """Rows whose KV of layers [0, depth) the device holds, of those in the log."""
        deep = max((rows for other, rows in self.filled.items() if other >= depth), default=0)
        return min(deep, self.total)

    def lay(self, size: float, arrived: Callable[[], None]) -> None:
        """Sends a message to the cloud."""
        self.world.at(self.up.send(self.world.now, round(size + FRAME_BYTES)), arrived)

    def reply(self, tag: int, count: int, size: float, took_ms: float = 0.0, queue_ms: float = 0.0) -> None:
        """The cloud sends a message to the device."""
        whole = round(size + FRAME_BYTES)
        note = Note(tag, count, took_ms, queue_ms, whole)

        def arrived() -> None:
            self.world.inbox.append(note)
            self.sight.heard_s = self.now_s

        self.world.at(self.down.send(self.world.now, whole), arrived)

    @property
    def alive(self) -> bool:
        """Whether the cloud shows signs of life."""
        return self.now_s - self.sight.heard_s <= DOWN_S

    def beat(self) -> int:
        """Asks for a sign of life after a silence, as every link does; when to look again, in ns."""
        sight = self.sight
        if self.now_s - max(sight.heard_s, sight.beat_s) >= HEARTBEAT_S:
            sight.beat_s = self.now_s
            self.lay(PING_BYTES, self._echo)
        return max(self.world.now + MS, round((max(sight.heard_s, sight.beat_s) + HEARTBEAT_S) * 1e9))

    def _echo(self) -> None:
        def arrived() -> None:
            self.sight.heard_s = self.now_s

        self.world.at(self.down.send(self.world.now, PING_BYTES + FRAME_BYTES), arrived)

    def take(self, unheard_ms: float = 0.0) -> Note | None:
        """The next message that was not a ping's answer, if one has arrived.

        Args:
            unheard_ms: for how long the device has not listened.
        """
        inbox = self.world.inbox
        while inbox:
            note = inbox.popleft()
            sent = self.sight.pings.pop(note.tag, None)
            if sent is None:
                return note
            asked, size = sent
            ms = (self.world.now - asked) / MS
            self._tell(ms - min(ms, unheard_ms) / 2, size, idle_s=PING_S)
        return None

    def await_note(self, wanted: Callable[[Note], bool]) -> Note:
        """Waits for a message.

        Raises:
            GaveUp: patience has ended.
        """
        while True:
            while (note := self.take()) is not None:
                if wanted(note):
                    return note
            self.world.wait(None if self.sight.patience is None else self.sight.patience())

    def listen(self, curious: bool, most: int = 1 << 20) -> None:
        """Asks the cloud for a sign of life where the link shows none otherwise, or for the uplink's rate, by `most`
        bytes.
        """
        asks = self.sight.pulse.asks(self.now_s, self.sight.seen_s, curious)
        if asks is not None:
            tag, size = self.tag(), min(asks, most) or PING_BYTES
            self.sight.pings[tag] = (self.world.now, size)
            self.lay(size, lambda: self.reply(tag, 0, PING_BYTES))

    def tell_trip(self, asked_ns: int, note: Note, size: float) -> None:
        """A question of some bytes was answered: what that says of the link and the cloud."""
        if self.sight.estimator is not None:
            self.sight.estimator.queued(self.now_s, note.queue_ms)
            self._tell((self.world.now - asked_ns) / MS - note.took_ms, size)

    def _tell(self, ms: float, size: float, idle_s: float = 0.0) -> None:
        estimator, self.sight.seen_s = self.sight.estimator, self.now_s
        if estimator is None:
            return
        if size < BULK_BYTES:
            estimator.link.trip(self.now_s, ms, idle_s=idle_s)
        else:
            trip = estimator.link.figures(self.now_s).trip_ms
            estimator.link.moved("up", self.now_s, size, max(ms - trip, 1.0))

    def standing(self, current: Candidate | None, cuts: tuple[int, ...], remaining: int) -> Standing:
        """For the policy."""
        total = self.total
        depths = sorted({*cuts, self.device.n_layers})
        return Standing(
            remaining,
            tuple((depth, float(total - self.held(depth))) for depth in depths),
            max(1, total - self.cloud.tokens),
            tuple((cut, float(total - min(self.sent.get(cut, 0), self.held(cut)))) for cut in cuts),
            current,
        )
