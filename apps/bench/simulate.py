"""Plays answers on a virtual clock: in one fixed mode, or in auto, where the device's own policy decides.

Device and cloud take their measured times, each by its declared factor; the link delivers as its trace says; which
drafts and exits are right comes from recorded facts. Auto sees what a device could measure, and nothing else: how long
an answer will be it guesses, and decides, waits and asks the link by `edge.rhythm`, as the device's controller does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from isthmus.apps.bench.conversation import Conversation, GaveUp, Sight
from isthmus.apps.bench.facts import Answer, draft_figures
from isthmus.apps.bench.players import Exit, Pipelined, Player, Verify, player
from isthmus.apps.bench.shaping import MS
from isthmus.apps.bench.virtual import Engine, Way, World
from isthmus.edge.costs import Candidate, candidates
from isthmus.edge.estimator import Estimator
from isthmus.edge.fallback import Rest
from isthmus.edge.figures import (
    CloudFigures,
    CodecFigures,
    DeviceFigures,
    DraftFigures,
    ExitFigures,
    Figures,
    LinkFigures,
    Wish,
)
from isthmus.edge.options import GenerateOptions
from isthmus.edge.policy import Plan, decide, unseen, worth_probing
from isthmus.edge.priors import LENGTHS
from isthmus.edge.rhythm import FIRST_BYTES, MOST_REST_S, REST_S, Rhythm, expected, next_look_s, probe_s, usual_ms
from isthmus.edge.shadow import DRAFTED
from isthmus.protocol.errors import DeviceError
from isthmus.split.traces import Trace

GREETINGS = 4  # trips that opening a connection has shown before the first question
D_MODEL = 576  # of the model whose facts are replayed
CODECS = (CodecFigures("f32", 4.0 * D_MODEL, 0.0),)


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """A link to simulate: half of the round trip each way, and rates or traces.

    Attributes:
        up, down: opportunities; None for a rate.
        up_bps, down_bps: rates in bit/s where no traces are given; None is unlimited.
    """

    rtt_ms: float
    up: Trace | None = None
    down: Trace | None = None
    up_bps: float | None = None
    down_bps: float | None = None

    def ways(self, start_s: float = 0.0) -> tuple[Way, Way]:
        """Both directions, with traces from `start_s` on."""
        begin = -round(start_s * 1e9)
        return (
            Way(self.rtt_ms / 2, self.up_bps, self.up, begin),
            Way(self.rtt_ms / 2, self.down_bps, self.down, begin),
        )


@dataclass(frozen=True, slots=True)
class Point:
    """What is shared between whom.

    Attributes:
        device, cloud: true times, slow-down and factor included.
        figures: what the device knows of itself, exits, drafts and codecs before it begins.
    """

    device: DeviceFigures
    cloud: CloudFigures
    link: LinkPlan
    figures: Figures


@dataclass(frozen=True, slots=True)
class Window:
    """Answers one after the other, from a moment of the link's trace on.

    Attributes:
        lead_s: from then on, the link is open before the first of them is asked for.
        seconds: after which it is over, however far the answers are.
        max_tokens: of an answer, as the device is told; that it will be shorter it does not know.
    """

    start_s: float
    answers: tuple[Answer, ...]
    lead_s: float = 0.0
    seconds: float = math.inf
    max_tokens: int = GenerateOptions().max_tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a window.

    Attributes:
        seconds: until the last token.
        tokens: made.
        wrong: tokens that an exit emitted and the model would not have.
        cloud_ms: of the cloud's engine.
        switches: changes of the mode.
        used: tokens by mode.
    """

    seconds: float
    tokens: int
    wrong: int
    cloud_ms: float
    switches: int
    used: Mapping[str, int]


def device_figures(
    layers_ms: Mapping[int, float],
    head_ms: float,
    prefill_row_ms: float,
    *,
    slow: float,
    held: int,
    heads: Mapping[int, float] | None = None,
) -> DeviceFigures:
    """A device out of this machine's times, by a slow-down.

    Args:
        heads: by layer, the share of the output head's rows that the exit there has; all by default.
    """
    n_layers = max(layers_ms)
    points = tuple((k, ms * slow) for k, ms in sorted(layers_ms.items()))
    per_layer = min(layers_ms[k] for k in layers_ms)
    exits_ms = tuple((layer, (per_layer + share * head_ms) * slow) for layer, share in sorted((heads or {}).items()))
    times = (head_ms * slow, per_layer * slow, prefill_row_ms * slow)
    return DeviceFigures(held, n_layers, points, *times, exits_ms=exits_ms)


def cloud_figures(
    rows_ms: Mapping[int, float], head_ms: float, prefill_row_ms: float, n_layers: int, *, factor: float
) -> CloudFigures:
    """A cloud out of this machine's times, by a declared factor."""
    points = tuple((n, ms * factor) for n, ms in sorted(rows_ms.items()))
    return CloudFigures(n_layers, points, head_ms * factor, prefill_row_ms * factor)


