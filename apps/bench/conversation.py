"""One simulated answer: how far it is, what each side holds, what travels, and what the device gets to see of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from isthmus.apps.bench.facts import Answer
from isthmus.apps.bench.shaping import MS
from isthmus.apps.bench.virtual import Engine, Note, Way, World
from isthmus.edge.costs import MESSAGE_BYTES, Candidate, Standing
from isthmus.edge.estimator import BULK_BYTES, Estimator
from isthmus.edge.figures import CloudFigures, DeviceFigures

CHUNK = 128  # rows of a prompt that a device computes and sends at once
Patience = Callable[[float], None]  # told for how many ms the cloud has been late; may raise `GaveUp`


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
        pings: when those that are not answered were sent, and their bytes, by tag.
        last_ping, last_trip, last_probe: when a ping was sent, the trip last seen, the rate last probed, in ns.
        tags: questions so far.
    """

    estimator: Estimator | None = None
    patience: Patience | None = None
    pings: dict[int, tuple[int, int]] = field(default_factory=dict)
    last_ping: int = -(10**12)
    last_trip: int = -(10**12)
    last_probe: int = 0
    tags: int = 0


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
        self.world.at(self.up.send(self.world.now, round(size + MESSAGE_BYTES)), arrived)

    def reply(self, tag: int, count: int, size: float, took_ms: float = 0.0, queue_ms: float = 0.0) -> None:
        """The cloud sends a message to the device."""
        whole = round(size + MESSAGE_BYTES)
        note = Note(tag, count, took_ms, queue_ms, whole)
        self.world.at(self.down.send(self.world.now, whole), lambda: self.world.inbox.append(note))

    def take(self) -> Note | None:
        """The next message that was not a ping's answer, if one has arrived."""
        inbox, estimator = self.world.inbox, self.sight.estimator
        while inbox:
            note = inbox.popleft()
            sent = self.sight.pings.pop(note.tag, None)
            if sent is None:
                return note
            asked, size = sent
            if size >= BULK_BYTES:
                self.tell_trip(asked, note, size)
            elif estimator:
                estimator.link.trip(self.now_s, (self.world.now - asked) / MS)
                self.sight.last_trip = self.world.now
        return None

    def await_note(self, wanted: Callable[[Note], bool], late_after_ms: float) -> Note:
        """Waits for a message.

        Args:
            late_after_ms: from when on it is late, and patience is asked at times.

        Raises:
            GaveUp: patience has ended.
        """
        world, begin = self.world, self.world.now
        next_look = begin + round(late_after_ms * MS)
        while True:
            while (note := self.take()) is not None:
                if wanted(note):
                    return note
            if self.sight.patience is None:
                world.wait()
            elif not world.wait(next_look):
                waited = (world.now - begin) / MS
                self.sight.patience(waited - late_after_ms)
                next_look = world.now + round(max(20.0, 0.2 * waited) * MS)
                self.ping(20.0)

    def ping(self, every_ms: float) -> None:
        """Asks the cloud for nothing but an answer, unless the trip is known from lately or still asked for."""
        last = max(self.sight.last_ping, self.sight.last_trip)
        if self.sight.estimator is None or self.sight.pings or self.world.now - last < every_ms * MS:
            return
        self._ping(20)

    def probe(self, every_ms: float, size: int) -> None:
        """Asks so with many bytes, to see the uplink's rate."""
        if self.sight.estimator is None or self.sight.pings or self.world.now - self.sight.last_probe < every_ms * MS:
            return
        self.sight.last_probe = self.world.now
        self._ping(size)

    def _ping(self, size: int) -> None:
        tag = self.tag()
        self.sight.last_ping = self.world.now
        self.sight.pings[tag] = (self.world.now, size)
        self.lay(size, lambda: self.reply(tag, 0, 20))

    def silence(self, usual_ms: float) -> float:
        """For how many ms more than is usual a ping has not been answered."""
        oldest = min((sent for sent, _ in self.sight.pings.values()), default=self.world.now)
        return max(0.0, (self.world.now - oldest) / MS - usual_ms)

    def tell_trip(self, asked_ns: int, note: Note, size: float) -> None:
        """A question of some bytes was answered: what that says of the link and the cloud."""
        estimator = self.sight.estimator
        if estimator is None:
            return
        ms = (self.world.now - asked_ns) / MS - note.took_ms
        estimator.queued(self.now_s, note.queue_ms)
        if size < BULK_BYTES:
            estimator.link.trip(self.now_s, ms)
            self.sight.last_trip = self.world.now
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
