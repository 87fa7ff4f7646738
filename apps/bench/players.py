"""The ways of working, simulated: each plays one round at a time, up to the next token boundary."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from isthmus.apps.bench.conversation import CHUNK, Conversation
from isthmus.apps.bench.virtual import Note
from isthmus.edge.costs import ANSWER_BYTES, NEWS_BYTES, TOKEN_BYTES, Candidate
from isthmus.edge.exit import GAMBLE
from isthmus.edge.figures import Figures
from isthmus.edge.pace import GUESSES, LIKELY


class Player(Protocol):
    """A way of working on one answer."""

    def round(self) -> None:
        """Makes one token or more."""
        ...

    def stop(self) -> None:
        """Another way goes on."""
        ...


def player(talk: Conversation, choice: Candidate, figures: Figures) -> Player:
    """Who plays a choice."""
    if choice.mode == "local":
        return Local(talk)
    if choice.mode == "stream":
        return Stream(talk)
    if choice.mode == "verify":
        return (Pipelined if choice.depth > 1 else Verify)(talk, choice)
    if choice.mode == "exit":
        return Exit(talk, choice, next(one.row_bytes for one in figures.exits if one.layer == choice.cut))
    return Split(talk, choice, next(codec.row_bytes for codec in figures.codecs if codec.name == choice.codec))


class Local:
    """The whole model on the device."""

    def __init__(self, talk: Conversation) -> None:
        self._talk = talk

    def round(self) -> None:
        """One token."""
        talk, depth = self._talk, self._talk.device.n_layers
        rows = max(1, talk.total - talk.held(depth))
        talk.world.work(talk.device.prefill(rows - 1, depth) + talk.device.token_ms)
        talk.fill(depth, talk.total)
        talk.emit(1)

    def stop(self) -> None:
        """Nothing is under way."""


class Stream:
    """The whole model in the cloud: a request up, a message down for each token as it is made."""

    def __init__(self, talk: Conversation) -> None:
        self._talk = talk
        self._tag = 0
        self._asked_ns = 0

    def round(self) -> None:
        """One token, or all that have arrived."""
        talk = self._talk
        first = not self._tag
        if first:
            self._begin()
        sight = talk.sight.estimator
        note = talk.await_note(lambda one: one.tag == self._tag)
        if first:
            talk.tell_trip(self._asked_ns, note, TOKEN_BYTES * talk.total)
        if sight is not None:
            sight.queued(talk.now_s, note.queue_ms)
        talk.emit(1)

    def stop(self) -> None:
        """The cloud hears of it when the link lets it."""
        talk, tag = self._talk, self._tag
        if tag and talk.left:

            def arrived() -> None:
                if talk.cloud.epoch == tag:
                    talk.cloud.epoch = 0

            talk.lay(0, arrived)
        self._tag = 0

    def _begin(self) -> None:
        talk, tag = self._talk, self._talk.tag()
        self._tag, self._asked_ns = tag, talk.world.now
        cloud, costs, at, total = talk.cloud, talk.costs, talk.made, talk.total
        missing = max(1, total - cloud.tokens)

        def price(place: int) -> float | None:
            if cloud.epoch != tag:
                return None
            rows = max(1, answer.prompt + place - cloud.tokens)
            cloud.tokens = answer.prompt + place
            return costs.prefill(rows - 1) + costs.step(1)

        def made(place: int, took_ms: float, queue_ms: float) -> None:
            talk.reply(tag, place, NEWS_BYTES, took_ms, queue_ms)
            if place + 1 < answer.tokens:
                cloud.engine.submit(lambda: price(place + 1), lambda _, took, queued: made(place + 1, took, queued))

        def arrived() -> None:
            cloud.epoch = tag
            cloud.engine.submit(lambda: price(at), lambda _, took, queued: made(at, took, queued))

        answer = talk.answer
        talk.lay(40 + TOKEN_BYTES * missing, arrived)


class _Hidden:
    """What split and exit mode share: hidden states go up."""

    def __init__(self, talk: Conversation, choice: Candidate, row_bytes: float) -> None:
        self._talk, self.choice, self._row_bytes = talk, choice, row_bytes

    def _compute(self, last_ms: float) -> float:
        """Computes the rows that the cloud lacks and sends all but the last chunk; bytes of that one."""
        talk, cut = self._talk, self.choice.cut
        sent, total = talk.sent.get(cut, 0), talk.total
        at = min(sent, talk.held(cut), total - 1)
        while total - at > CHUNK:
            talk.world.work(talk.device.prefill(CHUNK, cut) + CHUNK * talk.device.codec_ms)
            at += CHUNK
            talk.lay(max(0, at - sent) * self._row_bytes, lambda: None)
            sent = max(sent, at)
        rows = total - at
        talk.world.work(talk.device.prefill(rows - 1, cut) + rows * talk.device.codec_ms + last_ms)
        talk.fill(cut, total)
        talk.sent[cut] = total
        return max(1, total - sent) * self._row_bytes

    def _ask(
        self, size: float, sent_before: float, guesses: int = 0, meanwhile: Callable[[], None] | None = None
    ) -> Note:
        """Asks for the next token, and whether so many guesses are right."""
        talk, cut, tag = self._talk, self.choice.cut, self._talk.tag()
        cloud, costs, total, asked = talk.cloud, talk.costs, talk.total, talk.world.now

        def price() -> float:
            rows = max(1, total - cloud.hidden.get(cut, 0)) + guesses
            cloud.hidden[cut] = max(total, cloud.hidden.get(cut, 0))
            return costs.rest(cut, rows)

        talk.lay(
            size,
            lambda: cloud.engine.submit(price, lambda _, took, queue: talk.reply(tag, 0, ANSWER_BYTES, took, queue)),
        )
        if meanwhile is not None:
            meanwhile()
        note = talk.await_note(lambda one: one.tag == tag)
        talk.tell_trip(asked, note, size + sent_before)
        return note

    def stop(self) -> None:
        """A question whose answer nobody awaits is answered all the same."""


class Split(_Hidden):
    """Layers [0, cut) on the device, the rest in the cloud."""

    def round(self) -> None:
        """One token."""
        size = self._compute(self._talk.device.through(self.choice.cut))
        self._ask(40 + size, 0.0)
        self._talk.emit(1)


class Exit(_Hidden):
    """Layers [0, cut) and an exit on the device; the cloud is sent all states and asked where the exit is not sure.

    As the device does, it guesses on for a while before it asks, and while it waits it says what follows if all guesses
    are right: as long as that is done before the answer is due, which it may be wrong about.
    """

    def __init__(self, talk: Conversation, choice: Candidate, row_bytes: float) -> None:
        super().__init__(talk, choice, row_bytes)
        self._ahead = 0  # tokens that were said while an answer was awaited, and stand

    def round(self) -> None:
        """A token that the exit is sure of, or all that a question brings."""
        talk, cut = self._talk, self.choice.cut
        at = talk.made
        facts, pace = talk.answer.exits[cut], talk.sight.pace
        size = self._compute(self._said_ms())
        if facts.confidence[at] >= self.choice.threshold:
            talk.lay(size, lambda: None)
            talk.wrong += not facts.right[at]
            self._told(0)
            talk.emit(1)
            return
        end, odds = at, facts.confidence[at]
        while end - at < GUESSES and odds >= max(LIKELY, pace.even()) and end + 1 < talk.answer.tokens:
            end += 1
            talk.world.work(self._said_ms() + talk.device.codec_ms)
            sure = facts.confidence[end] >= self.choice.threshold
            odds *= 1.0 if sure else facts.confidence[end]
        size += (end - at) * self._row_bytes
        talk.lay(size, lambda: None)
        began, firm = talk.world.now, [facts.confidence[i] >= self.choice.threshold for i in range(at, end + 1)]
        due = began + pace.answer_s() * 1e9
        before = size if size > 3 * self._row_bytes else 0.0
        note = self._ask(ANSWER_BYTES, before, end - at, partial(self._go_ahead, due, end) if odds >= GAMBLE else None)
        stands = [facts.right[at + i] or one for i, one in enumerate(firm)]
        count = next((i + 1 for i, stood in enumerate(stands) if not stood), len(stands))
        talk.wrong += sum(not facts.right[at + i] for i in range(count) if stands[i])
        hits = sum(stood and not one for stood, one in zip(stands[:count], firm, strict=False))
        took_s, engine_ms = (talk.world.now - began) / 1e9, note.took_ms - note.queue_ms
        pace.answered(hits + (not stands[count - 1]), hits, end - at + 1, took_s, engine_ms * 1e-3)
        self._ahead = self._ahead if all(stands) else 0
        rows = talk.total + count - 1
        talk.fill(cut, rows)
        talk.sent[cut] = talk.cloud.hidden[cut] = rows
        for number in range(count):
            self._told(0 if number else 1)
        talk.emit(count)

    def _said_ms(self) -> float:
        """What the exit's next token takes, which it may have said already."""
        if self._ahead:
            self._ahead -= 1
            return 0.0
        step_ms = self._talk.device.drafted(self.choice.cut)
        self._talk.sight.pace.drafted(1, step_ms * 1e-3)
        return step_ms

    def _go_ahead(self, due: float, end: int) -> None:
        """Says what follows the guesses up to `end` while their answer is awaited."""
        talk = self._talk
        step_ms, pace = talk.device.drafted(self.choice.cut), talk.sight.pace
        while end + 1 + self._ahead < talk.answer.tokens and not talk.world.inbox:
            if talk.world.now + pace.draft_s * 1e9 > due:
                break
            talk.world.work(step_ms)
            pace.drafted(1, step_ms * 1e-3)
            self._ahead += 1

    def _told(self, asked: int) -> None:
        if self._talk.sight.estimator is not None:
            self._talk.sight.estimator.exit(self.choice.cut, self.choice.threshold, asked, self.choice.asked)


