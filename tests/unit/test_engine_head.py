"""An output head that has rows for some tokens only: as if all others had been masked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.engine import KvConfig, open_part
from isthmus.engine.binding import cpu_names
from isthmus.engine.narrow import Narrowed
from isthmus.engine.part import Part, Rows, Want
from isthmus.engine.sampler import sample
from isthmus.engine.sampling import GREEDY, Sampling
from isthmus.protocol.errors import EngineError
from isthmus.quant.groups import dequantize, quantize
from isthmus.quant.packed import PackedMatrix
from tests.native_tools import some_tokens
from tests.random_model import RandomModel

native = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
TEXT = some_tokens(40)
IDS = np.array([0, 3, 4, 5, 17, 31, 32, 48, 49, 50, 63, 64, 77, 78, 79, 80, 99, 100], np.int32)
SETTINGS = (
    GREEDY,
    Sampling(1.0, seed=3),
    Sampling(3.0, top_k=5, seed=4),
    Sampling(2.0, top_k=60, top_p=0.8, seed=5, stream=2),
    Sampling(50.0, top_p=0.5, seed=6),
)


class Some(RandomModel):
    """A random model whose head has the rows of `tokens` only; rows `same` are equal, so that their logits tie."""

    def __init__(self, tokens: Any = IDS, format: str = "f32", same: tuple[int, ...] = ()) -> None:
        super().__init__(format)
        weights = dequantize(super().head())
        weights[list(same)] = 50 * weights[IDS[-1]]
        kept = weights if tokens is None else weights[tokens]
        self.tokens, self._head, self.full = tokens, quantize(kept, "f32"), weights

    def head(self) -> PackedMatrix:
        return self._head

    def head_tokens(self) -> Any:
        return self.tokens


def opened(source: Any, backend: str = "native", **settings: Any) -> Part:
    if backend == "onnx":
        pytest.importorskip("onnxruntime", reason="needs onnxruntime")
        settings = {"threads": 1}
    return open_part(source, 0, source.config.n_layers, backend=backend, kv=KvConfig("f32", 1024), **settings)


def run(part: Part, want: Want, sampling: Sampling = GREEDY) -> Any:
    sequence = part.open()
    result = part.step(Rows().tokens(sequence, 0, TEXT, want=want, want_all=True, sampling=sampling))
    sequence.close()
    return result


def masked(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits [n, len(IDS)] by token, minus infinity elsewhere: [n, 101] f32."""
    full = np.full((len(logits), 101), -np.inf, np.float32)
    full[:, IDS] = logits
    return full


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native), "onnx"])
@pytest.mark.parametrize("same", [(), (4, 31, 99)])
def test_it_is_the_full_head_with_the_others_masked(backend: str, same: tuple[int, ...]) -> None:
    part, whole = opened(Some(same=same), backend), opened(Some(None, same=same), backend)
    logits, full = run(part, Want.LOGITS).logits, run(whole, Want.LOGITS).logits
    assert logits.shape == (40, len(IDS)) and full.shape == (40, 101)
    if backend == "native":
        assert logits.tobytes() == full[:, IDS].tobytes()
    np.testing.assert_allclose(logits, full[:, IDS], rtol=1e-5, atol=1e-5)
    for sampling in SETTINGS:
        tokens = run(part, Want.SAMPLE, sampling).tokens
        assert tokens == [sample(row, sampling, at) for at, row in enumerate(masked(logits))]
        assert set(tokens) <= set(IDS.tolist())
    assert not same or 4 in run(part, Want.SAMPLE).tokens  # the lowest of those that tie
    top = 1 / np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True)).sum(axis=1)
    np.testing.assert_allclose(run(part, Want.CONFIDENCE).confidence, top, rtol=2e-6)


@native
@pytest.mark.parametrize("cpu", cpu_names())
def test_the_same_bits_row_by_row_and_on_every_kernel_family(cpu: str) -> None:
    everything = Want.SAMPLE | Want.CONFIDENCE | Want.HIDDEN
    expected = run(opened(Some(), cpu="plain", threads=1), everything, SETTINGS[3])
    part = opened(Some(), cpu=cpu, threads=2)
    sequence = part.open()
    for at, token in enumerate(TEXT):
        got = part.step(Rows().tokens(sequence, at, [token], want=everything, sampling=SETTINGS[3]))
        assert got.tokens == expected.tokens[at : at + 1]
        assert got.confidence.tobytes() == expected.confidence[at : at + 1].tobytes()
    assert run(part, everything, SETTINGS[3]).confidence.tobytes() == expected.confidence.tobytes()


@native
def test_a_narrowed_source_keeps_it() -> None:
    source = Some(format="n8")
    part = opened(Narrowed(source, 4))
    assert run(part, Want.LOGITS).logits.shape == (40, len(IDS))
    assert set(run(part, Want.SAMPLE, SETTINGS[4]).tokens) <= set(IDS.tolist())


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native), "onnx"])
def test_tokens_that_do_not_fit_are_refused(backend: str) -> None:
    wrongs: list[tuple[Any, str]] = [
        (IDS[::-1].copy(), "ascend"),
        (IDS.repeat(2), "ascend"),
        (IDS - 1, "vocabulary"),
        (IDS + 1, "vocabulary"),
        (IDS[:0], "ascend"),
        (IDS.astype(np.float32), "ascend"),
        (IDS[1:], "the output head is 18 x 72, not 17 x 72"),
    ]
    for tokens, match in wrongs:
        source = Some()
        source.tokens = tokens
        with pytest.raises(EngineError, match=match):
            run(opened(source, backend), Want.LOGITS)
