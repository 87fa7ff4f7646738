"""`isthmus bench`: how fast this machine decodes a bundle, beside what its memory allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.apps.cli.bench_experts import command as experts
from isthmus.apps.cli.bench_modes import command as modes

if TYPE_CHECKING:
    from isthmus.apps.bench.contenders import Contender
    from isthmus.apps.bench.quality import Quality
    from isthmus.apps.bench.turns import Case
    from isthmus.engine.part import WeightSource
    from isthmus.split.bundle import Bundle

COLUMNS = (  # key of a row in --json, title, format
    ("threads", "threads", "d"),
    ("tok_s", "tok/s", ".0f"),
    ("best_tok_s", "best tenth", ".0f"),
    ("roofline_share", "of memory", ".0%"),
    ("cosine", "cosine", ".4f"),
    ("reference_tok_s", "reference", ".0f"),
    ("ratio", "ratio", ".2f"),
    ("reference_cosine", "its cosine", ".4f"),
)

app = typer.Typer(help="Measure this machine.", no_args_is_help=True, add_completion=False)
app.command("modes")(modes)
app.command("experts")(experts)


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
    reference: Annotated[
        Path | None, typer.Option(help="Folder of another engine (an engine.py), measured in turns with this one.")
    ] = None,
    turns: Annotated[int, typer.Option(help="Turns of each measurement; fewer are faster and noisier.")] = 6,
    cosine: Annotated[bool, typer.Option(help="Also compare logits with float32 on the same weights.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Measure decode and prefill in tokens per second: a minute for a small model.

    "of memory" is the share of what the memory allows: a decoded token reads all weights once. "cosine" compares
    the logits with float32 on the bundle's own weights, over greedy answers.
    """
    from rich.console import Console

    from isthmus.apps.bench.contenders import MAX_CONTEXT
    from isthmus.apps.bench.turns import Case
    from isthmus.engine.narrow import Narrowed
    from isthmus.protocol.errors import EngineError
    from isthmus.split.bundle import Bundle

    contexts, batches, counts = numbers("--context", context), numbers("--batch", batch), numbers("--threads", threads)
    if max(contexts) > MAX_CONTEXT - 100 or not 0 <= prefill <= MAX_CONTEXT - 100:
        option, given = ("--prefill", prefill) if max(contexts) <= MAX_CONTEXT - 100 else ("--context", max(contexts))
        raise EngineError(f"{option} is {given}", f"measure up to {MAX_CONTEXT - 100} positions")
    if turns < 1:
        raise EngineError(f"--turns is {turns}", "give 1 or more")
    cases = [Case(c, b) for b in batches for c in contexts if b == 1 or c == min(contexts)]
    cases += [Case(prefill, 0)] if prefill else []
    source = Bundle.open(bundle)
    read = weights_read(Narrowed(source, bits) if bits else source)
    rows = []
    with Console(stderr=True).status("comparing with float32") as status:
        quality = yardstick(source) if cosine else None
        for n in counts:
            with Bench(source, n, max(batches), cpu, bits, reference, quality, read) as bench:
                for case in cases:
                    status.update(f"{case}, {n} threads")
                    rows.append(bench.row(case, turns))
                    if not as_json:
                        status.stop()  # lest it is drawn over the row
                        if len(rows) == 1:
                            print(f"{source.name}: {read / 1e6:.1f} MB of weights a token, {bench.cpu} kernels\n")
                            shown = {"roofline_share", *rows[0]}
                            print(line("case", {key: title for key, title, _ in COLUMNS if key in shown}))
                        print(line(str(case), formatted(rows[-1])), flush=True)
                        status.start()
                kernels = bench.cpu
    if as_json:
        head = {"bundle": source.name, "weight_bytes": read, "bits": bits, "kernels": kernels}
        print(json.dumps({**head, "rows": rows}))
    else:
        print(f"\n{verdict(rows)}".rstrip())


def formatted(row: dict[str, Any]) -> dict[str, str]:
    """A row's values as people read them."""
    return {key: format(row[key], form) for key, _, form in COLUMNS if key in row}


