"""What is counted along a model's own answers in place of priors, and that plans believe it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.apps.bench.facts import Answer, ExitFacts
from isthmus.apps.cli import decoder_ways
from isthmus.apps.cli.decoder_plan import PRIORS, plan
from isthmus.apps.cli.decoder_ways import Setting
from isthmus.apps.cli.foreseen import Foreseen, counted, foreseen
from isthmus.edge import priors
from isthmus.edge.figures import ExitFigures
from isthmus.edge.pace import GUESSES, LIKELY
from isthmus.protocol.errors import ModelError
from isthmus.split.bundle import Bundle
from isthmus.split.exit_run import ExitRun
from isthmus.split.link import read_link
from tests.decoder_plans import EXIT, a_profile, write_early
from tests.edge_bundle import CONFIG

LIKELY_ENOUGH, UNLIKELY = LIKELY + 0.05, LIKELY / 2


def facts(*said: tuple[float, bool]) -> ExitFacts:
    confidence, right = zip(*said, strict=True)
    return ExitFacts(confidence, right)


def an_answer(facts: ExitFacts, prompt: int = 10) -> Answer:
    count = len(facts.right)
    return Answer(prompt, (1,) * count, (1, 0) * (count // 2) + (0,) * (count % 2), {2: facts})


@pytest.mark.parametrize(
    ("along", "asked"),
    [
        ([(0.95, True)] * 5, 0),  # sure of all
        ([(UNLIKELY, True)] * 5, 5),  # each is asked about by itself
        ([(LIKELY_ENOUGH, False)] * 5, 5),  # guesses that are wrong spare nothing
        # Two unsure ones are not both right; the second one's question answers for both.
        ([(0.6, True), (0.3, True), (0.95, True)], 1),
        ([(0.6, False), (0.3, True), (0.95, True)], 2),
        ([(0.6, True), (0.95, False), (0.95, True), (UNLIKELY, True)], 1),  # what it is sure of stands, right or not
        ([(0.85, True)] + [(0.95, True)] * (GUESSES - 1) + [(0.85, True)], 1),  # as far as guesses go
        ([(0.85, True)] + [(0.95, True)] * GUESSES + [(0.85, True)], 2),
    ],
)
def test_questions_come_where_guessing_on_is_a_gamble(along: list[tuple[float, bool]], asked: int) -> None:
    assert counted(facts(*along), 0.9, LIKELY, 0).asked == asked


@pytest.mark.parametrize(
    ("along", "floor", "ahead", "steps"),
    [
        ([(0.95, True)] * 5, 0.5, 9, 5),  # each is waited for
        ([(0.95, False)] * 5, 0.5, 9, 5),
        ([(0.05, True)] * 5, 0.5, 9, 5),  # too unsure to say more meanwhile
        ([(0.2, True)] * 5, 0.5, 0, 5),
        ([(0.2, True)] * 5, 0.5, 1, 1),  # each but the first is said while the one before it is asked about
        ([(0.2, True), (0.2, False), (0.2, True), (0.2, True)], 0.5, 9, 2),  # the third was said after another word
        ([(0.8, True)] * 3, 1.1, 0, 3),  # where guesses cost more than questions none is made
        ([(0.8, False)] + [(0.95, True)] * 3, 0.5, 0, 7),  # three in vain, and again
        ([(0.8, False)] + [(0.95, True)] * 3, 0.9, 0, 4),
        ([(0.8, True)] + [(0.95, True)] * 9, 0.5, 9, GUESSES + 1),  # the last one was said while it waited
    ],
)
def test_steps_count_that_are_waited_for(along: list[tuple[float, bool]], floor: float, ahead: int, steps: int) -> None:
    assert counted(facts(*along), 0.9, floor, ahead).steps == steps


def test_an_exit_is_as_unsure_and_asks_as_often_as_was_counted() -> None:
    found = Foreseen((an_answer(facts((0.95, True), (UNLIKELY, True), (0.6, True), (0.3, True))),))
    believed = ExitFigures(2, 0.9, 0.1, 0.1, 0.05, 43.0)
    one = found.exit(believed, 1.0, 100.0, 30.0, as_long)
    assert one.unsure == pytest.approx(0.75)
    assert one.asked(0.5) == pytest.approx(0.5)  # one question for the second token, one for the last two
    assert one.steps(0.5) == 0.5  # the last two while the cloud is asked about the second
    assert (one.layer, one.disagreement, one.row_bytes) == (2, 0.05, 43.0)
    assert found.exit(replace(one, threshold=1.0), 1.0, 100.0, 30.0, as_long).unsure == 1.0  # never believed
    assert found.exit(believed, 1.0, 100.0, 99.0, as_long).asked(0.0) == pytest.approx(
        0.75
    )  # a guess costs what it spares


def as_long(pause_ms: float) -> float:
    """After any pause a token takes as long as without."""
    return 1.0


def test_steps_after_pauses_take_longer() -> None:
    found = Foreseen((an_answer(facts((0.05, True), (0.95, True), (0.6, True), (0.95, True))),))
    believed = ExitFigures(2, 0.9, 0.1, 0.1, 0.05, 43.0)
    pauses = {100.0: 3.0, 10.0: 1.5}  # nothing is said while it asks about the first; three tokens about the third
    one = found.exit(believed, 1.0, 100.0, 30.0, pauses.__getitem__)
    assert one.asked(0.0) == 0.5 and one.steps(0.5) == pytest.approx((4 + 2.0 + 0.5) / 4)


def test_drafts_bring_what_was_counted(early: Bundle) -> None:
    found = Foreseen((an_answer(facts((0.9, True), (0.9, True), (0.9, False), (0.9, True))),))
    device = a_profile("ab").device(CONFIG.n_layers)
    ngram, exit = found.drafts(priors.drafts(early, [2], device))
    assert (ngram.source, ngram.accepted) == ("ngram", 0.5)
    assert dict(ngram.tokens_a_round)[1] == pytest.approx(4 / 2)
    assert (exit.source, exit.layer, exit.accepted, exit.draft_ms) == ("exit", 2, 0.75, device.drafted(2))


def test_means_and_beginnings() -> None:
    long, short = an_answer(facts(*[(0.9, True)] * 8), 20), an_answer(facts(*[(0.9, True)] * 3), 11)
    found = Foreseen((long, short))
    assert (found.prompt, found.tokens) == (16, 6)
    begun = found.first(4)
    assert [one.tokens for one in begun.answers] == [4, 3] and begun.answers[0].agreed == long.agreed[:4]
    assert len(begun.answers[0].exits[2].right) == 4


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With a certified exit before layer 2."""
    return write_early(tmp_path_factory.mktemp("early") / "tiny")


