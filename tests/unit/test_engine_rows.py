"""Rows of a step: the same bits whichever way they are batched, cut or threaded; and clear words for bad ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from isthmus.engine.binding import cpu_names
from isthmus.engine.part import Rows, Want
from isthmus.engine.sampling import Sampling
from isthmus.protocol.errors import EngineError
from tests.native_tools import ALL, kv_bytes, open_part, run_tokens, some_tokens
from tests.random_model import RandomModel, random_config

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")

LENGTH = 41
TOKENS = some_tokens(LENGTH)
SAMPLING = Sampling(temperature=0.9, top_k=30, top_p=0.95, seed=11)
CHUNKS = {"one by one": [1] * LENGTH, "chunks": [16, 1, 7, 17], "two": [33, 8]}


@pytest.fixture(scope="module", params=[("q4", "f16"), ("f32", "f32"), ("q8", "f16")], ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[RandomModel, str]:
    weights, kv = request.param
    return RandomModel(weights, random_config(windows=(0, 13, 0))), kv


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_chunks_and_threads_leave_every_bit_alone(case: tuple[RandomModel, str], threads: int) -> None:
    model, kv = case
    whole = open_part(model, format=kv)
    expected = whole.open()
    logits, hidden, samples = run_tokens(whole, expected, TOKENS, [LENGTH], sampling=SAMPLING)
    assert len(set(samples)) > 5 and np.ptp(logits) > 1
    part = open_part(model, format=kv, threads=threads)
    assert part.threads == threads
    for name, steps in {"whole": [LENGTH], **CHUNKS}.items():
        sequence = part.open()
        found = run_tokens(part, sequence, TOKENS, steps, sampling=SAMPLING)
        assert found[0].tobytes() == logits.tobytes(), name
        assert found[1].tobytes() == hidden.tobytes(), name
        assert found[2] == samples, name
        assert kv_bytes(sequence) == kv_bytes(expected), name
        sequence.close()


@pytest.mark.parametrize("cpu", cpu_names())
def test_kernel_families_give_the_same_bits(case: tuple[RandomModel, str], cpu: str) -> None:
    model, kv = case
    plain, part = open_part(model, format=kv, cpu="plain"), open_part(model, format=kv, cpu=cpu, threads=2)
    assert part.cpu == cpu
    a, b = plain.open(), part.open()
    one, two = run_tokens(plain, a, TOKENS, [LENGTH]), run_tokens(part, b, TOKENS, [30, 1, 10])
    assert one[0].tobytes() == two[0].tobytes() and one[1].tobytes() == two[1].tobytes() and one[2] == two[2]
    assert kv_bytes(a) == kv_bytes(b)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_of_other_sequences_change_nothing(case: tuple[RandomModel, str], threads: int) -> None:
    model, kv = case
    part = open_part(model, format=kv, threads=threads)
    texts = [some_tokens(LENGTH, seed) for seed in range(4)]
    alone = []
    for text in texts:
        sequence = part.open()
        alone.append((run_tokens(part, sequence, text, [LENGTH], sampling=SAMPLING), kv_bytes(sequence)))
        sequence.close()
    rng = np.random.default_rng(threads)
    sequences = [part.open() for _ in texts]
    logits: list[list[Any]] = [[] for _ in texts]
    hidden: list[list[Any]] = [[] for _ in texts]
    samples: list[list[int]] = [[] for _ in texts]
    while any(s.length < LENGTH for s in sequences):
        rows, order = Rows(), []
        for i in rng.permutation(4):  # some decode, some prefill, some rest
            n = min(int(rng.choice([0, 1, 1, 5, 12])), LENGTH - sequences[i].length)
            if n:
                at = sequences[i].length
                rows.tokens(sequences[i], at, texts[i][at : at + n], want=ALL, want_all=True, sampling=SAMPLING)
                order += [int(i)] * n
        if not order:
            continue
        result = part.step(rows)
        for row, i in enumerate(order):
            logits[i].append(result.logits[row])
            hidden[i].append(result.hidden[row])
            samples[i].append(result.tokens[row])
    for i, (expected, memory) in enumerate(alone):
        assert np.stack(logits[i]).tobytes() == expected[0].tobytes()
        assert np.stack(hidden[i]).tobytes() == expected[1].tobytes()
        assert samples[i] == expected[2]
        assert kv_bytes(sequences[i]) == memory


@pytest.mark.parametrize("threads", [1, 2])
def test_every_cut_gives_the_same_logits(case: tuple[RandomModel, str], threads: int) -> None:
    """As two parts, and as one part that two sequences share, as a cloud serves both."""
    model, kv = case
    layers = model.config.n_layers
    whole = open_part(model, format=kv, threads=threads)
    sequence = whole.open()
    logits, _, samples = run_tokens(whole, sequence, TOKENS, [LENGTH], sampling=SAMPLING)
    for cut in range(1, layers):
        low, high = open_part(model, 0, cut, format=kv, threads=threads), open_part(model, cut, format=kv)
        for first, second in ((low, high), (whole, whole)):
            a, b = first.open(), second.open()
            for at, n in ((0, 9), (9, 1), (10, LENGTH - 10)):
                up = Rows().tokens(a, at, TOKENS[at : at + n], leave=cut, want=Want.HIDDEN, want_all=True)
                rest = Rows().hidden(
                    b, at, first.step(up).hidden, enter=cut, want=ALL, want_all=True, sampling=SAMPLING
                )
                result = second.step(rest)
                assert result.logits.tobytes() == logits[at : at + n].tobytes(), (cut, at)
                assert result.tokens == samples[at : at + n]
            assert a.length == b.length == LENGTH
            a.close()
            b.close()


def test_rows_of_different_layers_in_one_step(case: tuple[RandomModel, str]) -> None:
    """Rows that enter and leave at every layer beside each other, as if each went alone."""
    model, kv = case
    layers, part = model.config.n_layers, open_part(model, format=kv, threads=2)
    ways = [(enter, leave) for enter in range(layers + 1) for leave in range(enter, layers + 1)]
    inputs = np.random.default_rng(1).standard_normal((3, len(ways), model.config.d_model)).astype(np.float32)

    def rows_of(i: int, sequence: Any, at: int) -> Rows:
        enter, leave = ways[i]
        want = Want.HIDDEN | (Want.LOGITS if leave == layers else Want.NONE)
        if enter:
            return Rows().hidden(sequence, at, inputs[at : at + 1, i], enter=enter, leave=leave, want=want)
        return Rows().tokens(sequence, at, TOKENS[at : at + 1], leave=leave, want=want)

    together = [part.open() for _ in ways]
    for at in range(3):
        rows = Rows()
        for i, sequence in enumerate(together):
            rows.spans += rows_of(i, sequence, at).spans
        result = part.step(rows)
        full = [i for i, (_, leave) in enumerate(ways) if leave == layers]
        for i in range(len(ways)):
            alone = part.open()
            for before in range(at):
                part.step(rows_of(i, alone, before))
            single = part.step(rows_of(i, alone, at))
            assert single.hidden[0].tobytes() == result.hidden[i].tobytes(), ways[i]
            if i in full:
                assert single.logits[0].tobytes() == result.logits[full.index(i)].tobytes(), ways[i]
            alone.close()


def test_one_sequence_in_several_spans(case: tuple[RandomModel, str]) -> None:
    """The spans of a step may follow each other within a sequence, each with its own wishes."""
    model, kv = case
    part = open_part(model, format=kv)
    sequence = part.open()
    logits, hidden, _ = run_tokens(part, sequence, TOKENS, [LENGTH])
    other = part.open()
    rows = Rows().tokens(other, 0, TOKENS[:20], want=Want.NONE)
    rows.tokens(other, 20, TOKENS[20:21], want=Want.LOGITS)
    rows.tokens(other, 21, TOKENS[21:], want=Want.HIDDEN, want_all=True)
    result = part.step(rows)
    assert result.logits.tobytes() == logits[20:21].tobytes()
    assert result.hidden.tobytes() == hidden[21:].tobytes()
    assert kv_bytes(other) == kv_bytes(sequence) and other.length == LENGTH


def test_skipped_layers_are_filled_later(case: tuple[RandomModel, str]) -> None:
    """Rows that left early go on from their hidden states, in one batch with the next deeper row."""
    model, kv = case
    part = open_part(model, format=kv)
    whole = part.open()
    logits, _, _ = run_tokens(part, whole, TOKENS, [LENGTH])
    sequence = part.open()
    early = part.step(Rows().tokens(sequence, 0, TOKENS[:30], leave=1, want=Want.HIDDEN, want_all=True)).hidden
    rows = Rows().hidden(sequence, 0, early, enter=1, want=Want.LOGITS)
    rows.tokens(sequence, 30, TOKENS[30:31], want=Want.LOGITS)
    result = part.step(rows)
    assert result.logits.tobytes() == logits[29:31].tobytes()
    assert kv_bytes(sequence) == kv_bytes(whole)[: len(kv_bytes(sequence))]


def test_steps_longer_than_one_native_call() -> None:
    model, text = RandomModel("q4m"), some_tokens(600)
    part = open_part(model, threads=2, max_tokens=2048)
    a, b = part.open(), part.open()
    short = run_tokens(part, a, text, [100] * 6, sampling=SAMPLING)
    long = run_tokens(part, b, text, [600], sampling=SAMPLING)
    assert short[0].tobytes() == long[0].tobytes() and short[1].tobytes() == long[1].tobytes() and short[2] == long[2]
    assert kv_bytes(a) == kv_bytes(b)
    b.truncate(0)
    rows = Rows().tokens(b, 0, text[:300], want=Want.LOGITS).tokens(a, 600, text[:1], want=Want.LOGITS)
    cut = rows.hidden(part.open(), 0, short[1][:290], enter=2, want=Want.LOGITS, want_all=True)
    result = part.step(cut)
    assert result.logits.shape == (292, model.config.vocab_size)
    assert result.logits[0].tobytes() == short[0][299].tobytes()


def test_more_sequences_than_rows_of_a_call() -> None:
    part = open_part(RandomModel("q4"), max_tokens=300 * 16)
    sequences = [part.open() for _ in range(280)]
    expected = part.step(Rows().tokens(sequences[0], 0, TOKENS[:1], want=Want.LOGITS)).logits
    sequences[0].truncate(0)
    rows = Rows()
    for sequence in sequences:
        rows.tokens(sequence, 0, TOKENS[:1], want=Want.LOGITS)
    logits = part.step(rows).logits
    assert logits.tobytes() == expected.tobytes() * 280


def test_truncate_and_redo(case: tuple[RandomModel, str]) -> None:
    model, kv = case
    part = open_part(model, format=kv)
    sequence = part.open()
    logits, _, _ = run_tokens(part, sequence, TOKENS, [LENGTH])
    memory, free = kv_bytes(sequence), part.free_tokens
    for length in (LENGTH - 1, 33, 32, 16, 5, 0):
        sequence.truncate(length)
        assert sequence.length == length
        run_tokens(part, sequence, some_tokens(LENGTH - length, 9), [LENGTH - length])  # another ending
        sequence.truncate(length)
        again, _, _ = run_tokens(part, sequence, TOKENS[length:], [LENGTH - length])
        assert again.tobytes() == logits[length:].tobytes() and kv_bytes(sequence) == memory
        assert part.free_tokens == free
    for wrong in (-1, LENGTH + 1):
        with pytest.raises(EngineError, match="go back"):
            sequence.truncate(wrong)
    assert sequence.length == LENGTH


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return RandomModel("q4")


class TestBadRows:
    """Each is one error with words, and leaves the sequence as it was."""

    def refuse(self, part: Any, rows: Rows, match: str) -> None:
        with pytest.raises(EngineError, match=match) as caught:
            part.step(rows)
        assert caught.value.problem and "\n" not in str(caught.value)

    def test_all(self, model: RandomModel) -> None:
        part, other = open_part(model), open_part(model)
        upper, lower = open_part(model, 1), open_part(model, 0, 2)
        d = model.config.d_model
        state = np.zeros((2, d), np.float32)
        closed, held = part.open(), part.open()
        closed.close()
        part.step(Rows().tokens(held, 0, [1, 2, 3]))
        memory, free = kv_bytes(held), part.free_tokens
        self.refuse(part, Rows().tokens(closed, 0, [1]), "closed")
        self.refuse(part, Rows().tokens(other.open(), 0, [1]), "another part")
        self.refuse(part, Rows(), "row")
        self.refuse(part, Rows().tokens(held, 3, []), "0 rows")
        for token in (-1, 101, 2**31):
            self.refuse(part, Rows().tokens(held, 3, [4, token, 5]), f"token {token}")
            self.refuse(part, Rows().tokens(held, 3, [token]), f"token {token}")
        for position in (-1, 4, 500):
            self.refuse(part, Rows().tokens(held, position, [1]), f"position {position}")
        self.refuse(part, Rows().tokens(held, 3, [1]).tokens(held, 5, [1]), "position 5")
        self.refuse(part, Rows().tokens(held, 3, [1], leave=2, want=Want.LOGITS), "head")
        self.refuse(lower, Rows().tokens(lower.open(), 0, [1], want=Want.SAMPLE), "head")
        self.refuse(upper, Rows().tokens(upper.open(), 0, [1]), r"layers \[0, 3\)")
        for enter, leave in ((-1, 2), (2, 1), (0, 4), (4, 4)):
            rows = Rows().hidden(held, 3, state, enter=enter, leave=leave, want=Want.HIDDEN)
            self.refuse(part, rows, "layers")
        self.refuse(upper, Rows().hidden(upper.open(), 0, state, enter=0), "layers")
        for wrong in (state.astype(np.float64), state[:, :-1], state[0], np.zeros((2, d, 1), np.float32)):
            rows = Rows()
            rows.spans = Rows().hidden(held, 3, state, enter=1).spans
            rows.spans[0].hidden_in = wrong  # type: ignore[assignment]
            self.refuse(part, rows, "hidden states are")
        for value in (np.nan, np.inf, -np.inf):
            broken = state.copy()
            broken[1, d - 1] = value
            self.refuse(part, Rows().hidden(held, 3, broken, enter=1), "not finite")
            self.refuse(part, Rows().hidden(held, 3, broken[1:], enter=1), "not finite")
        assert held.length == 3 and kv_bytes(held) == memory and part.free_tokens == free
        assert len(part.step(Rows().tokens(held, 3, [1])).tokens) == 1

    def test_a_good_row_beside_a_bad_one_is_not_computed(self, model: RandomModel) -> None:
        part = open_part(model)
        good, bad = part.open(), part.open()
        self.refuse(part, Rows().tokens(good, 0, [1, 2]).tokens(bad, 0, [1, 777]), "token 777")
        assert good.length == bad.length == 0 and part.free_tokens == 1024

    def test_hidden_states_that_are_not_contiguous(self, model: RandomModel) -> None:
        part = open_part(model)
        wide = np.random.default_rng(0).standard_normal((6, 2 * model.config.d_model)).astype(np.float32)
        view = wide[::2, ::2]
        a, b = part.open(), part.open()
        one = part.step(Rows().hidden(a, 0, view, enter=1, want=Want.LOGITS))
        two = part.step(Rows().hidden(b, 0, view.copy(), enter=1, want=Want.LOGITS))
        assert one.logits.tobytes() == two.logits.tobytes()

    def test_a_closed_part(self, model: RandomModel) -> None:
        part = open_part(model)
        sequence = part.open()
        part.close()
        self.refuse(part, Rows().tokens(sequence, 0, [1]), "closed")
        with pytest.raises(EngineError, match="closed"):
            part.open()

    def test_closed_sequences(self, model: RandomModel) -> None:
        sequence = open_part(model).open()
        sequence.close()
        sequence.close()
        for call in (sequence.fork, lambda: sequence.truncate(0)):
            with pytest.raises(EngineError, match="closed"):
                call()


def test_weights_that_do_not_fit_are_refused() -> None:
    model = RandomModel("q4")
    for name, wrong, match in [
        ("q", None, "no 'q'"),
        ("down", model.layers[0]["up"], "'down' of layer 1 is"),
        ("attn_norm", np.ones(5, np.float32), "attn_norm"),
        ("q_bias", np.ones(5, np.float32), "q_bias"),
        ("k_norm", None, "k_norm"),
    ]:
        broken = RandomModel("q4")
        if wrong is None:
            del broken.layers[1][name]
        else:
            broken.layers[1][name] = wrong
        with pytest.raises(EngineError, match=match):
            open_part(broken)
    broken = RandomModel("q4")
    broken._config = replace(broken.config, vocab_size=500)
    with pytest.raises(EngineError, match="embedding"):
        open_part(broken)
    broken._config = model.config
    broken._norm = np.ones(3, np.float32)
    with pytest.raises(EngineError, match="final norm"):
        open_part(broken)
    for start, end in ((-1, 2), (2, 2), (0, 4)):
        with pytest.raises(EngineError, match="layers"):
            open_part(model, start, end)
