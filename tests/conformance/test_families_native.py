"""Every family on the native engine in float32 against `transformers`, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="torch is what the engine is held against; pip install torch transformers")
pytest.importorskip("transformers", reason="transformers is what the engine is held against")

from isthmus.engine.binding import cpu_names
from isthmus.engine.native_part import NativePart, chain, open_native
from isthmus.engine.part import KvConfig, Rows, Want
from tests.conformance.tiny import CASES, VOCAB, build

pytestmark = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")

LENGTH = 37
# Sizes that fit neither lanes nor groups: name -> (case of tiny.py, settings).
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-head-10": ("llama", {"head_dim": 10}),
    "qwen2-head-6": ("qwen2", {"hidden_size": 24}),
    "qwen3-head-6": ("qwen3", {"head_dim": 6, "rms_norm_eps": 1e-2}),
    "qwen3-one-head": ("qwen3", {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 50}),
}
LOGITS = Want.LOGITS


class Case:
    """A tiny model, its part, and what `transformers` makes of `tokens`."""

    def __init__(self, family: str, folder: Path) -> None:
        name, settings = ODD.get(family, (family, {}))
        self.tiny = build(name, folder, seed=len(family), **settings)
        self.tokens = np.random.default_rng(1).integers(0, VOCAB, LENGTH).tolist()
        self.other = np.random.default_rng(2).integers(0, VOCAB, LENGTH).tolist()
        self.logits, self.other_logits = self.tiny.logits([self.tokens, self.other])  # [LENGTH, vocab_size]
        self.hidden = [h[0] for h in self.tiny.hidden([self.tokens])]  # before each layer
        self.layers = self.tiny.source.config.n_layers
        self.part = self.open(0, self.layers)

    def open(self, start: int, end: int, threads: int = 2) -> NativePart:
        return open_native(self.tiny.source, start, end, threads=threads, kv=KvConfig("f32", 512))


@pytest.fixture(scope="module", params=[*CASES, *ODD])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("tiny"))


def close(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Largest difference of every position (row) below 1e-4 of its largest number."""
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max(axis=1) / np.abs(expected).max(axis=1)
    assert error.max() < 1e-4, error


@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [7, 1, 1, 21, 7], [16, 21]], ids=len)
def test_prefill_decode_and_chunks(case: Case, chunks: list[int]) -> None:
    sequence, logits, at = case.part.open(), [], 0
    for n in chunks:
        rows = Rows().tokens(sequence, at, case.tokens[at : at + n], want=LOGITS, want_all=True)
        logits.append(case.part.step(rows).logits)
        at += n
    close(np.concatenate(logits), case.logits)
    assert sequence.length == LENGTH
    sequence.close()


def test_every_cut(case: Case) -> None:
    """Device half and cloud half as two parts, and over two sequences as one part."""
    for cut in range(1, case.layers):
        low, high = case.open(0, cut), case.open(cut, case.layers, threads=1)
        for first, second in ((low, high), (case.part, case.part)):
            a, b = first.open(), second.open()
            for at, n in ((0, 9), (9, 1), (10, LENGTH - 10)):
                rows = Rows().tokens(a, at, case.tokens[at : at + n], leave=cut, want=Want.HIDDEN, want_all=True)
                hidden = first.step(rows).hidden
                close(hidden, case.hidden[cut][at : at + n])
                rows = Rows().hidden(b, at, hidden, enter=cut, want=LOGITS, want_all=True)
                close(second.step(rows).logits, case.logits[at : at + n])
            a.close()
            b.close()
        low.close()
        high.close()


def test_mixed_rows(case: Case) -> None:
    """Prefill of one text, decode of another and hidden states of a third sequence in one step."""
    part, cut = case.part, 1
    one, two, three = part.open(), part.open(), part.open()
    part.step(Rows().tokens(two, 0, case.other[:12], want=Want.NONE))
    rows = Rows().tokens(one, 0, case.tokens[:8], want=LOGITS, want_all=True)
    rows.tokens(two, 12, case.other[12:13], want=LOGITS | Want.SAMPLE)
    rows.hidden(three, 0, case.hidden[cut], enter=cut, want=LOGITS)
    rows.tokens(one, 8, case.tokens[8:9], want=LOGITS)
    out = part.step(rows)
    close(out.logits[:8], case.logits[:8])
    close(out.logits[8:9], case.other_logits[12:13])
    close(out.logits[9:], case.logits[[LENGTH - 1, 8]])
    assert out.tokens == [int(np.argmax(case.other_logits[12]))]
    for sequence in (one, two, three):
        sequence.close()


def test_fork_and_truncate(case: Case) -> None:
    part = case.part
    trunk = part.open()
    part.step(Rows().tokens(trunk, 0, case.tokens[:10], want=Want.NONE))
    branch = trunk.fork()
    part.step(Rows().tokens(trunk, 10, case.other[10:15], want=Want.NONE))
    trunk.truncate(10)
    for sequence in (trunk, branch):
        out = part.step(Rows().tokens(sequence, 10, case.tokens[10:], want=LOGITS, want_all=True))
        close(out.logits, case.logits[10:])
        sequence.close()
    assert part.free_tokens == 512


def test_a_chain_of_single_layers(case: Case) -> None:
    linked = chain([case.open(i, i + 1) for i in range(case.layers)])
    rows = Rows().tokens(linked.open(), 0, case.tokens, want=LOGITS, want_all=True)
    close(linked.step(rows).logits, case.logits)


def test_a_sequences_window_is_the_familys(tmp_path: Path) -> None:
    """A window given to a sequence, long past the end of what is kept."""
    tiny = build("mistral", tmp_path, sliding_window=6, max_position_embeddings=512)
    tokens = np.random.default_rng(2).integers(0, VOCAB, 400).tolist()
    expected = tiny.logits([tokens])[0]
    windowless = build("mistral", tmp_path, sliding_window=None, max_position_embeddings=512).source
    part = open_native(windowless, 0, 3, threads=1, kv=KvConfig("f32", 240))
    sequence, logits, at = part.open(window=6, sinks=0), [], 0
    for n in (150, 1, 1, 120, 28, *[1] * 100):
        rows = Rows().tokens(sequence, at, tokens[at : at + n], want=LOGITS, want_all=True)
        logits.append(part.step(rows).logits)
        at += n
    close(np.concatenate(logits), expected)
