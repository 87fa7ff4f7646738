"""Ways to share a model between a device and a cloud, side by side: the same prompts, the same link, the same exits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from isthmus.edge import Device
from isthmus.edge.token import Stats
from isthmus.engine.part import Part, Rows
from isthmus.engine.sampling import GREEDY, Sampling

CE_COLLM = "CE-CoLLM's policy"
CE_COLLM_THRESHOLD = 0.8  # as published (2411.02829), on f16 states and one question a token


@dataclass(frozen=True, slots=True)
class Way:
    """One way of sharing.

    Attributes:
        options: a `Device`'s, beside those that all have.
    """

    name: str
    options: Mapping[str, Any]


@dataclass
class Row:
    """What a way came to, over all prompts.

    Attributes:
        agreement: share of tokens that are the whole model's greedy choice after the same prefix; None where the
            device's bundle does not hold it, or nothing is greedy.
        same: answers that are, token for token, the cloud's own.
        notes: what did not go as asked.
    """

    way: str
    prompts: int = 0
    tokens: int = 0
    tok_s: float = 0.0
    ttft_ms: float = 0.0
    requests_per_token: float = 0.0
    up_bytes_per_token: float = 0.0
    down_bytes_per_token: float = 0.0
    cloud_ms_per_token: float = 0.0
    acceptance: float | None = None
    agreement: float | None = None
    same: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def ways(cut: int | None, threshold: float | None, whole: bool) -> list[Way]:
    """What is compared.

    Args:
        cut: the exit's layer; None where the bundle has no exits.
        threshold: of our exit mode; None for its certificate's.
        whole: whether the device holds the whole model.
    """
    found = [Way("cloud only (stream)", {"mode": "stream"})]
    if whole:
        found.append(Way("device only (local)", {"mode": "local"}))
    found.append(Way("naive split, f16", {"mode": "split", "cut": cut}))
    found.append(Way("verify, n-grams", {"mode": "verify", "draft": "ngrams", "draft_depth": 1}))
    if cut is not None:
        published = {"mode": "exit", "cut": cut, "threshold": CE_COLLM_THRESHOLD, "codec": "f16", "guesses": 0}
        ours = {"mode": "exit", "cut": cut, "threshold": threshold}
        found[-1:-1] = [Way(CE_COLLM, published), Way("exit, one token a question", {**ours, "guesses": 0})]
        found[-1:-1] = [Way("exit", ours)]
        found.append(Way("verify, exit drafts", {"mode": "verify", "draft": "exit", "draft_depth": 1}))
        found.append(Way("verify, exit drafts, pipelined", {"mode": "verify", "draft": "exit", "draft_depth": 8}))
    return [*found, Way("auto", {"mode": "auto"})]


def compare(
    contenders: Sequence[Way],
    opened: Callable[[Way], Device],
    prompts: Sequence[str],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    teacher: Part | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Every way answers every prompt, in turns, each on a device of its own.

    Args:
        opened: makes a way's device.
        teacher: the whole model, to hold greedy answers against.
        progress: told what is running.
    """
    told: dict[str, list[tuple[list[int], Stats, float]]] = {way.name: [] for way in contenders}
    asked: list[list[int]] = []
    with ExitStack() as stack:
        devices = {way.name: stack.enter_context(opened(way)) for way in contenders}
        for number, prompt in enumerate(prompts):
            for name, device in devices.items():
                if progress:
                    progress(f"prompt {number + 1} of {len(prompts)}: {name}")
                device.reset()
                began = time.perf_counter()
                tokens = [token.id for token in device.chat(prompt, max_tokens=max_tokens, sampling=sampling)]
                told[name].append((tokens, device.stats, time.perf_counter() - began))
            asked.append(device.tokens[: device.stats.prompt_tokens])
    streamed = [tokens for tokens, _, _ in told[contenders[0].name]]
    rows = [_row(name, answers, streamed) for name, answers in told.items()]
    if teacher is not None and not sampling.temperature:
        for row, answers in zip(rows, told.values(), strict=True):
            right = [agreed(teacher, prompt, tokens) for prompt, (tokens, _, _) in zip(asked, answers, strict=True)]
            row.agreement = sum(right) / max(1, row.tokens)
    return rows


def agreed(teacher: Part, prompt: list[int], tokens: list[int]) -> int:
    """How many tokens of an answer are the model's greedy choice after what stands before them."""
    sequence = teacher.open()
    try:
        if len(prompt) > 1:
            teacher.step(Rows().tokens(sequence, 0, prompt[:-1]))
        rows = Rows().tokens(sequence, len(prompt) - 1, [prompt[-1], *tokens[:-1]], want_all=True)
        return sum(a == b for a, b in zip(teacher.step(rows).tokens, tokens, strict=True))
    finally:
        sequence.close()


def _row(name: str, answers: Sequence[tuple[list[int], Stats, float]], streamed: Sequence[list[int]]) -> Row:
    stats = [stats for _, stats, _ in answers]
    tokens = sum(len(said) for said, _, _ in answers)
    decoded = sum(len(said) - 1 for said, _, _ in answers)
    decoding_s = sum(took_s - one.ttft_ms * 1e-3 for _, one, took_s in answers)
    drafted = sum(one.drafted for one in stats)
    return Row(
        name,
        len(answers),
        tokens,
        decoded / decoding_s if decoding_s > 0 else 0.0,
        statistics.median(one.ttft_ms for one in stats),
        sum(one.round_trips for one in stats) / tokens,
        sum(one.bytes_up for one in stats) / tokens,
        sum(one.bytes_down for one in stats) / tokens,
        sum(one.cloud_ms for one in stats) / tokens,
        sum(one.accepted for one in stats) / drafted if drafted else None,
        None,
        sum(said == text for (said, _, _), text in zip(answers, streamed, strict=True)),
        sorted({one.note for one in stats if one.note}),
    )
