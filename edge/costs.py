"""What each way of working would cost from here on: the published formulas over measured figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from isthmus.edge.figures import (
    CloudFigures,
    CodecFigures,
    DeviceFigures,
    DraftFigures,
    ExitFigures,
    Figures,
    LinkFigures,
    Points,
    Wish,
    between,
)

Way = Literal["local", "stream", "split", "exit", "verify"]
SEGMENT_BYTES = 1500  # what a trip carries without taking longer
MESSAGE_BYTES = 100  # of framing, encryption and envelope around each message
TOKEN_BYTES = 3  # of a token's id among others
NEWS_BYTES = 45  # of one streamed token
ANSWER_BYTES = 40
DEPTH = 8  # blocks of drafts under way at most


@dataclass(frozen=True, slots=True)
class Standing:
    """How far an answer is, and what each side would have to compute again.

    Attributes:
        remaining: tokens that are still expected, 1 or more.
        device_missing: (k, rows) whose KV of layers [0, k) the device lacks.
        cloud_missing: rows whose KV the cloud lacks, if it computes from tokens.
        hidden_missing: (cut, rows) that the cloud lacks behind a cut, if it computes from hidden states.
        current: what is in use, None at the beginning.
    """

    remaining: int
    device_missing: Points = ()
    cloud_missing: int = 0
    hidden_missing: Points = ()
    current: Candidate | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way of working, with its settings and its price.

    Attributes:
        mode: the way.
        cut: layers on the device in split and exit mode, and of an exit that drafts; 0 otherwise.
        codec: of hidden states, empty where none travel.
        threshold: confidence from which on an exit emits.
        source: of drafts, empty where none are made.
        draft_tokens: of one block.
        depth: blocks under way at most.
        ms_per_token: expected.
        setup_ms: expected before the first token, if this is begun now.
        total_ms: for all tokens that remain.
        cloud_ms: of the cloud's engine for each token.
        why_not: why it may not be chosen, empty when it may.
    """

    mode: Way
    cut: int = 0
    codec: str = ""
    threshold: float = 0.0
    source: str = ""
    draft_tokens: int = 0
    depth: int = 1
    ms_per_token: float = 0.0
    setup_ms: float = 0.0
    total_ms: float = 0.0
    cloud_ms: float = 0.0
    why_not: str = ""

    @property
    def key(self) -> tuple[str, int, str, str, int, bool]:
        """What makes it another way of working; a threshold or a depth may change on the way."""
        return self.mode, self.cut, self.codec, self.source, self.draft_tokens, self.depth > 1

    @property
    def name(self) -> str:
        """For people: "exit 20 coded", "verify ngram 4 pipelined"."""
        parts = [self.mode, str(self.cut or ""), self.codec, self.source, str(self.draft_tokens or "")]
        if self.mode == "verify":
            parts = [self.mode, self.source, str(self.cut or ""), f"x{self.draft_tokens}"]
        return " ".join([part for part in parts if part] + ["pipelined"] * (self.depth > 1))


def candidates(figures: Figures, wish: Wish, standing: Standing) -> list[Candidate]:
    """Every way that these figures know of, priced, those that may not be chosen included.

    With k the cut, R the trip, c the emitted share, a the share of drafts that is taken, E the tokens of a round:

        local       t_device
        stream      max(t_cloud, bytes / downlink)
        split       t(k) + codec + R + t_rest(k)
        exit        max(t(k) + t_exit + codec + (1 - c) (R + t_rest(k, 1 / (1 - c) rows)), bytes / uplink)
        verify      (g t_d + R + t_v(rows)) / E
        pipelined   a t_d + (1 - a) (R + t_v(g) + t_d (g + 1) / 2), where t_v(g) <= g t_d

    The first three and the synchronous round are those of CE-CoLLM (2411.02829) and speculative decoding (2211.17192);
    a pipelined mismatch lies in the middle of its block in the mean, so half a block is drafted before it is sent.
    """
    found = [_local(figures, standing)]
    if figures.cloud is not None and figures.link is not None:
        found += _Priced(figures.device, figures.cloud, figures.link, standing).all(figures)
    pace = dict(figures.pace)
    return [_judged(one, figures, wish, standing, pace.get(one.mode, 1.0)) for one in found]


