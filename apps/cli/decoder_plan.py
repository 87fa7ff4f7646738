"""How to share a language model between a device and a cloud: every mode at every cut, priced before anything runs.

The prices are those by which `auto` decides (`edge.costs`), over profiles of both machines and a link, or the trace of
one, in place of what a device would measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from isthmus.apps.cli.decoder_profile import DecoderProfile
from isthmus.edge import budget, priors
from isthmus.edge.costs import MESSAGE_BYTES, TOKEN_BYTES, Candidate, Standing, candidates
from isthmus.edge.estimator import BETWEEN_MS, quantile
from isthmus.edge.figures import CloudFigures, CodecFigures, DraftFigures, Figures, LinkFigures, Wish, between
from isthmus.engine import KvConfig
from isthmus.protocol.errors import PlanError
from isthmus.split.bundle import Bundle
from isthmus.split.files import write_whole
from isthmus.split.link import Link
from isthmus.split.replay import INPUTS, passed
from isthmus.split.traces import Trace, per_second

LOW = 0.1  # the share of a trace's seconds in which its rate is lower than the low one
EXACT = "f32"
CODECS = {EXACT: 4.0, "f16": 2.0, "int8": 1.0}  # bytes of a value
QUESTION_BYTES = 40


@dataclass(frozen=True, slots=True)
class Answer:
    """What is planned for.

    Attributes:
        prompt, tokens: of an answer.
        memory_mb: that the device may hold, weights, KV and the rest together; None for no bound.
        disagreement: share of tokens that exits may decide otherwise than the model.
        slo_ms: for a token, None for none.

    Raises:
        PlanError: a number is none.
    """

    prompt: int = 64
    tokens: int = 120
    memory_mb: float | None = None
    disagreement: float = 0.0
    slo_ms: float | None = None

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.tokens < 1:
            raise PlanError(f"an answer of {self.tokens} tokens to a prompt of {self.prompt}", "give 1 or more of both")
        if not 0.0 <= self.disagreement <= 1.0:
            raise PlanError(f"{self.disagreement:g} of tokens may differ", "give a share from 0 to 1")
        for name, value in (("--memory-mb", self.memory_mb), ("--slo-ms", self.slo_ms)):
            if value is not None and not 0.0 < value < float("inf"):
                raise PlanError(f"{name} is {value:g}", "give a number above 0")


class Way(msgspec.Struct, frozen=True):
    """One way of working, with what it takes.

    Attributes:
        cut: layers on the device in split and exit mode, and of an exit that drafts; 0 otherwise.
        codec: of hidden states.
        token_ms: of a token, in the mean; `first_ms` of the first.
        total_ms: of the whole answer.
        cloud_ms: of the cloud's engine for a token.
        up_bytes: for a token, the prompt apart.
        device_mb: of weights, KV and the rest that the device holds for it.
        exact: whether the text is the cloud model's own.
        fails: what it does not keep to, "" if nothing.
    """

    name: str
    mode: Literal["local", "stream", "split", "exit", "verify"]
    cut: int
    codec: str
    token_ms: float
    first_ms: float
    total_ms: float
    cloud_ms: float
    up_bytes: float
    device_mb: float
    exact: bool
    fails: str = ""


class DecoderPlan(msgspec.Struct, frozen=True):
    """See the module.

    Attributes:
        model: the bundle's model_id.
        link: in words.
        best: which of `ways`, which begin with the best of each mode.
        verdict: in one sentence.
    """

    model: str
    name: str
    link: str
    prompt: int
    tokens: int
    ways: tuple[Way, ...]
    best: int
    verdict: str
    format: Literal["isthmus-decoder-plan"] = "isthmus-decoder-plan"
    version: int = 1

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=1))


def plan(
    bundle: Bundle, device: DecoderProfile, cloud: DecoderProfile, times: float, link: Link, answer: Answer
) -> DecoderPlan:
    """All ways, and which is best.

    Args:
        device, cloud: of the same model; the cloud is so many `times` as fast as its profile says.

    Raises:
        PlanError: a profile is another model's, or no way keeps to what was asked for.
    """
    for what, profile in (("device", device), ("cloud", cloud)):
        if profile.model != bundle.manifest.model_id:
            problem = f"the {what}'s profile is of {profile.name} ({profile.model[:12]}), another model or version"
            raise PlanError(problem, "measure it with the same bundle: isthmus profile")
    if not 0.0 < times < float("inf"):
        raise PlanError(f"the cloud is {times:g} times as fast as the device", "give a number above 0")
    ways_ = _Ways(bundle, device, cloud.cloud(times), link_figures(link), answer)
    found = sorted(ways_.all(), key=lambda way: way.total_ms)
    able = [way for way in found if not way.fails]
    if not able:
        nearest = next((way for way in found if way.fails.endswith("wanted")), found[0])
        why = f"the nearest is {nearest.name}, {nearest.fails}"
        raise PlanError(f"no way keeps to what was asked for: {why}", "ask for less, or change the link")
    order = able + [way for way in found if way.fails]
    firsts = [next(way for way in order if way.mode == mode) for mode in dict.fromkeys(way.mode for way in order)]
    ways = (*firsts, *(way for way in order if way not in firsts))
    best = ways.index(able[0])
    said = _verdict(able[0], able, answer)
    return DecoderPlan(
        bundle.manifest.model_id, bundle.manifest.name, link.words, answer.prompt, answer.tokens, ways, best, said
    )


def link_figures(link: Link, seed: int = 0) -> LinkFigures:
    """A link as a device would come to know it: trips as its questions meet them, rates as they mostly are."""
    rate = link.rate()
    trips, weights = [link.trip_ms], [1.0]
    if link.changes:
        period_ms = max(way.period_ms for way in (link.up, link.down) if isinstance(way, Trace))
        starts = np.random.default_rng(seed).uniform(0.0, period_ms, INPUTS)
        there = passed(link.up, starts, MESSAGE_BYTES) + link.trip_ms / 2
        taken = passed(link.down, there, MESSAGE_BYTES) + link.trip_ms / 2 - starts
        trips, weights = taken.tolist(), (1.0 / (taken + BETWEEN_MS)).tolist()
    trip = quantile(trips, 0.5, weights)
    up_low, down_low = (
        min(mean, max(1.0, float(np.quantile(per_second(way), LOW)))) if isinstance(way, Trace) else mean
        for way, mean in ((link.up, rate.up_bps), (link.down, rate.down_bps))
    )
    high = max(trip, quantile(trips, 0.9, weights))
    return LinkFigures(trip, high, rate.up_bps, rate.down_bps, up_low, down_low)


class _Ways:
    """Prices ways for one answer.

    Args:
        device, cloud: times of both.
    """

    def __init__(
        self, bundle: Bundle, device: DecoderProfile, cloud: CloudFigures, link: LinkFigures, answer: Answer
    ) -> None:
        self._config, self._device, self._answer = bundle.config, device, answer
        files = {name: entry.bytes for name, entry in bundle.manifest.files.items()}
        self._sizes = budget.PartSizes.from_files(self._config.n_layers, files)
        self._kv = KvConfig("f16", answer.prompt + answer.tokens)
        self._most = self._config.n_layers
        if answer.memory_mb is not None:
            self._most = budget.layers_that_fit(self._sizes, self._config, self._kv, answer.memory_mb)
        self._exits = [one.layer for one in bundle.exits if one.layer <= self._most]
        width = self._config.d_model
        codecs = tuple(CodecFigures(name, size * width, 0.0) for name, size in CODECS.items())
        here = device.device(self._most)
        self._figures = Figures(
            here,
            cloud,
            link,
            priors.exits(bundle, self._exits),
            priors.drafts(bundle, self._exits, here),
            codecs,
        )
        self._row_bytes = {one.name: one.row_bytes for one in codecs}
        self._exit_bytes = {one.layer: one.row_bytes for one in self._figures.exits}
        self._drafts: dict[tuple[str, int], DraftFigures] = {
            (one.source, one.layer): one for one in self._figures.drafts
        }

    def all(self) -> Iterator[Way]:
        """Splits at every cut, and what needs none."""
        n_layers = self._config.n_layers
        wish = Wish("speed", self._answer.disagreement)
        for held in range(1, n_layers + 1):
            figures = replace(self._figures, device=self._device.device(held))
            missing = tuple((k, float(self._answer.prompt)) for k in sorted({held, *self._exits, n_layers}))
            standing = Standing(self._answer.tokens, missing, self._answer.prompt, missing)
            for one in candidates(figures, wish, standing):
                if (one.cut == held) if one.mode == "split" else (held == n_layers):
                    yield self._way(one)

    def _way(self, one: Candidate) -> Way:
        layers = self._config.n_layers if one.mode == "local" else one.cut
        needed = budget.needed_bytes(self._sizes, self._config, self._kv, layers) / budget.MB if layers else 0.0
        return Way(
            one.name,
            one.mode,
            one.cut,
            one.codec,
            one.ms_per_token,
            one.setup_ms + one.ms_per_token,
            one.total_ms,
            one.cloud_ms,
            self._up_bytes(one),
            needed,
            one.mode != "exit" and one.codec in ("", EXACT),
            self._fails(one, layers, needed),
        )

    def _up_bytes(self, one: Candidate) -> float:
        """For a token, framing included."""
        match one.mode:
            case "split":
                return self._row_bytes[one.codec] + MESSAGE_BYTES
            case "exit":
                return self._exit_bytes[one.cut] + one.asked * (QUESTION_BYTES + MESSAGE_BYTES)
            case "verify":
                drafts, block = self._drafts[one.source, one.cut], TOKEN_BYTES * one.draft_tokens + MESSAGE_BYTES
                if one.depth > 1:
                    return block * (drafts.accepted / one.draft_tokens + 1.0 - drafts.accepted)
                return block / max(1.0, between(drafts.tokens_a_round, one.draft_tokens))
        return 0.0

    def _fails(self, one: Candidate, layers: int, needed_mb: float) -> str:
        answer = self._answer
        if one.why_not:
            return one.why_not
        if one.mode == "split" and one.codec != EXACT and not answer.disagreement:
            return "rounding turns some tokens"
        if layers > self._most:
            return f"{needed_mb:.4g} MB on the device, {answer.memory_mb:g} wanted"
        if answer.slo_ms is not None and one.ms_per_token > answer.slo_ms:
            return f"{one.ms_per_token:.3g} ms a token, {answer.slo_ms:g} wanted"
        return ""


def _verdict(best: Way, able: Sequence[Way], answer: Answer) -> str:
    def told(way: Way) -> str:
        return f"{way.total_ms / 1e3:.3g} s for {answer.tokens} tokens"

    head = {
        "local": "Do not share it: the device alone takes",
        "stream": "Do not split it, but let the cloud answer: it takes",
    }.get(best.mode, f"Share it by {best.name}: it takes")
    others = [way for way in able if way.mode != best.mode]
    if not others:
        return f"{head} {told(best)}."
    return f"{head} {told(best)}, against {told(others[0])} of the next best, {others[0].name}."
