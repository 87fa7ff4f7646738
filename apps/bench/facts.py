"""What a model and its exits said along answers, as simulations replay it: right and wrong come as they came."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from isthmus.apps.bench.shaping import BenchError
from isthmus.edge.drafts import NgramDrafts
from isthmus.edge.figures import DraftFigures, ExitFigures

LONGEST = 16  # drafts of n-grams that are kept for a position


@dataclass(frozen=True, slots=True)
class ExitFacts:
    """One exit along one answer.

    Attributes:
        confidence: of its most likely token, for each token of the answer.
        right: whether that is the model's choice.
    """

    confidence: tuple[float, ...]
    right: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the whole model.

    Attributes:
        prompt: tokens before it.
        drafted: drafts that the n-grams of all before a token offer, up to LONGEST.
        agreed: how many of them come true, one after the other.
        exits: by the layer that an exit stands before.

    Raises:
        BenchError: the facts are not all about the same tokens.
    """

    prompt: int
    drafted: tuple[int, ...]
    agreed: tuple[int, ...]
    exits: Mapping[int, ExitFacts]

    def __post_init__(self) -> None:
        facts: list[Sequence[object]] = [self.agreed]
        for one in self.exits.values():
            facts += [one.confidence, one.right]
        if self.prompt < 1 or not self.drafted or any(len(one) != len(self.drafted) for one in facts):
            raise BenchError("the facts of an answer differ in length", "record them again")

    @property
    def tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.drafted)

    def taken(self, layer: int, at: int, count: int) -> int:
        """How many of `count` drafts from a token on come true: an exit's, or for layer 0 those of n-grams."""
        if not layer:
            return min(self.agreed[at], count)
        right = self.exits[layer].right[at : at + count]
        return next((i for i, one in enumerate(right) if not one), len(right))


def guessed(tokens: Sequence[int], answer: int) -> Answer:
    """What n-grams foresee of an answer, without exits.

    Args:
        tokens: of the prompt and the answer.
        answer: how many of them are the prompt.
    """
    drafts, drafted, agreed = NgramDrafts(), list[int](), list[int]()
    drafts.extend(tokens[:answer])
    for at in range(answer, len(tokens)):
        offered = drafts.draft(LONGEST)
        pairs = list(zip(offered, tokens[at:], strict=False))
        drafted.append(len(offered))
        agreed.append(next((i for i, (guess, came) in enumerate(pairs) if guess != came), len(pairs)))
        drafts.extend(tokens[at : at + 1])
    return Answer(answer, tuple(drafted), tuple(agreed), {})


class Facts(NamedTuple):
    """Exits as they are certified, and what they and n-grams foresaw along answers.

    Attributes:
        heads: by layer, the share of the output head's rows that an exit has.
    """

    exits: tuple[ExitFigures, ...]
    answers: tuple[Answer, ...]
    heads: Mapping[int, float]


def read(path: str | Path) -> Facts:
    """Facts from a file.

    Raises:
        BenchError: it cannot be read.
    """
    try:
        told = json.loads(Path(path).read_text())
        exits = tuple(ExitFigures(**one) for one in told["exits"])
        heads = {int(layer): float(share) for layer, share in told["heads"].items()}
        return Facts(exits, tuple(_answer(one) for one in told["answers"]), heads)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{path} holds no facts: {error}", "record them again") from error


def write(facts: Facts, path: str | Path) -> None:
    """Writes facts, one answer on a line."""
    exits = json.dumps([asdict(one) for one in facts.exits])
    lines = [json.dumps(_told(answer), separators=(",", ":")) for answer in facts.answers]
    heads = json.dumps(facts.heads)
    Path(path).write_text(f'{{"exits": {exits}, "heads": {heads}, "answers": [\n' + ",\n".join(lines) + "\n]}\n")


def draft_figures(answers: Sequence[Answer], layer: int, draft_ms: float, lengths: Sequence[int]) -> DraftFigures:
    """What drafts of an exit, or of n-grams for layer 0, bring: counted along answers."""
    tokens = {g: _rounds(answers, layer, g) for g in lengths}
    if layer:
        right = [one for answer in answers for one in answer.exits[layer].right]
        accepted = sum(right) / len(right)
    else:
        drafted = sum(min(1, one) for answer in answers for one in answer.drafted)
        accepted = sum(min(1, one) for answer in answers for one in answer.agreed) / max(1, drafted)
    return DraftFigures(
        "exit" if layer else "ngram",
        layer,
        draft_ms,
        accepted,
        tuple((g, made) for g, (made, _) in tokens.items()),
        tuple((g, rows) for g, (_, rows) in tokens.items()),
    )


def _rounds(answers: Sequence[Answer], layer: int, g: int) -> tuple[float, float]:
    """Tokens and rows of a round, in the mean."""
    rounds = rows = tokens = 0
    for answer in answers:
        at = 0
        while at < answer.tokens:
            rows += 1 + (g if layer else min(g, answer.drafted[at]))
            at += answer.taken(layer, at, g) + 1
            rounds += 1
        tokens += answer.tokens
    return tokens / rounds, rows / rounds


def made_up(count: int, tokens: int, foresees: float, seed: int = 0, layer: int = 20) -> tuple[Answer, ...]:
    """Answers of which an exit foresees tokens independently with one probability, and n-grams nothing.

    For checks against formulas that assume just this: where it is wrong the exit is too unsure to say what may follow
    while it waits.
    """
    import random

    rng = random.Random(seed)
    found = []
    for _ in range(count):
        right = tuple(rng.random() < foresees for _ in range(tokens))
        confidence = tuple(0.9 if one else 0.05 for one in right)
        found.append(Answer(100, (0,) * tokens, (0,) * tokens, {layer: ExitFacts(confidence, right)}))
    return tuple(found)


def _answer(told: Mapping[str, Any]) -> Answer:
    exits = {
        int(layer): ExitFacts(tuple(map(float, one["confidence"])), tuple(mark == "1" for mark in one["right"]))
        for layer, one in told["exits"].items()
    }
    return Answer(int(told["prompt"]), tuple(map(int, told["drafted"])), tuple(map(int, told["agreed"])), exits)


def _told(answer: Answer) -> dict[str, Any]:
    exits = {
        str(layer): {
            "confidence": [round(value, 3) for value in one.confidence],
            "right": "".join("1" if right else "0" for right in one.right),
        }
        for layer, one in answer.exits.items()
    }
    return {"prompt": answer.prompt, "drafted": answer.drafted, "agreed": answer.agreed, "exits": exits}
