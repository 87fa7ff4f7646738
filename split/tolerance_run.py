"""Finds the largest tolerance whose perplexity stays within a bound, and certifies it (see `tolerance.py`).

A plane is read where it takes away most error for its bytes. An expert's error is its share of a token times what its
weights, read with fewer planes, are off by; so one number, the least error that a byte must take away, gives the shares
of all planes of all layers. It is raised in steps that were chosen before any data are seen, until the hypothesis "the
perplexity rises by more than is allowed" is no longer rejected (learn then test, Angelopoulos et al., 2110.01052; a
fixed sequence needs no correction). The unit is the document: what it loses beyond the allowance is tested by its mean
(Student's t), which for many documents is normal.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.native_part import NativePart
from isthmus.engine.part import Rows, Want
from isthmus.protocol.errors import ModelError
from isthmus.quant.groups import dequantize
from isthmus.quant.nested import WIDTHS, view
from isthmus.quant.packed import PackedMatrix
from isthmus.quant.planes import MATRICES
from isthmus.split.bundle import Bundle
from isthmus.split.tolerance import Tolerance
from isthmus.split.tolerance_shares import mean_bits, shares

LEAST_DOCUMENTS = 30  # below them a mean is not normal
LEAST_TOKENS = 8
STEPS = tuple(2.0 ** (step / 2 - 12) for step in range(21))  # least errors that two bits must take away
Matrices = tuple[PackedMatrix, PackedMatrix, PackedMatrix]  # gate, up and down of an expert
_SAMPLED = 4  # experts of a layer whose error is measured


class Read(NamedTuple):
    """How documents fare with some planes.

    Attributes:
        losses: negative log likelihood of each document [n], in nats.
        bits: of an expert that a token is sent to, in the mean.
    """

    losses: NDArray[np.float64]
    bits: float


class Tried(NamedTuple):
    """A tolerance and what came of it.

    Attributes:
        step: its place in `STEPS`.
        bits: see `Read`.
        perplexity: of all documents.
        bound: by how much the perplexity rises at most, as a share, with the confidence that was asked for.
        passed: whether that is allowed.
    """

    step: int
    bits: float
    perplexity: float
    bound: float
    passed: bool


def data_hash(documents: Sequence[Sequence[int]]) -> str:
    """Sha256 of documents' tokens, in hex."""
    return hashlib.sha256(json.dumps(documents, separators=(",", ":")).encode()).hexdigest()


def errors(bundle: Bundle) -> NDArray[np.float64]:
    """What experts are off by when some of their planes are read, of each layer; see `expert_errors`.

    Raises:
        ModelError: the bundle has no nested experts.
    """
    config, found = bundle.config, list[list[Matrices]]()
    for index in range(config.n_layers):
        found.append([])
        if config.experts_of(index):
            assert config.experts is not None
            layer = bundle.layer(index)
            for e in range(0, config.experts.n_experts, max(1, config.experts.n_experts // _SAMPLED)):
                gate, up, down = (layer[f"experts.{e}.{name}"] for name in MATRICES)
                assert (
                    isinstance(gate, PackedMatrix) and isinstance(up, PackedMatrix) and isinstance(down, PackedMatrix)
                )
                found[-1].append((gate, up, down))
    return expert_errors(found)


def expert_errors(layers: Sequence[Sequence[Matrices]]) -> NDArray[np.float64]:
    """What experts are off by when some of their planes are read, [layers, planes + 1].

    Shares of their weights' square, added over their matrices: 1 with no plane, 0 with all; zeros where a layer has no
    experts.

    Args:
        layers: gate, up and down of some experts of each layer.

    Raises:
        ModelError: they are not nested.
    """
    found = list[list[float]]()
    for experts in layers:
        formats = {matrix.format for matrices in experts for matrix in matrices}
        if formats and not (len(formats) == 1 and formats <= set(WIDTHS[1:])):
            raise ModelError("the experts are not nested", "convert the model with --format n8 or n4")
        each = [_apart(matrices, 1 + WIDTHS.index(matrices[0].format)) for matrices in experts]
        found.append(np.mean(each, axis=0).tolist() if each else [])
    most = max(map(len, found))
    return np.array([row or [0.0] * most for row in found])


def _apart(matrices: Matrices, planes: int) -> list[float]:
    total = [0.0] * planes
    for matrix in matrices:
        whole = dequantize(matrix)
        energy = float(np.square(whole).sum()) or 1.0
        for plane in range(1, planes):
            off = dequantize(view(matrix, WIDTHS[plane - 1])) - whole
            total[plane] += float(np.square(off).sum()) / energy
    return [1.0, *(min(1.0, one) for one in total[1:]), 0.0]


def read(
    part: NativePart, documents: Sequence[Sequence[int]], tolerance: NDArray[np.float32] | None,
    progress: Callable[[int], object] | None = None,
) -> Read:  # fmt: skip
    """Documents' likelihoods on a part of all layers.

    Args:
        tolerance: of `Layers.tolerate`; None for all planes.
        progress: called with the documents done.
    """
    part.tolerate(tolerance)
    found, taken, tokens = [], 0.0, 0
    for done, document in enumerate(documents, 1):
        routing, sequence = part.record(len(document)), part.open()
        assert routing is not None
        logits = part.step(Rows().tokens(sequence, 0, list(document), want=Want.LOGITS, want_all=True)).logits
        sequence.close()
        assert logits is not None
        found.append(_loss(logits[:-1], np.array(document[1:])))
        tokens += len(document)
        if tolerance is not None:
            taken += len(document) * mean_bits(routing.weights, tolerance)
        if progress:
            progress(done)
    part.record(0)
    part.tolerate(None)
    return Read(np.array(found), taken / tokens if tolerance is not None else math.nan)


def _loss(logits: NDArray[np.float32], truth: NDArray[np.int64]) -> float:
    """Negative log likelihood in nats."""
    top = logits.max(axis=1)
    total = np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)) + top
    return float((total - logits[np.arange(len(truth)), truth]).sum())