def point(
    device: DeviceFigures,
    cloud: CloudFigures,
    link: LinkPlan,
    calibration: Sequence[Answer],
    exits: Sequence[ExitFigures],
) -> Point:
    """A point with those exits that the device's layers allow, and drafts, as they were on other answers."""
    able = tuple(one for one in exits if one.layer <= device.held and one.layer < device.n_layers)
    drafts: list[DraftFigures] = [draft_figures(calibration, 0, 0.0, LENGTHS)]
    drafts += [draft_figures(calibration, one.layer, device.drafted(one.layer), LENGTHS) for one in able]
    return Point(device, cloud, link, Figures(device, cloud, None, able, tuple(drafts), CODECS))


def fixed_modes(point: Point, wish: Wish) -> list[Candidate]:
    """Every way of working that the wish allows at a point."""
    from isthmus.edge.costs import Standing

    trip, up, down = point.link.rtt_ms, point.link.up_bps or 1e9, point.link.down_bps or 1e9
    link = LinkFigures(trip, trip, up, down, up, down)
    found = candidates(replace(point.figures, link=link), wish, Standing(100))
    return [one for one in found if not one.why_not]


def play_fixed(point: Point, choice: Candidate, window: Window) -> Outcome:
    """A window in one mode."""
    return _Game(point, window, None, choice).play()


def play_auto(point: Point, wish: Wish, window: Window) -> Outcome:
    """A window in the modes that the policy chooses."""
    return _Game(point, window, wish, None).play()


