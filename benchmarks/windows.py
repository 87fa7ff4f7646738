"""Is "auto" as near to the best mode on real links as in the simulator? Eight windows of 60 seconds, played for real.

In each window a cloud is a process of its own, the link is a relay that replays a trace from a moment on, and a device
answers questions, which no exit was trained or certified with, one after the other: in every fixed mode that the wish
allows, each on the same stretch of the trace, then in auto, which has met machine and cloud before but not the link.
The simulator plays auto on the same stretch with times that were measured just before and just after (the mean of both
counts), what a question takes over a link that only delays among them, corrected by how fast the steps of both sides
were within the window, since a host that others use is another one a minute later; and with what n-grams and exits
foresee of the answers. Fixed modes wait for a link that is silent, and auto goes on by itself; where it can do so only
with an exit's guesses, an answer is complete when the cloud has confirmed them. A device that holds 20 layers has a
folder with no more in it. Slow-downs are declared; nothing else should run on the machine. What was played
while others on the host took much of the processors is played again, at most twice. Each window is kept when it is
done, by commit: a run that was stopped is gone on with, and `--only` plays some again.

usage: python benchmarks/windows.py [--traces FOLDER] [--seconds 60] [--only 0,3] [--questions 16]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kept import Kept
from models import BENCH, bundle, part_of
from prompts import prompts
from record import RUNS, Cell, Record, commit
from window_times import TOKENS, Case, Steps, Times, calibrate, trip_over

from isthmus.apps.bench.calm import Calm
from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.apps.bench.facts import Answer, ExitFacts, guessed
from isthmus.apps.bench.relay import LinkProfile, Relay
from isthmus.apps.bench.simulate import LinkPlan, Point, Window, play_auto
from isthmus.edge import Device, Timeouts, priors
from isthmus.edge.exit import ExitSpeaker
from isthmus.edge.figures import Figures, Wish
from isthmus.edge.local import LocalPart
from isthmus.edge.model_drafts import Said
from isthmus.edge.token import Source, Token
from isthmus.engine import KvConfig, open_part
from isthmus.engine.sampling import GREEDY
from isthmus.protocol.chain import Chain
from isthmus.split.bundle import Bundle
from isthmus.split.traces import Trace, read_pair, synthetic_pair, turned

LEAD_S = 3.0  # in which a device connects
NEAR, ALIKE = 0.9, 0.1
WAITS_MS = 120_000  # for a silent link
MOST_TAKEN, TRIES, PATIENCE_S = 0.1, 3, 60.0  # of the processors, by others on the host; plays; waiting for calm
PLAYED_BY = ("calm", "carrier", "conversation", "facts", "players", "relay", "shaping", "simulate", "virtual")
PLAYS = (
    *RUNS,
    "benchmarks/windows.py",
    "benchmarks/window_times.py",
    *(f"apps/bench/{name}.py" for name in PLAYED_BY),
)  # what a window depends on
Play = Callable[[list[str], float], tuple[int, Counter[str]]]


CASES = (
    Case("Verizon-LTE-short", 20, 20, 4, 1, 30, 0.0),
    Case("Verizon-LTE-short", 60, 5, 1, 8, 20, 0.05),
    Case("ATT-LTE-driving-2016", 20, 50, 4, 1, 30, 0.0),
    Case("ATT-LTE-driving-2016", 60, 20, 1, 8, 20, 0.05),
    Case("TMobile-UMTS-driving", 30, 20, 4, 1, 30, 0.0),
    Case("TMobile-UMTS-driving", 90, 20, 1, 8, 20, 0.0),
    Case("Verizon-EVDO-driving", 20, 100, 1, 1, 30, 0.0),
    Case("Verizon-EVDO-driving", 60, 50, 4, 8, 20, 0.05),
)


def answers(source: Bundle, asked: list[str], layers: list[int], cut: int, keys: Path) -> list[Answer]:
    """What is answered, and what n-grams and exits foresee of it: by the model alone, or with an exit before `cut`,
    whose states travel rounded, so that the text soon is another.
    """
    kv = KvConfig("f16", 4096)
    found = []
    with ExitStack() as opened:
        options: dict[str, Any] = {"mode": "local"}
        if cut:
            cloud = opened.enter_context(CloudProcess(source.path, keys, 1))
            options = {"mode": "exit", "cut": cut, "cloud": cloud.address, "keys": keys}
        device = opened.enter_context(Device(source.path, threads=1, kv_tokens=1024, **options))
        speakers = {}
        for layer in layers:
            part = LocalPart(open_part(source, 0, layer, threads=1, kv=kv))
            speakers[layer] = ExitSpeaker(
                part, open_part(source.exit(layer), layer, layer + 1, threads=1, kv=kv), layer
            )
        for question in asked:
            device.reset()
            list(device.chat(question, max_tokens=TOKENS))
            log, first = device.tokens, device.stats.prompt_tokens
            found.append(along(log, first, speakers))
    return found


def along(log: list[int], first: int, speakers: Mapping[int, ExitSpeaker]) -> Answer:
    """One answer; `device.reset` has forgotten all that was before its prompt."""
    said: dict[int, list[Said]] = {layer: [] for layer in speakers}
    chain = Chain()
    chain.extend(log[:first])
    for speaker in speakers.values():
        speaker.truncate(0)
    for token in log[first:]:
        for layer, speaker in speakers.items():
            said[layer].append(speaker.say(chain, GREEDY))
        chain.extend([token])
    exits = {
        layer: ExitFacts(
            tuple(one.confidence for one in words),
            tuple(one.token == came for one, came in zip(words, log[first:], strict=True)),
        )
        for layer, words in said.items()
    }
    return replace(guessed(log, first), exits=exits)


def links(folder: Path | None, name: str) -> tuple[Trace, Trace]:
    """A link's two ways; without a folder the synthetic one's, whatever its name."""
    return read_pair(folder / name) if folder else synthetic_pair()


def fixed_ways(case: Case, source: Bundle, layers: list[int]) -> dict[str, dict[str, Any]]:
    """Every fixed mode that the wish allows, by name."""
    ways: dict[str, dict[str, Any]] = {"stream": {"mode": "stream"}}
    if case.held == source.config.n_layers:
        ways["local"] = {"mode": "local"}
    ways["verify ngram"] = {"mode": "verify", "draft_depth": 1}
    if layers:
        ways["verify exit"] = {"mode": "verify", "draft": "exit", "draft_depth": 1}
        ways["verify exit pipelined"] = {"mode": "verify", "draft": "exit", "draft_depth": 8}
    cut = min(case.held, source.config.n_layers - 1)
    ways["split f32"] = {"mode": "split", "cut": cut, "codec": "f32"}
    for entry in source.exits:
        promised = entry.certificate.disagreement if entry.certificate else 1.0
        if entry.layer in layers and promised <= case.disagreement:
            ways[f"exit {entry.layer}"] = {"mode": "exit", "cut": entry.layer}
    return ways


def play(device: Device, asked: list[str], begin_s: float, seconds: float) -> tuple[int, Counter[str]]:
    """Tokens that came in time and stood, and where they were made.

    What an exit guessed while the link was silent counts where the cloud had confirmed it by then.
    """
    time.sleep(max(0.0, begin_s - time.monotonic()))
    sources: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while True:
        for question in asked:
            device.reset()
            sources.update(heard(device, device.chat(question, max_tokens=TOKENS), end))
            if time.monotonic() >= end:
                return sources.total(), sources


def heard(device: Device, answer: Iterator[Token], end: float) -> list[Source]:
    """Where the tokens of an answer that came by `end` and stood were made."""
    said, first, sure = list[Source](), 0, 0
    for token in answer:
        if time.monotonic() >= end:
            break
        first = first if said else token.position
        del said[token.position - first :]  # that was taken back
        said.append(token.source)
        sure = len(said) if token.verified else sure
    else:
        if time.monotonic() < end:  # later nobody knows when the last guesses were confirmed
            sure = len(device.stats.tokens) - device.stats.unverified
    return [one for at, one in enumerate(said) if at < sure or one != "exit"]


def real(case: Case, options: Mapping[str, Any], folder: Path, keys: Path, cloud: str, link: LinkProfile) -> Play:
    """Plays a window in one mode."""

    def played(asked: list[str], seconds: float) -> tuple[int, Counter[str]]:
        auto = options["mode"] == "auto"
        patience = Timeouts(connect_ms=60_000) if auto else Timeouts(connect_ms=60_000, give_up_ms=WAITS_MS)
        with Relay(cloud, link) as relay:
            began = time.monotonic()
            with Device(
                folder,
                relay.address,
                keys=keys,
                threads=1,
                slow_down=case.slow,
                kv_tokens=1024,
                timeouts=patience,
                fallback=auto,
                **options,
            ) as device:
                list(device.chat(asked[0], max_tokens=1))  # connects, before the window begins
                return play(device, asked, began + LEAD_S, seconds)

    return played


@dataclass(frozen=True, slots=True)
class Played:
    """What a window came to, in tokens.

    Attributes:
        taken: the largest share of the processors' time that others on the host took while it was played.
    """

    window: int
    commit: str | None
    fixed: dict[str, int]
    auto: int
    simulated: int
    made_by: str
    taken: float


class Stand:
    """A bundle, what this machine takes for it, what the model answers, and keys."""

    def __init__(self, source: Bundle, traces: Path | None, keys: Path, questions_: int, seconds: float) -> None:
        self._source, self._traces, self._keys, self._seconds = source, traces, keys, seconds
        self._layers = [entry.layer for entry in source.exits]
        self._asked = prompts().others[: 2 * questions_ : 2]  # those about topics
        self._said: dict[int, list[Answer]] = {}  # by the exit that speaks, 0 for none
        self._calm, self._taken = Calm(), 0.0

    def window(self, number: int) -> Played:
        """Plays one."""
        case, source, keys = CASES[number], self._source, self._keys
        folder = part_of(source, case.held, keys / f"part-{number}")
        able = [layer for layer in self._layers if layer <= case.held]
        up, down = (turned(one, case.start_s - LEAD_S) for one in links(self._traces, case.link))
        link = replace(LinkProfile.of_rtt(case.rtt_ms), trace_up=up, trace_down=down)
        tokens: dict[str, int] = {}
        self._taken = 0.0
        with CloudProcess(source.path, keys, 1, case.cloud) as cloud:
            wish = {"mode": "auto", "max_disagreement": case.disagreement}
            real(case, wish, folder, keys, cloud.address, LinkProfile())(self._asked, 5.0)  # meets machine and cloud
            for name, way in fixed_ways(case, source, able).items():
                tokens[name], _ = self._calmly(real(case, way, folder, keys, cloud.address, link))
                print(f"window {number}: {name} {tokens[name]} tokens", file=sys.stderr, flush=True)
            before, steps = self._measured(case, cloud.address), Steps()
            with steps.seen():
                auto, sources = self._calmly(real(case, wish, folder, keys, cloud.address, link))
            after = self._measured(case, cloud.address)
        for times in (before, after):
            times.corrected(case, steps)
        simulations = [self._simulated(case, times, able, up, down) for times in (before, after)]
        simulated = round(statistics.mean(tokens for tokens, _ in simulations))
        used = [ways for _, ways in simulations]
        made_by = ", ".join(f"{source} {count}" for source, count in sources.most_common())
        print(f"window {number}: auto {auto} ({made_by}), simulated {simulated} {used}", file=sys.stderr, flush=True)
        return Played(number, commit(PLAYS), tokens, auto, simulated, made_by, round(self._taken, 3))

    def _calmly(self, played: Play) -> tuple[int, Counter[str]]:
        """The calmest of at most `TRIES`."""
        tries: list[tuple[float, tuple[int, Counter[str]]]] = []
        while not tries or (tries[-1][0] > MOST_TAKEN and len(tries) < TRIES):
            self._calm.wait(PATIENCE_S)
            outcome = played(self._asked, self._seconds)
            tries.append((self._calm.taken(), outcome))
        taken, outcome = min(tries, key=lambda one: one[0])
        self._taken = max(self._taken, taken)
        return outcome

    def _answered(self, cut: int) -> list[Answer]:
        if cut not in self._said:
            self._said[cut] = answers(self._source, self._asked, self._layers, cut, self._keys)
        return self._said[cut]

    def _measured(self, case: Case, cloud: str) -> Times:
        """What both sides take now: on a host that others use, it is not the same an hour later."""
        self._calm.wait(PATIENCE_S)
        times = Times(self._source, [*self._layers, 20])
        with Relay(cloud, LinkProfile()) as relay:  # which takes its part of the time, too
            calibrate(times, case, self._source.path, self._keys, relay.address, self._asked)
        with Relay(cloud, LinkProfile.of_rtt(case.rtt_ms)) as relay:
            times.trip_ms = trip_over(case, self._source.path, self._keys, relay.address, self._asked)
        return times

    def _simulated(
        self, case: Case, times: Times, able: list[int], up: Trace, down: Trace
    ) -> tuple[int, dict[str, int]]:
        """Tokens of auto in the simulator, and of each of its ways."""
        source, device = self._source, times.device(case)
        figures = Figures(
            replace(device, codec_ms=priors.CODEC_MS),
            times.believed(case),
            None,
            priors.exits(source, able),
            priors.drafts(source, able, device),
            priors.codecs(source, ("f32",)),
        )
        point = Point(device, times.cloud(case), LinkPlan(times.trip_ms, up, down), figures)
        said = self._answered(max(able, default=0) if case.disagreement else 0)
        turns = int(self._seconds * 1e3 / (len(said) * TOKENS)) + 2
        window = Window(0.0, tuple(said) * turns, LEAD_S, self._seconds, TOKENS)
        outcome = play_auto(point, Wish("speed", case.disagreement), window)
        return outcome.tokens, dict(outcome.used)


def main() -> int:
    """Plays the windows and writes results/windows.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--traces", type=Path, help="folder of PREFIX.up and PREFIX.down; without it all links are a synthetic one"
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", default="", help="numbers of windows, from 0 on; all else")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--bundle", type=Path, help="with calibrated exits; by default SmolLM2 with those shipped")
    options = parser.parse_args()
    name = "windows" if options.traces else "windows-synthetic"
    kept = Kept(BENCH / f"{name}-{options.seconds:g}-{options.questions}.jsonl", Played)
    played = {one.window: one for one in kept.found}  # the last of each
    missing = [n for n in range(len(CASES)) if n not in played or played[n].commit != commit(PLAYS)]
    chosen = [int(n) for n in options.only.split(",")] if options.only else missing
    with fresh_keys() as keys:
        os.environ["ISTHMUS_CACHE"] = str(keys / "cache")  # what auto learns of this machine, and nothing from before
        if chosen:
            source = Bundle.open(options.bundle) if options.bundle else bundle("keep")
            stand = Stand(source, options.traces, keys, options.questions, options.seconds)
            for number in chosen:
                played[number] = stand.window(number)
                kept.add([played[number]])
    record = Record(
        name,
        {
            "seconds": options.seconds,
            "questions": options.questions,
            "threads": "1 on each side",
            "emulated": "device slow-down, cloud step, round trip and links",
        },
    )
    tell(record, [played[number] for number in sorted(played)])
    record.write()
    return 0


