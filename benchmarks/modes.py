"""Ways to share SmolLM2 between a device and a cloud over emulated links, each held against the others in one run.

At a round trip of 50 ms: against CE-CoLLM's policy as published (f16 states, threshold 0.8, one question a token, every
prompt from nothing) with the same exit, and the pipelined drafts against their closed form. Then the same with a cloud
whose model is a declared number of times larger; then other round trips, with fewer prompts, for the plot.

Theirs and the naive split are played with every prompt anew, the others in a session that keeps the chat template's
beginning. Exit mode is held to the same targets in both ways; the one "every prompt anew" compares like with like.

Exit mode's threshold, and how far it guesses on, were chosen while other kept-back prompts were asked, none of those
here; no exit was trained or certified with either. exits.py's table says how often the exit before layer 24 says wrong
words: from 0.95 on 0.14 % of tokens, at theirs of 0.8 1.17 %. The rest that differs is states that travelled rounded.
The threshold as certified, which is lower still, agrees with the whole model less often than theirs does: see its row.

Devices hold the whole model, but of the larger one only the layers before the deepest exit, so that none answers alone
with another model than the cloud's.

Before each prompt it waits, for a minute at most, until others on the host leave this machine its processors.

usage: python benchmarks/modes.py [--prompts 24] [--fewer 3] [--tokens 64] [--trips 5,20,100,200] [--only WORDS]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from models import BENCH, bundle, part_of
from prompts import prompts
from record import Cell, Record

from isthmus.apps.bench.modes import (
    CE_COLLM,
    EXIT,
    LOCAL,
    PIPELINED,
    VERIFY,
    Row,
    Way,
    compare,
    select,
    table,
    ways,
    whole,
)
from isthmus.apps.bench.shaping import LinkProfile
from isthmus.apps.bench.stage import Stage
from isthmus.edge.exit import ExitSpeaker
from isthmus.edge.local import LocalPart
from isthmus.engine import KvConfig, open_part
from isthmus.engine.sampling import GREEDY
from isthmus.protocol.chain import Chain
from isthmus.split.bundle import Bundle

FORMAT = "keep"
TRIP_MS = 50
CERTIFIED = f"{EXIT}, as certified"
ANEW = f"{EXIT}, every prompt anew"  # as theirs is
COLUMNS = (
    "way",
    "tok/s",
    "of the better alone",
    "asks a token",
    "bytes up a token",
    "cloud ms a token",
    "layers filled",
    "agrees",
)
# Of exit mode to CE-CoLLM's policy: a row's attribute, unit, ratio to reach, whether that is the most.
AGAINST = (
    ("requests_per_token", "a token", 0.8, True),
    ("cloud_ms_per_token", "ms a token", 0.8, True),
    ("up_bytes_per_token", "bytes a token", 1 / 3, True),
    ("tok_s", "tok/s", 1.2, False),
)
CHOSEN = 64  # kept-back prompts that were asked when settings were chosen
PATIENCE_S = 60.0
VERIFY_BYTES = 32
CLOSED_FORM = 0.85


def main() -> int:
    """Measures and writes results/modes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24, help="at 50 ms")
    parser.add_argument("--fewer", type=int, default=3, help="prompts elsewhere; 0 leaves that out")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--trips", default="5,20,100,200", help="other round trips, in ms")
    parser.add_argument("--cut", type=int, default=24)
    parser.add_argument("--threshold", type=float, default=0.98, help="of exit mode; see above")
    parser.add_argument("--larger", type=float, default=8.0, help="times that the larger cloud model's steps take")
    parser.add_argument("--only", default="", help="ways whose names hold one of these words")
    options = parser.parse_args()
    source = bundle(FORMAT)
    contenders = ways(options.cut, options.threshold, source.whole)
    certified = Way(CERTIFIED, {"mode": "exit", "cut": options.cut})
    contenders.insert(next(i for i, way in enumerate(contenders) if way.name == EXIT) + 1, certified)
    contenders = select(contenders, options.only)
    record = Record("modes", {name: value for name, value in vars(options).items() if value != ""} | {"format": FORMAT})

    rows = measured(source, contenders, TRIP_MS, options.prompts, options.tokens)
    exits = f"exit mode believes the exit before layer {options.cut} from {options.threshold:g} on"
    note = f"A round trip of {TRIP_MS} ms, {options.prompts} prompts, {options.tokens} tokens each at most; {exits}. "
    note += f"Times are those of the median prompt of the {rows[0].timed} in which the host was calm."
    tell(record, "modes", rows, note)
    against(record, {row.way: row for row in rows})
    drafts(record, source, {row.way: row for row in rows})
    if options.fewer:
        others, held = [way for way in contenders if way.name != LOCAL], max(options.cut, source.exits[-1].layer)
        larger = measured(source, others, TRIP_MS, options.fewer, options.tokens, options.larger, held)
        note = f"Steps of the cloud take {options.larger:g} times as long; {TRIP_MS} ms, {options.fewer} prompts; "
        note += f"devices hold {held} of {source.config.n_layers} layers."
        tell(record, "larger", larger, note)
        speeds = {TRIP_MS: rows}
        for trip in map(int, options.trips.split(",")):
            speeds[trip] = measured(source, contenders, trip, options.fewer, options.tokens)
        trips = sorted(speeds)
        cells: list[list[Cell]] = [
            [way.name, *(speeds[trip][i].tok_s for trip in trips)] for i, way in enumerate(contenders)
        ]
        note = f"Tokens per second; at {TRIP_MS} ms {options.prompts} prompts, elsewhere {options.fewer}."
        record.table("trips", ["way", *(f"{trip} ms" for trip in trips)], cells, note=note)
    record.write()
    return 0


