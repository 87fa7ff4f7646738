"""How far is a language model's plan from what its modes really take? Each mode over emulated links, and as planned.

A device and a cloud, both as fast as a processor of this machine (who pretends to be slower by waiting finds its
processor asleep, which no profile says), answer the questions that modes.py asks, each anew, in every mode by itself.
Plans are made on profiles that were measured just before and just after, where drafts are checked while more are made
beside another process that does the same, and count what drafts and exits foresee along answers to other questions of
the kind; of a plan the best way of a mode counts, at the same cut and with the same drafts. Over a trace each question
is asked at another of its moments, and plans are for answers that begin at these.

usage: python benchmarks/forecast.py [--prompts 8] [--tokens 48]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing import get_context
from typing import Any, NamedTuple

import msgspec
import numpy as np
from models import BENCH, bundle
from planner import LINKS
from progress import tenths
from prompts import prompts
from record import Cell, Record

from isthmus.apps.bench.calm import Calm
from isthmus.apps.bench.relay import LinkProfile
from isthmus.apps.bench.stage import Stage
from isthmus.apps.cli.decoder_measure import measure
from isthmus.apps.cli.decoder_plan import DecoderPlan, plan
from isthmus.apps.cli.decoder_profile import DecoderProfile
from isthmus.apps.cli.decoder_ways import EXACT, Answer, Setting, Way
from isthmus.apps.cli.foreseen import Foreseen, foreseen
from isthmus.split.bundle import Bundle
from isthmus.split.exit_run import ExitRun, working_in
from isthmus.split.link import Link, read_link
from isthmus.split.replay import Times
from isthmus.split.traces import turned

CUT = 24
PIPED = "verify exit, pipelined"  # both sides compute at once
WAYS: Mapping[str, tuple[dict[str, Any], Callable[[Way], bool]]] = {
    "local": ({"mode": "local"}, lambda way: way.mode == "local"),
    "stream": ({"mode": "stream"}, lambda way: way.mode == "stream"),
    f"split {CUT} {EXACT}": (
        {"mode": "split", "cut": CUT, "codec": EXACT},
        lambda way: way.mode == "split" and (way.cut, way.codec) == (CUT, EXACT),
    ),
    f"exit {CUT}": ({"mode": "exit", "cut": CUT}, lambda way: way.mode == "exit" and way.cut == CUT),
    "verify ngram": (
        {"mode": "verify", "draft": "ngrams", "draft_depth": 1},
        lambda way: way.mode == "verify" and "ngram" in way.name,
    ),
    PIPED: (
        {"mode": "verify", "draft": "exit", "draft_depth": 8},
        lambda way: way.mode == "verify" and way.name.endswith("pipelined"),
    ),
}
STARTS_S = tuple(15.0 * at for at in range(8))  # over the synthetic trace, which repeats after 120
TIMES = ("layers_ms", "rows_ms", "apart", "exits_ms", "rests_ms", "layers_cold_ms", "exits_cold_ms", "rests_cold_ms")
PROFILE_S, STARTING_S, CALM_S = 6.0, 2.0, 30.0
COUNTED = 48  # questions along whose answers is counted


def main() -> int:
    """Measures and writes results/forecast.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    source, asked = bundle("keep"), prompts().kept_back[: options.prompts]
    record = Record("forecast", vars(options) | {"threads": "1 on each side"})
    with working_in(BENCH / "exits"):
        along = foreseen(
            ExitRun(source, BENCH / "exits", tenths, os.cpu_count() or 1), prompts().others[: 2 * COUNTED : 2]
        )
    rows: list[list[Cell]] = []
    offs = list[float]()
    for name, profile in LINKS.items():
        before = alone(source), beside(source)
        told = {way: taken(source, profile, WAYS[way][0], asked, options.tokens) for way in WAYS}
        after = alone(source), beside(source)  # the host may be another one by now: the mean of both
        by_itself, both = (mean(*pair) for pair in zip(before, after, strict=True))
        took_ms = {way: statistics.fmean(one.ms for one in found) for way, found in told.items()}
        for way, found in told.items():
            prompt = round(statistics.fmean(one.prompt for one in found))
            answer = Answer(prompt, options.tokens, disagreement=1.0)
            machine = both if way == PIPED else by_itself
            moments = None if profile.trace_up is None else np.array([one.at_ms for one in found])
            ways = planned(source, profile, machine, answer, along, moments).ways
            best = min((one for one in ways if WAYS[way][1](one)), key=lambda one: one.total_ms)
            off = abs(best.total_ms - took_ms[way]) / took_ms[way]
            offs.append(off)
            fastest = "fastest" if took_ms[way] == min(took_ms.values()) else ""
            tokens = statistics.fmean(one.tokens for one in found)
            rows.append([name, way, best.name, best.total_ms, took_ms[way], off, fastest, tokens])
            print(*rows[-1], sep="; ", file=sys.stderr, flush=True)
    record.figure("ways over links", len(offs), "ways")
    record.figure("off by, median", statistics.median(offs), "of the measured")
    record.figure("off by, 95 %", float(np.quantile(offs, 0.95)), "of the measured")
    columns = ["link", "way", "as planned", "planned, ms", "measured, ms", "off by", "", "tokens"]
    record.table(
        "forecast",
        columns,
        rows,
        note="Of an answer, the prompt included, in the mean; over the trace at the same moments.",
    )
    record.write()
    return 0


