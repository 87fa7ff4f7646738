"""States along samples, and heads trained on them, on a small random model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training exits needs torch==2.13.0")

from isthmus.engine import KvConfig  # noqa: E402
from isthmus.engine import open_part as open_engine_part  # noqa: E402
from isthmus.engine.part import Part, Rows, Want  # noqa: E402
from isthmus.protocol.channels import ChannelStats  # noqa: E402
from isthmus.protocol.errors import BundleError, ModelError  # noqa: E402
from isthmus.split.exit_scores import ExitScores  # noqa: E402
from isthmus.split.exit_states import Sample, States, questions, read_texts  # noqa: E402
from isthmus.split.exit_training import (  # noqa: E402
    ExitHead,
    Recipe,
    Teacher,
    agreement,
    channels,
    foresee,
    frequent_tokens,
    least_squares,
    train,
)
from isthmus.split.exits import ExitSource  # noqa: E402
from tests.native_tools import open_part  # noqa: E402
from tests.random_model import RandomModel, random_config, random_matrix  # noqa: E402

MODEL = RandomModel("f32", random_config(full=False), seed=3)
WIDTH = MODEL.config.d_model
SHORT = Recipe(d_ff=48, epochs=2, batch_tokens=256, warmup=2)
Trained = tuple[States, ExitHead]


@pytest.fixture(scope="module")
def part() -> Iterator[Part]:
    part = open_part(MODEL, format="f32")
    yield part
    part.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, part: Part) -> Trained:
    """A head for the exit before layer 2, trained for a moment."""
    states = collected(tmp_path_factory.mktemp("states") / "s", part, 40, [2])
    return states, train(states, list(range(40)), 2, Teacher(MODEL), SHORT)


def samples(count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample(rng.integers(0, 101, rng.integers(9, 40)).tolist()) for _ in range(count)]


def collected(folder: Path, part: Part, count: int, layers: list[int], seed: int = 0) -> States:
    states = States(folder, samples(count, seed), layers, WIDTH, "aa")
    states.collect(part)
    return states


def test_states_are_the_engines(tmp_path: Path, part: Part) -> None:
    states = collected(tmp_path / "s", part, 3, [1, 2])
    tokens = states.samples[1].tokens
    sequence = part.open()
    result = part.step(Rows().tokens(sequence, 0, tokens, want=Want.LOGITS | Want.HIDDEN, want_all=True))
    assert states.choices(1).tolist() == result.logits.argmax(axis=1).tolist()
    np.testing.assert_array_equal(states.last(1), result.hidden.astype(np.float16))
    sequence.truncate(0)
    for layer in (1, 2):
        sequence.truncate(0)
        rows = Rows().tokens(sequence, 0, tokens, leave=layer, want=Want.HIDDEN, want_all=True)
        np.testing.assert_array_equal(states.before(layer, 1), part.step(rows).hidden.astype(np.float16))
    sequence.close()


def test_a_run_that_was_stopped_goes_on_where_it_ended(
    tmp_path: Path, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.split.exit_states._SAVE_EVERY", 2)
    whole = collected(tmp_path / "whole", part, 5, [2])

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        States(tmp_path / "s", samples(5), [2], WIDTH, "aa").collect(part, stop)
    states = States(tmp_path / "s", samples(5), [2], WIDTH, "aa")
    assert states.done == 2
    seen: list[int] = []
    states.collect(part, lambda done, _: seen.append(done))
    assert seen == [3, 4, 5]
    for index in range(5):
        np.testing.assert_array_equal(states.before(2, index), whole.before(2, index))
        np.testing.assert_array_equal(states.choices(index), whole.choices(index))


def test_states_of_something_else_are_made_anew(tmp_path: Path, part: Part) -> None:
    collected(tmp_path / "s", part, 4, [2])
    assert States(tmp_path / "s", samples(4), [2], WIDTH, "aa").done == 4
    assert States(tmp_path / "s", samples(4), [2], WIDTH, "bb").done == 0
    collected(tmp_path / "s", part, 4, [2])
    assert States(tmp_path / "s", samples(4, seed=1), [2], WIDTH, "aa").done == 0
    (tmp_path / "s" / "states.json").write_text("{")
    assert States(tmp_path / "s", samples(4), [2], WIDTH, "aa").done == 0


def test_least_squares_finds_a_linear_map(tmp_path: Path, part: Part) -> None:
    states = collected(tmp_path / "s", part, 60, [3])  # before a layer that is not there: the last states themselves
    found = least_squares(states, list(range(60)), 3)
    assert torch.dist(found, torch.eye(WIDTH)) < 0.1 * WIDTH**0.5


def test_training_teaches(tmp_path: Path, part: Part) -> None:
    states, teacher, every = collected(tmp_path / "s", part, 100, [2]), Teacher(MODEL), list(range(100))
    start = ExitHead(MODEL.config, 32, teacher.norm, None)
    linear = ExitHead(MODEL.config, 32, teacher.norm, least_squares(states, every, 2))
    steps: list[tuple[int, int]] = []
    recipe = Recipe(d_ff=64, epochs=8, batch_tokens=512, warmup=5)
    head = train(states, every, 2, teacher, recipe, lambda done, total, _: steps.append((done, total)))
    found = [agreement(one, states, every, 2, teacher) for one in (start, linear, head)]
    assert found[0] < found[1] < found[2] - 0.05, found
    assert steps[-1][0] == steps[-1][1] == len(steps)


def test_training_gives_the_same_head_again(trained: Trained, part: Part) -> None:
    states, head = trained
    again = train(states, list(range(40)), 2, Teacher(MODEL), SHORT)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


def test_what_a_head_foresees_counts_from_the_answer_on(tmp_path: Path, part: Part) -> None:
    states = States(tmp_path / "s", [Sample(list(range(20)), 12), Sample(list(range(20)))], [2], WIDTH, "aa")
    states.collect(part)
    teacher = Teacher(MODEL)
    head = ExitHead(MODEL.config, 32, teacher.norm, None)
    answer, text = (foresee(head, states, index, 2, teacher) for index in (0, 1))
    assert len(answer.tokens) == 9 and len(text.tokens) == 20  # the state at 11 foresees token 12
    assert answer.tokens.tolist() == text.tokens.tolist()[11:]
    assert ((answer.confidence > 0) & (answer.confidence <= 1)).all()
    assert answer.right.tolist() == [t == c for t, c in zip(answer.tokens, states.choices(0)[11:], strict=True)]


def test_texts_are_read_from_files_and_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One document.\nTwo lines.")
    (tmp_path / "b.jsonl").write_text('{"id": 3, "0": "first", "1": "second"}\n{"title": "x", "text": "the text"}\n')
    assert read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == [
        "One document.\nTwo lines.", "first", "the text",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", b"\xff\xfe\x00", "cannot be read as text"),
        ("a.txt", b" \n", "holds no text"),
        ("a.jsonl", b'{"0": "a"}\n[1]\n', "line 2 of .*a.jsonl is no JSON object with a text"),
        ("a.jsonl", b'{"0": 1}\n', "line 1 of"),
        ("none.txt", None, "cannot be read as text"),
    ],
)
def test_what_is_no_text_is_refused(name: str, data: bytes | None, says: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelError, match=says):
        read_texts([tmp_path / name])


def test_questions_are_the_same_for_the_same_seed() -> None:
    texts = [f"text {i}" for i in range(30)]
    asked = questions(texts, 40)
    assert len(asked) == len(set(asked)) == 40 and asked == questions(texts, 40) != questions(texts, 40, seed=1)
    assert sum("text " in question for question in asked) == 20


@pytest.mark.parametrize(("format", "least"), [("f32", 0.99), ("q8", 0.9), ("q4", 0.6)])
def test_the_engine_says_what_the_trained_head_says(format: str, least: float, trained: Trained) -> None:
    states, head = trained
    teacher = Teacher(MODEL)
    running = open_engine_part(ExitSource(MODEL, 2, head.weights(format)), 2, 3, threads=1, kv=KvConfig("f32", 256))
    same = []
    for index in range(40):
        sequence = running.open()
        rows = Rows().hidden(sequence, 0, states.before(2, index).astype(np.float32), enter=2, want_all=True)
        said = foresee(head, states, index, 2, teacher).tokens
        same += [a == b for a, b in zip(running.step(rows).tokens, said, strict=True)]
        sequence.close()
    running.close()
    assert np.mean(same) >= least


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"final_norm": None}, "no final_norm"),
        ({"input": None}, "no input"),
        ({"q": None}, "'q' of layer 2 is missing"),
        ({"gate": random_matrix("f32", 7, WIDTH, np.random.default_rng(0))}, "'up' of layer 2 is .*, not"),
        ({"surprise": np.zeros(3, np.float32)}, "unknown weight 'surprise'"),
    ],
)
def test_weights_of_another_shape_are_refused(change: dict[str, Any], says: str) -> None:
    head = ExitHead(MODEL.config, 48, MODEL.final_norm(), None)
    weights = {name: value for name, value in {**head.weights("f32"), **change}.items() if value is not None}
    with pytest.raises(BundleError, match=says):
        ExitSource(MODEL, 2, weights)


def test_an_exit_stands_before_a_layer_that_is_there() -> None:
    weights = ExitHead(MODEL.config, 48, MODEL.final_norm(), None).weights("f32")
    for layer in (0, 3, -1):
        with pytest.raises(BundleError, match="choose 1"):
            ExitSource(MODEL, layer, weights)
    with pytest.raises(BundleError, match=r"open it as layers \[2, 3\)"):
        ExitSource(MODEL, 2, weights).layer(1)


def test_a_training_that_was_stopped_goes_on_where_it_ended(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.split.exit_training.KEPT_STEPS", 2)
    states, whole = trained
    every, teacher, kept = list(range(40)), Teacher(MODEL), tmp_path / "work" / "t.pt"

    def stop(done: int, *_: object) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(states, every, 2, teacher, SHORT, stop, kept)
    steps: list[int] = []
    head = train(states, every, 2, teacher, SHORT, lambda done, *_: steps.append(done), kept)
    assert steps[0] == 5 and len(steps) > 1
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), whole.parameters(), strict=True))
    steps.clear()
    again = train(states, every, 2, teacher, SHORT, lambda done, *_: steps.append(done), kept)
    assert steps == []
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", b"\x80\x02]q."])
def test_a_kept_training_that_is_damaged_or_another_is_made_anew(
    damage: bytes, trained: Trained, tmp_path: Path
) -> None:
    states, whole = trained
    every, teacher, kept = list(range(40)), Teacher(MODEL), tmp_path / "t.pt"
    kept.write_bytes(damage)
    steps: list[int] = []
    head = train(states, every, 2, teacher, SHORT, lambda done, *_: steps.append(done), kept)
    assert steps[0] == 1
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), whole.parameters(), strict=True))
    other = Recipe(d_ff=48, epochs=2, batch_tokens=256, warmup=2, seed=1)
    steps.clear()
    train(states, every, 2, teacher, other, lambda done, *_: steps.append(done), kept)
    assert steps[0] == 1


def test_channels_are_those_of_the_states(trained: Trained) -> None:
    states, _ = trained
    found = channels(states, list(range(40)), 2)
    every = np.concatenate([states.before(2, index)[1:] for index in range(40)])
    assert found.digest == ChannelStats.of(every).digest
    np.testing.assert_allclose(found.mean, every.astype(np.float64).mean(axis=0), rtol=1e-5, atol=1e-6)


def test_channels_of_many_states_are_those_of_some(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    states, _ = trained
    monkeypatch.setattr("isthmus.split.exit_training.CHANNEL_ROWS", 100)
    some, every = channels(states, list(range(40)), 2), channels(states, list(range(4)), 2)
    assert some.width == every.width == WIDTH and some.digest != every.digest


def test_frequent_tokens_are_the_most_frequent_choices(trained: Trained) -> None:
    states, _ = trained
    choices = np.concatenate([states.choices(index) for index in range(40)])
    found = frequent_tokens(states, list(range(40)), 5)
    counts = np.bincount(choices)
    assert len(set(found.tolist())) == 5 and counts[found].tolist() == sorted(counts.tolist())[-1:-6:-1]


@pytest.mark.parametrize("count", [0, 60])
def test_scores_are_what_the_head_foresees(count: int, trained: Trained, part: Part, tmp_path: Path) -> None:
    _, head = trained
    given = [Sample(list(range(30)), 12), Sample(list(range(50, 90)))]
    states = States(tmp_path / "s", given, [2], WIDTH, "aa")
    states.collect(part)
    teacher, tokens = Teacher(MODEL), None
    if count:
        tokens = np.sort(frequent_tokens(trained[0], list(range(40)), count)).astype(np.int32)
        teacher.head = teacher.head[torch.from_numpy(tokens).long()]
    with ExitScores(ExitSource(MODEL, 2, head.weights("f32"), tokens), 2, states) as scores:
        for index, end in ((0, 18), (1, 40)):  # of answers only what stands in them
            said, wanted = scores.along(index), foresee(head, states, index, 2, teacher)
            named = wanted.tokens if tokens is None else tokens[wanted.tokens]
            start = max(0, given[index].answer - 1)
            assert len(said.right) == end
            np.testing.assert_allclose(said.confidence, wanted.confidence[:end], rtol=2e-3)
            assert np.mean(said.right == (named[:end] == states.choices(index)[start : start + end])) > 0.95
