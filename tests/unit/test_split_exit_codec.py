"""How states travel from an exit: the smallest codec that changes few of the model's choices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from isthmus.engine import KvConfig, open_part
from isthmus.protocol import tensors
from isthmus.protocol.channels import ChannelStats
from isthmus.protocol.tensors import ENTROPY_CODECS
from isthmus.split import exit_codec
from isthmus.split.bundle import Bundle
from isthmus.split.exit_codec import CodecTrials, Tried
from isthmus.split.exit_states import Sample, States
from tests.edge_bundle import CONFIG, write_tiny

LAYER, ANSWER = 2, 6
NAMED: dict[str, Any] = {"exit": "ab" * 32, "data": "cd" * 32}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(write_tiny(tmp_path_factory.mktemp("bundle") / "b"))


@pytest.fixture(scope="module")
def states(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> States:
    rng = np.random.default_rng(3)
    samples = [Sample(rng.integers(0, CONFIG.vocab_size, 20 + i).tolist(), ANSWER) for i in range(12)]
    found = States(tmp_path_factory.mktemp("states"), samples, [LAYER], CONFIG.d_model, bundle.model_id)
    part = open_part(bundle, 0, CONFIG.n_layers, threads=1, kv=KvConfig("f16", 256))
    found.collect(part)
    part.close()
    return found


@pytest.fixture(scope="module")
def stats(states: States) -> ChannelStats:
    rows = np.concatenate([np.asarray(states.before(LAYER, i)[1:], np.float32) for i in range(len(states.samples))])
    return ChannelStats.of(rows)


@pytest.fixture
def trials(bundle: Bundle, states: States, stats: ChannelStats) -> Iterator[CodecTrials]:
    with CodecTrials(bundle, LAYER, states, stats) as opened:
        yield opened


def test_states_as_they_are_keep_the_choices(trials: CodecTrials, states: States) -> None:
    found = trials.tried("f32")
    answered = sum(len(sample.tokens) - sample.answer for sample in states.samples)
    assert found.tokens == answered and found.agreement > 0.95  # kept in f16: a near-tie may turn
    assert found.row_bytes == pytest.approx(4 * CONFIG.d_model, rel=0.2)


def test_a_row_costs_what_it_costs_on_the_wire(trials: CodecTrials, states: States, stats: ChannelStats) -> None:
    size = rows = 0
    for index in range(len(states.samples)):
        hidden = np.asarray(states.before(LAYER, index), np.float32)
        size += len(tensors.encode(hidden, "ecsq4", plain=1, stats=stats).data) - 2 * CONFIG.d_model
        rows += len(hidden) - 1
    assert trials.tried("ecsq4").row_bytes == size / rows


def test_the_coarser_a_codec_the_smaller_and_the_less_true(trials: CodecTrials) -> None:
    coarse, fine = trials.tried("ecsq2"), trials.tried("ecsq32")
    assert coarse.row_bytes < fine.row_bytes and coarse.agreement < fine.agreement


@pytest.mark.parametrize("loss", [0.0, 0.05, 0.2, 1.0])
def test_the_smallest_that_loses_no_more_than_allowed(trials: CodecTrials, loss: float) -> None:
    told: list[tuple[int, int]] = []
    found = trials.smallest(loss, **NAMED, progress=lambda done, total: told.append((done, total)))
    names = (*ENTROPY_CODECS, "f16")
    tried = {name: trials.tried(name) for name in names}
    assert found.exact == tried["f16"].agreement
    assert Tried(found.agreement, found.row_bytes, found.tokens) == tried[found.name]
    assert found.agreement >= found.exact - loss
    assert all(tried[name].agreement < found.exact - loss for name in names[: names.index(found.name)])
    assert (found.loss, found.exit, found.data) == (loss, NAMED["exit"], NAMED["data"])
    assert told[-1] == (len(names), len(names))
    found.check("here")


def test_f16_where_no_smaller_one_will_do(trials: CodecTrials, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trials.tried
    monkeypatch.setattr(trials, "tried", lambda name: whole(name) if name == "f16" else Tried(0.0, 1.0, 9))
    found = trials.smallest(0.02, **NAMED)
    assert found.name == "f16" and found.agreement == found.exact


def test_states_too_wide_for_entropy_codes_travel_as_f16(
    bundle: Bundle, states: States, stats: ChannelStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exit_codec, "ENTROPY_MAX_WIDTH", CONFIG.d_model - 1)
    with CodecTrials(bundle, LAYER, states, stats) as trials:
        assert trials.smallest(1.0, **NAMED).name == "f16"