def measured(
    source: Bundle,
    contenders: Sequence[Way],
    trip_ms: int,
    count: int,
    tokens: int,
    cloud_step: float = 1.0,
    held: int | None = None,
) -> list[Row]:
    """A row for each way, printed as well.

    Args:
        count: prompts.
        held: layers that the devices hold; None for all.
    """
    asked, link = prompts().kept_back[CHOSEN : CHOSEN + count], LinkProfile.of_rtt(trip_ms)
    with ExitStack() as opened:
        part = source
        if held is not None:
            folder = opened.enter_context(TemporaryDirectory(dir=BENCH))
            part = Bundle.open(part_of(source, held, Path(folder)))
        stage = opened.enter_context(Parted(source, part, link, cloud_step))
        teacher = opened.enter_context(whole(source))
        rows = compare(
            contenders, lambda way: stage.device(**way.options), asked, tokens, GREEDY, teacher, None, PATIENCE_S
        )
    larger = f", steps of the cloud take {cloud_step:g} times as long" if cloud_step > 1 else ""
    print(table(f"round trip {trip_ms} ms{larger}", rows), flush=True)
    return rows


class Parted(Stage):
    """A stage whose devices hold a part of the cloud's bundle."""

    def __init__(self, source: Bundle, part: Bundle, link: LinkProfile, cloud_step: float) -> None:
        super().__init__(source, link, cloud_step=cloud_step)
        self._part = part

    def __enter__(self) -> Parted:
        super().__enter__()
        self._bundle = self._part  # of devices: the cloud has begun
        return self


def tell(record: Record, name: str, rows: Sequence[Row], note: str) -> None:
    """A table and its figures. Ways below 1 "of the better alone" lose to the better of device and cloud alone."""
    cells: list[list[Cell]] = []
    for row in rows:
        asks, up, cloud = row.requests_per_token, row.up_bytes_per_token, row.cloud_ms_per_token
        cells.append([row.way, row.tok_s, row.of_best, asks, up, cloud, row.filled_per_token, row.agreement])
        for key, unit, *_ in AGAINST:
            record.figure(f"{name}/{row.way}/{key}", getattr(row, key), unit)
        if row.filled_per_token is not None:
            record.figure(f"{name}/{row.way}/filled_per_token", row.filled_per_token, "layers a token")
        if row.agreement is not None:
            record.figure(f"{name}/{row.way}/agreement", row.agreement, "share")
    record.table(name, COLUMNS, cells, note=note)


