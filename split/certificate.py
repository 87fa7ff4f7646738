"""A certificate: the confidence from which on an exit may speak for the model, and what is promised of it.

Learn then test (Angelopoulos et al., 2110.01052; for exits as in CALM, 2207.07061). The unit is the prompt: its loss is
the share of its answer's tokens that the exit would emit and that differ from the model's greedy choice under the same
prefix, the risk is the mean loss over prompts. From the strictest threshold down, the hypothesis "the risk is above
the allowed disagreement" is tested until it cannot be rejected; the last one rejected is certified. A fixed sequence
needs no correction for its many tests. The test is by betting (Waudby-Smith and Ramdas, 2010.09686): the capital of
whoever bets on small losses is a supermartingale under the hypothesis, so one over its maximum is a valid p-value. On
losses as small as these it certifies at a third of the prompts that the Hoeffding-Bentkus bound would need.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from isthmus.engine.threshold import NEVER, least
from isthmus.protocol.errors import BundleError, ModelError

if TYPE_CHECKING:
    from isthmus.split.exit_states import Sample

THRESHOLDS = tuple(step / 200 for step in range(199, 0, -1))  # chosen before any data are seen
MOST_PROMPTS = 1_000_000
_BOLDEST = 0.9  # share of the capital that a loss of 1 may cost
_HEX = frozenset("0123456789abcdef")


class Said(NamedTuple):
    """What an exit said along one answer.

    Attributes:
        confidence: in each token that it would emit [n] f32.
        right: whether that is the model's greedy choice under the same prefix [n].
    """

    confidence: NDArray[np.float32]
    right: NDArray[np.bool_]


class Certificate(msgspec.Struct, frozen=True):
    """Of one exit alone: with this confidence, over prompts like these, the risk is at most `disagreement`.

    Attributes:
        exit: sha256 of the exit's file.
        data: `data_hash` of the prompts and answers.
        prompts, tokens: how many prompts there were, and tokens in their answers.
        disagreement: the allowed risk.
        confidence: with which the promise holds, over draws of prompts.
        threshold: a token is emitted if the exit's confidence is not below it; at `NEVER` none is (`engine.threshold`).
        risk: the measured one at the threshold.
        bound: the upper bound of the risk with that confidence.
        emitted: share of tokens that the exit emits.
    """

    exit: str
    data: str
    prompts: int
    tokens: int
    disagreement: float
    confidence: float
    threshold: float
    risk: float
    bound: float
    emitted: float

    def check(self, where: str) -> None:
        """Raises a BundleError that begins with `where` if a value cannot be."""
        hashes = all(len(text) == 64 and _HEX.issuperset(text) for text in (self.exit, self.data))
        shares = (self.risk, self.bound, self.emitted)
        if not (
            hashes
            and 0 < self.prompts <= self.tokens
            and 0 < self.disagreement < 1
            and 0 < self.confidence < 1
            and 0 < self.threshold <= NEVER
            and all(0 <= share <= 1 for share in shares)
        ):
            raise BundleError(f"{where} has a certificate whose values cannot be", "calibrate it again")
        if self.bound > self.disagreement or self.risk > self.bound:
            raise BundleError(
                f"{where} has a certificate of {self.disagreement:g} with the risk {self.risk:.4f}"
                f" and the bound {self.bound:.4f}",
                "calibrate it again",
            )


def data_hash(samples: Sequence[Sample]) -> str:
    """Sha256 of the tokens of prompts and answers, in hex."""
    return hashlib.sha256(json.dumps(samples, separators=(",", ":")).encode()).hexdigest()


def losses(said: Sequence[Said], threshold: float) -> NDArray[np.float64]:
    """Each prompt's share of tokens that are emitted and wrong at a threshold, [n]."""
    confidence, right = (np.concatenate([one[i] for one in said]) for i in range(2))
    lengths = np.array([len(one.right) for one in said])
    wrong = (confidence >= least(threshold)) & ~right
    found: NDArray[np.float64] = np.add.reduceat(wrong, np.cumsum(lengths) - lengths, dtype=np.float64) / lengths
    return found


