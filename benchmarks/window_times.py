"""What both sides of a window take: measured before and after it, and corrected by the steps that they made in it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from isthmus.edge import Device, priors
from isthmus.edge.figures import CloudFigures, DeviceFigures
from isthmus.edge.knowledge import Knowledge
from isthmus.edge.stopwatch import Stopwatch
from isthmus.engine import KvConfig, Part, Rows, Want, open_part
from isthmus.protocol import tensors
from isthmus.split.bundle import Bundle

TOKENS = 120  # of an answer at most
STEPS = (1, 2, 4, 8)
PROMPT = 128
ENOUGH = 20  # steps in a window that tell how fast a side is
Step = tuple[int, int, int, float]  # rows that were wanted, other rows, cut, ms


@dataclass(frozen=True)
class Case:
    """A window."""

    link: str
    start_s: float
    rtt_ms: float
    slow: float
    cloud: float
    held: int
    disagreement: float


class Steps:
    """What steps took while devices were at work.

    Attributes:
        device: ms for each megabyte of weights, of their steps of one row.
        trips: ms of questions, without what the cloud says that it took.
        cloud: (rows that were wanted, other rows, cut, ms) of the cloud's steps, as it says itself.
    """

    def __init__(self) -> None:
        self.device, self.cloud, self.trips = list[float](), list[Step](), list[float]()

    @contextmanager
    def seen(self) -> Iterator[None]:
        """From here on all devices of this process are watched."""
        saw, stepped, trip, steps = Stopwatch.saw, Knowledge.stepped, Knowledge.trip, self

        def saw_too(watch: Stopwatch, rows: Rows, part: Part, seconds: float) -> None:
            alone = Stopwatch(watch.sizes, time.perf_counter)
            saw(alone, rows, part, seconds)
            steps.device += alone._decoded  # one at most
            saw(watch, rows, part, seconds)

        def stepped_too(
            knowledge: Knowledge, now_s: float, rows: int, prompt: int, ms: float, queue_ms: float, cut: int
        ) -> None:
            steps.cloud.append((rows, prompt, cut, ms))
            stepped(knowledge, now_s, rows, prompt, ms, queue_ms, cut)

        def trip_too(knowledge: Knowledge, now_s: float, ms: float, *, idle_s: float = 0.0) -> None:
            if not idle_s:
                steps.trips.append(ms)
            trip(knowledge, now_s, ms, idle_s=idle_s)

        with (
            patch.object(Stopwatch, "saw", saw_too),
            patch.object(Knowledge, "stepped", stepped_too),
            patch.object(Knowledge, "trip", trip_too),
        ):
            yield


@dataclass(frozen=True)
class Measured(CloudFigures):
    """A cloud whose steps from hidden states take another share of what the formula says than those of tokens."""

    rest_share: float = 1.0

    def rest(self, layer: int, rows: float = 1) -> float:
        """See `CloudFigures`."""
        return self.rest_share * CloudFigures.rest(self, layer, rows)


class Times:
    """What this machine takes, measured in this run with one thread: layers [0, k), steps of n rows, one prompt row."""

    def __init__(self, source: Bundle, layers: list[int]) -> None:
        part = open_part(source, 0, source.config.n_layers, threads=1, kv=KvConfig("f16", 4096))
        self.n_layers = part.end

        def step(count: int, leave: int | None, want: Want) -> float:
            sequence, took = part.open(), []
            part.step(Rows().tokens(sequence, 0, [7] * PROMPT, want=Want.NONE))
            for turn in range(12):
                rows = Rows().tokens(
                    sequence,
                    PROMPT + turn * count,
                    [7] * count,
                    leave=leave,
                    want=want,
                    want_all=want is not Want.NONE,
                )
                began = time.perf_counter()
                part.step(rows)
                took.append((time.perf_counter() - began) * 1e3)
            sequence.close()
            return statistics.median(took[2:])

        self.layers = {k: step(1, k, Want.HIDDEN) for k in sorted({1, *layers, part.end})}
        self.rows = {n: step(n, None, Want.SAMPLE) for n in STEPS}
        self.head = max(0.1, self.rows[1] - self.layers[part.end])
        self.prompt = step(64, None, Want.NONE) / 64
        vocabulary = source.config.vocab_size
        self.heads = [(one.layer, (one.head_tokens or vocabulary) / vocabulary) for one in source.exits]
        self.device_share = self.cloud_share = 1.0  # of that a token takes: with messages, text, and waits between
        self.rest_share = 1.0  # of what the formula says of steps from hidden states, beside tokens'
        self.trip_ms = 0.0  # of a question, see `trip_over`
        self.codec_ms = _coding_ms(source)
        self.steps = Steps()  # by which the shares were found
        part.close()

    def corrected(self, case: Case, steps: Steps) -> None:
        """Both sides as fast as in a window, by the steps that they made in it."""
        if len(steps.device) >= ENOUGH and self.steps.device:
            self.device_share *= statistics.median(steps.device) / statistics.median(self.steps.device)
        tokens, rests = ([one for one in steps.cloud if bool(one[2]) == hidden] for hidden in (False, True))
        if len(tokens) >= ENOUGH and self.steps.cloud:
            self.cloud_share *= self._pace(case, tokens) / self._pace(case, self.steps.cloud)
        if len(rests) >= ENOUGH:
            self.rest_share = self._pace(case, rests) / self.cloud_share

    def _pace(self, case: Case, steps: Sequence[Step]) -> float:
        """How long the cloud's steps took, of what they are put at."""
        known = self.believed(replace(case, cloud=case.cloud / self.cloud_share))
        expected = (  # as the simulator has it: rows of hidden states are alike, whoever wants them
            known.rest(cut, max(1, rows + prompt)) if cut else known.step(max(1, rows)) + known.prefill(prompt)
            for rows, prompt, cut, _ in steps
        )
        return sum(one[3] for one in steps) / sum(expected)  # the slow ones take their time, too

    def device(self, case: Case) -> DeviceFigures:
        """Of the case's device."""
        slow = case.slow * self.device_share
        points = tuple((k, ms * slow) for k, ms in self.layers.items())
        head, exit_ms, prompt = self.head * slow, self.layers[1] * slow, self.prompt * slow
        exits_ms = tuple((layer, exit_ms + head * share) for layer, share in self.heads)
        return DeviceFigures(case.held, self.n_layers, points, head, exit_ms, prompt, self.codec_ms, exits_ms)

    def cloud(self, case: Case) -> CloudFigures:
        """Of the case's cloud, as it is."""
        known = self.believed(case)
        return Measured(known.n_layers, known.rows_ms, known.head_ms, known.prefill_row_ms, rest_share=self.rest_share)

    def believed(self, case: Case) -> CloudFigures:
        """Of the case's cloud, as a device takes it to be that knows how long its tokens take."""
        slow = case.cloud * self.cloud_share
        rows = tuple((n, ms * slow) for n, ms in self.rows.items())
        return CloudFigures(self.n_layers, rows, self.head * slow, self.prompt * slow)