def _judged(one: Candidate, figures: Figures, wish: Wish, standing: Standing, pace: float) -> Candidate:
    ms = one.ms_per_token * pace
    setup = one.setup_ms
    if one.mode != "local" and figures.link is not None:
        setup += figures.link.silent_ms  # what has lasted so long lasts as long again
    total = setup + ms * max(1, standing.remaining)
    return replace(
        one, ms_per_token=ms, setup_ms=setup, total_ms=total, why_not=one.why_not or _why_not(one, figures, wish)
    )


def _why_not(one: Candidate, figures: Figures, wish: Wish) -> str:
    device, cloud, link = figures.device, figures.cloud, figures.link
    if one.mode == "local":
        if not device.whole:
            return f"the device holds {device.held} of {device.n_layers} layers"
        answers = wish.prefer != "privacy" and cloud is not None and link is not None and link.up
        if answers and cloud is not None and not cloud.same_model and wish.max_disagreement < 1:
            return "the cloud's model is another one"
        return ""
    if wish.prefer == "privacy":
        return "nothing may be sent"
    if link is None or not link.up:
        return "the cloud does not answer"
    if one.cut > device.held:
        return f"the device holds {device.held} of {device.n_layers} layers"
    if one.mode in ("split", "exit"):
        if cloud is not None and not cloud.same_model:
            return "the cloud's model is another one"
        lost = _disagreement(one, figures)
        if lost > wish.max_disagreement:
            return f"{100 * lost:.3g} % of tokens may differ"
    return ""


def _disagreement(one: Candidate, figures: Figures) -> float:
    if one.mode == "exit":
        same = (e for e in figures.exits if (e.layer, e.threshold, e.codec) == (one.cut, one.threshold, one.codec))
        return next(e.disagreement for e in same)
    return next(codec.disagreement for codec in figures.codecs if codec.name == one.codec)


def _local(figures: Figures, standing: Standing) -> Candidate:
    device = figures.device
    rows = _missing(standing.device_missing, device.n_layers)
    current = standing.current is not None and standing.current.mode == "local"
    setup = 0.0 if current else device.prefill(max(0, rows - 1), device.n_layers)
    return Candidate("local", ms_per_token=device.token_ms, setup_ms=setup)


