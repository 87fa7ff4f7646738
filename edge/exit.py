"""Exit mode: the device says what it is sure of by itself, and asks the cloud about the rest."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.edge.events import Verified
from isthmus.edge.link import Link, Restart
from isthmus.edge.local import LocalPart
from isthmus.edge.model_drafts import Said
from isthmus.edge.pace import LIKELY, Pace
from isthmus.edge.runners import HIDDEN_LANE, known, sampler
from isthmus.edge.token import Source
from isthmus.engine.part import Part, Rows, StepResult, Want
from isthmus.engine.sampling import GREEDY, Sampling
from isthmus.engine.threshold import least
from isthmus.protocol import messages as m
from isthmus.protocol import tensors
from isthmus.protocol.chain import Chain
from isthmus.protocol.channels import ChannelStats

GAMBLE = 0.1  # probability that a question's guesses are all right below which nothing is said while it is under way
REMEMBERED = 512  # answers of an exit
KEPT_STATES = 256  # positions, where nobody has asked for states
AHEAD_ROWS = 4  # whose states are sent together while nobody asks for them
_HASH_BYTES = 4  # of a prefix on the wire: enough, since a wrong one can only be refused


class _Question(NamedTuple):
    """What the cloud was asked.

    Attributes:
        guess: what the exit says that the answer is; no row carries it.
        sure: whether that stands.
        sent_s: when, by `time.perf_counter`.
    """

    guess: int
    sure: bool
    sent_s: float


class ExitSpeaker:
    """The layers before an exit, and the exit; also a `model_drafts.Speaker`.

    What it said is remembered for the tokens and the sampling that it was said for.

    Args:
        part: with layers [0, cut) at least.
        head: layers [cut, cut + 1) of the exit; see `split.exits`.

    Attributes:
        cut: before which layer the exit stands.
    """

    def __init__(self, part: LocalPart, head: Part, cut: int) -> None:
        self._part, self._head, self.cut = part, head, cut
        self._sequence = head.open()
        self._log = Chain()  # that the exit's KV and the states are for
        self._said: OrderedDict[tuple[bytes, Sampling], Said] = OrderedDict()
        self._states: deque[NDArray[np.float32]] = deque()  # of the last positions, each [n, d_model]
        self._first = 0  # position of the first of them

    def held(self, log: Chain) -> int:
        """Leading positions of a log that the exit has KV of."""
        return min(self._sequence.length, self._log.common(log))

    def advance(self, log: Chain, rows: int, anew: bool = False) -> bool:
        """Computes KV of up to `rows` more positions before the log's last; whether there were any.

        Args:
            anew: also where that takes KV from those who work with another cut.

        Raises:
            DeviceError, OutOfBlocks: as in `say`.
        """
        start = self.held(log)
        end = min(start + rows, len(log) - 1)
        if end <= start or not (anew or self._part.gives(log, start, self.cut)):
            return False
        self._take(log, start, end, None)
        self.sent(end - KEPT_STATES)
        return True

    def remembers(self, log: Chain, sampling: Sampling) -> bool:
        """Whether it has said before what comes after the log."""
        return (log.head, sampling) in self._said

    def say(self, log: Chain, sampling: Sampling) -> Said:
        """What comes after the whole log.

        Raises:
            DeviceError: no room is left for KV of the layers before the exit.
            OutOfBlocks: none is left for the exit's own.
        """
        known = self._said.get((log.head, sampling))
        if known is not None:
            return known
        result = self._take(log, min(self.held(log), len(log) - 1), len(log), sampling)
        assert result is not None
        said = self._said[log.head, sampling] = Said(result.tokens[0], float(result.confidence[0]))
        if len(self._said) > REMEMBERED:
            self._said.popitem(last=False)
        return said

    def draft(self, log: Chain, sampling: Sampling) -> Said:
        """See `model_drafts.Speaker`; of its states only the last are kept."""
        said = self.say(log, sampling)
        self.sent(len(log) - KEPT_STATES)
        return said

    def sample(self, log: Chain, sampling: Sampling) -> int:
        """The token that it drafts."""
        return self.draft(log, sampling).token

    def states(self, log: Chain, start: int, end: int) -> NDArray[np.float32]:
        """The hidden states before layer `cut` of positions [start, end), which were said before: [n, d_model] f32."""
        if (common := self._log.common(log)) < len(log):
            self._cut_back(common)
        if start < self._first or end > self._first + sum(map(len, self._states)):
            self._states.clear()
            for at, states in self._part.hidden(log, start, self.cut):
                self._keep(at, states)
        held = np.concatenate(self._states)
        return held[start - self._first : end - self._first]

    def sent(self, end: int) -> None:
        """States before `end` are not asked for again, as long as all goes well."""
        while self._states and self._first + len(self._states[0]) <= end:
            self._first += len(self._states.popleft())

    def truncate(self, length: int) -> None:
        """See `model_drafts.Speaker`."""
        self._part.truncate(length)
        self._cut_back(length)

    def close(self) -> None:
        """Frees the exit."""
        self._sequence.close()
        self._head.close()

    def _take(self, log: Chain, start: int, end: int, sampling: Sampling | None) -> StepResult | None:
        """Positions [start, end); with a sampling, what comes after them."""
        self._cut_back(start)
        result = None
        for at, states in self._part.hidden(log, start, self.cut, end=end):
            self._keep(at, states)
            said = sampling is not None and at + len(states) == end
            want = Want.SAMPLE | Want.CONFIDENCE if said else Want.NONE
            rows = Rows().hidden(self._sequence, at, states, enter=self.cut, want=want, sampling=sampling or GREEDY)
            result = self._head.step(rows)
        self._log.follow(log, end)
        return result

    def _keep(self, at: int, states: NDArray[np.float32]) -> None:
        if not self._states:
            self._first = at
        end = self._first + sum(map(len, self._states))
        if at > end:  # what lies between was let go
            self._states.clear()
            self._first = end = at
        if at < end:
            states = states[end - at :]
        if len(states):
            self._states.append(states)

    def _cut_back(self, length: int) -> None:
        if length < self._sequence.length:
            self._sequence.truncate(length)
            self._log.truncate(length)
        end = self._first + sum(map(len, self._states))
        while self._states and end > length:
            last = self._states.pop()
            end -= len(last)
            if end < length:
                self._states.append(last[: length - end])
                break


class ExitRunner:
    """See the module.

    Token t is the exit's where its confidence reaches the threshold, else the full model's over the states that
    travelled; nothing else enters, so the text does not depend on the link. Where the exit is not sure, the device goes
    on for some tokens as if it were right, and asks the cloud about all of them at once: the answer says how many were
    what the full model says, and what follows them; until it comes the device goes on as if all were. The states of all
    tokens travel ahead of the questions, and the cloud computes those that nobody asked about with the next question.

    Args:
        threshold: confidence from which on the exit is believed; at 1 never (see `engine.threshold`).
        codec, stats: how states travel.
        pace: how far to go on before asking, at most, and what that must bring.
        n_layers: of the model.

    Attributes:
        source: of the token given last: "exit", "verified" (the exit's, confirmed) or "cloud".
        drafted, accepted: unsure guesses that the cloud was asked about, and those that were right.
        asks: questions so far.
        filled: layer-tokens that the cloud computed with its answers, of states behind the prompt that nobody asked
            about.
    """

    source: Source = "exit"

    def __init__(
        self,
        link: Link,
        log: Chain,
        sampling: Sampling,
        eos: Sequence[int],
        speaker: ExitSpeaker,
        threshold: float,
        codec: str,
        stats: ChannelStats | None,
        pace: Pace,
        n_layers: int,
    ) -> None:
        self._prompt, self._rest = len(log), n_layers - speaker.cut  # positions, and layers behind the exit
        self._link, self._log, self._sampling, self._eos = link, log, sampling, frozenset(eos)
        self._speaker, self._least, self._codec, self._stats, self._pace = speaker, least(threshold), codec, stats, pace
        self._sampler: m.Sampler | None = None  # until the cloud knows it
        self._lane = link.session.lane(HIDDEN_LANE, speaker.cut, codec)
        self._told = Chain()  # the log, what is said beyond it, and guesses
        self._ready: deque[tuple[int, Source]] = deque()
        self._sent = 0  # positions whose states went up
        self._unsure = -1  # the position after which the first unsure guess stands
        self._odds = 1.0  # that all unsure guesses since are right
        self._firm = 0  # of the tokens from there on those that the exit is sure of, as bits
        self._found: int | None = None
        self._running = False
        self._asked: _Question | None = None  # whose answer has not come
        self.drafted = self.accepted = self.asks = self.filled = 0
        self._unasked = 0  # rows behind the prompt that were sent since the last answer, with nobody waiting for them

    def next(self, remaining: int) -> int:
        """See `Runner`."""
        goal = len(self._log) + remaining
        while not self._ready:
            try:
                if not self._running:
                    self._begin()
                if self._asked is None:
                    self._go_on(goal)
                else:
                    self._hear(self._asked)
            except Restart:
                self._running = False
        token, self.source = self._ready.popleft()
        return token

    def ready(self) -> bool:
        """See `Runner`."""
        return bool(self._ready)

    def reused(self) -> int:
        """See `Runner`."""
        return self._found if self._found is not None else known(self._lane, self._log)

    def stop(self) -> None:
        """See `Runner`."""
        self._speaker.truncate(len(self._log))
        self._link.cancel(self._lane)
        self._running, self._asked = False, None

    def _begin(self) -> None:
        self._told = self._log.copy()
        self._sent = self._link.align(self._lane, len(self._log) - 1)
        self._found = self._sent if self._found is None else self._found
        self._speaker.truncate(len(self._log))
        self._unsure, self._firm, self._odds = -1, 0, 1.0
        self._unasked = 0
        self._sampler, self._asked = sampler(self._sampling), None
        self._running = True

    def _go_on(self, goal: int) -> None:
        """One more token, said or guessed; or the question."""
        told = self._told
        said = self._say(told)
        sure = said.confidence >= self._least
        if self._unsure < 0:
            if sure:
                self._ready.append((said.token, "exit"))
                if len(told) - self._sent >= AHEAD_ROWS:
                    self._send_ahead(len(told))
                told.extend((said.token,))
                return
            self._unsure = len(told) - 1
            self._link.probe()  # so that a dark link is known by the time that the answer is due
        guesses, odds = len(told) - 1 - self._unsure, self._odds * (1.0 if sure else said.confidence)
        most = min(self._pace.most, m.MAX_DRAFT - 1, goal - 2 - self._unsure)
        if guesses < most and odds >= max(LIKELY, self._pace.even()) and said.token not in self._eos:
            self._odds = odds
            self._firm |= sure << (len(told) - self._unsure)
            told.extend((said.token,))
            return
        self._ask(said.token, sure, odds, goal)

    def _ask(self, guess: int, sure: bool, odds: float, goal: int) -> None:
        """Asks about the guesses and what follows them; `guess` and `sure` as in the question.

        Args:
            odds: that all of it is right.
        """
        told, lane, at = self._told, self._lane, self._unsure
        self._send_ahead(at)
        tensor = self._coded(at, len(told))
        self._asked = _Question(guess, sure, time.perf_counter())
        head, asks = told.at(at)[:_HASH_BYTES], self._sampler
        draft = m.Draft(lane.alias, lane.epoch, at, head, told.tokens[at:], tensor, asks, self._firm)
        self._sampler = None
        self.asks += 1
        self._link.draft(lane, draft, told.at(at))
        if odds >= GAMBLE:
            self._go_ahead(guess, self._asked.sent_s + self._pace.answer_s(), goal)

    def _hear(self, question: _Question) -> None:
        """Waits for the answer."""
        told, at = self._told, self._unsure
        guess, sure, began = question
        news = self._link.verdict(self._lane)
        if not isinstance(news, Verified) or news.position != at:
            return  # of rows that another runner sent on this lane
        self._asked = None
        self.filled, self._unasked = self.filled + self._unasked * self._rest, 0
        right, asked, firm = at + news.accepted, len(told) - at, self._firm
        hits = sum(not firm >> i & 1 for i in range(1, news.accepted))
        checked = hits + (right < len(told) or not sure)
        source: Source
        token, source, goes_on = news.token, "cloud", False
        if right == len(told):
            hits += not sure and guess == token
            if goes_on := sure or guess == token:
                token, source = guess, "exit" if sure else "verified"
        self.drafted, self.accepted = self.drafted + checked, self.accepted + hits
        self._pace.answered(checked, hits, asked, time.perf_counter() - began, news.engine_us * 1e-6)
        for i in range(1, news.accepted):
            self._ready.append((told.tokens[at + i], "exit" if firm >> i & 1 else "verified"))
        self._ready.append((token, source))
        if not goes_on:
            told.truncate(right)
            self._speaker.truncate(right)
        told.extend((token,))
        self._sent, self._unsure, self._firm, self._odds = right, -1, 0, 1.0
        self._speaker.sent(right)

    def _go_ahead(self, guess: int, due_s: float, goal: int) -> None:
        """Says what follows if all guesses are right, as long as that is done before the answer is due, or here."""
        path = self._told.copy()
        path.extend((guess,))
        while len(path) < goal and path.tokens[-1] not in self._eos:
            if time.perf_counter() + self._pace.draft_s > due_s:
                break
            path.extend((self._say(path).token,))
            if self._link.look():
                break

    def _say(self, log: Chain) -> Said:
        if self._speaker.remembers(log, self._sampling):
            return self._speaker.say(log, self._sampling)
        began = time.perf_counter()
        said = self._speaker.say(log, self._sampling)
        self._pace.drafted(1, time.perf_counter() - began)
        return said

    def _send_ahead(self, end: int) -> None:
        """States of positions before `end` that the cloud has not got, with nobody waiting for them."""
        told, lane = self._told, self._lane
        while self._sent < end:
            at, stop = self._sent, min(end, self._sent + self._link.max_rows)
            tensor = self._coded(at, stop)
            head = told.at(at)[:_HASH_BYTES]
            fill = m.Fill(lane.alias, lane.epoch, at, head, told.tokens[at:stop], tensor)
            self._link.fill(lane, fill, told.at(stop))
            self._sent = stop
            self._unasked += max(0, stop - max(at, self._prompt))
            self._speaker.sent(stop)

    def _coded(self, start: int, end: int) -> m.Tensor:
        states = self._speaker.states(self._told, start, end)
        return tensors.encode(states, self._codec, plain=1 if start == 0 else 0, stats=self._stats)