def rise(exact: Read, other: Read, lengths: NDArray[np.int64], confidence: float) -> float:
    """By how much the perplexity rises at most, as a share, with that confidence.

    Args:
        lengths: tokens of the documents that are foretold.
    """
    # The largest share r for which "more than r" is not rejected: the mean of losses - log(1 + r) * lengths is tested.
    lost, t = other.losses - exact.losses, _student(confidence, len(lengths) - 1)

    def rejected(rate: float) -> bool:
        beyond = lost - rate * lengths
        spread = float(beyond.std(ddof=1)) / math.sqrt(len(beyond))
        return float(beyond.mean()) + t * spread <= 0

    low, high = -1.0, 1.0
    while not rejected(high) and high < 64:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return math.expm1(high)


def _student(confidence: float, freedom: int) -> float:
    """The quantile of Student's t, by Fisher and Cornish's expansion: to 1e-3 from 30 degrees of freedom on."""
    z = NormalDist().inv_cdf(confidence)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def calibrate(
    bundle: Bundle,
    part: NativePart,
    documents: Sequence[Sequence[int]],
    *,
    within: float,
    confidence: float,
    tell: Callable[[str], Callable[[int, int], object]],
) -> Iterator[tuple[Tried, Tolerance | None]]:
    """Tries one step after the other, and ends behind the first that does not pass.

    Args:
        part: of all layers, whose experts all may be read.
        documents: tokens of each, at least `LEAST_TOKENS`; taken for independent draws of those to come.
        within, confidence: see `Tolerance`.
        tell: begins a step of a name and gives what is told of its progress.

    Raises:
        ModelError: too few documents, numbers that make no sense, or experts that are not nested.
    """
    for name, value in (("within", within), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ModelError(f"{name} {value:g} is impossible", "choose one between 0 and 1, as 0.01 and 0.95")
    if len(documents) < LEAST_DOCUMENTS:
        raise ModelError(f"{len(documents)} documents are too few", f"give at least {LEAST_DOCUMENTS} (--text)")
    off = errors(bundle)
    lengths = np.array([len(document) - 1 for document in documents])
    data = data_hash(documents)

    def reading(name: str, tolerance: NDArray[np.float32] | None) -> Read:
        say = tell(name)
        return read(part, documents, tolerance, lambda done: say(done, len(documents)))

    exact = reading("exact", None)
    for step, least in enumerate(STEPS):
        table = shares(off, least)
        other = reading(f"tolerance {step + 1} of {len(STEPS)}", table)
        bound = rise(exact, other, lengths, confidence)
        tried = Tried(step, other.bits, math.exp(other.losses.sum() / lengths.sum()), bound, bound <= within)
        if not tried.passed:
            yield tried, None
            return
        yield (
            tried,
            Tolerance(
                shares=tuple(tuple(map(float, row)) for row in table),
                model_id=bundle.model_id,
                data=data,
                documents=len(documents),
                tokens=int(lengths.sum()),
                within=within,
                confidence=confidence,
                exact=math.exp(exact.losses.sum() / lengths.sum()),
                bounded=tried.perplexity,
                bound=bound,
                bits=other.bits,
            ),
        )
