"""Ways to share a language model between a device and a cloud: every mode at every cut, priced before anything runs.

The prices are those by which `auto` decides (`edge.costs`), over profiles of both machines and a link in place of what
a device would measure. Where the link is a trace, or others use the cloud, answers are replayed (`decoder_replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import numpy as np

from isthmus.apps.cli.decoder_profile import DecoderProfile
from isthmus.apps.cli.decoder_replay import Rounds, replayed
from isthmus.apps.cli.foreseen import Foreseen
from isthmus.edge import budget, priors
from isthmus.edge.costs import (
    ANSWER_BYTES,
    MESSAGE_BYTES,
    NEWS_BYTES,
    TOKEN_BYTES,
    Candidate,
    Standing,
    candidates,
)
from isthmus.edge.estimator import BETWEEN_MS, quantile
from isthmus.edge.exit import AHEAD_ROWS
from isthmus.edge.figures import (
    CodecFigures,
    DeviceFigures,
    DraftFigures,
    Expected,
    Figures,
    LinkFigures,
    Wish,
    between,
)
from isthmus.edge.pace import SEVERAL, even
from isthmus.engine import KvConfig
from isthmus.protocol.errors import PlanError
from isthmus.split.bundle import Bundle
from isthmus.split.link import Link
from isthmus.split.onnx_network import SERVICE_MS
from isthmus.split.replay import INPUTS, Times, passed
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
        slo_ms: for a token, at the `percentile` of answers where not all take the same; None for none.
        energy_j: that the device may spend on an answer, None for no bound, from its watts while it computes and while
            it waits for something that travels.
        load: the share of the cloud's time that others take.

    Raises:
        PlanError: a number is none, or a budget of energy without watts.
    """

    prompt: int = 64
    tokens: int = 120
    memory_mb: float | None = None
    disagreement: float = 0.0
    slo_ms: float | None = None
    percentile: float = 95.0
    energy_j: float | None = None
    device_watts: float = 0.0
    radio_watts: float = 0.0
    load: float = 0.0

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.tokens < 1:
            raise PlanError(f"an answer of {self.tokens} tokens to a prompt of {self.prompt}", "give 1 or more of both")
        if not 0.0 <= self.disagreement <= 1.0:
            raise PlanError(f"--max-disagreement is {self.disagreement:g}", "give a share from 0 to 1")
        bounds = {"--memory-mb": self.memory_mb, "--slo-ms": self.slo_ms, "--energy-j": self.energy_j}
        for name, value in bounds.items():
            if value is not None and not 0.0 < value < float("inf"):
                raise PlanError(f"{name} is {value:g}", "give a number above 0")
        if not 0.0 < self.percentile < 100.0:
            raise PlanError(f"the percentile is {self.percentile:g}", "give one between 0 and 100, as 95")
        if not 0.0 <= self.load < 1.0:
            raise PlanError(f"others take {self.load:g} of the cloud's time", "give a share from 0 to below 1")
        watts = self.device_watts + self.radio_watts
        if not 0.0 <= watts < float("inf") or (self.energy_j is not None and not watts):
            problem = "a budget of energy is given, and no watts" if not watts else f"{watts:g} watts are declared"
            raise PlanError(problem, "declare --device-watts and --radio-watts")


class Way(msgspec.Struct, frozen=True):
    """One way of working, with what it takes.

    Attributes:
        cut: layers on the device in split and exit mode, and of an exit that drafts; 0 otherwise.
        codec: of hidden states.
        token_ms: of a token, in the mean; `first_ms` of the first.
        total_ms: of the whole answer.
        tail_ms: of a token at the plan's percentile of answers, None where all take the same.
        device_ms: of the device for a token.
        cloud_ms: of the cloud's engine for a token.
        up_bytes: for a token, the prompt apart.
        energy_j: that the device spends on an answer, 0 where no watts are declared.
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
    tail_ms: float | None = None
    device_ms: float = 0.0
    energy_j: float = 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What ways are priced for.

    Attributes:
        device, cloud: profiles of the bundle's model; the cloud is so many `times` as fast as its profile says.
        foreseen: what drafts and exits were right about; None for what priors say.
        at_ms: moments of the link's traces at which answers begin, 1 or more; None for any.
    """

    bundle: Bundle
    device: DecoderProfile
    cloud: DecoderProfile
    times: float
    link: Link
    answer: Answer
    foreseen: Foreseen | None = None
    at_ms: Times | None = None