@dataclass(frozen=True, slots=True)
class _Priced:
    device: DeviceFigures
    cloud: CloudFigures
    link: LinkFigures
    standing: Standing

    def all(self, figures: Figures) -> Iterator[Candidate]:
        yield self.stream()
        exact = [codec for codec in figures.codecs if codec.name != "coded"]
        codecs = {codec.name: codec for codec in figures.codecs}
        for cut in sorted({exit.layer for exit in figures.exits} | {self.device.held}):
            if 0 < cut < self.device.n_layers:
                yield from (self.split(cut, codec) for codec in exact)
        yield from (self.exit(one, codecs[one.codec]) for one in figures.exits if one.codec in codecs)
        for drafts in figures.drafts:
            for g, tokens in drafts.tokens_a_round:
                yield self.verify(drafts, g, tokens)
                if drafts.source != "ngram":
                    yield self.pipelined(drafts, g)

    def stream(self) -> Candidate:
        on_wire = (NEWS_BYTES + MESSAGE_BYTES) * 8e3 / self.link.down_low_bps
        step = self.cloud.step(1)
        return self._begun(
            Candidate("stream", ms_per_token=max(step + self.cloud.queue_ms, on_wire), cloud_ms=step),
            self._tokens_ms() + self.link.expected_trip_ms,
        )

    def split(self, cut: int, codec: CodecFigures) -> Candidate:
        rest = self.cloud.rest(cut)
        ms = self.device.through(cut) + self.device.codec_ms + self._trip(codec.row_bytes) + rest
        return self._begun(
            Candidate("split", cut, codec.name, ms_per_token=ms, cloud_ms=rest), self._hidden_ms(cut, codec)
        )

    def exit(self, one: ExitFigures, codec: CodecFigures) -> Candidate:
        asked = 1.0 - one.emitted
        rest = self.cloud.rest(one.layer, round(1.0 / max(asked, 1e-2)))
        chain = self.device.drafted(one.layer) + self.device.codec_ms + asked * (self._trip(codec.row_bytes) + rest)
        on_wire = (codec.row_bytes + MESSAGE_BYTES) * 8e3 / self.link.up_bps
        return self._begun(
            Candidate(
                "exit", one.layer, codec.name, one.threshold, ms_per_token=max(chain, on_wire), cloud_ms=asked * rest
            ),
            self._hidden_ms(one.layer, codec),
        )

    def verify(self, drafts: DraftFigures, g: int, tokens: float) -> Candidate:
        rows = between(drafts.rows_a_round, g)
        check = between(self.cloud.rows_ms, 1) if rows <= 1 else _at(self.cloud, rows)
        ms = (g * drafts.draft_ms + self._trip(TOKEN_BYTES * g) + check) / max(1.0, tokens)
        return self._begun(
            Candidate(
                "verify",
                drafts.layer,
                source=drafts.source,
                draft_tokens=g,
                ms_per_token=ms,
                cloud_ms=check / max(1.0, tokens),
            ),
            self._draft_ms(drafts),
        )

    def pipelined(self, drafts: DraftFigures, g: int) -> Candidate:
        a, draft, check = drafts.accepted, drafts.draft_ms, _at(self.cloud, g)
        ms = a * draft + (1 - a) * (self._trip(TOKEN_BYTES * g) + check + draft * (g + 1) / 2)
        one = Candidate(
            "verify",
            drafts.layer,
            source=drafts.source,
            draft_tokens=g,
            depth=DEPTH,
            ms_per_token=ms,
            cloud_ms=check * (a / g + (1 - a)),
        )
        if check > g * draft:
            one = replace(one, why_not="the cloud checks more slowly than drafts are made")
        return self._begun(one, self._draft_ms(drafts))

    def _begun(self, one: Candidate, setup_ms: float) -> Candidate:
        current = self.standing.current
        return replace(one, setup_ms=0.0 if current is not None and current.key == one.key else setup_ms)

    def _trip(self, row_bytes: float) -> float:
        over = max(0.0, row_bytes + MESSAGE_BYTES - SEGMENT_BYTES)
        return self.link.expected_trip_ms + over * 8e3 / self.link.up_bps + self.cloud.queue_ms

    def _tokens_ms(self) -> float:
        rows = self.standing.cloud_missing
        return rows * TOKEN_BYTES * 8e3 / self.link.up_bps + self.cloud.prefill(max(0, rows - 1))

    def _hidden_ms(self, cut: int, codec: CodecFigures) -> float:
        rows = max(0.0, _missing(self.standing.hidden_missing, cut) - 1)
        # A state that was not kept is computed again together with all before it that the cloud lacks.
        device = self.device.prefill(max(rows, _missing(self.standing.device_missing, cut) - 1), cut)
        upload = rows * codec.row_bytes * 8e3 / self.link.up_bps
        return max(device, upload) + self.cloud.prefill(rows, cut)

    def _draft_ms(self, drafts: DraftFigures) -> float:
        rows = max(0.0, _missing(self.standing.device_missing, drafts.layer) - 1) if drafts.layer else 0.0
        return max(self._tokens_ms(), self.device.prefill(rows, drafts.layer))


def _missing(points: Points, layer: int) -> float:
    return dict(points).get(layer, 0.0)


def _at(cloud: CloudFigures, rows: float) -> float:
    low = int(rows)
    return cloud.step(low) + (cloud.step(low + 1) - cloud.step(low)) * (rows - low)