def against(record: Record, rows: dict[str, Row]) -> None:
    """Exit mode beside CE-CoLLM's policy: the same exit, at equal or better agreement with the whole model.

    In a session, and with every prompt anew, as theirs is.
    """
    if EXIT not in rows or CE_COLLM not in rows:
        record.skip("exit mode against CE-CoLLM's policy", "--only leaves one of them out")
        return
    told = {"against CE-CoLLM": EXIT, "against CE-CoLLM, every prompt anew": ANEW}
    for name, way in told.items():
        if way not in rows:
            record.skip(name, "--only leaves it out")
            continue
        for key, unit, ratio, at_most in AGAINST:
            peer, value = f"modes/{CE_COLLM}/{key}", getattr(rows[way], key)
            record.figure(f"{name}/{key}", value, unit, target=ratio, of=peer, at_most=at_most)
        ours, theirs = rows[way].agreement, rows[CE_COLLM].agreement
        if ours is not None and theirs is not None:
            record.figure(f"{name}/agreement above theirs", ours - theirs, "share", target=0.0)


def drafts(record: Record, source: Bundle, rows: dict[str, Row]) -> None:
    """What verify mode sends, and how near pipelined drafts come to a*t_d + (1 - a)(R + t_v + t_d) seconds a token.

    They are held to what a draft takes while nothing else runs; beside a cloud that shares processors and memory it
    takes longer, and the form with that is told as well.
    """
    for name, row in rows.items():
        if name.startswith(VERIFY):
            up = row.up_bytes_per_token
            record.figure(f"{name}/bytes up", up, "bytes a token", target=VERIFY_BYTES, at_most=True)
    row = rows.get(PIPELINED, Row(PIPELINED))
    if not row.acceptance or not row.requests_per_token or not row.draft_ms:
        record.skip("the closed form of pipelined drafts", "--only leaves them out")
        return
    a, pass_ms, alone_ms = row.acceptance, row.cloud_ms_per_token / row.requests_per_token, drafting_ms(source)

    def closed(draft_ms: float) -> float:
        return 1e3 / (a * draft_ms + (1 - a) * (TRIP_MS + pass_ms + draft_ms))

    told = {"acceptance": (a, "share"), "a draft": (row.draft_ms, "ms"), "a pass": (pass_ms, "ms")}
    told |= {"a draft, alone": (alone_ms, "ms"), "tok_s, drafts alone": (closed(alone_ms), "tok/s")}
    for what, (value, unit) in told.items():
        record.figure(f"closed form/{what}", value, unit)
    record.figure("closed form/tok_s", closed(row.draft_ms), "tok/s")
    record.figure(f"{PIPELINED}/tok_s", row.tok_s, "tok/s", target=CLOSED_FORM, of="closed form/tok_s, drafts alone")


def drafting_ms(source: Bundle, tokens: int = 64) -> float:
    """What one draft by the deepest exit takes."""
    layer, kv, log = source.exits[-1].layer, KvConfig("f16", 1024), Chain()
    head = open_part(source.exit(layer), layer, layer + 1, threads=1, kv=kv)
    part = LocalPart(open_part(source, 0, layer, threads=1, kv=kv))
    speaker = ExitSpeaker(part, head, layer)
    log.extend(source.tokenizer().chat([{"role": "user", "content": prompts().kept_back[0]}]))
    log.extend((speaker.sample(log, GREEDY),))
    began = time.perf_counter()
    for _ in range(tokens):
        log.extend((speaker.sample(log, GREEDY),))
    took_ms = (time.perf_counter() - began) * 1e3
    speaker.close()
    part.close()
    return took_ms / tokens


if __name__ == "__main__":
    sys.exit(main())