def emitted(said: Sequence[Said], threshold: float) -> float:
    """The share of all tokens that are emitted at a threshold."""
    return float(np.mean(np.concatenate([one.confidence for one in said]) >= least(threshold)))


def p_value(values: NDArray[np.float64], risk: float, delta: float) -> float:
    """Of the hypothesis that the mean of independent losses in [0, 1] is above `risk`, by betting against it.

    Args:
        values: in an order that does not depend on them.
        delta: the level at which the bets aim; the p-value is valid whatever it is.
    """
    n = len(values)
    counts = np.arange(1, n + 1)
    means = (0.5 + np.cumsum(values)) / (counts + 1)
    variances = (0.25 + np.cumsum((values - means) ** 2)) / (counts + 1)
    known = np.concatenate([[0.25], variances[:-1]])  # each bet knows only the losses before it
    bets = np.minimum(np.sqrt(2 * math.log(1 / delta) / (n * known)), _BOLDEST / (1 - risk))
    capital = np.cumsum(np.log1p(bets * (risk - values)))
    return float(min(1.0, np.exp(-capital.max(initial=0.0))))


def fewest_prompts(disagreement: float, confidence: float) -> int:
    """The prompts that it takes at least to certify anything, if none has an error; `MOST_PROMPTS` at most."""

    def enough(count: int) -> bool:
        return p_value(np.zeros(count), disagreement, 1 - confidence) <= 1 - confidence

    low, high = 0, 1
    while not enough(high) and high < MOST_PROMPTS:
        low, high = high, min(2 * high, MOST_PROMPTS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def upper_bound(values: NDArray[np.float64], delta: float) -> float:
    """The smallest risk (to 1/10,000) above which the mean is not, with confidence 1 - delta."""
    low, high = 0, 10_000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(values, middle / 10_000, delta) <= delta else (middle, high)
    return high / 10_000


def calibrate(
    said: Sequence[Said], *, disagreement: float, confidence: float, exit: str, data: str, seed: int = 0
) -> Certificate | None:
    """The lowest threshold that learn-then-test certifies; None if it certifies none.

    Args:
        said: one for each prompt; prompts are taken for independent draws of those to come.
        seed: of the order in which the losses are bet on.

    Raises:
        ModelError: `disagreement` or `confidence` is not between 0 and 1, or there is no prompt.
    """
    for name, value in (("disagreement", disagreement), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ModelError(f"{name} {value:g} is impossible", "choose one between 0 and 1, as 0.05 and 0.95")
    if not said or not all(len(one.right) for one in said):
        raise ModelError("there are no answers to calibrate on", "give prompts that the model answers")
    order, delta = np.random.default_rng(seed).permutation(len(said)), 1 - confidence

    def test(threshold: float) -> bool:
        found = losses(said, threshold)  # bets may have won before all losses were seen
        return float(found.mean()) <= disagreement and p_value(found[order], disagreement, delta) <= delta

    threshold = lowest(test)
    if threshold is None:
        return None
    found = losses(said, threshold)
    return Certificate(
        exit=exit,
        data=data,
        prompts=len(said),
        tokens=sum(len(one.right) for one in said),
        disagreement=disagreement,
        confidence=confidence,
        threshold=threshold,
        risk=float(found.mean()),
        bound=min(disagreement, max(float(found.mean()), upper_bound(found[order], delta))),
        emitted=emitted(said, threshold),
    )


def lowest(test: Callable[[float], bool]) -> float | None:
    """The last of `THRESHOLDS` that passes before the first that does not; None if not even the first passes."""
    found = None
    for threshold in THRESHOLDS:
        if not test(threshold):
            break
        found = threshold
    return found
