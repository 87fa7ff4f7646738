"""`isthmus experts`: with how few bits a mixture's experts may be read, and where they should stand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.apps.cli import experts_place

if TYPE_CHECKING:
    from isthmus.split.tolerance import Tolerance

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Prepare the experts of a mixture for a device that cannot hold them.\n\n"
    "`calibrate` finds with how few bits nested experts may be read while the perplexity stays within a bound, and "
    "certifies it; isthmus run --experts bounded then reads no more. `place` says which of them should stand in "
    "memory, on flash and in a cloud, by recorded routing.",
)
app.command("place")(experts_place.command)


@app.command()
def calibrate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder")],
    within: Annotated[float, typer.Option(help="By how much the perplexity may rise, as a share")] = 0.01,
    confidence: Annotated[float, typer.Option(help="With which that is promised")] = 0.95,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text file, a .jsonl file with a document a line, or a folder of them; repeat it for more. "
            "The held-out tenth of each file is taken. By default what isthmus fetch texts brought"
        ),
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents at most")] = 200,
    force: Annotated[bool, typer.Option("--force", help="Take away the tolerance if none is found anew")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What was tried on standard output as JSON")] = False,
    threads: Annotated[int, typer.Option(min=0, help="Threads of the engine; 0 for one per core")] = 0,
) -> None:
    """Certify with how few bits each expert may be read (learn then test).

    An expert with a small share of a token is read with fewer bits than one with a large share, or not at all. The less
    exact, the higher the perplexity: the largest tolerance is written into the bundle with which it rises by no more
    than --within, with --confidence, for documents like those of the calibration. The document is the unit; their mean
    is taken for normal, so give many.

    A tolerance that the bundle has is replaced by one that is found. If none is found it stays, unless these very
    documents gave it; --force takes it away. All experts are held in memory meanwhile.
    """
    import json
    from contextlib import closing

    from isthmus.apps.cli.exit_work import bars
    from isthmus.apps.cli.exits import table
    from isthmus.apps.cli.signals import ending_cleanly
    from isthmus.engine import KvConfig
    from isthmus.engine.native_part import open_native
    from isthmus.protocol.errors import ModelError
    from isthmus.split.bundle import Bundle
    from isthmus.split.exit_samples import CHUNK_TOKENS, chunks, divided, text_files
    from isthmus.split.fetch import find
    from isthmus.split.rewriting import put_tolerance
    from isthmus.split.tolerance_run import LEAST_TOKENS, data_hash
    from isthmus.split.tolerance_run import calibrate as tried_in_turn

    opened = Bundle.open(bundle)
    config = opened.config
    if config.experts is None:
        raise ModelError(f"{opened.name} has no experts", "isthmus moefy makes them of a dense model")
    paths = text or [folder for folder in [find("texts")] if folder is not None]
    if not paths:
        raise ModelError("there is no text to measure with", "name files with --text; isthmus fetch texts brings some")
    held = divided(text_files(paths)).held
    held = held[:: max(1, len(held) // documents)][:documents]
    rows, found = list[tuple[str, ...]](), None
    told = list[dict[str, float]]()
    with ending_cleanly(), bars() as say:
        samples = [list(sample.tokens) for sample in chunks(opened.tokenizer(), held, config.context_length)]
        samples = [sample for sample in samples if len(sample) >= LEAST_TOKENS]
        kv = KvConfig(max_tokens=min(CHUNK_TOKENS, config.context_length) + 16)
        with closing(open_native(opened, 0, config.n_layers, threads=threads, kv=kv)) as part:
            for tried, tolerance in tried_in_turn(
                opened, part, samples, within=within, confidence=confidence, tell=say
            ):
                found = tolerance or found
                told.append(tried._asdict())
                rows.append(
                    (
                        f"{tried.bits:.2f}",
                        f"{tried.perplexity:.3f}",
                        f"{tried.bound:+.2%}",
                        "yes" if tried.passed else "no",
                    )
                )
    before = Bundle.open(bundle).manifest.tolerance  # by now
    asked = data_hash(samples), within, confidence
    # What the bundle has does not follow from its own documents.
    own = before is not None and (before.data, before.within, before.confidence) == asked
    stays = found is None and before is not None and not force and not own
    if not as_json:
        table(["bits", "perplexity", f"rises at most ({confidence:.0%})", f"within {within:.1%}"], rows)
    if found is not None or (before is not None and not stays):
        put_tolerance(bundle, found)
    if as_json:
        import msgspec

        print(json.dumps({"tried": told, "tolerance": msgspec.to_builtins(found)}))
        return
    if found is not None:
        print(tolerance_text(found))
    else:
        print(f"nothing but all bits keeps the perplexity within {within:.1%} on {len(samples)} documents")
        if stays and before is not None:
            print(f"what the bundle had stays: {tolerance_text(before)}; --force takes it away")


def tolerance_text(found: Tolerance) -> str:
    """A tolerance in one line."""
    return (
        f"experts may be read with {found.bits:.2f} bits in the mean: perplexity {found.bounded:.3f} for "
        f"{found.exact:.3f}, at most {found.bound:+.2%} with confidence {found.confidence:.0%} (at most "
        f"{found.within:.1%} allowed; {found.documents} documents, {found.tokens} tokens, data {found.data[:12]})"
    )