class Verify:
    """The device drafts a block, the cloud checks it in one pass."""

    def __init__(self, talk: Conversation, choice: Candidate) -> None:
        self._talk, self.choice = talk, choice

    def round(self) -> None:
        """The tokens that were taken and the cloud's own."""
        talk, choice = self._talk, self.choice
        at, tag, layer = talk.made, talk.tag(), choice.cut
        count = min(choice.draft_tokens, talk.left - 1)
        if layer:
            missing = talk.total - talk.held(layer)
            talk.world.work(talk.device.prefill(max(0, missing - 1), layer) + count * talk.device.drafted(layer))
            if count:
                talk.fill(layer, talk.total + count - 1)
        else:
            count = min(count, talk.answer.drafted[at])
        taken = min(talk.answer.taken(layer, at, count), count)
        cloud, costs, total = talk.cloud, talk.costs, talk.total
        asked = talk.world.now
        missing = max(1, total - cloud.tokens)
        size = 20 + TOKEN_BYTES * (count + missing - 1)

        def price() -> float:
            rows = max(1, total - cloud.tokens)
            cloud.tokens = total + taken
            return costs.prefill(rows - 1) + costs.step(count + 1)

        talk.lay(
            size,
            lambda: cloud.engine.submit(
                price, lambda _, took, queue: talk.reply(tag, taken, ANSWER_BYTES, took, queue)
            ),
        )
        note = talk.await_note(lambda one: one.tag == tag)
        talk.tell_trip(asked, note, size)
        if talk.sight.estimator is not None:
            source = "exit" if layer else "ngram"
            talk.sight.estimator.block(source, layer, choice.draft_tokens, count, taken)  # type: ignore[arg-type]
        talk.emit(taken + 1)
        if layer:
            talk.filled[layer] = min(talk.filled.get(layer, 0), talk.total)

    def stop(self) -> None:
        """A block whose answer nobody awaits is checked all the same."""


