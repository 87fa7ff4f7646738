"""What each way of working would cost from here on: the published formulas over measured figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from isthmus.edge.figures import (
    CloudFigures,
    CodecFigures,
    DraftFigures,
    ExitFigures,
    Figures,
    LinkFigures,
    Points,
    Wish,
    between,
)
from isthmus.edge.pace import even

CODED = "coded"  # exit mode's own codec, another one for each exit
Way = Literal["local", "stream", "split", "exit", "verify"]
MESSAGE_BYTES = 100  # of framing, encryption and envelope around each message
TOKEN_BYTES = 3  # of a token's id among others
NEWS_BYTES = 35  # of one streamed token
ANSWER_BYTES = 40
FRESH_S, FADE_S, STALE_BPS = 3.0, 5.0, 5e5  # a rate that was seen longer ago fades by halves, down to here
DEPTH = 8  # blocks of drafts under way at most


@dataclass(frozen=True, slots=True)
class Standing:
    """How far an answer is, and what each side would have to compute again.

    Attributes:
        remaining: tokens that are still expected, 1 or more.
        device_missing: (k, rows) whose KV of layers [0, k) the device lacks.
        cloud_missing: rows whose KV the cloud lacks, if it computes from tokens.
        hidden_missing: (cut, rows) that the cloud lacks behind a cut, if it computes from hidden states as they are.
        exit_missing: the same of states as they travel in exit mode; None where that makes no difference.
        current: what is in use, None at the beginning.
        greedy: whether the most likely token is taken, which is what exits are certified for.
        small_missing: rows that a small model that drafts has not seen.
    """

    remaining: int
    device_missing: Points = ()
    cloud_missing: int = 0
    hidden_missing: Points = ()
    current: Candidate | None = None
    greedy: bool = True
    small_missing: float = 0.0
    exit_missing: Points | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way of working, with its settings and its price.

    Attributes:
        mode: the way.
        cut: layers on the device in split and exit mode, and of an exit that drafts; 0 otherwise.
        codec: of hidden states, empty where none travel.
        threshold: confidence from which on an exit emits.
        asked: questions that are expected for each of its tokens.
        source: of drafts, empty where none are made.
        draft_tokens: of one block.
        depth: blocks under way at most.
        ms_per_token: expected.
        setup_ms: expected before the first token, if this is begun now.
        total_ms: for all tokens that remain.
        cloud_ms: of the cloud's engine for each token.
        why_not: why it may not be chosen, empty when it may.
        pace: the factor in `ms_per_token` by which this mode lately took longer than its formula says.
        waits_ms, setup_waits_ms: of a token's time and of the beginning's, what this device waits for experts in local
            mode.
    """

    mode: Way
    cut: int = 0
    codec: str = ""
    threshold: float = 0.0
    asked: float = 0.0
    source: str = ""
    draft_tokens: int = 0
    depth: int = 1
    ms_per_token: float = 0.0
    setup_ms: float = 0.0
    total_ms: float = 0.0
    cloud_ms: float = 0.0
    why_not: str = ""
    pace: float = 1.0
    waits_ms: float = 0.0
    setup_waits_ms: float = 0.0

    @property
    def formula_ms(self) -> float:
        """What a token takes by the formula alone."""
        return self.ms_per_token / self.pace

    @property
    def key(self) -> tuple[str, int, str, str, bool]:
        """What makes it another way of working; a threshold, or the length of drafts, may change on the way."""
        return self.mode, self.cut, self.codec, self.source, self.depth > 1

    @property
    def name(self) -> str:
        """For people: "exit 20 coded at 0.56", "verify ngram x4 pipelined"."""
        parts = [self.mode, self.source, str(self.cut or ""), self.codec]
        if self.mode == "exit":
            parts.append(f"at {self.threshold:.3g}")
        if self.mode == "verify":
            parts.append(f"x{self.draft_tokens}")
        return " ".join([part for part in parts if part] + ["pipelined"] * (self.depth > 1))


def candidates(figures: Figures, wish: Wish, standing: Standing) -> list[Candidate]:
    """Every way that these figures know of, priced, those that may not be chosen included.

    With k the cut, R the trip, q the questions for each token of an exit that is not always sure
    (`ExitFigures.asked`), n the device's steps for each, guesses in vain included (`steps`), a the share of drafts that
    is taken, E the tokens of a round:

        local       t_device
        stream      max(t_cloud, bytes / downlink)
        split       t(k) + codec + R + t_rest(k)
        exit        max(n t + q (R + t_rest(k, 1 / q rows)), bytes / uplink), t = t(k) + t_exit + codec
        verify      (g t_d + a^g t_row + R + t_v(rows)) / E
        pipelined   a max(t_d, t_v(g) / g, bytes / uplink) + (1 - a) (R + t_v(g) + t_d (g + 2) / 2)

    The first three and the synchronous round are those of CE-CoLLM (2411.02829) and speculative decoding (2211.17192);
    where all drafts are taken, the device has a row t_row more to compute. In a pipe a mismatch lies in the middle of
    its block in the mean, so half a block is drafted before it is sent, and its answer comes in the middle of a draft.
    """
    pace = dict(figures.pace)
    found = [_local(figures, wish, standing, pace.get("local", 1.0))]
    if figures.cloud is not None and figures.link is not None:
        found += _Priced(figures, figures.cloud, figures.link, wish, standing, pace).all()
    return found


