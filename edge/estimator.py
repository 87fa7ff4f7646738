"""What a device learns while it works: observations in, figures out. No clock of its own, no I/O."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from isthmus.edge.figures import (
    CloudFigures,
    DeviceFigures,
    DraftFigures,
    DraftSource,
    ExitFigures,
    Figures,
    LinkFigures,
)

Direction = Literal["up", "down"]
SPAN_S = 20.0  # how long an observation of the link counts
TRIPS, MOVES = 48, 12  # observations kept at most
BETWEEN_MS = 50.0  # about what work takes between an answer and its next question
RECENT = 6  # trips that may make the link worse at once; to make it better takes the whole window
QUEUE_SPAN_S, QUEUED = 5.0, 9
START_BPS = 1e6  # of a link over which nothing was moved yet
BULK_BYTES = 3000  # fewer bytes tell of delay, not of rate
TRUST = 60.0  # tokens that a calibration counts like
HALF_LIFE = 120.0  # tokens after which an observed share counts half
PACE_WEIGHT, PACE_HALF_S, PACE_BOUND = 0.1, 15.0, 3.0


class Window:
    """The last observations of one quantity.

    Args:
        span_s: an older one is forgotten, unless it is the only one.
        most: observations at most.
    """

    def __init__(self, span_s: float, most: int) -> None:
        self._span_s = span_s
        self._seen: deque[tuple[float, float, float]] = deque(maxlen=most)

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, now_s: float, value: float, weight: float = 1.0) -> None:
        """Observes a value."""
        self._seen.append((now_s, value, weight))

    def worse(self, value: float, weight: float = 1.0) -> None:
        """Observes the same as last time once more: the larger value counts."""
        at, last, before = self._seen.pop()
        self._seen.append((at, value, weight) if value > last else (at, last, before))

    @property
    def last_s(self) -> float:
        """When something was last seen."""
        return self._seen[-1][0] if self._seen else float("-inf")

    def values(self, now_s: float) -> list[float]:
        """What counts now, the oldest first."""
        while len(self._seen) > 1 and self._seen[0][0] < now_s - self._span_s:
            self._seen.popleft()
        return [value for _, value, _ in self._seen]

    @property
    def weights(self) -> list[float]:
        """Of what `values` last gave."""
        return [weight for _, _, weight in self._seen]


class Share:
    """A share by counting, with a Beta prior out of calibration and a memory that fades.

    Args:
        prior: the calibrated share.
        trust: observations that it counts like.
    """

    def __init__(self, prior: float, trust: float = TRUST, half_life: float = HALF_LIFE) -> None:
        self._prior, self._trust = prior, trust
        self._fade = 0.5 ** (1.0 / half_life)
        self._hits = self._count = 0.0

    def saw(self, hits: float, count: float) -> None:
        """Counts hits among so many."""
        fade = self._fade**count
        self._hits, self._count = self._hits * fade + hits, self._count * fade + count

    @property
    def value(self) -> float:
        """The mean of the posterior."""
        return (self._prior * self._trust + self._hits) / (self._trust + self._count)


class LinkEstimator:
    """The link out of trips and transfers: what grows worse counts at once, what grows better has to last.

    Args:
        trip_ms: what the first greeting took.
        rate_bps: what to think of the rate before anything was moved.
    """

    def __init__(self, trip_ms: float, rate_bps: float = START_BPS) -> None:
        self._first_ms, self._rate_bps = trip_ms, rate_bps
        self._trips = Window(SPAN_S, TRIPS)
        self._moved = {"up": Window(SPAN_S, MOVES), "down": Window(SPAN_S, MOVES)}

    def trip(self, now_s: float, ms: float, *, idle_s: float = 0.0) -> None:
        """A question of one segment was answered; `ms` without the cloud's own time.

        Args:
            idle_s: for how long nothing was asked before it. It then stands for all the questions that work would have
                asked in that time and its own, of which a slow link delays few.
        """
        ms = max(0.0, ms)
        weight = max(1.0, (idle_s * 1e3 + ms) / (ms + BETWEEN_MS))
        if now_s - ms * 1e-3 < self._trips.last_s - 1e-3:
            self._trips.worse(ms, weight)  # was under way when the last one came: the same moment of the link
        else:
            self._trips.add(now_s, ms, weight)

    def moved(self, way: Direction, now_s: float, size: float, ms: float) -> None:
        """Bytes that came through in a time that no trip is part of; a few of them say nothing."""
        if size >= BULK_BYTES and ms > 0:
            self._moved[way].add(now_s, size * 8e3 / ms)

    def figures(self, now_s: float, silent_ms: float = 0.0, up: bool = True) -> LinkFigures:
        """The link as it seems now."""
        trips, weights = self._trips.values(now_s), self._trips.weights
        if not trips:
            trips, weights = [self._first_ms], [1.0]
        trip = max(quantile(trips, 0.5, weights), statistics.median(trips[-RECENT:]))
        rates = {way: self._rates(window.values(now_s)) for way, window in self._moved.items()}
        return LinkFigures(
            trip,
            max(trip, quantile(trips, 0.9, weights)),
            rates["up"][0],
            rates["down"][0],
            rates["up"][1],
            rates["down"][1],
            silent_ms,
            up,
            min(now_s - self._moved["up"].last_s, 1e6),
        )

    def _rates(self, seen: list[float]) -> tuple[float, float]:
        if not seen:
            return self._rate_bps, self._rate_bps
        median = min(statistics.median(seen), statistics.median(seen[-RECENT:]))
        return median, min(median, quantile(seen, 0.1))


@dataclass(slots=True)
class _Pace:
    factor: float = 1.0
    seen_s: float = 0.0

    def at(self, now_s: float) -> float:
        """The factor, which a mode out of use loses with time."""
        kept: float = 0.5 ** (max(0.0, now_s - self.seen_s) / PACE_HALF_S)
        return float(self.factor**kept)


class Estimator:
    """All figures of one device: calibrated ones that observations correct.

    Args:
        known: what was measured before, and what the cloud declares.

    Attributes:
        known: the same; what corrections are made to.
    """

    def __init__(self, known: Figures, trip_ms: float = 0.0) -> None:
        self.known = known
        self.link = LinkEstimator(trip_ms)
        self._device = self._cloud = 1.0
        self._queued = Window(QUEUE_SPAN_S, QUEUED)
        # Questions over those expected: a share of tokens would not carry over to another link.
        self._asked = {(one.layer, one.threshold): Share(1.0, TRUST / 2) for one in known.exits}
        self._accepted = {(one.source, one.layer): Share(one.accepted) for one in known.drafts}
        self._expected = {
            (one.source, one.layer, g): tokens - 1.0 for one in known.drafts for g, tokens in one.tokens_a_round
        }
        # Tokens taken over those expected, for all lengths at once: else one that is not in use would seem better.
        self._luck = {(one.source, one.layer): Share(1.0, TRUST / 2) for one in known.drafts}
        self._pace: dict[str, _Pace] = {}

    def knows(self, device: DeviceFigures, cloud: CloudFigures | None = None, small_ms: float | None = None) -> None:
        """Takes times that were measured since in place of those known before."""

        def draft_ms(one: DraftFigures) -> float:
            small = small_ms if one.source == "model" else None
            return device.drafted(one.layer) if one.layer else one.draft_ms if small is None else small

        drafts = tuple(replace(one, draft_ms=draft_ms(one)) for one in self.known.drafts)
        self.known = replace(self.known, device=device, cloud=cloud or self.known.cloud, drafts=drafts)

    def device_step(self, expected_ms: float, ms: float) -> None:
        """A step of this device that the `known` figures put at `expected_ms`."""
        self._device = _drawn(self._device, expected_ms, ms)

    def cloud_step(self, expected_ms: float, ms: float) -> None:
        """A step of the cloud, as it says itself and without its queue, that `known` puts at `expected_ms`."""
        self._cloud = _drawn(self._cloud, expected_ms, ms)

    def queued(self, now_s: float, ms: float) -> None:
        """How long work waited in the cloud before it began."""
        self._queued.add(now_s, ms)

    def exit(self, layer: int, threshold: float, asked: int, expected: float) -> None:
        """A token of exit mode has come, after so many questions; these figures `expected` so many for a token."""
        share = self._asked[layer, threshold]
        share.saw(asked, expected / share.value)

    def block(self, source: DraftSource, layer: int, g: int, drafted: int, taken: int) -> None:
        """A block of up to g drafts was checked: so many were drafted, so many taken."""
        self._accepted[source, layer].saw(taken, taken + (taken < drafted))
        expected = self._expected.get((source, layer, g), 0.0)
        if expected > 0:
            self._luck[source, layer].saw(taken, expected)

    def paced(self, mode: str, now_s: float, formula_ms: float, ms: float) -> None:
        """Tokens of a mode came, which its formula, without a pace, puts at `formula_ms` together."""
        pace = self._pace.setdefault(mode, _Pace(seen_s=now_s))
        ratio = min(PACE_BOUND, max(1 / PACE_BOUND, ms / max(formula_ms, 1e-3)))
        pace.factor = pace.at(now_s) ** (1 - PACE_WEIGHT) * ratio**PACE_WEIGHT
        pace.seen_s = now_s

    def figures(self, now_s: float, silent_ms: float = 0.0, up: bool = True) -> Figures:
        """What to decide on now."""
        known = self.known
        queued = self._queued.values(now_s)
        queue_ms = statistics.median(queued) if queued else known.cloud.queue_ms if known.cloud else 0.0
        return replace(
            known,
            device=_slower_device(known.device, self._device),
            cloud=known.cloud and replace(_slower_cloud(known.cloud, self._cloud), queue_ms=queue_ms),
            link=self.link.figures(now_s, silent_ms, up) if known.cloud else None,
            exits=tuple(self._exit(one) for one in known.exits),
            drafts=tuple(self._drafts(one) for one in known.drafts),
            pace=tuple((mode, pace.at(now_s)) for mode, pace in self._pace.items()),
        )

    def _exit(self, one: ExitFigures) -> ExitFigures:
        more = self._asked[one.layer, one.threshold].value
        return replace(one, unsure=min(1.0, one.unsure * more), guessed=min(1.0, one.guessed * more))

    def _drafts(self, one: DraftFigures) -> DraftFigures:
        luck = self._luck[one.source, one.layer].value
        rounds = tuple((g, min(g + 1.0, 1.0 + (tokens - 1.0) * luck)) for g, tokens in one.tokens_a_round)
        return replace(
            one,
            accepted=self._accepted[one.source, one.layer].value,
            tokens_a_round=rounds,
            draft_ms=one.draft_ms * self._device,
        )


def quantile(values: list[float], share: float, weights: list[float] | None = None) -> float:
    """The value below which that share lies, linear between the two nearest.

    Args:
        weights: of each, from 0 on; all the same by default.
    """
    order = sorted(zip(values, [1.0] * len(values) if weights is None else weights, strict=True))
    first, last = order[0], order[-1]
    at = share * (sum(weight for _, weight in order) - (first[1] + last[1]) / 2)  # from the middle of the first
    for (low, before), (high, after) in pairwise(order):
        step = (before + after) / 2
        if at <= step:
            return low + (high - low) * at / step if step else low
        at -= step
    return last[0]


def _drawn(factor: float, expected_ms: float, ms: float) -> float:
    return factor if expected_ms <= 0 else factor + 0.1 * (ms / expected_ms - factor)


def _slower_device(known: DeviceFigures, factor: float) -> DeviceFigures:
    if factor == 1.0:
        return known
    return replace(
        known,
        layers_ms=tuple((k, ms * factor) for k, ms in known.layers_ms),
        head_ms=known.head_ms * factor,
        exit_ms=known.exit_ms * factor,
        exits_ms=tuple((layer, ms * factor) for layer, ms in known.exits_ms),
        prefill_row_ms=known.prefill_row_ms * factor,
        codec_ms=known.codec_ms * factor,
    )


def _slower_cloud(known: CloudFigures, factor: float) -> CloudFigures:
    if factor == 1.0:
        return known
    return replace(
        known,
        rows_ms=tuple((n, ms * factor) for n, ms in known.rows_ms),
        head_ms=known.head_ms * factor,
        prefill_row_ms=known.prefill_row_ms * factor,
    )
