"""Whether drafts change anything: verified answers against the cloud's own, token for token, over a real cloud process.

Each prompt is streamed, greedy and at a temperature with a seed of its own, then answered in verify mode with drafts of
n-grams and of the deepest exit, one block at a time and pipelined. A run that was stopped, or that asked for fewer
prompts, is gone on with, unless something has changed since that a text may depend on.

usage: python benchmarks/verify.py [--prompts 200] [--tokens 64] [--temperature 0.8] [--rtt-ms 5]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from kept import Kept
from models import BENCH, bundle
from record import RUNS, Cell, Record, commit

from isthmus.apps.bench.modes import STREAM, VERIFY, Way, ways
from isthmus.apps.bench.shaping import LinkProfile
from isthmus.apps.bench.stage import Stage
from isthmus.edge import Device
from isthmus.engine.sampling import Sampling
from isthmus.split.exit_states import CHECK_TOPICS, questions

FORMAT = "keep"
WAYS = (
    Way(STREAM, {"mode": "stream"}),
    *(way for way in ways(None, None, whole=True) if way.name.startswith(VERIFY)),
    Way(f"{VERIFY}, n-grams, pipelined", {"mode": "verify", "draft": "ngrams", "draft_depth": 8}),
)
MAX_BYTES, PROMPTS = 32, 200
NICE = 10


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        prompt: its number.
        wrong_at: the first token that is not the stream's, -1 for none.
    """

    prompt: int
    temperature: float
    way: str
    tokens: int
    wrong_at: int
    bytes_up: int


def done(answers: list[Answer], prompt: int, temperature: float) -> bool:
    """Whether all ways answered a prompt."""
    return sum((a.prompt, a.temperature) == (prompt, temperature) for a in answers) == len(WAYS)


def main() -> int:
    """Measures and writes results/verify.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of a fixed list, from its beginning")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8, help="beside greedy")
    parser.add_argument("--rtt-ms", type=float, default=5.0)
    options = parser.parse_args()
    os.nice(NICE)
    settings = {name: value for name, value in vars(options).items() if name != "prompts"}
    name = "-".join(f"{value:g}" for value in settings.values())
    kept = Kept(BENCH / f"verify-{commit(RUNS) or 'unknown'}-{name}.jsonl", Answer)
    temperatures = (0.0, options.temperature)
    asked = list(enumerate(questions([], options.prompts, topics=CHECK_TOPICS)))
    left = [(n, text, t) for n, text in asked for t in temperatures if not done(kept.found, n, t)]
    if left:
        source = bundle(FORMAT)
        with Stage(source, LinkProfile.of_rtt(options.rtt_ms)) as stage:
            devices = [stage.device(**way.options) for way in WAYS]
            for number, text, temperature in left:
                kept.add(answered(devices, number, text, temperature, options.tokens))
                print(
                    f"prompt {number + 1} of {len(asked)} at temperature {temperature:g}", file=sys.stderr, flush=True
                )
            for device in devices:
                device.close()
    record = Record("verify", settings | {"prompts": len(asked), "format": FORMAT})
    record.figure("prompts", len(asked), "prompts", target=PROMPTS)
    tell(record, [answer for answer in kept.found if answer.prompt < len(asked)], temperatures)
    record.write()
    return 0


def answered(devices: list[Device], number: int, text: str, temperature: float, tokens: int) -> Iterator[Answer]:
    """What each way says to one prompt, the stream first."""
    truth: list[int] = []
    for way, device in zip(WAYS, devices, strict=True):
        sampling = Sampling(temperature, seed=number)
        asks = [{"role": "user", "content": text}]
        said = [token.id for token in device.chat(asks, max_tokens=tokens, sampling=sampling)]
        truth = truth or said
        wrong = next((i for i, (a, b) in enumerate(zip(truth, said, strict=False)) if a != b), -1)
        if wrong < 0 and len(said) != len(truth):
            wrong = min(len(said), len(truth))
        yield Answer(number, temperature, way.name, len(said), wrong, device.stats.bytes_up)


def tell(record: Record, answers: list[Answer], temperatures: tuple[float, ...]) -> None:
    """A figure and a cell for each way and temperature."""
    rows: list[list[Cell]] = []
    for way in (way.name for way in WAYS):
        cells: list[Cell] = [way]
        for temperature in temperatures:
            found = [a for a in answers if a.way == way and a.temperature == temperature]
            tokens, wrong = sum(a.tokens for a in found), sum(a.wrong_at >= 0 for a in found)
            up, name = sum(a.bytes_up for a in found) / max(1, tokens), f"{way}, temperature {temperature:g}"
            if way != STREAM:
                record.figure(f"{name}/answers that differ", wrong, f"of {len(found)}", target=0, at_most=True)
            most = MAX_BYTES if way != STREAM else None
            record.figure(f"{name}/bytes up", up, "bytes a token", target=most, at_most=True)
            record.figure(f"{name}/tokens", tokens, "tokens")
            cells += [f"{len(found) - wrong} of {len(found)}", up]
        rows.append(cells)
    columns = ["way"]
    for temperature in temperatures:
        called = f"temperature {temperature:g}" if temperature else "greedy"
        columns += [f"{called}: answers as streamed", f"{called}: bytes up a token"]
    record.table("verify", columns, rows, note="Token for token, over a cloud process; a seed for each prompt.")


if __name__ == "__main__":
    sys.exit(main())
