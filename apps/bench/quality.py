"""How near an engine's logits come to float32 on the same weights: the price beside each speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from isthmus.apps.bench.contenders import MAX_CONTEXT, Contender, logits_along
from isthmus.engine import KvConfig, open_part
from isthmus.engine.config import DecoderConfig
from isthmus.engine.part import Part, Rows, Want, WeightSource
from isthmus.engine.shapes import matrix_shapes
from isthmus.quant.groups import dequantize, quantize
from isthmus.quant.packed import PackedMatrix

QUESTIONS = (
    "What is the capital of Italy?",
    "Write a short poem about the sea.",
    "Explain how a bicycle stays upright.",
    "Why is the sky blue?",
    "How do I boil an egg?",
)


class InFloat:
    """A `WeightSource` whose matrices are those of another one in float32, of which no bit is lost."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._embedding, head = in_float(source.embedding()), source.head()
        self._head = self._embedding if head is source.embedding() else in_float(head)

    @property
    def config(self) -> DecoderConfig:
        return self._source.config

    def embedding(self) -> PackedMatrix:
        """See `WeightSource`."""
        return self._embedding

    def layer(self, index: int) -> Mapping[str, PackedMatrix | NDArray[np.float32]]:
        """See `WeightSource`."""
        layer = self._source.layer(index)
        return {name: in_float(w) if isinstance(w, PackedMatrix) else w for name, w in layer.items()}

    def final_norm(self) -> NDArray[np.float32]:
        """See `WeightSource`."""
        return self._source.final_norm()

    def head(self) -> PackedMatrix:
        """See `WeightSource`."""
        return self._head


class Quality:
    """The float32 model's greedy answers to some prompts, with its logits; others are compared along these answers.

    Args:
        source: the weights, whatever their format.
        prompts: token ids.
        tokens: length of each answer.
    """

    def __init__(self, source: WeightSource, prompts: Sequence[list[int]], tokens: int = 40) -> None:
        self._prompts = prompts
        part = open_part(InFloat(source), 0, source.config.n_layers, kv=KvConfig("f32", MAX_CONTEXT))
        self._answers = [greedy(part, prompt, tokens) for prompt in prompts]
        self._truth = [logits_along(part, *pair) for pair in zip(prompts, self._answers, strict=True)]
        part.close()

    def cosine(self, contender: Contender) -> float:
        """Mean cosine between its logits and the float32 model's, over all positions of all answers."""
        found = []
        for prompt, answer, truth in zip(self._prompts, self._answers, self._truth, strict=True):
            logits = contender.logits(prompt, answer)
            norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(truth, axis=1)
            found.append((logits * truth).sum(axis=1) / norms)
        return float(np.concatenate(found).mean())


def float_bytes(config: DecoderConfig) -> int:
    """Memory that the float32 model takes, about."""
    shapes = [shape for index in range(config.n_layers) for shape in matrix_shapes(config, index).values()]
    layers = sum(rows * cols for rows, cols in shapes)
    return 4 * (layers + (1 if config.tied else 2) * config.vocab_size * config.d_model)


def in_float(matrix: PackedMatrix) -> PackedMatrix:
    """The same matrix in float32."""
    return matrix if matrix.format == "f32" else quantize(dequantize(matrix), "f32")


def greedy(part: Part, prompt: list[int], tokens: int) -> list[int]:
    """The greedy answer of exactly that many tokens."""
    sequence, answer, ids = part.open(), list[int](), prompt
    while len(answer) < tokens:
        answer += part.step(Rows().tokens(sequence, sequence.length, ids, want=Want.SAMPLE)).tokens
        ids = answer[-1:]
    sequence.close()
    return answer
