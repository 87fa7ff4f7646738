"""Plays answers on a virtual clock: in one fixed mode, or in auto, where the device's own policy decides.

Device and cloud take their measured times, each by its declared factor; the link delivers as its trace says; which
drafts and exits are right comes from recorded facts. Auto sees what a device could measure, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from isthmus.apps.bench.conversation import Conversation, GaveUp, Sight
from isthmus.apps.bench.facts import Answer, draft_figures, exit_figures
from isthmus.apps.bench.players import Player, player
from isthmus.apps.bench.shaping import MS
from isthmus.apps.bench.traces import Trace
from isthmus.apps.bench.virtual import Engine, Way, World
from isthmus.edge.costs import Candidate, candidates
from isthmus.edge.estimator import Estimator
from isthmus.edge.figures import CloudFigures, CodecFigures, DeviceFigures, DraftFigures, Figures, LinkFigures, Wish
from isthmus.edge.policy import decide, worth_probing

DECIDE_MS = 50.0  # between two decisions at least
PING_MS = 500.0  # of a link that is not otherwise measured
PROBE_MS = 2000.0  # between two measurements of a rate that would change the mode
GREETINGS = 4  # trips that opening a connection has shown before the first question
BULK = 9000  # bytes each way that it moves to see the link's rate
CODECS = (CodecFigures("f32", 2304, 0.0), CodecFigures("f16", 1152, 0.003), CodecFigures("coded", 384, 0.0))
LENGTHS = (1, 2, 3, 4, 6)
SHADOW = 4  # drafts that are held against what came while others draft


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
    """

    start_s: float
    answers: tuple[Answer, ...]
    lead_s: float = 0.0
    seconds: float = math.inf


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
    layers_ms: Mapping[int, float], head_ms: float, prefill_row_ms: float, *, slow: float, held: int
) -> DeviceFigures:
    """A device out of this machine's times, by a slow-down."""
    n_layers = max(layers_ms)
    points = tuple((k, ms * slow) for k, ms in sorted(layers_ms.items()))
    per_layer = min(layers_ms[k] for k in layers_ms)
    return DeviceFigures(held, n_layers, points, head_ms * slow, per_layer * slow, prefill_row_ms * slow)


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
    layers: Sequence[int],
    disagreement: float,
) -> Point:
    """A point with the exits and drafts that the device's layers allow, calibrated on other answers."""
    layers = [layer for layer in layers if layer <= device.held and layer < device.n_layers]
    exits = tuple(exit_figures(calibration, layer, disagreement) for layer in layers) if disagreement else ()
    drafts: list[DraftFigures] = [draft_figures(calibration, 0, 0.0, LENGTHS)]
    drafts += [draft_figures(calibration, layer, device.drafted(layer), LENGTHS) for layer in layers]
    return Point(device, cloud, link, Figures(device, cloud, None, exits, tuple(drafts), CODECS))


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
        self._decided = -(10**12)
        self._curious = False
        self._end = math.inf
        self._foreseen = 0  # tokens of the answer that were held against n-grams

    def play(self) -> Outcome:
        self._greet(self._estimator or Estimator(self._point.figures))
        begin = self._world.now = max(self._world.now, round(self._window.lead_s * 1e9))
        self._end = begin + self._window.seconds * 1e9
        tokens = wrong = 0
        sight = Sight(self._estimator, self._impatient if self._wish is not None else None)
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
        for size_up, size_down, way in ((BULK, 150, "up"), (150, BULK, "down")):
            there = down.send(up.send(at, size_up), size_down)
            trip = estimator.link.figures(there / 1e9).trip_ms
            estimator.link.moved("up" if way == "up" else "down", there / 1e9, BULK, max((there - at) / MS - trip, 1.0))
            at = there
        self._world.now = at

    def _answer_auto(self) -> None:
        talk, world = self._talk, self._world
        self._decided = -(10**12)
        while talk.left and world.now < self._end:
            if world.now - self._decided >= DECIDE_MS * MS:
                self._decide(0.0)
            assert self._player is not None and self._choice is not None
            try:
                self._round(self._player, self._choice)
            except GaveUp:
                continue
            if self._curious:
                talk.probe(PROBE_MS, BULK)
            talk.ping(PING_MS)
            while self._choice.mode == "local" and talk.take() is not None:
                pass

    def _round(self, player: Player, choice: Candidate) -> None:
        talk = self._talk
        made, begin, fresh = talk.made, self._world.now, choice.setup_ms > 0
        player.round()
        tokens = talk.made - made
        self._used[choice.mode] = self._used.get(choice.mode, 0) + tokens
        if self._estimator is not None and not fresh and choice.mode != "stream":
            took = (self._world.now - begin) / MS
            self._estimator.paced(choice.mode, talk.now_s, tokens * choice.ms_per_token, took)
        if self._estimator is not None and choice.source != "ngram":
            self._foresee(self._estimator)

    def _foresee(self, estimator: Estimator) -> None:
        """What n-grams would have drafted of the tokens that have come: a device sees that for nothing."""
        answer = self._talk.answer
        while self._foreseen < self._talk.made:
            drafted = min(SHADOW, answer.drafted[self._foreseen])
            taken = min(answer.taken(0, self._foreseen, drafted), drafted)
            if self._foreseen + taken >= self._talk.made:
                return
            estimator.block("ngram", 0, SHADOW, drafted, taken)
            self._foreseen += taken + 1

    def _decide(self, waited_ms: float) -> None:
        talk, estimator, world = self._talk, self._estimator, self._world
        assert estimator is not None and self._wish is not None
        self._decided = world.now
        known = estimator.link.figures(talk.now_s)
        silent = max(waited_ms, talk.silence(2 * known.trip_high_ms))
        figures = estimator.figures(talk.now_s, silent)
        plan = decide(figures, self._wish, talk.standing(self._choice, self._cuts, talk.left))
        if self._world.now - talk.sight.last_probe >= PROBE_MS * MS:
            self._curious = worth_probing(figures, self._wish, talk.standing(plan.choice, self._cuts, talk.left))
        if self._choice is None or plan.choice.key != self._choice.key:
            if self._player is not None:
                self._switches += 1
                self._player.stop()
            self._choice = plan.choice
            self._player = player(talk, plan.choice, self._point.figures)
        else:
            self._choice = plan.choice

    def _impatient(self, late_ms: float) -> None:
        before = self._player
        self._decide(late_ms)
        if self._player is not before:
            raise GaveUp


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