class _Game:
    def __init__(self, point: Point, window: Window, wish: Wish | None, choice: Candidate | None) -> None:
        self._point, self._window, self._wish, self._choice = point, window, wish, choice
        self._world = World()
        self._ways = point.link.ways(window.start_s)
        self._engine = Engine(self._world)
        self._used: dict[str, int] = {}
        self._switches = 0
        self._estimator = Estimator(point.figures) if wish is not None else None
        self._cuts = tuple(sorted({c.cut for c in fixed_modes(point, Wish("speed", 1.0)) if c.cut}))
        self._talk: Conversation
        self._player: Player | None = None
        self._rhythm, self._rest = Rhythm(), Rest(REST_S, MOST_REST_S)
        self._curious = self._fresh = False
        self._better: Plan | None = None  # than what is awaited in vain
        self._began = self._look = self._listened = 0  # this round, the next look at what is late, the last at the link
        self._end = math.inf
        self._foreseen = 0  # tokens of the answer that were held against n-grams

    def play(self) -> Outcome:
        self._greet(self._estimator or Estimator(self._point.figures))
        begin = self._world.now = max(self._world.now, round(self._window.lead_s * 1e9))
        self._end = begin + self._window.seconds * 1e9
        tokens = wrong = 0
        sight = Sight(self._estimator, self._impatient if self._wish is not None else None, heard_s=begin / 1e9)
        for answer in self._window.answers:
            if self._world.now >= self._end:
                break
            self._talk = Conversation(
                self._world,
                self._ways,
                self._engine,
                self._point.device,
                self._point.cloud,
                answer,
                sight,
            )
            self._player = None
            self._foreseen = 0
            if self._wish is not None:
                self._choice = None
                self._answer_auto()
            else:
                assert self._choice is not None
                self._player = player(self._talk, self._choice, self._point.figures)
                while self._talk.left and self._world.now < self._end:
                    self._round(self._player, self._choice)
            if self._player is not None:
                self._player.stop()
            tokens, wrong = tokens + self._talk.made, wrong + self._talk.wrong
        seconds = (self._world.now - begin) / 1e9
        return Outcome(seconds, tokens, wrong, self._engine.busy_ms, self._switches, self._used)

    def _greet(self, estimator: Estimator) -> None:
        """What opening a connection shows of the link."""
        up, down = self._ways
        at = 0
        for _ in range(GREETINGS):
            there = down.send(up.send(at, 150), 150)
            estimator.link.trip(there / 1e9, (there - at) / MS)
            at = there
        self._world.now = at

    def _answer_auto(self) -> None:
        talk, world = self._talk, self._world
        try:
            plan = self._decide(0.0)
            if self._curious and self._measured():
                plan = self._decide(0.0)
            self._take(plan)
        except DeviceError:  # then as when little is known
            self._take(Plan(Candidate("stream"), (), ""))
        while talk.left and world.now < self._end:
            if talk.made and self._rhythm.due(talk.now_s):
                self._listen()
                self._reconsider()
            assert self._player is not None and self._choice is not None
            try:
                self._round(self._player, self._choice)
            except GaveUp:
                assert self._better is not None
                self._rest.begin(talk.now_s)
                self._take(self._better)

    def _measured(self) -> bool:
        """As the controller: the uplink is measured before anything is chosen, once."""
        talk, estimator = self._talk, self._estimator
        assert estimator is not None
        figures = estimator.figures(talk.now_s)
        if not unseen(figures.link):
            return False
        began = self._world.now
        until = began + round(probe_s(figures) * 1e9)
        talk.listen(True, FIRST_BYTES)
        while unseen(estimator.link.figures(talk.now_s)) and self._world.now < until:
            self._world.wait(until)
            talk.take()
        if unseen(estimator.link.figures(talk.now_s)):
            assert figures.link is not None
            waited_ms = (self._world.now - began) / MS - figures.link.trip_ms
            estimator.link.moved("up", talk.now_s, FIRST_BYTES, max(waited_ms, 1.0))  # or longer
        return True

    def _round(self, player: Player, choice: Candidate) -> None:
        talk = self._talk
        made, self._began, self._look = talk.made, self._world.now, self._world.now
        player.round()
        tokens = talk.made - made
        self._used[choice.mode] = self._used.get(choice.mode, 0) + tokens
        if self._estimator is not None and not self._fresh and choice.mode != "stream":
            took = (self._world.now - self._began) / MS
            self._estimator.paced(choice.mode, talk.now_s, tokens * choice.formula_ms, took)
        self._fresh = False
        if choice.mode != "local":
            self._rest.end()
        if self._estimator is not None and choice.source != "ngram":
            self._foresee(self._estimator)

    def _foresee(self, estimator: Estimator) -> None:
        """What n-grams would have drafted of the tokens that have come: a device sees that for nothing."""
        answer = self._talk.answer
        while self._foreseen < self._talk.made:
            drafted = min(DRAFTED, answer.drafted[self._foreseen])
            taken = min(answer.taken(0, self._foreseen, drafted), drafted)
            if self._foreseen + taken >= self._talk.made:
                return
            estimator.block("ngram", 0, DRAFTED, drafted, taken)
            self._foreseen += taken + 1

    def _listen(self) -> None:
        """Hears what has come while the device was alone, and asks for a sign of life."""
        talk, now = self._talk, self._world.now
        if self._choice is not None and self._choice.mode == "local":
            while talk.take((now - self._listened) / MS) is not None:
                pass
        self._listened = now
        talk.beat()
        talk.listen(self._curious)

    def _reconsider(self) -> None:
        talk, estimator, choice = self._talk, self._estimator, self._choice
        assert estimator is not None and choice is not None
        known, sight = estimator.link.figures(talk.now_s), talk.sight
        try:
            plan = self._decide(sight.pulse.silent_ms(talk.now_s, sight.seen_s, known.trip_high_ms))
        except DeviceError:
            return
        if plan.choice.key == choice.key:
            self._choice = plan.choice
            if isinstance(self._player, Exit | Verify | Pipelined):
                self._player.choice = plan.choice  # whose drafts may be longer now, and whose questions fewer
        elif choice.mode != "local" or self._rest.over(talk.now_s):
            self._take(plan)
            return
        self._rhythm.stayed()

    def _decide(self, silent_ms: float) -> Plan:
        talk, estimator, wish = self._talk, self._estimator, self._wish
        assert estimator is not None and wish is not None
        self._rhythm.decided(talk.now_s)
        figures = estimator.figures(talk.now_s, max(0.0, silent_ms), talk.alive)
        standing = talk.standing(
            self._choice, self._cuts, expected(talk.made, max(1, self._window.max_tokens - talk.made))
        )
        plan = decide(figures, wish, standing)
        if talk.sight.pulse.probes(talk.now_s):
            begun = standing if standing.current is None else replace(standing, current=plan.choice)
            blind = bool(plan.choice.codec) and unseen(figures.link)
            self._curious = blind or (not plan.choice.codec and worth_probing(figures, wish, begun))
        return plan

    def _take(self, plan: Plan) -> None:
        if self._player is not None:
            self._switches += 1
            self._player.stop()
        self._choice, self._fresh = plan.choice, True
        self._player = player(self._talk, plan.choice, self._point.figures)
        self._rhythm.changed()

    def _impatient(self) -> int:
        """The device waits for the cloud: until when, at most."""
        talk, choice, now = self._talk, self._choice, self._world.now
        assert self._estimator is not None and choice is not None
        beat = talk.beat()
        if now < self._look:
            return min(self._look, beat)
        waited_ms = (now - self._began) / MS
        patience_ms = usual_ms(choice, self._estimator.figures(talk.now_s), self._fresh)
        if waited_ms < patience_ms:
            self._look = max(now + MS, self._began + math.ceil(patience_ms * MS))
            return min(self._look, beat)
        self._look = max(now + MS, round(next_look_s(talk.now_s, waited_ms) * 1e9))
        with suppress(DeviceError):
            plan = self._decide(waited_ms - patience_ms)
            if plan.choice.key != choice.key:
                self._better = plan
                raise GaveUp
        return min(self._look, beat)


def windows(answers: Sequence[Answer], starts_s: Sequence[float], each: int) -> list[Window]:
    """Windows that share out answers in turn."""
    return [
        Window(start, tuple(answers[(i * each + j) % len(answers)] for j in range(each)))
        for i, start in enumerate(starts_s)
    ]


def compare(point: Point, wish: Wish, played: Sequence[Window]) -> Iterator[tuple[str, list[Outcome]]]:
    """Every fixed mode at a point, then "auto"."""
    for choice in fixed_modes(point, wish):
        yield choice.name, [play_fixed(point, choice, window) for window in played]
    yield "auto", [play_auto(point, wish, window) for window in played]
