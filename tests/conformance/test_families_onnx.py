"""Every family on onnxruntime in float32 against `transformers`, on tiny random models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from isthmus.engine.onnx_part import open_onnx
from isthmus.engine.part import KvConfig, Part, Rows, Want
from isthmus.engine.sampling import Sampling
from tests.conformance.tiny import DENSE, VOCAB, build

LENGTH = 23
# Heads that are no multiple of 8 are padded inside: name -> (case of tiny.py, settings).
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-head-10": ("llama", {"head_dim": 10}),
    "qwen2-head-6": ("qwen2", {"hidden_size": 24}),
    "qwen3-head-6": ("qwen3", {"head_dim": 6, "rms_norm_eps": 1e-2}),
}


class Case:
    """A tiny model, its part, and what `transformers` makes of `tokens`."""

    def __init__(self, family: str, folder: Path) -> None:
        name, settings = ODD.get(family, (family, {}))
        self.tiny = build(name, folder, seed=len(family), **settings)
        self.tokens = np.random.default_rng(1).integers(0, VOCAB, LENGTH).tolist()
        self.logits = self.tiny.logits([self.tokens])[0]  # [LENGTH, vocab_size]
        self.hidden = [h[0] for h in self.tiny.hidden([self.tokens])]  # before each layer
        self.layers = self.tiny.source.config.n_layers
        self.part = self.open(0, self.layers)

    def open(self, start: int, end: int) -> Part:
        return open_onnx(self.tiny.source, start, end, threads=1, kv=KvConfig("f32", 512))


@pytest.fixture(scope="module", params=[*DENSE, *ODD])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    made = Case(request.param, tmp_path_factory.mktemp("tiny"))
    yield made
    made.part.close()


def close(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Relative error of every position (row) below 1e-4."""
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 1e-4, error


def test_prefill(case: Case) -> None:
    sequence = case.part.open()
    out = case.part.step(Rows().tokens(sequence, 0, case.tokens, want=Want.LOGITS, want_all=True))
    close(out.logits, case.logits)
    assert sequence.length == LENGTH
    sequence.close()


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [7, 1, 1, 9, 5], [16, 7]])
def test_chunks(case: Case, chunks: list[int]) -> None:
    sequence, logits, at = case.part.open(), [], 0
    for n in chunks:
        rows = Rows().tokens(sequence, at, case.tokens[at : at + n], want=Want.LOGITS, want_all=True)
        logits.append(case.part.step(rows).logits)
        at += n
    close(np.concatenate(logits), case.logits)
    sequence.close()


def test_cuts(case: Case) -> None:
    """At every cut, device half and cloud half as two parts and, over two sequences, as one."""
    for cut in range(case.layers + 1):
        low, high = case.open(0, cut), case.open(cut, case.layers)
        for first, second in ((low, high), (case.part, case.part)):
            a, b = first.open(), second.open()
            for at, n in ((0, 9), (9, 1), (10, LENGTH - 10)):
                rows = Rows().tokens(a, at, case.tokens[at : at + n], leave=cut, want=Want.HIDDEN, want_all=True)
                hidden = first.step(rows).hidden
                if cut < case.layers:
                    close(hidden, case.hidden[cut][at : at + n])
                rows = Rows().hidden(b, at, hidden, enter=cut, want=Want.LOGITS, want_all=True)
                close(second.step(rows).logits, case.logits[at : at + n])
            a.close()
            b.close()
        low.close()
        high.close()


def test_mixed_rows(case: Case) -> None:
    """Prefill of one sequence, decode of a second and hidden states of a third in one step."""
    part, cut = case.part, 1
    one, two, three = part.open(), part.open(), part.open()
    part.step(Rows().tokens(two, 0, case.tokens[:12], want=Want.NONE))
    rows = Rows().tokens(one, 0, case.tokens[:8], want=Want.LOGITS | Want.HIDDEN, want_all=True)
    rows.tokens(two, 12, case.tokens[12:13], want=Want.LOGITS | Want.SAMPLE, sampling=Sampling())
    rows.hidden(three, 0, case.hidden[cut], enter=cut, want=Want.LOGITS)
    rows.tokens(one, 8, case.tokens[8:9], want=Want.LOGITS)
    out = part.step(rows)
    close(out.logits, case.logits[[*range(8), 12, LENGTH - 1, 8]])
    assert out.tokens == [int(np.argmax(case.logits[12]))]
    assert out.hidden.shape == (8, case.tiny.source.config.d_model)
    for sequence in (one, two, three):
        sequence.close()


def test_fork_and_truncate(case: Case) -> None:
    part = case.part
    trunk = part.open()
    part.step(Rows().tokens(trunk, 0, case.tokens[:10], want=Want.NONE))
    branch = trunk.fork()
    part.step(Rows().tokens(trunk, 10, [1, 2, 3, 4, 5], want=Want.NONE))
    trunk.truncate(10)
    for sequence in (trunk, branch):
        out = part.step(Rows().tokens(sequence, 10, case.tokens[10:], want=Want.LOGITS, want_all=True))
        close(out.logits, case.logits[10:])
        sequence.close()
    assert part.free_tokens == 512


def test_sequence_window(tmp_path: Path) -> None:
    """A window given to a sequence is the family's window, long past the end of what is kept."""
    window = 6
    tiny = build("mistral", tmp_path, sliding_window=window, max_position_embeddings=512)
    tokens = np.random.default_rng(2).integers(0, VOCAB, 400).tolist()
    expected = tiny.logits([tokens])[0]
    windowless = build("mistral", tmp_path, sliding_window=None, max_position_embeddings=512).source
    part = open_onnx(windowless, 0, 3, threads=1, kv=KvConfig("f32", 420))
    sequence, logits, at = part.open(window=window), [], 0
    for n in (150, 1, 1, 120, 28, *[1] * 100):
        rows = Rows().tokens(sequence, at, tokens[at : at + n], want=Want.LOGITS, want_all=True)
        logits.append(part.step(rows).logits)
        at += n
    close(np.concatenate(logits), expected)
    assert part.free_tokens >= 420 - 160
    part.close()