def priced(setting: Setting) -> list[Way]:
    """All ways, in no order."""
    return list(_Ways(setting).all())


def link_figures(link: Link, seed: int = 0) -> LinkFigures:
    """A link as a device would come to know it: trips as its questions meet them, rates as they mostly are."""
    rate = link.rate()
    back = ANSWER_BYTES + MESSAGE_BYTES
    trips, weights = [link.trip_ms + 8e3 * (MESSAGE_BYTES / rate.up_bps + back / rate.down_bps)], [1.0]
    if link.changes:
        period_ms = max(way.period_ms for way in (link.up, link.down) if isinstance(way, Trace))
        starts = np.random.default_rng(seed).uniform(0.0, period_ms, INPUTS)
        there = passed(link.up, starts, MESSAGE_BYTES) + link.trip_ms / 2
        taken = passed(link.down, there, back) + link.trip_ms / 2 - starts
        trips, weights = taken.tolist(), (1.0 / (taken + BETWEEN_MS)).tolist()
    trip = quantile(trips, 0.5, weights)
    up_low, down_low = (
        min(mean, max(1.0, float(np.quantile(per_second(way), LOW)))) if isinstance(way, Trace) else mean
        for way, mean in ((link.up, rate.up_bps), (link.down, rate.down_bps))
    )
    high = max(trip, quantile(trips, 0.9, weights))
    rates = rate.up_bps, rate.down_bps, up_low, down_low
    return LinkFigures(trip, high, *rates, carried_bytes=MESSAGE_BYTES, trust=1.0)


