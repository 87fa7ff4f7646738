"""Ways to share a model between a device and a cloud, side by side: the same prompts, the same link, the same exits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from isthmus.apps.bench.calm import Calm, calm_enough
from isthmus.edge import Device
from isthmus.edge.token import Stats
from isthmus.engine import KvConfig, open_part
from isthmus.engine.part import Part, Rows
from isthmus.engine.sampling import GREEDY, Sampling
from isthmus.protocol.errors import EngineError
from isthmus.split.bundle import Bundle

TEACHER_TOKENS = 2048
COLUMNS = (  # an attribute of a row, title, format
    ("tok_s", "tok/s", ".1f"),
    ("of_best", "of best", ".2f"),
    ("ttft_ms", "first, ms", ".0f"),
    ("requests_per_token", "asks/tok", ".2f"),
    ("up_bytes_per_token", "up B/tok", ".0f"),
    ("down_bytes_per_token", "down B", ".0f"),
    ("cloud_ms_per_token", "cloud ms", ".2f"),
    ("filled_per_token", "filled", ".1f"),
    ("acceptance", "accepted", ".0%"),
    ("agreement", "agrees", ".1%"),
)
STREAM, LOCAL = "cloud only (stream)", "device only (local)"
CE_COLLM, EXIT, VERIFY = "CE-CoLLM's policy", "exit", "verify"
PIPELINED = f"{VERIFY}, exit drafts, pipelined"
AUTO = "auto"
CE_COLLM_THRESHOLD = 0.8  # as published (2411.02829), on f16 states and one question a token


@dataclass(frozen=True, slots=True)
class Way:
    """One way of sharing.

    Attributes:
        options: a `Device`'s, beside those that all have.
        anew: every prompt begins with an empty session, as was published; else what a prompt has in common with the
            last one, which is the chat template's beginning, stays on both sides.
    """

    name: str
    options: Mapping[str, Any]
    anew: bool = False


@dataclass
class Row:
    """What a way came to: counts over all prompts; times of the median prompt, which a stall of the machine leaves.

    Attributes:
        timed: prompts whose times count: those in which others on the host left this machine its processors, or the
            calmer half (see `calm`).
        agreement: share of tokens that are the whole model's greedy choice after the same prefix; None where the
            device's bundle does not hold it, or nothing is greedy.
        acceptance: share of drafted tokens that were right, of those that the cloud checked.
        draft_ms: of a drafted token on the device, in the mean; None where none was drafted.
        filled_per_token: layers times tokens about which nobody asked that the cloud computed for those that follow,
            over all tokens; None where no exit speaks.
        same: answers that are, token for token, the cloud's own; None where that was not asked.
        of_best: tokens a second over those of the better of the device and the cloud alone, where these were asked.
        notes: what did not go as asked.
    """

    way: str
    prompts: int = 0
    timed: int = 0
    tokens: int = 0
    tok_s: float = 0.0
    ttft_ms: float = 0.0
    requests_per_token: float = 0.0
    up_bytes_per_token: float = 0.0
    down_bytes_per_token: float = 0.0
    cloud_ms_per_token: float = 0.0
    acceptance: float | None = None
    draft_ms: float | None = None
    agreement: float | None = None
    filled_per_token: float | None = None
    same: int | None = None
    of_best: float | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def ways(cut: int | None, threshold: float | None, whole: bool, exits: bool = True) -> list[Way]:
    """What is compared.

    Args:
        cut: the exit's layer, also where the naive split is made; None for the middle.
        threshold: of our exit mode; None for its certificate's.
        whole: whether the device holds the whole model.
        exits: whether the bundle has exits, without which some ways are left out.
    """
    found = [Way(STREAM, {"mode": "stream"})]
    if whole:
        found.append(Way(LOCAL, {"mode": "local"}))
    found.append(Way("naive split, f16", {"mode": "split", "cut": cut}, anew=True))
    if exits:
        published = {"mode": "exit", "cut": cut, "threshold": CE_COLLM_THRESHOLD, "codec": "f16", "guesses": 0}
        ours = {"mode": "exit", "cut": cut, "threshold": threshold}
        found += [
            Way(CE_COLLM, published, anew=True),
            Way(EXIT, ours),
            Way(f"{EXIT}, every prompt anew", ours, anew=True),
            Way(f"{EXIT}, one token a question", {**ours, "guesses": 0}),
        ]
    found.append(Way(f"{VERIFY}, n-grams", {"mode": "verify", "draft": "ngrams", "draft_depth": 1}))
    if exits:
        drafted = {"mode": "verify", "draft": "exit"}
        found.append(Way(f"{VERIFY}, exit drafts", {**drafted, "draft_depth": 1}))
        found.append(Way(PIPELINED, {**drafted, "draft_depth": 8}))
    return [*found, Way(AUTO, {"mode": "auto"})]


def select(contenders: Sequence[Way], only: str) -> list[Way]:
    """Those of one of these names, or whose names hold one of the words, separated by semicolons, or by commas where
    there are no semicolons; all without any.

    Raises:
        EngineError: there is none.
    """
    names = {way.name.lower() for way in contenders}
    apart = ";" if ";" in only or only.strip().lower() in names else ","
    words = [word.strip().lower() for word in only.split(apart) if word.strip()]
    found = [
        way
        for way in contenders
        if not words or any(word == way.name.lower() if word in names else word in way.name.lower() for word in words)
    ]
    if not found:
        shown = "; ".join(way.name for way in contenders)
        raise EngineError(f"--only {only!r} names no way", f"use words of: {shown}")
    return found


def compare(
    contenders: Sequence[Way],
    opened: Callable[[Way], Device],
    prompts: Sequence[str],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    teacher: Part | None = None,
    progress: Callable[[str], None] | None = None,
    patience_s: float = 0.0,
) -> list[Row]:
    """Every way answers every prompt, in turns, each on a device of its own.

    Args:
        opened: makes a way's device.
        teacher: the whole model, to hold greedy answers against.
        progress: told what is running.
        patience_s: how long to wait, before each prompt, for others on the host to leave this machine its processors.
    """
    calm, taken = Calm(), list[float]()
    told: dict[str, list[tuple[list[int], Stats, float]]] = {way.name: [] for way in contenders}
    asked: list[list[int]] = []
    with ExitStack() as stack:
        devices = [stack.enter_context(opened(way)) for way in contenders]
        for number, prompt in enumerate(prompts):
            calm.wait(patience_s)
            for way, device in zip(contenders, devices, strict=True):
                if progress:
                    progress(f"prompt {number + 1} of {len(prompts)}: {way.name}")
                if way.anew:
                    device.reset()
                began = time.perf_counter()
                asks = [{"role": "user", "content": prompt}]
                tokens = [token.id for token in device.chat(asks, max_tokens=max_tokens, sampling=sampling)]
                told[way.name].append((tokens, device.stats, time.perf_counter() - began))
            taken.append(calm.taken())
            asked.append(device.tokens[: device.stats.prompt_tokens])
    streamed = [tokens for tokens, _, _ in told[STREAM]] if STREAM in told else None
    rows = [_row(name, answers, streamed, calm_enough(taken)) for name, answers in told.items()]
    alone = [row.tok_s for row in rows if row.way in (STREAM, LOCAL)]
    for row in rows:
        row.of_best = row.tok_s / max(alone) if alone and max(alone) > 0 else None
    if teacher is not None and not sampling.temperature:
        for row, answers in zip(rows, told.values(), strict=True):
            right = [agreed(teacher, prompt, tokens) for prompt, (tokens, _, _) in zip(asked, answers, strict=True)]
            row.agreement = sum(right) / max(1, row.tokens)
    return rows


@contextmanager
def whole(source: Bundle) -> Iterator[Part | None]:
    """The model that answers are held against; None where the bundle holds too little of it."""
    if not source.whole:
        yield None
        return
    with closing(open_part(source, 0, source.config.n_layers, kv=KvConfig("f16", TEACHER_TOKENS))) as part:
        yield part


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


def table(title: str, rows: Sequence[Row]) -> str:
    """Rows as people read them."""
    columns = [column for column in COLUMNS if any(getattr(row, column[0]) is not None for row in rows)]
    lines = ["\n" + f"{title:<32}" + "".join(f"{name:>10}" for _, name, _ in columns)]
    for row in rows:
        values = [(getattr(row, key), form) for key, _, form in columns]
        cells = ["" if value is None else format(value, form) for value, form in values]
        lines.append(f"{row.way:<32}" + "".join(f"{cell:>10}" for cell in cells))
        lines += [f"    {note}" for note in row.notes]
    return "\n".join(lines)


def _row(
    name: str,
    answers: Sequence[tuple[list[int], Stats, float]],
    streamed: Sequence[list[int]] | None,
    timed: Sequence[int],
) -> Row:
    stats = [stats for _, stats, _ in answers]
    tokens = sum(len(said) for said, _, _ in answers)
    calm = [answers[one] for one in timed]
    decoding = [(len(said) - 1, took_s - one.ttft_ms * 1e-3) for said, one, took_s in calm]
    drafted = sum(one.drafted for one in stats)
    return Row(
        name,
        len(answers),
        len(calm),
        tokens,
        statistics.median([decoded / took_s for decoded, took_s in decoding if decoded and took_s > 0] or [0.0]),
        statistics.median(one.ttft_ms for _, one, _ in calm),
        sum(one.round_trips for one in stats) / tokens,
        sum(one.bytes_up for one in stats) / tokens,
        sum(one.bytes_down for one in stats) / tokens,
        statistics.median(one.cloud_ms / max(1, len(said)) for said, one, _ in calm),
        sum(one.accepted for one in stats) / drafted if drafted else None,
        sum(one.drafting_ms for _, one, _ in calm) / drafts
        if (drafts := sum(one.drafts for _, one, _ in calm))
        else None,
        None,
        sum(one.filled for one in stats) / tokens if any("exit" in one.sources for one in stats) else None,
        None if streamed is None else sum(said == text for (said, _, _), text in zip(answers, streamed, strict=True)),
        None,
        sorted({one.note for one in stats if one.note}),
    )
