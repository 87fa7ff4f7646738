"""What n-grams and exits foresee of a model's own answers to prompts: counted, where plans would believe priors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from isthmus.apps.bench.facts import Answer, ExitFacts, draft_figures, guessed
from isthmus.edge.exit import GAMBLE
from isthmus.edge.figures import DraftFigures, ExitFigures, Expected
from isthmus.edge.pace import GUESSES, LIKELY, even
from isthmus.edge.priors import LENGTHS
from isthmus.engine.threshold import least
from isthmus.split.exit_run import ExitRun

Slower = Callable[[float], float]


class Foreseen:
    """See the module; what was counted once is not counted again.

    Args:
        answers: the whole model's, one or more, and what was foreseen of them.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = tuple(answers)
        self._beginnings: dict[int, Foreseen] = {}
        self._drafts: dict[int, DraftFigures] = {}  # by the exit's layer, 0 for n-grams
        self._exits: dict[tuple[int, float, float, int], list[Counts]] = {}

    @property
    def prompt(self) -> int:
        """Tokens of a prompt, in the mean."""
        return round(statistics.fmean(one.prompt for one in self.answers))

    @property
    def tokens(self) -> int:
        """Tokens of an answer, in the mean."""
        return round(statistics.fmean(one.tokens for one in self.answers))

    def first(self, tokens: int) -> Foreseen:
        """Of the beginnings of answers: where less was said, less comes again."""
        if tokens not in self._beginnings:
            self._beginnings[tokens] = Foreseen([_first(one, tokens) for one in self.answers])
        return self._beginnings[tokens]

    def drafts(self, believed: Sequence[DraftFigures]) -> tuple[DraftFigures, ...]:
        """What drafts of n-grams and exits bring, for those that priors tell of."""
        for one in believed:
            if one.layer not in self._drafts:
                self._drafts[one.layer] = draft_figures(self.answers, one.layer, one.draft_ms, LENGTHS)
        return tuple(replace(self._drafts[one.layer], draft_ms=one.draft_ms) for one in believed)

    def exit(
        self, believed: ExitFigures, pass_ms: float, answer_ms: float, step_ms: float, slower: Slower
    ) -> ExitFigures:
        """An exit that priors tell of, with how often it is sure, asks and says something.

        Args:
            pass_ms: of the cloud, for one row.
            answer_ms: from question to answer, in the mean.
            step_ms: of the device, for a token of the exit's.
            slower: how many times as long that takes after a pause of so many ms.
        """
        floor, ahead = max(LIKELY, even(step_ms, pass_ms, answer_ms)), int(answer_ms / max(step_ms, 1e-3))
        key = believed.layer, believed.threshold, floor, ahead
        if key not in self._exits:
            facts = [answer.exits[believed.layer] for answer in self.answers]
            self._exits[key] = [counted(fact, believed.threshold, floor, ahead) for fact in facts]
        tokens = sum(answer.tokens for answer in self.answers)
        unsure, asked, idle, steps = (sum(counts) / tokens for counts in zip(*self._exits[key], strict=True))
        short_ms = answer_ms - ahead * step_ms if ahead else answer_ms
        steps += idle * (slower(answer_ms) - 1.0) + (asked - idle) * (slower(short_ms) - 1.0)
        return replace(believed, unsure=unsure, guessed=max(0.0, unsure - asked), expected=Expected(asked, steps))


class Counts(NamedTuple):
    """Along an answer.

    Attributes:
        unsure: tokens that an exit is not sure of.
        asked: questions to the cloud.
        idle: those of them in whose time nothing more is said.
        steps: of the device, beside which nothing else is waited for.
    """

    unsure: int
    asked: int
    idle: int
    steps: int


def counted(facts: ExitFacts, threshold: float, floor: float, ahead: int) -> Counts:
    """What an exit says and asks along an answer.

    By the rules by which `edge.exit` guesses, says more while it waits, and need not say again what came true. What an
    exit would say after a wrong guess is not known: there it is as sure as it is along the answer.

    Args:
        floor: the probability that all guesses are right below which it asks.
        ahead: tokens that it has time for until an answer comes.
    """
    count = len(facts.confidence)
    sure = [confidence >= least(threshold) for confidence in facts.confidence]
    stands = [right or firm for right, firm in zip(facts.right, sure, strict=True)]
    at = known = asked = idle = steps = 0  # what comes before `known` was said, behind what stands
    while at < count:
        steps, known = steps + (at >= known), max(known, at + 1)
        if sure[at]:
            at += 1
            continue
        end, odds, true = at, facts.confidence[at], True
        while end - at < GUESSES and odds >= floor and end + 1 < count:
            true &= stands[end]
            end += 1
            steps += end >= known or not true
            known = max(known, end + 1) if true else known
            odds *= 1.0 if sure[end] else facts.confidence[end]
        asked, idle = asked + 1, idle + (odds < GAMBLE)
        wrong = next((i for i in range(at, end + 1) if not stands[i]), end + 1)
        if odds >= GAMBLE and wrong > end:
            on = next((i for i in range(end + 1, count) if not stands[i]), count - 1)
            known = max(known, min(end + ahead, on) + 1)
        at = min(wrong, end) + 1
    return Counts(count - sum(sure), asked, idle, steps)


def foreseen(run: ExitRun, prompts: list[str], name: str = "foreseen") -> Foreseen:
    """Counts along the answers that a bundle's model gives to prompts, greedy.

    Args:
        name: of the folder that keeps what exits need of these answers.

    Raises:
        ModelError: no prompt leaves room for an answer, or the model has no chat template.
        BundleError: the bundle does not hold the whole model, or has exits of another one.
    """
    samples = run.answered(prompts)
    answers = [guessed(sample.tokens, sample.answer) for sample in samples]
    bundle = run.bundle
    if exits := [entry for entry in bundle.exits if bundle.holds(entry.file)]:
        states = run.states(name, samples, [entry.layer for entry in exits])
        for entry in exits:
            sha256 = bundle.manifest.files[entry.file].sha256
            said = run.said(bundle.exit(entry.layer), sha256, entry.layer, states)
            for at, (answer, one) in enumerate(zip(answers, said, strict=True)):
                facts = ExitFacts(tuple(map(float, one.confidence)), tuple(map(bool, one.right)))
                answers[at] = replace(answer, exits={**answer.exits, entry.layer: facts})
    return Foreseen(answers)


def _first(answer: Answer, tokens: int) -> Answer:
    exits = {layer: ExitFacts(facts.confidence[:tokens], facts.right[:tokens]) for layer, facts in answer.exits.items()}
    return Answer(answer.prompt, answer.drafted[:tokens], answer.agreed[:tokens], exits)
