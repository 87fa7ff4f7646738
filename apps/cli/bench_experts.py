"""`isthmus bench experts`: what a byte budget does to a mixture of experts on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from isthmus.apps.bench.experts import BudgetRow


def command(
    bundle: Annotated[Path, typer.Argument(help="The folder of a mixture of experts.")],
    expert_mb: Annotated[
        str,
        typer.Option(
            "--expert-mb", metavar="A,B,C", help="Budgets in MB; by default 12.5, 25 and 50 % of the experts."
        ),
    ] = "",
    expert_bits: Annotated[
        int, typer.Option("--expert-bits", help="Read nested experts with 2, 4 or 8 bits; 0 for all that are there.")
    ] = 0,
    flash_mb_s: Annotated[
        float, typer.Option("--flash-mb-s", help="Pretend that flash reads so many MB/s; 0 for what it does.")
    ] = 0.0,
    tokens: Annotated[int, typer.Option(help="Tokens to record, and to decode with each budget.")] = 256,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text, or .jsonl with a document a line, to record along; by default what isthmus fetch texts "
            "brought, else the model's own answer.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads of the engine, 0 for one a core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Measure what a memory budget does to a mixture of experts: a minute for a small model.

    Experts that are not in memory are read from flash when they are needed. The hit rates (LRU, LFRU, and Belady, which
    knows the future) are those of experts in memory when a layer takes them, worked out from the recorded routing;
    "ours" is what the store did, which reads ahead as well. "predicted" is worked out from routing, flash and compute,
    and is what `isthmus run --expert-mb` says before it loads anything: what is measured here is kept for that.
    "exposed" is what a token takes longer than with all experts in memory; "roofline" is the share of the speed that
    max(compute, bytes over bandwidth) allows, for the bytes that routers name. Times are those of the calmer turns.
    """
    import json
    from dataclasses import asdict
    from functools import partial
    from importlib import metadata

    from rich.console import Console

    from isthmus.apps.bench.experts import Setup, budgets, measure, record
    from isthmus.apps.bench.machine import read_machine
    from isthmus.edge.experts.simulate import foresight
    from isthmus.split.bundle import Bundle

    opened = Bundle.open(bundle)
    setup = Setup(opened, budgets(opened, megabytes(expert_mb), expert_bits, flash_mb_s), threads, tokens, text)
    with Console(stderr=True).status("routing") as status:
        tell = partial(_tell, status)
        routing, along = record(setup, tell)
        facts, rows = measure(setup, routing, tell)
    if as_json:
        settings = {"bundle": opened.name, "model_id": opened.model_id, "expert_bits": expert_bits, "threads": threads}
        settings |= {"flash_mb_s": flash_mb_s, "tokens": len(routing.chosen), "text": along}
        settings |= {"isthmus": metadata.version("isthmus"), "machine": asdict(read_machine())}
        found = {"foresight": foresight(routing), "facts": asdict(facts), "rows": [row.to_dict() for row in rows]}
        print(json.dumps({**settings, **found}))
        return
    cached = "past the page cache" if facts.direct else "dropped from the page cache behind"
    print(f"{opened.name}: {len(routing.chosen)} tokens of {along}")
    print(f"flash    {facts.flash_mb_s:.0f} MB/s, {facts.latency_ms:.2f} ms for a read beyond that, {cached}")
    if flash_mb_s:
        print(f"         budgets are measured as if it were {flash_mb_s:g} MB/s")
    print(f"compute  {facts.token_ms:.2f} ms a token with all experts in memory")
    print(f"foresight {foresight(routing):.0%} of experts are named one layer early\n")
    show(rows)
    print(f"\nkept; next: isthmus run {bundle} --expert-mb {rows[-1].budget_mb:g}")


def _tell(status: object, what: str) -> None:
    status.update(what)  # type: ignore[attr-defined]


def megabytes(text: str) -> list[float]:
    """Positive numbers out of "12.5,25"; none out of an empty text.

    Raises:
        DeviceError: something else stands there.
    """
    from math import isfinite

    from isthmus.protocol.errors import DeviceError

    try:
        found = [float(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        found = [0.0]
    if not all(isfinite(one) and one > 0 for one in found):
        raise DeviceError(f"--expert-mb is {text!r}", "give numbers of megabytes, separated by commas, as 20,40,80")
    return found


def show(rows: Sequence[BudgetRow]) -> None:
    """The table; a column for each figure."""
    titles = ("MB", "experts", "LRU", "LFRU", "Belady", "ours", "tok/s", "predicted", "MB/token", "exposed", "roofline")
    cells = [
        (
            f"{row.budget_mb:.1f}",
            f"{row.share:.1%}",
            *(f"{rate:.0%}" for rate in row.hits.values()),
            f"{row.hit_rate:.0%}",
            f"{row.tok_s:.1f}",
            f"{row.predicted_tok_s:.1f}",
            f"{row.read_mb:.2f}",
            f"{row.exposed_ms:.1f} ms",
            f"{row.roofline:.0%}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (titles, *cells)) for i in range(len(titles))]
    for line in (titles, *cells):
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
