"""The probability of the most likely token: the softmax of the logits, the same bits however it was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.engine.binding import cpu_names
from isthmus.engine.onnx_part import open_onnx
from isthmus.engine.part import KvConfig, Rows, Want
from isthmus.engine.sampling import Sampling
from isthmus.protocol.errors import EngineError
from tests.native_tools import open_part, run_tokens, some_tokens
from tests.random_model import RandomModel

native = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
TEXT = some_tokens(70)
BOTH = Want.SAMPLE | Want.CONFIDENCE
DRAWN = Sampling(temperature=0.8, top_k=20, seed=5)


def softmax_top(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The largest softmax probability of each row of logits [n, vocab_size], in float64."""
    below = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    top: NDArray[np.float64] = 1 / np.exp(below).sum(axis=1)
    return top


@native
@pytest.mark.parametrize("cpu", cpu_names())
@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_the_softmax_and_the_same_bits_everywhere(cpu: str, threads: int) -> None:
    model = RandomModel("q4m")
    plain = open_part(model, cpu="plain")
    logits, _, drawn = run_tokens(plain, plain.open(), TEXT, [70], sampling=DRAWN)
    rows = Rows().tokens(plain.open(), 0, TEXT, want=Want.CONFIDENCE, want_all=True)
    expected = plain.step(rows).confidence
    assert expected.dtype == np.float32 and expected.shape == (70,)
    np.testing.assert_allclose(expected, softmax_top(logits), rtol=2e-6)
    part = open_part(model, cpu=cpu, threads=threads)
    for steps in ([70], [1] * 70, [5, 1, 33, 2, 29]):
        sequence, found, tokens, at = part.open(), [], list[int](), 0
        for n in steps:
            rows = Rows().tokens(sequence, at, TEXT[at : at + n], want=BOTH, want_all=True, sampling=DRAWN)
            result = part.step(rows)
            found.append(result.confidence)
            tokens += result.tokens
            at += n
        assert np.concatenate(found).tobytes() == expected.tobytes() and tokens == drawn
        sequence.close()


@native
def test_rows_that_want_it_come_in_order() -> None:
    part = open_part(RandomModel("q4"), max_tokens=2048)
    rows = Rows().tokens(part.open(), 0, TEXT, want=Want.CONFIDENCE, want_all=True)
    expected = part.step(rows).confidence
    mixed = Rows().tokens(part.open(), 0, TEXT[:9], want=Want.SAMPLE | Want.HIDDEN)
    mixed.tokens(part.open(), 0, TEXT[:30], want=Want.CONFIDENCE).tokens(part.open(), 0, TEXT[:4], want=Want.LOGITS)
    mixed.tokens(part.open(), 0, TEXT[:12], want=BOTH, want_all=True)
    result = part.step(mixed)
    assert result.confidence.tobytes() == expected[[29, *range(12)]].tobytes()
    assert len(result.tokens) == 13 and len(result.hidden) == len(result.logits) == 1
    long = part.step(Rows().tokens(part.open(), 0, some_tokens(600), want=Want.CONFIDENCE, want_all=True))
    assert long.confidence.shape == (600,) and long.confidence[:70].tobytes() == expected.tobytes()
    assert part.step(Rows().tokens(part.open(), 0, TEXT)).confidence.shape == (0,)


@native
def test_each_step_gives_its_own() -> None:
    part = open_part(RandomModel("q4"))
    rows = Rows().tokens(part.open(), 0, TEXT, want=Want.CONFIDENCE, want_all=True)
    expected = part.step(rows).confidence
    sequence = part.open()
    held = [part.step(Rows().tokens(sequence, at, [t], want=Want.CONFIDENCE)).confidence for at, t in enumerate(TEXT)]
    assert np.concatenate(held).tobytes() == expected.tobytes()


@native
def test_only_the_last_layer_has_it() -> None:
    part = open_part(RandomModel("q4"))
    with pytest.raises(EngineError, match="head"):
        part.step(Rows().tokens(part.open(), 0, [1], leave=2, want=Want.CONFIDENCE))


def test_onnx_gives_it_too() -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    model = RandomModel("f32")
    part = open_onnx(model, 0, model.config.n_layers, threads=1, kv=KvConfig("f32", 256))
    want = BOTH | Want.LOGITS
    result = part.step(Rows().tokens(part.open(), 0, TEXT[:9], want=want, want_all=True))
    assert result.confidence.dtype == np.float32
    np.testing.assert_allclose(result.confidence, softmax_top(result.logits), rtol=1e-6)
    assert part.step(Rows().tokens(part.open(), 0, TEXT[:9])).confidence.shape == (0,)
    if cpu_names():
        other = open_part(model)
        same = other.step(Rows().tokens(other.open(), 0, TEXT[:9], want=BOTH, want_all=True))
        np.testing.assert_allclose(result.confidence, same.confidence, rtol=1e-2)