class _Ways:
    """Prices ways; a question takes `SERVICE_MS` more than its trip."""

    def __init__(self, setting: Setting) -> None:
        bundle, device, answer, foreseen = setting.bundle, setting.device, setting.answer, setting.foreseen
        self._config, self._device, self._answer = bundle.config, device, answer
        self._there, self._times, self._cloud = setting.cloud, setting.times, setting.cloud.cloud(setting.times)
        self._over = replace(setting.link, trip_ms=setting.link.trip_ms + SERVICE_MS)
        self._link, self._at_ms = link_figures(self._over), setting.at_ms
        files = {name: entry.bytes for name, entry in bundle.manifest.files.items()}
        self._sizes = budget.PartSizes.from_files(self._config.n_layers, files)
        self._kv = KvConfig("f16", answer.prompt + answer.tokens)
        self._most = self._config.n_layers
        if answer.memory_mb is not None:
            self._most = budget.layers_that_fit(self._sizes, self._config, self._kv, answer.memory_mb)
        self._exits = [one.layer for one in bundle.exits if one.layer <= self._most and bundle.holds(one.file)]
        self._exit_files = {one.layer: files[one.file] for one in bundle.exits}
        width = self._config.d_model
        codecs = tuple(CodecFigures(name, size * width, 0.0) for name, size in CODECS.items())
        here = device.device(self._most)
        exits, drafts = priors.exits(bundle, self._exits), priors.drafts(bundle, self._exits, here)
        self._along = foreseen.first(answer.tokens) if foreseen is not None else None
        if self._along is not None:
            drafts = self._along.drafts(drafts)
        self._figures = Figures(here, self._cloud, self._link, exits, drafts, codecs)
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
            missing = tuple((k, float(self._answer.prompt)) for k in sorted({held, *self._exits, n_layers}))
            standing = Standing(self._answer.tokens, missing, self._answer.prompt, missing)
            for figures, meant in self._paces(held):
                for one in candidates(figures, wish, standing):
                    if meant(one):
                        yield self._way(one, figures)

    def _paces(self, held: int) -> Iterator[tuple[Figures, Callable[[Candidate], bool]]]:
        """Figures of a device that holds so many layers, and the ways at whose pace they are.

        Who waits for the other side, or for the link, finds its caches cold: in split mode both for each token, in exit
        mode the cloud, and the device where it has asked, in verify mode who waits for drafts or for the answer.
        """
        n_layers, trip_ms = self._config.n_layers, self._link.expected_trip_ms
        warm = replace(self._figures, device=self._device.device(held))
        if held < n_layers:
            here_ms, there_ms = warm.device.through(held), self._cloud.rest(held)
            cold = self._cold(held, trip_ms + there_ms, trip_ms + here_ms)
            yield cold, lambda one: one.mode == "split" and one.cut == held
            return
        yield warm, lambda one: one.mode in ("local", "stream")
        for exit in self._figures.exits:
            slower, step_ms = self._slower(exit.layer), warm.device.drafted(exit.layer)
            rest_ms = self._there.cloud(self._times, trip_ms + step_ms).rest(exit.layer)
            answer_ms = trip_ms + rest_ms
            if self._along is not None:
                exit = self._along.exit(exit, rest_ms, answer_ms, step_ms, slower)
            else:
                asked = exit.asked(even(step_ms, rest_ms, answer_ms))
                steps = exit.steps(asked) + asked * (slower(answer_ms) - 1.0)
                exit = replace(exit, expected=Expected(asked, steps))
            asked = max(exit.asked(0.0), 1.0 / self._answer.tokens)
            cold = self._cold(held, 0.0, trip_ms + step_ms / asked)
            yield replace(cold, exits=(exit,), drafts=()), lambda one: one.mode == "exit"
        for drafts in self._figures.drafts:
            for g, tokens in drafts.tokens_a_round:
                check_ms, drafts_ms = self._cloud.step(round(between(drafts.rows_a_round, g))), g * drafts.draft_ms
                times = 1.0 + (self._slower(drafts.layer)(trip_ms + check_ms) - 1.0) / g  # the first one is cold
                one = replace(drafts, tokens_a_round=((g, tokens),), draft_ms=times * drafts.draft_ms)
                cold = self._cold(held, 0.0, trip_ms + drafts_ms)
                yield replace(cold, exits=(), drafts=(one,)), _verifies(piped=False)
                if g < SEVERAL:  # of which no pipe is made
                    continue
                one = replace(drafts, tokens_a_round=((g, tokens),))
                cold = self._cold(held, 0.0, max(0.0, drafts_ms - self._cloud.step(g)))
                yield replace(cold, exits=(), drafts=(one,)), _verifies(piped=True)

    def _slower(self, layer: int) -> Callable[[float], float]:
        """How many times as long an exit's token takes after a pause of so many ms."""
        step_ms = self._device.device(layer).drafted(layer)
        return lambda pause_ms: self._device.device(layer, pause_ms).drafted(layer) / step_ms

    def _cold(self, held: int, here_ms: float, there_ms: float) -> Figures:
        """Figures of a device and a cloud that pause for so long before each step."""
        there = self._there.cloud(self._times, there_ms)
        return replace(self._figures, device=self._device.device(held, here_ms), cloud=there)

    def _way(self, one: Candidate, figures: Figures) -> Way:
        steps = next((exit.steps(one.asked) for exit in figures.exits if exit.layer == one.cut), 0.0)
        answer, rounds = self._answer, self._rounds(one, figures.device, steps)
        way = Way(
            one.name,
            one.mode,
            one.cut,
            one.codec,
            one.ms_per_token,
            one.setup_ms + one.ms_per_token,
            one.total_ms,
            one.cloud_ms,
            self._up_bytes(one),
            self._device_mb(one),
            one.mode != "exit" and one.codec in ("", EXACT),
            device_ms=rounds.device_ms / rounds.tokens,
        )
        refused = one.why_not
        if way.mode == "split" and not way.exact and answer.disagreement < 1.0:
            refused = "rounding turns some tokens, how many was not measured"
        alone_ms = way.total_ms  # without others in the cloud
        if one.mode != "local" and not refused and (self._over.changes or answer.load):
            others_ms = self._cloud.step(1)
            taken = replayed(rounds, self._over, answer.tokens, answer.load, others_ms, self._at_ms)
            first_ms, token_ms, total_ms = (float(ms.mean()) for ms in (taken.first, taken.token, taken.total))
            tail_ms = float(np.percentile(taken.token, answer.percentile))
            way = msgspec.structs.replace(way, first_ms=first_ms, token_ms=token_ms, total_ms=total_ms, tail_ms=tail_ms)
            if answer.load and answer.radio_watts:
                alone_ms = float(replayed(rounds, self._over, answer.tokens, at_ms=self._at_ms).total.mean())
            else:
                alone_ms = total_ms
        energy_j = self._energy_j(rounds, alone_ms)
        way = msgspec.structs.replace(way, energy_j=energy_j)
        return msgspec.structs.replace(way, fails="; ".join(filter(None, (refused, self._fails(way)))))

    def _device_mb(self, one: Candidate) -> float:
        """What the device holds for a way: layers, KV and the rest, and the exit that speaks or drafts."""
        layers = self._config.n_layers if one.mode == "local" else one.cut
        if not layers:
            return 0.0
        needed = budget.needed_bytes(self._sizes, self._config, self._kv, layers)
        if one.cut in self._exit_files and one.mode in ("exit", "verify"):
            needed += self._exit_files[one.cut] + budget.kv_bytes(self._config, 1, self._kv)
            needed += 0 if self._config.tied else self._sizes.head
        return needed / budget.MB

    def _energy_j(self, rounds: Rounds, total_ms: float) -> float:
        """What the device spends on an answer: while it computes, and while something is under way."""
        answer, device_ms = self._answer, rounds.device_total_ms(self._answer.tokens)
        radio_ms = 0.0
        if rounds.asks or rounds.sent_bytes:
            waits_ms = total_ms - device_ms - rounds.cloud_total_ms(answer.tokens)
            sent_ms = answer.tokens * rounds.sent_bytes * 8e3 / self._link.up_bps
            radio_ms = total_ms if rounds.streamed else max(waits_ms, sent_ms, 0.0)
        return (device_ms * answer.device_watts + radio_ms * answer.radio_watts) * 1e-3

    def _rounds(self, one: Candidate, device: DeviceFigures, steps: float) -> Rounds:
        """A way as the replay takes it; what the device computes is what the formula has beside trip and cloud.

        Args:
            steps: of the device for each token, in exit mode.
        """
        rows = float(self._answer.prompt - 1)
        if one.mode == "local":
            return Rounds(device_ms=one.ms_per_token, prompt_ms=one.setup_ms)
        row = 0.0  # bytes of a state, where states travel
        if one.mode in ("split", "exit"):
            row = self._row_bytes[one.codec] if one.mode == "split" else self._exit_bytes[one.cut]
        base = Rounds(
            asks=1.0,
            up_bytes=(row or TOKEN_BYTES * one.draft_tokens) + MESSAGE_BYTES,
            down_bytes=ANSWER_BYTES + MESSAGE_BYTES,
            cloud_ms=one.cloud_ms,
            prompt_bytes=rows * (row or TOKEN_BYTES) + MESSAGE_BYTES,
            prompt_ms=device.prefill(rows, one.cut),
            cloud_prompt_ms=self._cloud.prefill(rows, one.cut if row else 0),
        )
        if one.mode == "stream":
            return replace(base, streamed=True, down_bytes=NEWS_BYTES + MESSAGE_BYTES)
        if one.mode == "exit":
            step_ms = device.drafted(one.cut) + device.codec_ms
            return replace(
                base,
                device_ms=step_ms * steps,
                asks=one.asked,
                sent_bytes=row + MESSAGE_BYTES / AHEAD_ROWS,
                up_bytes=QUESTION_BYTES + MESSAGE_BYTES,
                cloud_ms=one.cloud_ms / one.asked if one.asked else 0.0,
            )
        if one.mode == "verify" and one.depth > 1:
            accepted = self._drafts[one.source, one.cut].accepted
            share = accepted / one.draft_tokens + 1.0 - accepted
            base = replace(base, asks=1.0 - accepted, cloud_ms=one.cloud_ms / share)
        elif one.mode == "verify":
            tokens = max(1.0, between(self._drafts[one.source, one.cut].tokens_a_round, one.draft_tokens))
            base = replace(base, tokens=tokens, cloud_ms=one.cloud_ms * tokens)
        trip_ms = self._link.expected_trip_ms
        trip_ms += max(0.0, base.up_bytes - self._link.carried_bytes) * 8e3 / self._link.up_bps
        waits_ms = base.asks * (trip_ms + base.cloud_ms)
        return replace(base, device_ms=max(0.0, one.ms_per_token * base.tokens - waits_ms))

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

    def _fails(self, way: Way) -> str:
        answer = self._answer
        if answer.memory_mb is not None and way.device_mb > answer.memory_mb:
            return f"{way.device_mb:.4g} MB on the device, {answer.memory_mb:g} wanted"
        late_ms = way.token_ms if way.tail_ms is None else way.tail_ms
        if answer.slo_ms is not None and late_ms > answer.slo_ms:
            at = "" if way.tail_ms is None else f" at p{answer.percentile:g}"
            return f"{late_ms:.3g} ms a token{at}, {answer.slo_ms:g} wanted"
        if answer.energy_j is not None and way.energy_j > answer.energy_j:
            return f"{way.energy_j:.3g} J an answer, {answer.energy_j:g} wanted"
        return ""


def _verifies(piped: bool) -> Callable[[Candidate], bool]:
    return lambda way: way.mode == "verify" and (way.depth > 1) == piped