def calibrate(times: Times, case: Case, folder: Path, keys: Path, cloud: str, asked: list[str]) -> None:
    """What tokens take of what was measured of the engine alone: messages and text come to it, and a side that waits in
    proportion to what it computes finds its processor asleep.
    """
    whole = replace(case, held=times.n_layers)
    for mode in ("local", "stream"):
        with (
            times.steps.seen(),
            Device(folder, cloud, keys=keys, threads=1, slow_down=case.slow, kv_tokens=1024, mode=mode) as device,
        ):
            speeds = []
            for question in asked[:3]:
                device.reset()
                list(device.chat(question, max_tokens=TOKENS))
                speeds.append(device.stats.tok_s)
                if mode == "stream":
                    times.steps.cloud.append((1, 0, 0, device.stats.cloud_ms / len(device.stats.tokens)))
        ms = 1e3 / statistics.median(speeds)
        if mode == "local":
            times.device_share = ms / times.device(whole).token_ms
        else:
            times.cloud_share = ms / times.believed(whole).step(1)


def trip_over(case: Case, folder: Path, keys: Path, cloud: str, asked: list[str]) -> float:
    """What a question takes beyond the cloud's work over a link that only delays: the delay, and what wakes both sides
    and passes messages on. Where exits may speak, of a device that also says what may follow while it waits.
    """
    steps, options = Steps(), dict[str, Any](mode="verify", draft_depth=1)
    if case.disagreement:
        options = {"mode": "exit", "cut": case.held}
    with (
        steps.seen(),
        Device(folder, cloud, keys=keys, threads=1, slow_down=case.slow, kv_tokens=1024, **options) as device,
    ):
        for question in asked[:3]:
            device.reset()
            list(device.chat(question, max_tokens=TOKENS))
    return statistics.fmean(steps.trips)  # the slow ones take their time, too


def _coding_ms(source: Bundle) -> float:
    """What coding one hidden state takes, as the deepest exit has it."""
    entry = source.exits[-1]
    if entry.codec is None:
        return priors.CODEC_MS
    states = np.random.default_rng(0).standard_normal((1, source.config.d_model)).astype(np.float32)
    stats, took = source.exit(entry.layer).channels, []
    for _ in range(50):
        began = time.perf_counter()
        tensors.encode(states, entry.codec.name, stats=stats)
        took.append((time.perf_counter() - began) * 1e3)
    return statistics.median(took)
