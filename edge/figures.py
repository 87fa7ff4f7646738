"""What is known when a mode is chosen: device, cloud, link, exits, drafts, and what the user wishes. Plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from isthmus.edge.pace import LIKELY
from isthmus.protocol.errors import DeviceError

Prefer = Literal["speed", "cloud-cost", "privacy"]
DraftSource = Literal["ngram", "exit", "model"]
PREFERENCES: tuple[Prefer, ...] = ("speed", "cloud-cost", "privacy")
RATE_TRUST = 0.5  # of a rate that was seen
SEGMENT_BYTES = 1500.0  # what a trip carries without taking longer
IN_VAIN = 2.0  # guesses that an exit makes in vain for each that spares a question
DRAFT_SOURCES: tuple[DraftSource, ...] = ("ngram", "exit", "model")
Points = tuple[tuple[int, float], ...]  # (count, value), counts ascending


class Waits(NamedTuple):
    """What a device waits for experts that are not in its memory, through the whole model.

    Attributes:
        token_ms: one token.
        prompt_ms: (rows, ms) of prompts of so many rows, ascending; what is longer goes in chunks of the last.
    """

    token_ms: float = 0.0
    prompt_ms: Points = ()

    def prompt(self, rows: float) -> float:
        """Many rows, in ms."""
        if not self.prompt_ms or rows <= 0:
            return 0.0
        most, ms = self.prompt_ms[-1]
        chunks, left = divmod(rows, most)
        return chunks * ms + (between(self.prompt_ms, left) if left else 0.0)


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """Times of this device, its slow-down included.

    Attributes:
        held: leading layers that it can run.
        n_layers: layers of the model.
        layers_ms: (k, ms) of one token through layers [0, k), ascending.
        head_ms: of the output head for one row.
        exit_ms: of an exit's own layer for one row, without the output head.
        prefill_row_ms: of one of many rows through the whole model.
        codec_ms: of coding one row of hidden states.
        exits_ms: (layer, ms) of the exit before it for one row, its output head included, where it is known.
        waits: for experts, which the other times leave out.
        failed: why none of its layers can be used after all.
    """

    held: int
    n_layers: int
    layers_ms: Points
    head_ms: float
    exit_ms: float
    prefill_row_ms: float
    codec_ms: float = 0.0
    exits_ms: Points = ()
    waits: Waits = Waits()  # noqa: RUF009
    failed: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.held <= self.n_layers:
            raise DeviceError(f"a device holds {self.held} of {self.n_layers} layers", "give 0 to all")
        _check_points(self.layers_ms, "layers_ms")
        _check_times(self, "head_ms", "exit_ms", "prefill_row_ms", "codec_ms")
        _check_times(self.waits, "token_ms")
        if self.waits.prompt_ms:
            _check_points(self.waits.prompt_ms, "prompt_ms")

    @property
    def whole(self) -> bool:
        """Whether it can run every layer."""
        return self.held == self.n_layers

    @property
    def token_ms(self) -> float:
        """One token through the whole model."""
        return self.through(self.n_layers) + self.head_ms

    def through(self, layer: int) -> float:
        """One token through layers [0, layer), in ms."""
        return between(self.layers_ms, layer) + self.waits.token_ms * layer / self.n_layers

    def drafted(self, layer: int) -> float:
        """One token through layers [0, layer) and the exit there, in ms."""
        return self.through(layer) + dict(self.exits_ms).get(layer, self.exit_ms + self.head_ms)

    def prefill(self, rows: float, layer: int) -> float:
        """Many rows through layers [0, layer), without logits, in ms."""
        return (rows * self.prefill_row_ms + self.waits.prompt(rows)) * layer / self.n_layers


@dataclass(frozen=True, slots=True)
class CloudFigures:
    """Times of the cloud, its declared factor included.

    Attributes:
        n_layers: layers of its model.
        rows_ms: (n, ms) of one step of n rows of one sequence through the whole model, ascending.
        head_ms: of the output head for one row.
        prefill_row_ms: of one of many rows through the whole model.
        queue_ms: that work waits before it starts.
        rests_ms: (k, ms) of one row through layers [k, n_layers) and the head, ascending in k, where that was measured:
            it is less than its share of a whole step where weights stay in caches.
        same_model: whether its model is the device's, so that an answer of either is an answer of both.
    """

    n_layers: int
    rows_ms: Points
    head_ms: float
    prefill_row_ms: float
    queue_ms: float = 0.0
    same_model: bool = True
    rests_ms: Points = ()

    def __post_init__(self) -> None:
        _check_points(self.rows_ms, "rows_ms")
        _check_times(self, "head_ms", "prefill_row_ms", "queue_ms")
        if self.rests_ms:
            _check_points(self.rests_ms, "rests_ms")

    def step(self, rows: int) -> float:
        """The whole model for rows that all want logits, without the queue, in ms."""
        last, ms = self.rows_ms[-1]
        if rows > last:
            return ms + (rows - last) * (self.prefill_row_ms + self.head_ms)
        return between(self.rows_ms, rows)

    def rest(self, layer: int, rows: float = 1) -> float:
        """Layers [layer, n_layers) for rows of which the last wants logits, without the queue, in ms."""
        share = 1.0 - layer / self.n_layers
        last, ms = self.rows_ms[-1]
        body = between(self.rows_ms, min(rows, last)) if rows <= last else ms
        more = max(0, rows - last) * self.prefill_row_ms
        if not self.rests_ms:
            return (max(0.0, body - self.head_ms) + more) * share + self.head_ms
        one = self.rows_ms[0][1]
        head = min(self.head_ms, self.rests_ms[-1][1])
        points = ((0, one), *self.rests_ms, (self.n_layers, head))
        return between(points, layer) + (max(0.0, body - one) + more) * share

    def prefill(self, rows: float, layer: int = 0) -> float:
        """Many rows through layers [layer, n_layers), without logits, in ms."""
        return rows * self.prefill_row_ms * (1.0 - layer / self.n_layers)


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """The link as it was found, for messages of one segment.

    Attributes:
        trip_ms: median of a question's way up and its answer's way down, the cloud's own time not included.
        trip_high_ms: its 90 % quantile.
        up_bps, down_bps: rates in bit/s, medians.
        up_low_bps, down_low_bps: their 10 % quantiles.
        silent_ms: since something was due from the cloud that has not come; 0 while nothing is late.
        up: whether the cloud can be spoken to.
        up_age_s: since the uplink's rate was last seen.
        carried_bytes: of a question that `trip_ms` holds for.
        trust: the share of a rate that counts where many bytes are still to go.
    """

    trip_ms: float
    trip_high_ms: float
    up_bps: float
    down_bps: float
    up_low_bps: float
    down_low_bps: float
    silent_ms: float = 0.0
    up: bool = True
    up_age_s: float = 0.0
    carried_bytes: float = SEGMENT_BYTES
    trust: float = RATE_TRUST

    def __post_init__(self) -> None:
        _check_times(self, "trip_ms", "trip_high_ms", "silent_ms", "carried_bytes")
        for name in ("up_bps", "down_bps", "up_low_bps", "down_low_bps"):
            if not (math.isfinite(rate := getattr(self, name)) and rate > 0):
                raise DeviceError(f"{name} is {rate}", "give a rate above 0")

    @property
    def expected_trip_ms(self) -> float:
        """The mean of a two-point law: the high quantile stands for the fifth of all trips around and above it."""
        return 0.8 * self.trip_ms + 0.2 * max(self.trip_ms, self.trip_high_ms)


class Expected(NamedTuple):
    """Of exit mode over one link, for each token.

    Attributes:
        asked: questions to the cloud.
        steps: of the device, beside which nothing else is waited for.
    """

    asked: float
    steps: float


@dataclass(frozen=True, slots=True)
class ExitFigures:
    """An exit, and what is promised of it.

    Attributes:
        layer: it stands before this layer.
        threshold: confidence from which on it may emit.
        unsure: share of tokens that it is not sure of.
        guessed: share of tokens that it guesses right all the same, and goes on from, where guesses cost nothing.
        disagreement: certified bound on the share of tokens that differ from the whole model's.
        row_bytes: of one row of hidden states, as they travel from before it.
        expected: None for what these shares tell.
    """

    layer: int
    threshold: float
    unsure: float
    guessed: float
    disagreement: float
    row_bytes: float
    expected: Expected | None = None

    def __post_init__(self) -> None:
        _check_shares(self, "unsure", "guessed", "disagreement")

    def asked(self, even: float) -> float:
        """Questions to the cloud for each token: where it is not sure, and makes no guess that is right either.

        Args:
            even: the probability from which on a guess pays; one that it is not sure of lies below its threshold.
        """
        if self.expected is not None:
            return self.expected.asked
        made = (self.threshold - max(even, LIKELY)) / max(self.threshold - LIKELY, 1e-3)
        return max(0.0, self.unsure - self.guessed * max(0.0, made))

    def steps(self, asked: float) -> float:
        """Steps of the device for each token, guesses in vain included, beside which nothing else is waited for.

        Args:
            asked: questions for each token.
        """
        return self.expected.steps if self.expected is not None else 1.0 + IN_VAIN * (self.unsure - asked)


@dataclass(frozen=True, slots=True)
class DraftFigures:
    """Drafts of one source, as the cloud takes them.

    Attributes:
        source: "ngram", "exit" or "model".
        layer: the exit that drafts; 0 for others.
        draft_ms: of one drafted token on this device.
        accepted: share of drafted tokens that the cloud takes where all before it were taken.
        tokens_a_round: (g, tokens) that a round of g drafted tokens yields, the cloud's own included, ascending.
        rows_a_round: (g, rows) that it costs the cloud, as a source may draft fewer than g.
        row_ms: of one row of a prompt that a small model has not seen.
    """

    source: DraftSource
    layer: int
    draft_ms: float
    accepted: float
    tokens_a_round: Points
    rows_a_round: Points
    row_ms: float = 0.0

    def __post_init__(self) -> None:
        if self.source not in DRAFT_SOURCES:
            raise DeviceError(f"the source of drafts is {self.source!r}", f"choose one of {', '.join(DRAFT_SOURCES)}")
        _check_times(self, "draft_ms", "row_ms")
        _check_shares(self, "accepted")
        _check_points(self.tokens_a_round, "tokens_a_round")
        _check_points(self.rows_a_round, "rows_a_round")


@dataclass(frozen=True, slots=True)
class CodecFigures:
    """How hidden states travel.

    Attributes:
        name: the codec.
        row_bytes: of one row.
        disagreement: measured share of tokens that differ from the whole model's; 0 for an exact one.
    """

    name: str
    row_bytes: float
    disagreement: float

    def __post_init__(self) -> None:
        _check_shares(self, "disagreement")


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user wants.

    Attributes:
        prefer: "speed"; "cloud-cost", the fewest of the cloud's seconds that are not much slower; or "privacy", which
            means local and nothing sent.
        max_disagreement: share of tokens that exits may decide otherwise than the cloud's model; 0 asks for its very
            text.
        own: the device while it waits for experts for less than a round trip takes.
    """

    prefer: Prefer = "speed"
    max_disagreement: float = 0.0
    own: bool = False

    def __post_init__(self) -> None:
        if self.prefer not in PREFERENCES:
            raise DeviceError(f"prefer is {self.prefer!r}", f"choose one of {', '.join(PREFERENCES)}")
        _check_shares(self, "max_disagreement")


