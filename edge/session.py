"""The device's requests to a cloud, without any I/O: events in, messages out.

A driver gives `receive` every message that comes, calls `tick` at `wake_at`, sends what stands in `outbox`, and takes
what happened from `events`. Time is a float in seconds from any clock that does not go back. A Welcome means a new
connection (`protocol.link` makes them). Every message may be lost, repeated or overtaken: requests are repeated until
they are answered, answers are matched by (alias, epoch, position), and when the two sides no longer agree the lane is
opened again with a higher epoch and goes on from what the cloud still holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from isthmus.edge import nonsense
from isthmus.edge.events import Aligned, Answered, Behind, Event, Refused, Served, Streamed, Timeouts, Up, Verified
from isthmus.edge.lane import EXACT, Lane
from isthmus.edge.offers import served
from isthmus.edge.patience import Patience
from isthmus.edge.pending import Pending, Requests, bulk_key
from isthmus.edge.stream import Stream
from isthmus.edge.trips import Trips
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import ConversationFullError, DeviceError, IsthmusError, LinkError, ServiceError

_MAX_SETBACKS = 24  # realignments in a row without one token
_MAX_REPEATS = 3  # of a draft, which a cloud drops without a word when it does not fit


class Session:
    """One device's conversation with one cloud.

    Args:
        model_id: what the cloud must serve; empty for a device that only fetches a bundle.
        log: the token log that all lanes follow. Cut it back through `edited`.
        where: the cloud's address, for people.
        kv_format: how the cloud shall keep its KV; what it offers where it has no such format.
        window: as in `messages.Open`.

    Attributes:
        round_trips: answers that were waited for.
        cloud_us: engine time in the cloud, as answers name it; a step's counts for each session that has rows in it.
        patience: how long it waits.
        restore: gives a fresh lane what was kept of it.
        connections: Welcomes so far.
        closing: whether the cloud has said that it stops; until another one is there.
        trips: how long answers take.
        numerics: of the device's engine where it is exact: lanes of hidden states may then begin with others' KV.
    """

    def __init__(
        self,
        model_id: str,
        log: Chain,
        timeouts: Timeouts | None = None,
        *,
        where: str = "the cloud",
        kv_format: str = "f16",
        window: int = 0,
    ) -> None:
        self.outbox: list[m.Message] = []
        self.events: deque[Event] = deque()
        self.welcome: m.Welcome | None = None
        self.log, self.round_trips, self.cloud_us, self.connections = log, 0, 0, 0
        self._model_id, self._timeouts = model_id, timeouts or Timeouts()
        self.where, self._kv_format, self._window = where, kv_format, window
        self.restore: Callable[[Lane], None] | None = None
        self._lanes, self._streams = dict[int, Lane](), dict[int, Stream]()
        self._pending = Requests()
        self.patience, self.trips = Patience(self._timeouts, where), Trips()
        self.closing, self._setbacks, self.numerics = False, 0, ""
        self._room = self._vocab = 0  # positions that a session has, and tokens of the model; 0 for no bound

    # -- what the device asks for

    def lane(self, alias: int, enter: int, codec: str = "") -> Lane:
        """The lane with that alias; its rows enter before layer `enter` from now on, in that codec."""
        lane = self._lanes.get(alias)
        if lane is None:
            lane = self._lanes[alias] = Lane(alias, enter, codec)
            if self.restore is not None:
                self.restore(lane)
        elif (lane.enter, lane.codec) != (enter, codec):
            self._drop(lane)
            self.outbox += [m.Close(lane.alias, lane.epoch)] * (lane.opened and lane.enter == enter)
            lane.moved(enter, codec)
        return lane

    def agreed(self, alias: int, enter: int, exact: bool = True) -> int:
        """Leading positions of the log that a lane is known to hold, of `exact` rows or of rounded ones."""
        lane = self._lanes.get(alias)
        if lane is None or lane.enter != enter or exact != (lane.codec in EXACT):
            return 0
        lane.check(self.log)
        return lane.agreed

    def enters(self, alias: int) -> int:
        """Before which layer rows enter on a lane."""
        return self._lanes[alias].enter if alias in self._lanes else 0

    def edited(self, length: int) -> None:
        """The log is about to be cut back to `length`."""
        for lane in self._lanes.values():
            lane.edited(length, self.log)

    def align(self, lane: Lane, limit: int, now: float) -> None:
        """Asks for `Aligned`: the lane is open and holds a prefix of the log of at most `limit` tokens."""
        if lane.check(self.log) and lane.ready(limit, self.log):
            self.events.append(Aligned(lane))
        elif not (lane.limit == limit and ("control", lane.alias) in self._pending):
            lane.limit = limit
            self._busy(now)
            if not lane.opened:
                self._open(lane, now)
            else:
                self._cut(lane, min(limit, lane.agreed if lane.unsure(self.log) else lane.ahead), now)

    def greet(self, now: float) -> None:
        """Waits for the first Welcome: `Up`, or `Refused` when none comes in time."""
        self._busy(now)
        if self.welcome is None:
            self._post(("welcome",), None, None, now)

    def rows(self, lane: Lane, rows: m.Rows, now: float) -> None:
        """Sends rows on an aligned lane; `Answered` or `Behind` follows."""
        self._busy(now)
        self._post(("rows", lane.alias, rows.position), rows, lane, now)

    def generate(self, lane: Lane, request: m.Generate, now: float) -> None:
        """Starts a stream on an aligned lane; `Streamed` events or `Behind` follow."""
        self._busy(now)
        self.round_trips += 1
        lane.streamed = lane.streamed or request.position + len(request.tokens)
        self._streams[lane.alias] = Stream(request, lane.streamed)
        self._post(("stream", lane.alias), request, lane, now)

    def draft(self, lane: Lane, draft: m.Draft, head: bytes, now: float) -> None:
        """Sends guesses that follow what an aligned lane holds or was sent; `Verified` or `Behind` follows.

        Args:
            head: chain over the tokens before the first guess.
        """
        self._busy(now)
        self._post(("rows", lane.alias, draft.position), draft, lane, now, head)

    def void(self, lane: Lane, position: int) -> None:
        """Guesses from `position` on build on what was not right: the cloud drops them, and no answer will come."""
        self._pending.void(lane, position)

    def cancel(self, lane: Lane) -> None:
        """Gives up what is under way on a lane."""
        told = self._streams[lane.alias].told if lane.alias in self._streams else 0
        if self._drop(lane):
            self.outbox.append(m.Cancel(lane.alias, lane.epoch))
            lane.given_up(told, self.log, bool(self._window))

    def ask(self, request: m.GetManifest | m.GetRange, now: float) -> None:
        """Asks for bulk data; `Served` follows."""
        self._busy(now)
        self.round_trips += 1
        self._post(bulk_key(request), request, None, now)

    def close(self) -> None:
        """Tells the cloud to forget the lanes."""
        for lane in self._lanes.values():
            if lane.epoch:  # asked for once: after an error only the cloud knows whether it still stands
                self.outbox.append(m.Close(lane.alias, lane.epoch))
                lane.opened = False
        self._pending.clear()
        self._streams.clear()

    # -- what the driver reports

    def receive(self, message: m.Message, now: float) -> None:
        """Takes in one message from the cloud."""
        if self._absurd(nonsense.of_ids(message, self._vocab)):
            return
        match message:
            case m.Result():
                self._result(message, now)
            case m.Tokens():
                self._tokens(message, now)
            case m.Verdict():
                self._verdict(message, now)
            case m.Opened():
                self._opened(message, now)
            case m.Welcome():
                self._welcomed(message, now)
            case m.Fault():
                self._fault(message, now)
            case m.Manifest():
                if self._answered(("manifest",), now):
                    self.events.append(Served(message))
            case m.Range():
                if self._answered(("range", message.name, message.offset), now):
                    self.events.append(Served(message))
            case m.Bye():
                self.closing = True
            case _:
                pass  # what only a cloud receives, or a newer protocol's news

    def tick(self, now: float, up: bool = True, failure: IsthmusError | None = None) -> None:
        """Repeats what is overdue, and gives up in the end.

        Args:
            up: whether the link has shown a sign of life of late.
            failure: why it is down, when that is known.
        """
        if not self._pending:
            return
        connected = self.welcome is not None
        if up and connected:
            self.patience.alive(now)
        lost = self.patience.lost(now, connected, self.closing, failure)
        if lost is not None:
            self._fail(lost)
        elif connected:
            overdue = [pending for pending in self._pending.values() if pending.retry_at <= now]
            for pending in overdue:
                if isinstance(pending.message, m.Draft) and pending.tries >= _MAX_REPEATS and pending.lane:
                    self._setback(pending.lane)  # what it builds on is gone: ask where the cloud stands
                    break
                self.outbox.append(pending.repeated(now, self._timeouts.retry_ms / 1e3))

    @property
    def wake_at(self) -> float:
        """When `tick` must be called at the latest."""
        if self._pending and self.welcome is None:
            return self.patience.ends_at(connected=False)
        return min((pending.retry_at for pending in self._pending.values()), default=float("inf"))

    def abandon(self) -> None:
        """Nothing that is under way is wanted any more: the cloud is told so, and the lanes are to be opened again."""
        lanes = self._lanes.values()
        self.outbox[:] = [m.Cancel(one.alias, one.epoch) for one in lanes if one.opened and self._pending.any_of(one)]
        self._pending.clear()
        self._streams.clear()
        self.events.clear()
        for lane in lanes:
            lane.opened = False

    # -- messages

    def _welcomed(self, message: m.Welcome, now: float) -> None:
        self.welcome = message
        self.connections += 1
        self.closing = False
        self.patience.alive(now)
        if self._model_id:
            try:
                offer = served(message.offers, self._model_id, self.where)
            except DeviceError as error:
                self._fail(error)
                return
            self._room, self._vocab = 0 if self._window else offer.context_length, offer.vocab_size
            if offer.kv_formats and self._kv_format not in offer.kv_formats:
                self._kv_format = offer.kv_formats[0]
        self._answered(("welcome",), now)
        self.events.append(Up())
        for pending in self._pending.values():
            if pending.lane is None:
                self.outbox.append(pending.message)
        for lane in self._lanes.values():
            lane.opened = False
            if self._drop(lane):
                self.events.append(Behind(lane))

    def _opened(self, message: m.Opened, now: float) -> None:
        lane = self._lanes.get(message.alias)
        if lane is None or self._control(lane, message.epoch, m.Open, now) is None:
            return
        if not self._absurd(nonsense.of_opened(message, self._room)):
            lane.opened = True
            self._aligning(lane, message.committed, message.prefix_hash, now)

    def _result(self, message: m.Result, now: float) -> None:
        lane = self._lanes.get(message.alias)
        if lane is None or lane.epoch != message.epoch or self._absurd(nonsense.of_position(message.position, lane)):
            return
        key = ("rows", message.alias, message.position)
        pending = self._pending.get(key)
        if pending is None and (asked := self._control(lane, message.epoch, m.Truncate, now)) is not None:
            if not self._absurd(nonsense.of_cut(message, asked.length)):
                self._aligning(lane, message.committed, message.prefix_hash, now)
        elif lane.expects and not message.tokens and message.committed <= message.position:
            if not lane.was_cut(message.position, message.committed, message.prefix_hash):
                self._setback(lane)
            return
        if pending is None or not isinstance(rows := pending.message, m.Rows):
            return
        if message.committed < rows.position + len(rows.tokens) or (rows.want & m.WANT_SAMPLE and not message.tokens):
            return  # a late repetition of Truncate's answer
        if self._absurd(nonsense.of_result(message, rows, lane)):
            return
        del self._pending[key]
        self._tripped(pending, now, message.engine_us, message.queue_us, waited=bool(rows.want))
        self.patience.progressed(now)
        overtaken = message.committed < lane.committed  # by a later answer
        if not overtaken and not lane.told(message.committed, message.prefix_hash, self.log):
            self._setback(lane)
            return
        if message.tokens:
            self._setbacks = 0
        self.events.append(Answered(lane, message.position, message.tokens))

    def _tokens(self, message: m.Tokens, now: float) -> None:
        lane = self._lanes.get(message.alias)
        stream = self._streams.get(message.alias)
        if lane is None or stream is None or lane.epoch != message.epoch or stream.late(message):
            return
        if self._absurd(stream.nonsense(message)):
            return
        pending = self._pending[("stream", message.alias)]
        pending.asked_at = now
        for fresh, taken in stream.take(message):
            self.cloud_us += taken.engine_us
            lane.streamed_to(taken.committed, taken.prefix_hash)
            if fresh:
                self.patience.progressed(now)
                self._setbacks = pending.tries = 0
                pending.retry_at = now + self._timeouts.retry_ms / 1e3
            elif stream.wants and taken.reason in ("cancelled", "deadline"):
                self._setback(lane)  # it is asked for again, but not for ever
                return
            elif stream.wants and taken.reason != "full":
                self._absurd("it ends a stream before the tokens that were asked for")
                return
            if taken.done:
                del self._streams[lane.alias], self._pending[("stream", lane.alias)]
            self.events.append(Streamed(lane, fresh, taken.done, taken.reason))

    def _verdict(self, message: m.Verdict, now: float) -> None:
        lane, key = self._lanes.get(message.alias), ("rows", message.alias, message.position)
        pending = self._pending.get(key)
        if lane is None or lane.epoch != message.epoch or self._absurd(nonsense.of_position(message.position, lane)):
            return
        if pending is None or not isinstance(draft := pending.message, m.Draft):
            return
        if self._absurd(nonsense.of_verdict(message, draft)):
            return
        accepted, head = message.accepted, pending.head_after(message.accepted)
        if head != message.prefix_hash:
            self._setback(lane)
            return
        del self._pending[key]
        self._tripped(pending, now, message.engine_us, message.queue_us)
        self.patience.progressed(now)
        self._setbacks = 0
        lane.stands(message.position + accepted, head)
        self.events.append(Verified(lane, message.position, accepted, message.token, message.engine_us))

    def _fault(self, fault: m.Fault, now: float) -> None:
        code, error = fault.code, ServiceError(f"{self.where} refused: {fault.problem}", fault.remedy)
        if fault.alias is None:
            if code is m.Code.CLOSING:
                self.closing = True
            elif code is m.Code.VERSION and self.welcome is not None:
                self.outbox.append(m.Hello(m.VERSION, m.MIN_VERSION))  # the cloud has forgotten an idle connection
            elif code is m.Code.BUSY:
                self._later(None, fault, now)
            else:
                self._fail(error)
            return
        lane = self._lanes.get(fault.alias)
        if lane is None or lane.epoch != fault.epoch or not self._pending.any_of(lane):
            return
        if code is m.Code.BUSY or (code is m.Code.GAP and self._pending.earlier(lane, fault.position)):
            self._later(lane, fault, now)
        elif code in (m.Code.GAP, m.Code.DIVERGED, m.Code.STALE_EPOCH, m.Code.UNKNOWN_SESSION):
            if code is m.Code.DIVERGED and self._setbacks:
                lane.renew()
            self._setback(lane)
        elif code is m.Code.KV_FULL:
            problem = f"the conversation is full: {fault.problem}" if lane.opened else fault.problem
            self._fail(ConversationFullError(problem, fault.remedy or "begin a new one, or choose overflow='slide'"))
        elif code is m.Code.CLOSING:
            self.closing = True
            self._fail(LinkError(f"{self.where} is stopping", "try again later or name another cloud"))
        elif code is not m.Code.CANCELLED:
            self._fail(error)

    # -- lanes

    def _open(self, lane: Lane, now: float) -> None:
        self._drop(lane)
        message = lane.opening(self._model_id, self._kv_format, self._window, self.log, self.numerics)
        self._post(("control", lane.alias), message, lane, now)

    def _cut(self, lane: Lane, length: int, now: float) -> None:
        """Has the cloud cut its log back to what is known: rows may follow, which it refuses if it has not heard."""
        if not self._renewed(lane, now):
            self.outbox.append(lane.cutting(length))
            lane.cut(length, self.log)
            if lane.asks(self.log):
                self._open(lane, now)
            else:
                self.events.append(Aligned(lane))

    def _truncate(self, lane: Lane, length: int, now: float) -> None:
        """Has the cloud cut its log back, and say what is left."""
        if not self._renewed(lane, now):
            self._post(("control", lane.alias), lane.cutting(length), lane, now)

    def _renewed(self, lane: Lane, now: float) -> bool:
        """Drops what a lane waits for; whether it is begun anew, as there is no way back to what its window let go."""
        self._drop(lane)
        if not (self._window and lane.committed > self._window):
            return False
        self.outbox.append(m.Close(lane.alias, lane.epoch))
        lane.renew()
        if self._bears():
            self._open(lane, now)
        return True

    def _aligning(self, lane: Lane, committed: int, prefix_hash: bytes, now: float) -> None:
        known, limit = lane.agreed, min(lane.limit, len(self.log))
        agrees = lane.told(committed, prefix_hash, self.log)
        if agrees and lane.ready(limit, self.log):
            self.round_trips += 1
            self.events.append(Aligned(lane))
        elif committed:  # beyond the limit the cloud went on by itself: probably it agrees up to there
            keeps = limit if agrees or committed > limit else known if committed > known else 0
            self._truncate(lane, keeps, now)
        else:
            self._fail(LinkError(f"{self.where} names an empty log by another hash", "both sides must be one version"))

    def _setback(self, lane: Lane) -> None:
        lane.opened = False
        self._drop(lane)
        if self._bears():
            self.events.append(Behind(lane))

    def _bears(self) -> bool:
        """Counts one more realignment; whether it is tried."""
        self._setbacks += 1
        if self._setbacks > _MAX_SETBACKS:
            self._fail(LinkError(f"{self.where} and this device do not come to agree", "try again later"))
        return self._setbacks <= _MAX_SETBACKS

    # -- requests

    def _post(self, key: tuple[Any, ...], message: Any, lane: Lane | None, now: float, head: bytes = b"") -> None:
        rows = len(getattr(message, "tokens", ()))
        if lane is not None and rows:
            lane.sent = max(lane.sent, message.position + rows)
        self._pending[key] = Pending(message, lane, now, now + self._timeouts.retry_ms / 1e3, head=head)
        if self.welcome is not None:
            self.outbox.append(message)

    def _answered(self, key: tuple[Any, ...], now: float) -> bool:
        if self._pending.pop(key, None) is None:
            return False
        self.patience.progressed(now)
        return True

    def _control(self, lane: Lane, epoch: int, kind: type[m.Open] | type[m.Truncate], now: float) -> Any:
        """The request that a lane's answer is to; None when nothing like that was asked."""
        pending = self._pending.get(("control", lane.alias))
        if pending is None or not isinstance(pending.message, kind) or pending.message.epoch != epoch:
            return None
        self._answered(("control", lane.alias), now)
        if pending.timed(now):
            self.trips.greeted(now - pending.asked_at)
        return pending.message

    def _later(self, lane: Lane | None, fault: m.Fault, now: float) -> None:
        retry_at = now + max(fault.retry_ms / 1e3, self._timeouts.retry_ms / 4e3)
        asked_at = self._pending.put_off(lane, fault.position, retry_at)
        if asked_at is not None and fault.code is m.Code.BUSY:
            self.patience.put_off(fault.problem, asked_at, retry_at, now)

    def _drop(self, lane: Lane) -> bool:
        dropped = self._pending.drop(lane)
        self._streams.pop(lane.alias, None)
        if self.events:
            self.events = deque(e for e in self.events if isinstance(e, Up | Served | Refused) or e.lane is not lane)
        return dropped

    def _tripped(self, pending: Pending, now: float, engine_us: int, queue_us: int, *, waited: bool = True) -> None:
        self.round_trips += waited
        self.cloud_us += engine_us
        if pending.timed(now):
            self.trips.answered(now - pending.asked_at, (engine_us + queue_us) * 1e-6)

    def _busy(self, now: float) -> None:
        """Something is asked for: after a time in which nothing was, patience counts from now."""
        if not self._pending:
            self.patience.begin(now)

    def _absurd(self, what: str) -> bool:
        """Gives up on a cloud that answers nonsense; whether there is any."""
        if what:
            self._fail(LinkError(f"{self.where} answers nonsense: {what}", "both sides must be one version"))
        return bool(what)

    def _fail(self, error: IsthmusError) -> None:
        self.abandon()
        self.events.append(Refused(error))
