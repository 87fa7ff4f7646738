"""Which way to share a language model between a device and a cloud is best, as a file and in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from isthmus.apps.cli.decoder_profile import DecoderProfile
from isthmus.apps.cli.decoder_ways import Answer, Setting, Way, priced
from isthmus.protocol.errors import PlanError
from isthmus.split.bundle import Bundle
from isthmus.split.files import write_whole

SLOWEST = 1e-6  # times as fast as the device that a cloud may be
PRIORS = "other answers, and those that exits were certified with"


class DecoderPlan(msgspec.Struct, frozen=True):
    """See the module.

    Attributes:
        model: the bundle's model_id.
        link, cloud: in words.
        percentile: that `tail_ms` of the ways is.
        foreseen: along what it was counted how much drafts and exits foresee, in words.
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
    percentile: float = 95.0
    cloud: str = ""
    foreseen: str = ""
    format: Literal["isthmus-decoder-plan"] = "isthmus-decoder-plan"
    version: int = 1

    @property
    def sorted(self) -> list[Way]:
        """All ways, the fastest first, those that break something last."""
        return sorted(self.ways, key=lambda way: (bool(way.fails), way.total_ms))

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=1))


def plan(setting: Setting) -> DecoderPlan:
    """All ways, and which is best.

    Raises:
        PlanError: a profile is another model's, or no way keeps to what was asked for.
    """
    bundle, cloud, times, answer = setting.bundle, setting.cloud, setting.times, setting.answer
    check(bundle, setting.device, cloud, times)
    if (most := bundle.config.context_length) < answer.prompt + answer.tokens:
        problem = f"an answer of {answer.tokens} tokens to a prompt of {answer.prompt} is longer than the model takes"
        raise PlanError(problem, f"give {most} or fewer of both together")
    found = sorted(priced(setting), key=lambda way: way.total_ms)
    able = [way for way in found if not way.fails]
    if not able:
        nearest = next((way for way in found if way.fails.endswith("wanted")), found[0])
        why = f"the nearest is {nearest.name}, {nearest.fails}"
        raise PlanError(f"no way keeps to what was asked for: {why}", "ask for less, or change the link")
    order = able + [way for way in found if way.fails]
    firsts = [next(way for way in order if way.mode == mode) for mode in dict.fromkeys(way.mode for way in order)]
    ways = (*firsts, *(way for way in order if way not in firsts))
    best = ways.index(able[0])
    faster = f"{times:g} times as fast as the device" if cloud is setting.device else f"like {cloud.processor}"
    along = PRIORS
    if (counted := setting.foreseen) is not None:
        along = f"{len(counted.answers)} of its own answers, {counted.tokens} tokens each"
    return DecoderPlan(
        bundle.manifest.model_id,
        bundle.manifest.name,
        setting.link.words,
        answer.prompt,
        answer.tokens,
        ways,
        best,
        _verdict(able[0], able, answer),
        answer.percentile,
        f"a cloud {faster}",
        along,
    )


def check(bundle: Bundle, device: DecoderProfile, cloud: DecoderProfile, times: float) -> None:
    """Refuses what no plan can be made with.

    Raises:
        PlanError: a profile is another model's, or the cloud's speed is none.
    """
    for what, profile in (("device", device), ("cloud", cloud)):
        if profile.model != bundle.manifest.model_id:
            problem = f"the {what}'s profile is of {profile.name} ({profile.model[:12]}), another model or version"
            raise PlanError(problem, "measure it with the same bundle: isthmus profile")
        if profile.n_layers != bundle.config.n_layers:
            problem = f"the {what}'s profile has {profile.n_layers} layers, and the model {bundle.config.n_layers}"
            raise PlanError(problem, "measure it again: isthmus profile")
    if not SLOWEST <= times <= 1.0 / SLOWEST:
        problem = f"the cloud is {times:g} times as fast as the device"
        raise PlanError(problem, f"give a number from {SLOWEST:g} to {1.0 / SLOWEST:g}")


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
