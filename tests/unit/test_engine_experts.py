"""Mixtures of experts whose weights come and go while a step waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from isthmus.engine.binding import cpu_names
from isthmus.engine.config import ExpertsConfig
from isthmus.engine.experts import Expert, Wanted
from isthmus.engine.native_part import NativePart, chain
from isthmus.engine.part import Rows, Want
from isthmus.protocol.errors import EngineError
from isthmus.quant.packed import PackedMatrix
from tests.expert_shelf import Shelf
from tests.native_tools import ALL, kv_bytes, open_part, run_tokens, some_tokens
from tests.random_model import RandomModel, random_config

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
EXPERTS = ExpertsConfig(n_experts=8, top_k=2, d_expert=40)
TEXT = some_tokens(40)


@pytest.fixture(scope="module", params=["q4", "f32", "n8"])
def model(request: pytest.FixtureRequest) -> RandomModel:
    return RandomModel(request.param, random_config(experts=EXPERTS))


def paged(model: RandomModel, room: int, threads: int = 1) -> tuple[NativePart, Shelf]:
    shelf = Shelf(model, room)
    return open_part(model, threads=threads, experts=shelf), shelf


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("room", [1, 2, 8, 11, 24])
def test_few_experts_in_memory_change_no_bit(model: RandomModel, threads: int, room: int) -> None:
    whole = open_part(model)
    one = whole.open()
    expected = run_tokens(whole, one, TEXT, [40])
    part, shelf = paged(model, room, threads)
    for steps in ([1] * 40, [40], [13, 1, 26]):
        sequence = part.open()
        found = run_tokens(part, sequence, TEXT, steps)
        assert found[0].tobytes() == expected[0].tobytes() and found[1].tobytes() == expected[1].tobytes()
        assert found[2] == expected[2] and kv_bytes(sequence) == kv_bytes(one)
        sequence.close()
    assert shelf.asked[0][0] == 0 and {layer for layer, _ in shelf.asked} == {0, 1, 2}
    most = 3 * EXPERTS.n_experts
    assert sum(len(experts) for _, experts in shelf.asked) <= most if room == 24 else len(shelf.asked) > 3
    assert len(shelf.held) <= room


def test_mixed_rows_pause_in_every_segment(model: RandomModel) -> None:
    """Rows that enter and leave in the middle, with a source that must change experts in between."""
    hidden = np.random.default_rng(0).standard_normal((5, model.config.d_model)).astype(np.float32)
    results = []
    for part in (open_part(model), paged(model, 8)[0], paged(model, 8, 2)[0]):
        a, b, c = part.open(), part.open(), part.open()
        rows = Rows().tokens(a, 0, TEXT[:9], leave=2, want=Want.HIDDEN, want_all=True)
        rows.hidden(b, 0, hidden, enter=1, want=ALL).tokens(c, 0, TEXT[3:6], want=ALL, want_all=True)
        result = part.step(rows)
        results.append((result.hidden.tobytes(), result.logits.tobytes(), result.tokens))
    assert results[0] == results[1] == results[2]


def test_a_chain_shares_one_source() -> None:
    model = RandomModel("q4", random_config(experts=EXPERTS))
    whole = open_part(model)
    expected = run_tokens(whole, whole.open(), TEXT, [40])
    shelf = Shelf(model, 9)
    linked = chain([open_part(model, i, i + 1, experts=shelf) for i in range(3)])
    for steps in ([40], [1] * 40):
        found = run_tokens(linked, linked.open(), TEXT, steps)
        assert found[0].tobytes() == expected[0].tobytes()


class Odd(Shelf):
    """A source that does something wrong once it is told to."""

    wrong = ""

    def want(self, step: int, layer: int, wanted: Sequence[Wanted], foreseen: Sequence[Wanted]) -> None:
        if self.wrong == "raises":
            raise OSError("the disk is gone")
        if self.wrong == "nothing":
            return
        super().want(step, layer, wanted, foreseen)
        first, table = wanted[0].expert, self.tables.layer(layer)
        if self.wrong == "evicts itself":
            table.evict(first)
        if self.wrong == "evicts twice":
            self.tables.layer(2 - layer).evict(7)
        if self.wrong == "number":
            table.place(8, self.expert(layer, first))
        if self.wrong == "shape":
            e = self.expert(layer, first)
            table.place(first, Expert(e.gate, e.down, e.up))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ("nothing", "did not bring"),
        ("evicts itself", "while it is computed"),
        ("evicts twice", "not held"),
        ("number", "no expert 8"),
        ("shape", "'up' of expert"),
    ],
)
def test_a_wrong_source_is_one_error(wrong: str, match: str) -> None:
    model = RandomModel("q4", random_config(experts=EXPERTS))
    source = Odd(model, 24)
    part = open_part(model, experts=source)
    sequence = part.open()
    source.wrong = wrong
    with pytest.raises(EngineError, match=match):
        part.step(Rows().tokens(sequence, 0, TEXT[:20]))
    assert sequence.length == 0 and part.free_tokens == 1024


def test_a_step_can_be_repeated_after_its_source_failed() -> None:
    model = RandomModel("q4", random_config(experts=EXPERTS))
    whole = open_part(model)
    expected, _, _ = run_tokens(whole, whole.open(), TEXT, [40])
    source = Odd(model, 12)
    part = open_part(model, threads=2, experts=source)
    sequence = part.open()
    run_tokens(part, sequence, TEXT[:10], [10])
    source.wrong = "raises"
    with pytest.raises(OSError, match="disk"):
        part.step(Rows().tokens(sequence, 10, TEXT[10:]))
    assert sequence.length == 10
    source.wrong = ""
    found, _, _ = run_tokens(part, sequence, TEXT[10:], [30])
    assert found.tobytes() == expected[10:].tobytes()


def test_experts_that_left_are_not_kept_alive() -> None:
    """The engine holds on to resident experts only, so a source's byte budget is the process's."""
    import gc
    import weakref

    model = RandomModel("q4", random_config(experts=EXPERTS))
    part, shelf = paged(model, 6)
    made: list[weakref.ref[np.ndarray]] = []
    plain = shelf.expert

    def watched(layer: int, index: int) -> Expert:
        expert = plain(layer, index)
        made.append(weakref.ref(cast(np.ndarray, expert.gate.arrays["codes"])))
        return expert

    shelf.expert = watched  # type: ignore[method-assign]
    sequence = part.open()
    for at, token in enumerate(TEXT):
        part.step(Rows().tokens(sequence, at, [token]))
    gc.collect()
    assert len(made) > 20
    assert sum(ref() is not None for ref in made) == len(shelf.held) <= 6


def test_the_weights_of_experts_are_the_softmax_of_the_router() -> None:
    """Against a float64 mixture of the same experts, each alone as a dense model of one layer."""
    for renormalize in (True, False):
        experts = ExpertsConfig(4, 3, 40, renormalize)
        model = RandomModel("f32", random_config(n_layers=1, experts=experts))
        part = open_part(model, format="f32")
        state = np.random.default_rng(1).standard_normal((1, model.config.d_model)).astype(np.float32)
        out = part.step(Rows().hidden(part.open(), 0, state, enter=0, want=Want.HIDDEN)).hidden[0]
        layer = model.layers[0]
        deltas, after = [], None
        for e in range(4):
            dense = RandomModel("f32", random_config(n_layers=1))
            dense.layers[0] = {k: v for k, v in layer.items() if not k.startswith(("experts", "router"))}
            dense.layers[0] |= {n: layer[f"experts.{e}.{n}"] for n in ("gate", "up", "down")}
            alone = open_part(dense, format="f32")
            deltas.append(alone.step(Rows().hidden(alone.open(), 0, state, enter=0, want=Want.HIDDEN)).hidden[0])
            zero = cast(PackedMatrix, dense.layers[0]["down"])
            nothing = {"w": np.zeros_like(zero.arrays["w"])}
            dense.layers[0]["down"] = PackedMatrix("f32", zero.rows, zero.cols, nothing)
            alone = open_part(dense, format="f32")
            after = alone.step(Rows().hidden(alone.open(), 0, state, enter=0, want=Want.HIDDEN)).hidden[0]
        assert after is not None
        x = after.astype(np.float64)
        normed = x / np.sqrt((x**2).mean() + 1e-5) * cast("np.ndarray", layer["ffn_norm"])
        scores = cast("np.ndarray", layer["router"]).astype(np.float64) @ normed
        p = np.exp(scores - scores.max())
        p /= p.sum()
        best = np.argsort(-p)[:3]
        weights = p[best] / (p[best].sum() if renormalize else 1)
        expected = x + sum(w * (deltas[e] - x) for w, e in zip(weights, best, strict=True))
        assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max()