class Pipelined:
    """Blocks of drafts go up without waiting; the first that is not taken whole voids those after it."""

    def __init__(self, talk: Conversation, choice: Candidate) -> None:
        self._talk, self.choice = talk, choice
        self._ahead = self._unsent = 0
        self._under_way: deque[tuple[int, int, int, int]] = deque()  # tag, first token, drafts, when it was sent
        self._epoch = 0

    def round(self) -> None:
        """The tokens of one block, or the first part of them and the cloud's correction."""
        talk, g = self._talk, self.choice.draft_tokens
        made = talk.made
        while talk.made == made:
            while (note := talk.take()) is not None:
                self._answered(note)
            if talk.made != made:
                return
            if talk.left > self._ahead and len(self._under_way) < self.choice.depth:
                self._draft()
                if self._unsent == g or talk.left == self._ahead:
                    self._send()
            else:
                tag = self._under_way[0][0]
                self._answered(talk.await_note(lambda one: one.tag == tag))  # noqa: B023

    def stop(self) -> None:
        """The cloud drops what it has not begun, once it hears of it."""
        talk, epoch = self._talk, self._epoch
        if self._under_way:

            def arrived() -> None:
                if talk.cloud.epoch == epoch:
                    talk.cloud.epoch = 0

            talk.lay(0, arrived)
        self._void()

    def _draft(self) -> None:
        talk, layer = self._talk, self.choice.cut
        missing = talk.total + self._ahead - max(talk.held(layer), talk.filled.get(layer, 0))
        talk.world.work(talk.device.prefill(max(0, missing - 1), layer) + talk.device.drafted(layer))
        talk.filled[layer] = talk.total + self._ahead
        self._ahead += 1
        self._unsent += 1

    def _send(self) -> None:
        talk, tag, layer = self._talk, self._talk.tag(), self.choice.cut
        count, first = self._unsent, talk.made + self._ahead - self._unsent
        self._unsent = 0
        if not self._under_way and self._epoch == 0:
            self._epoch = tag
        epoch, cloud, costs, prompt = self._epoch, talk.cloud, talk.costs, talk.answer.prompt
        self._under_way.append((tag, first, count, talk.world.now))
        taken = talk.answer.taken(layer, first, count)
        missing = max(1, prompt + first - cloud.tokens) if epoch == tag else 1

        def price() -> float | None:
            if cloud.epoch != epoch:
                return None
            rows = max(1, prompt + first - cloud.tokens)
            cloud.tokens = prompt + first + taken
            if taken < count:
                cloud.epoch = 0
            return costs.prefill(rows - 1) + costs.step(count)

        def arrived() -> None:
            if tag == epoch:
                cloud.epoch = epoch
            cloud.engine.submit(price, lambda _, took, queue: talk.reply(tag, taken, ANSWER_BYTES, took, queue))

        talk.lay(20 + TOKEN_BYTES * (count + missing - 1), arrived)

    def _answered(self, note: Note) -> None:
        talk = self._talk
        if not self._under_way or note.tag != self._under_way[0][0]:
            return
        _, _, count, sent = self._under_way.popleft()
        if talk.sight.estimator is not None:
            talk.tell_trip(sent, note, TOKEN_BYTES * count)
            talk.sight.estimator.block("exit", self.choice.cut, self.choice.draft_tokens, count, note.count)
        if note.count == count:
            self._ahead -= count
            talk.emit(count)
        else:
            talk.emit(note.count + 1)
            self._void()

    def _void(self) -> None:
        talk, layer = self._talk, self.choice.cut
        self._ahead = self._unsent = self._epoch = 0
        self._under_way.clear()
        talk.filled[layer] = min(talk.filled.get(layer, 0), talk.total)
