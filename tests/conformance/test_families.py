"""Every family on every engine in float32 against `transformers`, on tiny random models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="torch is what the engines are held against; pip install torch transformers")
pytest.importorskip("transformers", reason="transformers is what the engines are held against")

from isthmus.engine import open_part
from isthmus.engine.binding import cpu_names
from isthmus.engine.native_part import chain
from isthmus.engine.part import KvConfig, Part, Rows, Want
from isthmus.split.checkpoints import Checkpoint
from tests.conformance.tiny import CASES, DENSE, VOCAB, build

if TYPE_CHECKING:
    from isthmus.engine.native_part import NativePart

LENGTH = 37
LOGITS = Want.LOGITS
# Sizes that fit neither lanes nor groups nor graphs' heads of 8: name -> (case of tiny.py, settings).
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-head-10": ("llama", {"head_dim": 10}),
    "qwen2-head-6": ("qwen2", {"hidden_size": 24}),
    "qwen3-head-6": ("qwen3", {"head_dim": 6, "rms_norm_eps": 1e-2}),
    "qwen3-one-head": ("qwen3", {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 50}),
}
ENGINES = {"native": (*CASES, *ODD), "onnx": (*DENSE, *ODD)}  # engine -> what it runs


def open_engine(engine: str, source: Checkpoint, start: int, end: int, *, threads: int = 2, tokens: int = 512) -> Part:
    """A part of a model in float32, or a skip where the engine is not there."""
    if engine == "native" and not cpu_names():
        pytest.skip("the native engine is not built (no C compiler?)")
    if engine == "onnx":
        pytest.importorskip("onnxruntime")
        threads = 1
    return open_part(source, start, end, backend=engine, threads=threads, kv=KvConfig("f32", tokens))


class Case:
    """A tiny model, its part, and what `transformers` makes of `tokens`."""

    def __init__(self, engine: str, family: str, folder: Path) -> None:
        name, settings = ODD.get(family, (family, {}))
        self.engine, self.tiny = engine, build(name, folder, seed=len(family), **settings)
        self.tokens = np.random.default_rng(1).integers(0, VOCAB, LENGTH).tolist()
        self.other = np.random.default_rng(2).integers(0, VOCAB, LENGTH).tolist()
        self.logits, self.other_logits = self.tiny.logits([self.tokens, self.other])  # [LENGTH, vocab_size]
        self.hidden = [h[0] for h in self.tiny.hidden([self.tokens])]  # before each layer
        self.layers = self.tiny.source.config.n_layers
        self.part = self.open(0, self.layers)

    def open(self, start: int, end: int, threads: int = 2) -> Part:
        return open_engine(self.engine, self.tiny.source, start, end, threads=threads)


@pytest.fixture(
    scope="module", params=[(engine, family) for engine in ENGINES for family in ENGINES[engine]], ids="-".join
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    engine, family = request.param
    made = Case(engine, family, tmp_path_factory.mktemp("tiny"))
    yield made
    made.part.close()


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
    ends = int(case.engine == "onnx")  # whose parts may be without layers
    for cut in range(1 - ends, case.layers + ends):
        low, high = case.open(0, cut), case.open(cut, case.layers, threads=1)
        for first, second in ((low, high), (case.part, case.part)):
            a, b = first.open(), second.open()
            for at, n in ((0, 9), (9, 1), (10, LENGTH - 10)):
                rows = Rows().tokens(a, at, case.tokens[at : at + n], leave=cut, want=Want.HIDDEN, want_all=True)
                hidden = first.step(rows).hidden
                if cut < case.layers:
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
    rows = Rows().tokens(one, 0, case.tokens[:8], want=LOGITS | Want.HIDDEN, want_all=True)
    rows.tokens(two, 12, case.other[12:13], want=LOGITS | Want.SAMPLE)
    rows.hidden(three, 0, case.hidden[cut], enter=cut, want=LOGITS)
    rows.tokens(one, 8, case.tokens[8:9], want=LOGITS)
    out = part.step(rows)
    close(out.logits[:8], case.logits[:8])
    close(out.logits[8:9], case.other_logits[12:13])
    close(out.logits[9:], case.logits[[LENGTH - 1, 8]])
    assert out.tokens == [int(np.argmax(case.other_logits[12]))]
    assert out.hidden.shape == (8, case.tiny.source.config.d_model)
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
    if case.engine == "onnx":
        return  # it has no chains
    linked = chain([cast("NativePart", case.open(i, i + 1)) for i in range(case.layers)])
    rows = Rows().tokens(linked.open(), 0, case.tokens, want=LOGITS, want_all=True)
    close(linked.step(rows).logits, case.logits)


@pytest.mark.parametrize(("engine", "kept"), [("native", 240), ("onnx", 420)])
def test_a_sequences_window_is_the_familys(tmp_path: Path, engine: str, kept: int) -> None:
    """A window given to a sequence, long past the end of what is kept."""
    tiny = build("mistral", tmp_path, sliding_window=6, max_position_embeddings=512)
    tokens = np.random.default_rng(2).integers(0, VOCAB, 400).tolist()
    expected = tiny.logits([tokens])[0]
    windowless = build("mistral", tmp_path, sliding_window=None, max_position_embeddings=512).source
    part = open_engine(engine, windowless, 0, 3, threads=1, tokens=kept)
    sequence, logits, at = part.open(window=6, sinks=0), [], 0
    for n in (150, 1, 1, 120, 28, *[1] * 100):
        rows = Rows().tokens(sequence, at, tokens[at : at + n], want=LOGITS, want_all=True)
        logits.append(part.step(rows).logits)
        at += n
    close(np.concatenate(logits), expected)
    assert part.free_tokens >= kept - 160
    part.close()
