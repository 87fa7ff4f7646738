"""`isthmus bench`: how fast this machine decodes a bundle, beside what its memory allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from isthmus.apps.bench.quality import Quality
    from isthmus.split.bundle import Bundle

COLUMNS = (  # key of a row in --json, title, format
    ("case", "case", ""),
    ("threads", "threads", "d"),
    ("tok_s", "tok/s", ".0f"),
    ("best_tok_s", "best tenth", ".0f"),
    ("roofline_share", "of roofline", ".0%"),
    ("cosine", "cosine", ".4f"),
    ("reference_tok_s", "reference", ".0f"),
    ("ratio", "ratio", ".2f"),
    ("reference_cosine", "its cosine", ".4f"),
)

app = typer.Typer(help="Measure this machine.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Measure decode and prefill speed against the memory's limit."""


@app.command()
def decode(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    threads: Annotated[str, typer.Option(help="Thread counts to measure, as 1,2.")] = "1,2",
    context: Annotated[str, typer.Option(help="Positions before the decoded ones, as 64,500.")] = "64,500",
    batch: Annotated[str, typer.Option(help="Sequences decoded together, as 1,8.")] = "1,8",
    prefill: Annotated[int, typer.Option(help="Prompt length of the prefill row; 0 for none.")] = 512,
    bits: Annotated[int, typer.Option(help="Read nested weights at 2, 4 or 8 bits; 0 for all.")] = 0,
    cpu: Annotated[str | None, typer.Option(help="Force a kernel family, as avx2 or plain.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of a reference prototype, measured in turns.")] = None,
    turns: Annotated[int, typer.Option(help="Turns that each contender takes.")] = 6,
    cosine: Annotated[bool, typer.Option(help="Also compare logits with float32 on the same weights.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Measure decode and prefill in tokens per second, beside the memory's limit and the logits' exactness.

    The cosine is that of the logits with float32 on the bundle's own weights, over greedy answers. A reference takes
    turns with isthmus.
    """
    from functools import partial

    from rich.console import Console
    from rich.table import Table

    from isthmus.apps.bench.contenders import MAX_CONTEXT, Contender, Engine, Prototype, kv_for, quietly
    from isthmus.apps.bench.turns import Case, measure
    from isthmus.apps.cli.roofline import read_bandwidth, token_bytes
    from isthmus.engine import open_part
    from isthmus.protocol.errors import EngineError
    from isthmus.split.bundle import Bundle
    from isthmus.split.manifest import Manifest

    contexts, batches = numbers("--context", context), numbers("--batch", batch)
    if max(contexts) > MAX_CONTEXT - 100 or prefill > MAX_CONTEXT - 100:
        raise EngineError(f"a context of {max(*contexts, prefill)}", f"measure up to {MAX_CONTEXT - 100} positions")
    cases = [Case(c, b) for b in batches for c in contexts if b == 1 or c == min(contexts)]
    cases += [Case(prefill, 0)] if prefill else []
    source = Bundle.open(bundle)
    weight_bytes = token_bytes(Manifest.parse((bundle / "bundle.json").read_bytes()))
    counts, quality = numbers("--threads", threads), yardstick(source) if cosine else None
    cosines: dict[str, float] = {}
    found = []
    for n in counts:
        part = open_part(source, 0, source.config.n_layers, threads=n, kv=kv_for(max(batches)), cpu=cpu, bits=bits)
        contenders: list[Contender] = [Engine("isthmus", part)]
        if reference:
            kind = "n4" if bits else "q4"
            other = quietly(partial(Prototype, "reference", reference, source, kind, n), "the reference")
            contenders += [other] if other else []
        if quality:
            cosines |= {c.name: quality.cosine(c) for c in contenders if c.name not in cosines}
        roof = read_bandwidth(n, buffer_bytes=weight_bytes) / weight_bytes
        for case in cases:
            speeds = measure(contenders, case, turns=turns)
            entry = {
                "case": str(case),
                "threads": n,
                "tok_s": speeds["isthmus"].median,
                "best_tok_s": speeds["isthmus"].best,
            }
            if case.batch == 1 and not bits:
                entry |= {"roofline_share": speeds["isthmus"].median / roof}
            if quality:
                entry |= {"cosine": cosines["isthmus"]}
            if "reference" in speeds:
                entry |= {
                    "reference_tok_s": speeds["reference"].median,
                    "ratio": speeds["isthmus"].median / speeds["reference"].median,
                }
                if quality:
                    entry |= {"reference_cosine": cosines["reference"]}
            found.append(entry)
        part.close()
    if as_json:
        print(json.dumps({"bundle": source.name, "weight_bytes": weight_bytes, "bits": bits, "rows": found}))
        return
    table = Table(title=f"{source.name}: {weight_bytes / 1e6:.1f} MB of weights a token")
    columns = [column for column in COLUMNS if any(column[0] in entry for entry in found)]
    for _, title, form in columns:
        table.add_column(title, justify="right" if form else "left", no_wrap=not form)
    for entry in found:
        table.add_row(*(format(entry[key], form) if key in entry else "" for key, _, form in columns))
    Console().print(table)


def yardstick(source: Bundle) -> Quality | None:
    """The bundle's model in float32, which answers a few questions; None and a line on stderr when it would not fit."""
    import sys

    from isthmus.apps.bench.quality import QUESTIONS, Quality, float_bytes
    from isthmus.apps.cli.machine import read_machine

    need, free = float_bytes(source.config), read_machine().memory.available_bytes
    if need > free // 2:
        print(f"no cosine: the model in float32 takes {need / 1e9:.1f} of {free / 1e9:.1f} GB", file=sys.stderr)
        return None
    tokenizer = source.tokenizer()
    chats = bool(tokenizer.entry.chat_template)
    prompts = [
        tokenizer.chat([{"role": "user", "content": question}]) if chats else tokenizer.encode(question)
        for question in QUESTIONS[:3]
    ]
    return Quality(source, prompts, 24)


def numbers(option: str, text: str) -> list[int]:
    """Whole positive numbers out of "1,2".

    Raises:
        EngineError: something else stands there.
    """
    from isthmus.protocol.errors import EngineError

    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise EngineError(f"{option} is {text!r}", "give whole numbers from 1 on, separated by commas")
    return values