def _local(figures: Figures, wish: Wish, standing: Standing, pace: float) -> Candidate:
    device, cloud, link = figures.device, figures.cloud, figures.link
    rows = _missing(standing.device_missing, device.n_layers)
    current = standing.current is not None and standing.current.mode == "local"
    setup = 0.0 if current else device.prefill(max(0.0, rows - 1), device.n_layers)
    ms = pace * device.token_ms
    why_not = ""
    if not device.whole:
        why_not = device.failed or f"the device holds {device.held} of {device.n_layers} layers"
    elif wish.prefer != "privacy" and cloud is not None and link is not None and link.up:
        why_not = "" if cloud.same_model or wish.max_disagreement >= 1 else "the cloud's model is another one"
    total = setup + ms * max(1, standing.remaining)
    found = Candidate("local", ms_per_token=ms, setup_ms=setup, total_ms=total, why_not=why_not, pace=pace)
    setup_waits = 0.0 if current else device.waits.prompt(rows - 1)
    return replace(found, waits_ms=device.waits.token_ms, setup_waits_ms=setup_waits)


class _Priced:
    """Ways that need the cloud, priced."""

    def __init__(
        self,
        figures: Figures,
        cloud: CloudFigures,
        link: LinkFigures,
        wish: Wish,
        standing: Standing,
        pace: Mapping[str, float],
    ) -> None:
        self._figures, self._device, self._cloud, self._link = figures, figures.device, cloud, link
        self._wish, self._standing, self._pace = wish, standing, pace
        self._current = standing.current.key if standing.current is not None else None
        self._trip_ms = link.expected_trip_ms + cloud.queue_ms
        rows = standing.cloud_missing
        self._tokens_ms = rows * TOKEN_BYTES * 8e3 / link.up_bps + cloud.prefill(max(0, rows - 1))
        self._never = ""
        if wish.prefer == "privacy":
            self._never = "nothing may be sent"
        elif not link.up:
            self._never = "the cloud does not answer"

    def all(self) -> Iterator[Candidate]:
        figures, device = self._figures, self._device
        yield self.stream()
        for cut in sorted({exit.layer for exit in figures.exits} | {device.held}):
            if 0 < cut < device.n_layers:
                yield from (self.split(cut, codec) for codec in figures.codecs)
        yield from (self.exit(one) for one in figures.exits)
        for drafts in figures.drafts:
            setup = self._draft_ms(drafts)
            for g, tokens in drafts.tokens_a_round:
                yield self.verify(drafts, g, tokens, setup)
                if drafts.source != "ngram":
                    yield self.pipelined(drafts, g, setup)

    def stream(self) -> Candidate:
        on_wire = (NEWS_BYTES + MESSAGE_BYTES) * 8e3 / self._link.down_low_bps
        step = self._cloud.step(1)
        setup = self._tokens_ms + self._link.expected_trip_ms
        return self._priced("stream", max(step + self._cloud.queue_ms, on_wire), step, setup)

    def split(self, cut: int, codec: CodecFigures) -> Candidate:
        rest = self._cloud.rest(cut)
        ms = self._device.through(cut) + self._device.codec_ms + self._trip(codec.row_bytes) + rest
        setup = self._hidden_ms(cut, codec.row_bytes, self._standing.hidden_missing)
        return self._priced("split", ms, rest, setup, cut, codec.name, lost=codec.disagreement)

    def exit(self, one: ExitFigures) -> Candidate:
        step, trip = self._device.drafted(one.layer) + self._device.codec_ms, self._trip(one.row_bytes)
        once = self._cloud.rest(one.layer)
        asked = one.asked(even(step, once, trip + once))
        rest = self._cloud.rest(one.layer, 1.0 / max(asked, 1e-2))
        chain = one.steps(asked) * step + asked * (trip + rest)
        on_wire = (one.row_bytes + MESSAGE_BYTES) * 8e3 / self._link.up_bps
        missing = self._standing.hidden_missing if self._standing.exit_missing is None else self._standing.exit_missing
        setup, ms = self._hidden_ms(one.layer, one.row_bytes, missing), max(chain, on_wire)
        return self._priced(
            "exit",
            ms,
            asked * rest,
            setup,
            one.layer,
            CODED,
            threshold=one.threshold,
            asked=asked,
            lost=one.disagreement,
            why_not="" if self._standing.greedy else "its certificate holds for greedy answers",
        )

    def verify(self, drafts: DraftFigures, g: int, tokens: float, setup: float) -> Candidate:
        tokens = max(1.0, tokens)
        check = self._check(between(drafts.rows_a_round, g))
        more = drafts.accepted**g * self._device.prefill(1, drafts.layer)
        ms = (g * drafts.draft_ms + more + self._trip(TOKEN_BYTES * g) + check) / tokens
        return self._priced("verify", ms, check / tokens, setup, drafts.layer, source=drafts.source, drafted=g)

    def pipelined(self, drafts: DraftFigures, g: int, setup: float) -> Candidate:
        a, draft, check = drafts.accepted, drafts.draft_ms, self._check(g)
        on_wire = (TOKEN_BYTES * g + MESSAGE_BYTES) * 8e3 / self._link.up_bps
        each = max(draft, check / g, on_wire / g)  # of a pipe that never stands still: the slowest one's
        ms = a * each + (1 - a) * (self._trip(TOKEN_BYTES * g) + check + draft * (g + 2) / 2)
        return self._priced(
            "verify",
            ms,
            check * (a / g + (1 - a)),
            setup,
            drafts.layer,
            source=drafts.source,
            drafted=g,
            depth=DEPTH,
        )

    def _priced(
        self,
        mode: Way,
        ms: float,
        cloud_ms: float,
        setup: float,
        cut: int = 0,
        codec: str = "",
        *,
        threshold: float = 0.0,
        asked: float = 0.0,
        source: str = "",
        drafted: int = 0,
        depth: int = 1,
        lost: float = 0.0,
        why_not: str = "",
    ) -> Candidate:
        if self._current == (mode, cut, codec, source, depth > 1):
            setup = 0.0
        setup += self._link.silent_ms  # what has lasted so long lasts as long again
        pace = self._pace.get(mode, 1.0)
        ms *= pace
        total = setup + ms * max(1, self._standing.remaining)
        why_not = self._never or self._why_not(mode, cut, lost) or why_not
        settings = (cut, codec, threshold, asked, source, drafted, depth)
        return Candidate(mode, *settings, ms, setup, total, cloud_ms, why_not, pace)

    def _why_not(self, mode: Way, cut: int, lost: float) -> str:
        device = self._device
        if cut > device.held:
            return f"the device holds {device.held} of {device.n_layers} layers"
        if mode in ("split", "exit") and not self._cloud.same_model:
            return "the cloud's model is another one"
        if lost <= self._wish.max_disagreement:
            return ""
        allowed = math.ceil(lost * 1e4 - 1e-9) / 1e4
        return f"{100 * lost:.3g} % of tokens may differ (a max disagreement of {allowed:g} allows that)"

    def _check(self, rows: float) -> float:
        low = int(rows)
        ms = self._cloud.step(low)
        return ms if rows == low else ms + (self._cloud.step(low + 1) - ms) * (rows - low)

    def _trip(self, row_bytes: float) -> float:
        over = row_bytes + MESSAGE_BYTES - self._link.carried_bytes
        return self._trip_ms + over * 8e3 / self._link.up_bps if over > 0 else self._trip_ms

    def _hidden_ms(self, cut: int, row_bytes: float, missing: Points) -> float:
        rows = max(0.0, _missing(missing, cut) - 1)
        # A state that was not kept is computed again together with all before it that the cloud lacks.
        device = self._device.prefill(max(rows, _missing(self._standing.device_missing, cut) - 1), cut)
        link = self._link
        aged: float = link.up_bps * 0.5 ** (max(0.0, link.up_age_s - FRESH_S) / FADE_S)
        rate_bps = max(aged, min(link.up_bps, STALE_BPS))
        upload = rows * row_bytes * 8e3 / (link.trust * rate_bps)
        return max(device, upload) + self._cloud.prefill(rows, cut)

    def _draft_ms(self, drafts: DraftFigures) -> float:
        if drafts.source == "model":
            return max(self._tokens_ms, self._standing.small_missing * drafts.row_ms)
        rows = max(0.0, _missing(self._standing.device_missing, drafts.layer) - 1) if drafts.layer else 0.0
        return max(self._tokens_ms, self._device.prefill(rows, drafts.layer))


def _missing(points: Points, layer: int) -> float:
    return next((rows for at, rows in points if at == layer), 0.0)