def told(step: str) -> Any:
    return lambda done, total: None


def test_a_models_own_answers_are_what_is_counted(early: Bundle, tmp_path: Path) -> None:
    run = ExitRun(early, tmp_path, told)
    found = foreseen(run, ["one", "two three"])
    samples = run.answered(["one", "two three"])
    assert [one.prompt for one in found.answers] == [sample.answer for sample in samples]
    assert [one.tokens for one in found.answers] == [len(sample.tokens) - sample.answer for sample in samples]
    assert all(list(one.exits) == [2] and len(one.exits[2].right) == one.tokens for one in found.answers)
    with pytest.raises(ModelError, match="no prompt leaves room"):
        foreseen(run, ["x" * 600])


def test_plans_believe_what_was_counted(early: Bundle) -> None:
    profile = a_profile(early.manifest.model_id)
    link, wanted = read_link("rtt=50,up=5,down=20"), decoder_ways.Answer(disagreement=0.05)
    sure, unsure = (
        Foreseen((an_answer(facts(*[(confidence, right)] * 40)),)) for confidence, right in ((0.99, True), (0.0, False))
    )
    takes = [
        {(way.mode, way.cut): way.token_ms for way in sorted(found.ways, key=lambda way: -way.token_ms)}
        for found in (plan(Setting(early, profile, profile, 8.0, link, wanted, along)) for along in (sure, unsure))
    ]
    assert takes[0]["exit", EXIT] < takes[1]["exit", EXIT] and takes[0]["verify", EXIT] < takes[1]["verify", EXIT]
    assert takes[0]["stream", 0] == takes[1]["stream", 0]
    assert takes[0]["verify", 0] == takes[1]["verify", 0]  # n-grams foresaw the same
    assert plan(Setting(early, profile, profile, 8.0, link, wanted)).foreseen == PRIORS
    assert (
        plan(Setting(early, profile, profile, 8.0, link, wanted, sure)).foreseen
        == "1 of its own answers, 40 tokens each"
    )