def tell(record: Record, windows: list[Played]) -> None:
    """Figures and the table."""
    rows: list[list[Cell]] = []
    for one in windows:
        case, name = CASES[one.window], f"window {one.window}"
        best = max(one.fixed, key=one.fixed.__getitem__)
        alone = max(count for way, count in one.fixed.items() if way in ("local", "stream"))
        record.figure(f"{name}/auto of the best mode", one.auto / max(1, one.fixed[best]), "ratio", target=NEAR)
        record.figure(f"{name}/auto of local or stream", one.auto / max(1, alone), "ratio", target=NEAR)
        off = abs(one.simulated / max(1, one.auto) - 1.0)
        record.figure(f"{name}/simulator off by", off, "share", target=ALIKE, at_most=True)
        record.figure(f"{name}/taken by others on the host", one.taken, "share of the processors' time")
        row: list[Cell] = [case.link, case.start_s, case.rtt_ms, case.slow, case.cloud, case.held]
        row += [case.disagreement, best, one.fixed[best], one.auto, one.simulated, one.made_by]
        row.append("; ".join(f"{way} {count}" for way, count in one.fixed.items()))
        rows.append(row)
        if one.commit != commit(PLAYS):
            record.notes.append(f"{name} was played at commit {one.commit}")
    record.figure("windows", len(windows), "windows", target=len(CASES))
    columns = ["link", "from, s", "round trip, ms", "device slow-down", "cloud step", "layers held", "disagreement"]
    columns += ["best mode", "its tokens", "auto", "simulated auto", "made by", "all modes"]
    record.table("windows", columns, rows, note="Tokens in the window; the simulator plays auto.")


if __name__ == "__main__":
    sys.exit(main())
