"""What n-grams and exits foresee of a model's own answers to prompts: counted, where plans would believe priors."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from isthmus.apps.bench.facts import Answer, ExitFacts, draft_figures, guessed
from isthmus.edge.figures import DraftFigures, ExitFigures
from isthmus.edge.pace import GUESSES, LIKELY
from isthmus.edge.priors import LENGTHS
from isthmus.engine.threshold import least
from isthmus.split.exit_run import ExitRun


class Foreseen:
    """See the module; what was counted once is not counted again.

    Args:
        answers: the whole model's, one or more, and what was foreseen of them.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = tuple(answers)
        self._beginnings: dict[int, Foreseen] = {}
        self._drafts: dict[int, DraftFigures] = {}  # by the exit's layer, 0 for n-grams
        self._exits: dict[tuple[int, float], tuple[float, float]] = {}

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

    def exits(self, believed: Sequence[ExitFigures]) -> tuple[ExitFigures, ...]:
        """How often exits are sure and how often they guess, for those that priors tell of."""
        for one in believed:
            if (one.layer, one.threshold) not in self._exits:
                self._exits[one.layer, one.threshold] = self._counted(one)
        shares = [self._exits[one.layer, one.threshold] for one in believed]
        return tuple(
            replace(one, unsure=unsure, guessed=unsure - asked)
            for one, (unsure, asked) in zip(believed, shares, strict=True)
        )

    def _counted(self, one: ExitFigures) -> tuple[float, float]:
        """Of all tokens those that an exit is not sure of, and those that are asked about."""
        tokens = sum(answer.tokens for answer in self.answers)
        facts = [answer.exits[one.layer] for answer in self.answers]
        unsure = sum(sure < least(one.threshold) for fact in facts for sure in fact.confidence)
        return unsure / tokens, sum(questions(fact, one.threshold) for fact in facts) / tokens


def questions(facts: ExitFacts, threshold: float) -> int:
    """To the cloud along an answer, by the rule that `edge.exit` guesses by, where guesses cost nothing but bytes.

    What an exit would say after a wrong guess is not known: there it is as sure as it is along the answer.
    """
    sure = [confidence >= least(threshold) for confidence in facts.confidence]
    at, asked, count = 0, 0, len(sure)
    while at < count:
        if sure[at]:
            at += 1
            continue
        end, odds = at, facts.confidence[at]
        while end - at < GUESSES and odds >= LIKELY and end + 1 < count:
            end += 1
            odds *= 1.0 if sure[end] else facts.confidence[end]
        asked += 1
        at = next((i for i in range(at, end + 1) if not (facts.right[i] or sure[i])), end) + 1
    return asked


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
    if layers := [entry.layer for entry in bundle.exits]:
        states = run.states(name, samples, layers)
        for entry in bundle.exits:
            sha256 = bundle.manifest.files[entry.file].sha256
            said = run.said(bundle.exit(entry.layer), sha256, entry.layer, states)
            for at, (answer, one) in enumerate(zip(answers, said, strict=True)):
                facts = ExitFacts(tuple(map(float, one.confidence)), tuple(map(bool, one.right)))
                answers[at] = replace(answer, exits={**answer.exits, entry.layer: facts})
    return Foreseen(answers)


def _first(answer: Answer, tokens: int) -> Answer:
    exits = {layer: ExitFacts(facts.confidence[:tokens], facts.right[:tokens]) for layer, facts in answer.exits.items()}
    return Answer(answer.prompt, answer.drafted[:tokens], answer.agreed[:tokens], exits)