@dataclass(frozen=True, slots=True)
class Figures:
    """All that a choice depends on but the wish and how far an answer is.

    Attributes:
        cloud, link: None without a cloud.
        pace: (mode, factor) by which a mode lately took longer than its formula said.
    """

    device: DeviceFigures
    cloud: CloudFigures | None = None
    link: LinkFigures | None = None
    exits: tuple[ExitFigures, ...] = ()
    drafts: tuple[DraftFigures, ...] = ()
    codecs: tuple[CodecFigures, ...] = ()
    pace: tuple[tuple[str, float], ...] = ()


def between(points: Points, count: float) -> float:
    """The value at a count, linear between points, on through the last two beyond them and through 0 below them."""
    if len(points) == 1 or count <= points[0][0]:
        first, value = points[0]
        return value * count / first if count < first else value
    for (a, low), (b, high) in pairwise(points):
        if count <= b or b == points[-1][0]:
            return low + (high - low) * (count - a) / (b - a)
    raise AssertionError("the last two points reach everywhere")


def round_of(accepted: float, drafted: int) -> float:
    """Tokens of a verified round, (1 - a^(g + 1)) / (1 - a) (Leviathan et al., 2211.17192)."""
    return drafted + 1.0 if accepted >= 1.0 else (1.0 - accepted ** (drafted + 1)) / (1.0 - accepted)


def _check_points(points: Points, name: str) -> None:
    counts = [count for count, _ in points]
    if not counts or counts[0] < 1 or any(b <= a for a, b in pairwise(counts)):
        raise DeviceError(f"{name} has the counts {counts}", "give one or more, from 1 on, in order")
    if not all(math.isfinite(value) and value >= 0 for _, value in points):
        raise DeviceError(f"{name} is {points}", "give numbers from 0 on")


def _check_times(figures: object, *names: str) -> None:
    for name in names:
        if not (math.isfinite(value := getattr(figures, name)) and value >= 0):
            raise DeviceError(f"{name} is {value}", "give milliseconds from 0 on")


def _check_shares(figures: object, *names: str) -> None:
    for name in names:
        if not 0 <= (value := getattr(figures, name)) <= 1:
            raise DeviceError(f"{name} is {value}", "give a share from 0 to 1")
