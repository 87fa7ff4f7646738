"""Parts that map what enters them: the same as mapping first, whatever the batch, the threads and the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.engine import KvConfig, open_part
from isthmus.engine.binding import cpu_names
from isthmus.engine.part import Part, Rows, Want
from isthmus.protocol.errors import EngineError
from isthmus.quant.groups import dequantize
from isthmus.quant.packed import PackedMatrix
from tests.random_model import RandomModel, random_config, random_matrix

START, COUNT = 1, 13
native = pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")


class Mapped(RandomModel):
    """A random model whose layer START has an input map."""

    def __init__(self, format: str, rows: int | None = None) -> None:
        super().__init__(format, random_config())
        width = self.config.d_model
        self.input = random_matrix(format, rows or width, width, np.random.default_rng(7))

    def layer(self, index: int) -> Mapping[str, PackedMatrix | NDArray[np.float32]]:
        weights = super().layer(index)
        return {**weights, "input": self.input} if index == START else weights


def opened(source: RandomModel, start: int = START, **settings: Any) -> Part:
    kv = KvConfig(settings.pop("format", "f32"), 256)
    return open_part(source, start, source.config.n_layers, kv=kv, **settings)


def states(count: int = COUNT) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((count, random_config().d_model)).astype(np.float32)


def logits(part: Part, hidden: NDArray[np.float32], steps: list[int]) -> NDArray[np.float32]:
    sequence, found, at = part.open(), [], 0
    for n in steps:
        rows = Rows().hidden(sequence, at, hidden[at : at + n], enter=START, want=Want.LOGITS, want_all=True)
        found.append(part.step(rows).logits)
        at += n
    sequence.close()
    return np.concatenate(found)


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native), "onnx"])
def test_it_is_as_if_the_states_were_mapped_before(backend: str) -> None:
    if backend == "onnx":
        pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    source = Mapped("f32")
    mapped, plain = opened(source, backend=backend), opened(RandomModel("f32", random_config()), backend=backend)
    hidden = states()
    expected = logits(plain, hidden @ np.asarray(dequantize(source.input), np.float32).T, [COUNT])
    found = logits(mapped, hidden, [COUNT])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(found - logits(plain, hidden, [COUNT])).max() > 0.1 * np.abs(expected).max()
    for part in (mapped, plain):
        part.close()


@native
@pytest.mark.parametrize("format", ["f32", "q8", "q4", "q4m", "n4"])
def test_bits_depend_on_nothing_else(format: str) -> None:
    source, hidden, found = Mapped(format), states(), []
    for cpu in cpu_names():
        for threads in (1, 2):
            part = opened(source, cpu=cpu, threads=threads)
            found += [logits(part, hidden, steps) for steps in ([COUNT], [1] * COUNT, [5, 1, 7])]
            part.close()
    assert all(np.array_equal(found[0], other) for other in found)


@native
def test_only_states_come_in_and_only_at_the_front() -> None:
    part = opened(Mapped("f32"))
    sequence = part.open()
    with pytest.raises(EngineError):
        part.step(Rows().hidden(sequence, 0, states(), enter=START + 1))
    sequence.close()
    part.close()

    class First(Mapped):
        def layer(self, index: int) -> Mapping[str, PackedMatrix | NDArray[np.float32]]:
            return {**super().layer(index), "input": self.input} if index == 0 else RandomModel.layer(self, index)

    part = opened(First("f32"), 0)
    sequence = part.open()
    with pytest.raises(EngineError):
        part.step(Rows().tokens(sequence, 0, [3, 4]))
    part.step(Rows().hidden(sequence, 0, states(), enter=0))
    part.close()


@native
def test_a_map_of_another_size_is_refused() -> None:
    with pytest.raises(EngineError, match="the input map is 40 x 72, not 72 x 72"):
        opened(Mapped("f32", rows=40))
