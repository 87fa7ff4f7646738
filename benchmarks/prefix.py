"""What KV that the cloud keeps saves: a prompt that others had before, and sessions that come back from disk.

A device asks a question behind a prompt of 512 tokens that nobody had before (cold), and then another device a question
behind the same prompt (warm) and then one more (again); pairs take turns over prompts, each device a new one. The
sessions are opened one after the other over one connection, each with a text of its own, in a KV that holds a few of
them; memory is the cloud's resident memory beyond that after the first ones, when the KV is full, and some are asked to
go on.

usage: python benchmarks/prefix.py [--turns 12] [--sessions 1000] [--tokens 256]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from models import BENCH, bundle
from record import Cell, Record

from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.edge import Device
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.keys import read_device
from isthmus.protocol.link import Link, connect
from isthmus.split.bundle import Bundle
from isthmus.split.exit_samples import divided, text_files
from isthmus.split.fetch import fetch
from isthmus.split.tokenizer import Tokenizer

PREFIX, TOKENS, SETTLED = 512, 8, 40  # tokens of the prompt and of an answer; sessions after which the KV is full
CUT, BACK = 15, 40  # where a model is split; sessions that come back
WAYS: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("stream", {}, 0.4),
    ("verify", {}, 0.4),
    ("split", {"cut": CUT, "codec": "f16"}, 0.05),
    ("exit", {}, 0.05),
)


def prompts(tokenizer: Tokenizer, text: str, count: int) -> list[str]:
    """Texts of about `PREFIX` tokens that begin differently."""
    words = text.split()
    found = []
    for index in range(count):
        at = index * 97 % (len(words) - 2 * PREFIX)
        low, high = 1, 2 * PREFIX
        while low < high:
            middle = (low + high + 1) // 2
            few = len(tokenizer.encode(" ".join(words[at : at + middle]))) <= PREFIX
            low, high = (middle, high) if few else (low, middle - 1)
        found.append(f"{' '.join(words[at : at + low])}.")
    return found


def asked(
    folder: Path, cloud: CloudProcess, keys: Path, texts: Sequence[str], mode: str, **fields: Any
) -> list[tuple[float, int]]:
    """Milliseconds to the first token, and bytes up, of each question to a device that is connected already."""
    found = []
    with Device(folder, cloud.address, keys=keys, threads=1, mode=mode, standby=False, **fields) as device:
        for text in texts:
            time.sleep(0.3)
            list(device.generate(text, max_tokens=TOKENS))
            found.append((device.stats.ttft_ms, device.stats.bytes_up))
    return found


def shared(record: Record, folder: Path, texts: Sequence[str], turns: int) -> None:
    """Cold beside warm, by mode."""
    rows: list[list[Cell]] = []
    with fresh_keys() as keys, CloudProcess(folder, keys, 2, more=["--context-s", "600"]) as cloud:
        for number, (mode, fields, most) in enumerate(WAYS):
            found: dict[str, list[tuple[float, int]]] = {"cold": [], "warm": [], "again": []}
            for turn in range(turns + 1):
                cold, warm, again = (
                    f"{texts[number * (turns + 1) + turn]} {question}"
                    for question in ("Who said so?", "What does it mean?", "Where was that?")
                )
                answers = asked(folder, cloud, keys, [cold], mode, **fields)
                answers += asked(folder, cloud, keys, [warm, again], mode, **fields)
                for name, answer in zip(found, answers, strict=True):
                    found[name] += [answer] if turn else []
            medians = {
                name: [statistics.median(one) for one in zip(*each, strict=True)] for name, each in found.items()
            }
            print(mode, medians, file=sys.stderr, flush=True)
            row: list[Cell] = [mode]
            for name, (first_ms, up) in medians.items():
                for what, value, unit, share in (("first token", first_ms, "ms", 0.1), ("up", up, "bytes", most)):
                    of = None if name == "cold" else f"{what}/{mode}/cold"
                    target = None if name == "cold" else share
                    record.figure(f"{what}/{mode}/{name}", value, unit, target=target, of=of, at_most=True)
                row += [first_ms, int(up)]
                if name != "cold":
                    row.append(" / ".join(f"{a / b:.1%}" for a, b in zip((first_ms, up), medians["cold"], strict=True)))
            rows.append(row)
    columns = ["mode", "cold ms", "bytes", "warm ms", "bytes", "of cold", "again ms", "bytes", "of cold"]
    note = (
        f"To the first token, and bytes up of {TOKENS} tokens, behind a prompt of {PREFIX} tokens. Cold: nobody had "
        "it; warm: another device had it; again: this device had it, and asks something else. Two processes on one "
        "machine, encrypted. In split and exit mode a device that has not had it computes its own layers of all of it."
    )
    record.table("prefix", columns, rows, note=note)


class Talker:
    """Sessions over one connection, without a device."""

    def __init__(self, address: str, keys: Path, model_id: str) -> None:
        self._link: Link = connect(address, read_device(keys), agent="benchmark")
        self._model_id = model_id

    def said(self, alias: int, epoch: int, text: list[int]) -> tuple[int, float, int]:
        """The token behind a text, milliseconds that it took, and how many tokens the cloud had."""
        chain, began = Chain(text), time.perf_counter()
        session = alias.to_bytes(16, "little")
        self._link.send(m.Open(session, alias, epoch, self._model_id, prefixes=chain.names(len(text) - 1)))
        opened = self._answer(m.Opened)
        assert isinstance(opened, m.Opened)
        at = min(opened.committed, len(text) - 1)
        if opened.committed > len(text) or opened.prefix_hash != chain.at(opened.committed):
            raise RuntimeError(f"session {alias} holds {opened.committed} tokens of another text")
        self._link.send(m.Rows(alias, epoch, at, chain.at(at), text[at:]))
        result = self._answer(m.Result)
        assert isinstance(result, m.Result)
        return result.tokens[0], (time.perf_counter() - began) * 1e3, at

    def close(self) -> None:
        self._link.close()

    def _answer(self, kind: type[m.Opened] | type[m.Result]) -> m.Opened | m.Result:
        until = time.monotonic() + 60.0
        while time.monotonic() < until:
            message = self._link.receive(100.0)
            if isinstance(message, kind):
                return message
            if isinstance(message, m.Fault):
                raise RuntimeError(message.problem)
        raise RuntimeError("the cloud does not answer")


def resident(pid: int) -> int:
    """Bytes of a process that are in memory and its own."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def idle(record: Record, source: Bundle, texts: Sequence[list[int]]) -> None:
    """What sessions cost that nobody asks, and how soon they go on."""
    rng, firsts = random.Random(0), list[int]()
    with TemporaryDirectory() as place, fresh_keys() as keys:
        more = ["--context-s", "86400", "--spill", place, "--spill-mb", "100000"]
        more += ["--max-sessions", str(len(texts) + 10)]
        with CloudProcess(source.path, keys, 2, more=more) as cloud:
            talker = Talker(cloud.address, keys, source.model_id)
            before = 0
            for number, text in enumerate(texts):
                firsts.append(talker.said(number + 1, 1, text)[0])
                if number + 1 == SETTLED:
                    before = resident(cloud.pid)
                if number % 100 == 99:
                    print(f"{number + 1} sessions, {resident(cloud.pid) / 1e6:.0f} MB", file=sys.stderr, flush=True)
            each_mb = (resident(cloud.pid) - before) / 1e6 / (len(texts) - SETTLED)
            back, held, wrong = list[float](), list[int](), 0
            for number in rng.sample(range(len(texts) - SETTLED), BACK):
                time.sleep(0.3)  # a cloud whose KV is all of sessions of the last five seconds is busy
                token, took_ms, at = talker.said(number + 1, 2, texts[number])
                wrong += token != firsts[number]
                back.append(took_ms)
                held.append(at)
            talker.close()
    record.figure("idle session", each_mb, "MB", target=1.0, at_most=True)
    record.figure("back after", statistics.median(back), "ms", target=100.0, at_most=True)
    record.figure("back after, the slowest", max(back), "ms")
    record.figure("tokens that came from disk", statistics.median(held), f"of {len(texts[0])}")
    record.figure("wrong tokens", wrong, "", target=0.0, at_most=True)


def main() -> int:
    """Measures and writes results/prefix.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=256, help="of a session")
    asked = parser.parse_args()
    source = bundle("keep")
    tokenizer = source.tokenizer()
    text = " ".join(divided(text_files([fetch("texts")])).held[:400])
    record = Record("prefix", {**vars(asked), "format": "keep", "link": "loopback", "cut": CUT})
    shared(record, BENCH / "smollm2-keep", prompts(tokenizer, text, len(WAYS) * (asked.turns + 1)), asked.turns)
    rng, vocab = random.Random(1), source.config.vocab_size
    idle(record, source, [[rng.randrange(vocab) for _ in range(asked.tokens)] for _ in range(asked.sessions)])
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