def line(case: str, cells: dict[str, str]) -> str:
    """A line of the table: what is printed must not depend on the rows that follow."""
    return f"{case:<20}" + "".join(f"{cells.get(key, ''):>12}" for key, _, _ in COLUMNS).rstrip()


class Bench:
    """The engine on a bundle with so many threads, beside a reference where there is one."""

    def __init__(
        self,
        source: Bundle,
        threads: int,
        batch: int,
        cpu: str | None,
        bits: int,
        reference: Path | None,
        quality: Quality | None,
        read: int,
    ) -> None:
        from functools import partial

        from isthmus.apps.bench.contenders import Engine, kv_for, quietly
        from isthmus.apps.bench.prototype import Prototype
        from isthmus.apps.bench.roofline import read_bandwidth
        from isthmus.engine import open_part

        layers = source.config.n_layers
        self._part = open_part(source, 0, layers, threads=threads, kv=kv_for(batch), cpu=cpu, bits=bits)
        self.cpu = str(getattr(self._part, "cpu", "onnxruntime"))
        self._contenders: list[Contender] = [Engine("isthmus", self._part)]
        if reference:
            make = partial(Prototype, "reference", reference, source, "n4" if bits else "q4", threads)
            other = quietly(make, "the reference")
            self._contenders += [other] if other else []
        self._threads, self._read = threads, read
        self._cosines = {c.name: quality.cosine(c) for c in self._contenders} if quality else {}
        self._bandwidth = partial(read_bandwidth, threads, buffer_bytes=read)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._part.close()

    def row(self, case: Case, turns: int) -> dict[str, Any]:
        """Measures a case; keys as in COLUMNS."""
        from isthmus.apps.bench.turns import measure

        before = self._bandwidth() if case.batch == 1 else 0.0
        speeds = measure(self._contenders, case, turns=turns)
        own, other = speeds["isthmus"], speeds.get("reference")
        row: dict[str, Any] = {
            "case": str(case),
            "threads": self._threads,
            "tok_s": own.median,
            "best_tok_s": own.best,
        }
        if case.batch == 1:  # the memory's speed drifts on a shared machine: the better of two looks
            limit = max(before, self._bandwidth())
            row |= {"memory_gb_s": limit / 1e9, "roofline_share": own.median * self._read / limit}
        if "isthmus" in self._cosines:
            row |= {"cosine": self._cosines["isthmus"]}
        if other:
            row |= {"reference_tok_s": other.median, "ratio": own.median / other.median}
            if "reference" in self._cosines:
                row |= {"reference_cosine": self._cosines["reference"]}
        return row


def verdict(rows: list[dict[str, Any]]) -> str:
    """What limits decoding, in a sentence."""
    single = [row for row in rows if "roofline_share" in row]
    if not single:
        return ""
    best = max(single, key=lambda row: row["tok_s"])
    share, threads = best["roofline_share"], best["threads"]
    why = "the memory is what limits it" if share > 0.7 else "computing limits it more than the memory does"
    return (
        f"Best with {threads} thread{'s' * (threads > 1)}: {best['tok_s']:.0f} tokens/s, {share:.0%} of what "
        f"{best['memory_gb_s']:.1f} GB/s of memory allow; {why}."
    )


def weights_read(source: WeightSource) -> int:
    """Bytes of weights that one decoded token reads."""
    from isthmus.quant.packed import PackedMatrix

    layers = (source.layer(index).values() for index in range(source.config.n_layers))
    matrices = (weight for layer in layers for weight in layer if isinstance(weight, PackedMatrix))
    return source.head().nbytes + sum(matrix.nbytes for matrix in matrices)


def yardstick(source: Bundle) -> Quality | None:
    """The bundle's model in float32, which answers a few questions; None and a line on stderr when it would not fit."""
    import sys

    from isthmus.apps.bench.machine import read_machine
    from isthmus.apps.bench.quality import QUESTIONS, Quality, float_bytes

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