def alone(source: Bundle) -> DecoderProfile:
    """What the model takes on this machine."""
    return measure(source, 1, "this", "this", PROFILE_S)


def beside(source: Bundle) -> DecoderProfile:
    """The same while another process does it, too."""
    other = get_context("spawn").Process(target=_busy, args=(str(source.path),), daemon=True)
    other.start()
    try:
        time.sleep(STARTING_S)
        return alone(source)
    finally:
        other.kill()
        other.join()


def _busy(path: str) -> None:
    while True:
        alone(Bundle.open(path))


def mean(one: DecoderProfile, other: DecoderProfile) -> DecoderProfile:
    """Between two profiles of a machine."""
    pairs = {
        name: tuple((n, (a + b) / 2) for (n, a), (_, b) in zip(getattr(one, name), getattr(other, name), strict=True))
        for name in TIMES
    }
    prefill_ms = (one.prefill_row_ms + other.prefill_row_ms) / 2
    return msgspec.structs.replace(one, **pairs, prefill_row_ms=prefill_ms)


def planned(
    source: Bundle,
    profile: LinkProfile,
    machine: DecoderProfile,
    answer: Answer,
    along: Foreseen,
    moments: Times | None,
) -> DecoderPlan:
    """The plan over a link, of a trace for answers that begin at those moments (ms)."""
    if profile.trace_up is not None and profile.trace_down is not None:
        link = Link(profile.rtt_ms, profile.trace_up, profile.trace_down)
    else:
        assert profile.rate_up_bps is not None and profile.rate_down_bps is not None
        up, down = profile.rate_up_bps / 1e6, profile.rate_down_bps / 1e6
        link = read_link(f"rtt={profile.rtt_ms},up={up},down={down}")
    return plan(Setting(source, machine, machine, 1.0, link, answer, along, moments))


class Took(NamedTuple):
    """An answer.

    Attributes:
        at_ms: when it began, since the link's trace did.
        prompt: its tokens.
    """

    at_ms: float
    ms: float
    tokens: int
    prompt: int


def taken(source: Bundle, profile: LinkProfile, options: dict[str, Any], asked: list[str], tokens: int) -> list[Took]:
    """Answers of so many tokens, for which a plan is; all, if none is as long."""
    found, starts = list[Took](), (0.0,) if profile.trace_up is None else STARTS_S
    for number, start_s in enumerate(starts):
        with Stage(source, _from(profile, start_s)) as stage, stage.device(**options) as device:
            begun = time.perf_counter() - start_s
            list(device.chat(asked[0], max_tokens=2))  # connects
            Calm().wait(CALM_S)
            for question in asked[number :: len(starts)]:
                device.reset()
                began = time.perf_counter()
                list(device.chat(question, max_tokens=tokens))
                took_ms = (time.perf_counter() - began) * 1e3
                said, prompt = len(device.stats.tokens), device.stats.prompt_tokens
                found.append(Took((began - begun) * 1e3, took_ms, said, prompt))
    return [one for one in found if one.tokens == tokens] or found


def _from(profile: LinkProfile, start_s: float) -> LinkProfile:
    """A link whose traces begin where they are after some seconds."""
    up, down = profile.trace_up, profile.trace_down
    if up is None or down is None:
        return profile
    return replace(profile, trace_up=turned(up, start_s), trace_down=turned(down, start_s))


if __name__ == "__main__":
    sys.exit(main())
