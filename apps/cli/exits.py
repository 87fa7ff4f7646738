"""`isthmus exits`: trains early exits for a bundle, certifies them, and measures them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.apps.cli.exit_work import working

if TYPE_CHECKING:
    from isthmus.split.bundle import Bundle
    from isthmus.split.certificate import Certificate, Said
    from isthmus.split.exit_entry import CodecChoice, ExitEntry
    from isthmus.split.exit_run import ExitRun
    from isthmus.split.exit_states import Sample, States

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Train early exits for a bundle, certify and measure them.\n\n"
    "An exit foresees the model's own choice from the hidden states before some layer. `train` makes exits and writes "
    "them into the bundle; `calibrate` finds from which confidence on they may speak for the model, and certifies it; "
    "`measure` shows what they do on other prompts.",
)

AGREES = (
    "texts, answers: share of tokens at which it names the model's choice, held-out documents and own answers; "
    "emits: of own answers, where 5 % of all tokens were wrong, which is no promise"
)
BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder")]
Layers = Annotated[str | None, typer.Option(help="Before which layers, as 15,20,24,27 (of 30 layers the default)")]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        help="A text file, a .jsonl file with a document a line, or a folder of them; repeat it for more. "
        "A tenth of each file is held out"
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(help="A file with a prompt a line, or .jsonl, in place of the built-in questions"),
]
Count = Annotated[int, typer.Option("--count", min=1, help="Built-in questions at most")]
Work = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where answers, states and trainings are kept; by default in the cache folder"),
]
Threads = Annotated[int, typer.Option(min=0, help="Threads of the engine; 0 for one per core")]


@app.command()
def train(
    bundle: BundleFolder,
    text: Text = None,
    layers: Layers = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents to train on at most")] = 1000,
    answers: Annotated[int, typer.Option(min=1, help="Own answers of the model to train on")] = 300,
    checks: Annotated[int, typer.Option(min=1, help="Own answers to measure with")] = 320,
    epochs: Annotated[str, typer.Option(help="Passes over the samples; one number, or one for each layer")] = "4",
    d_ff: Annotated[int, typer.Option("--d-ff", min=1, help="Width of a head's feed-forward network")] = 1024,
    head_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, max=8192, help="Tokens that an exit can name, 0 for all; by default 8192 before 2/3 of the depth"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples' order and of the weights to begin with")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace exits that agree more often, too")] = False,
    work: Work = None,
    threads: Threads = 0,
) -> None:
    """Train exits over the frozen model, on texts and on its own greedy answers, and write them into the bundle.

    It needs PyTorch, on the CPU: for a model of 135 M parameters about ten minutes an exit. Stopped, it goes on where
    it was when it is called again. Texts come with: isthmus fetch texts.

    An exit of the bundle that agrees with more of the model's own held-out answers than the new one stays, with its
    certificate; --force replaces it.
    """
    from isthmus.protocol.errors import ModelError
    from isthmus.split.bundle import Bundle
    from isthmus.split.exit_run import usual_head, usual_layers
    from isthmus.split.exit_samples import check_questions, chunks, divided, text_files
    from isthmus.split.exit_scores import would_emit
    from isthmus.split.exit_states import questions
    from isthmus.split.exit_writer import put_exits

    opened = Bundle.open(bundle)
    n_layers = opened.config.n_layers
    chosen = _numbers(layers, n_layers) if layers is not None else usual_layers(n_layers)
    if not text:
        raise ModelError("there is nothing to train on", "name files with --text; isthmus fetch texts brings some")
    texts = divided(text_files(text), documents)
    passes = _integers("--epochs", epochs)
    if min(passes) < 1 or len(passes) not in (1, len(chosen)):
        raise ModelError(f"--epochs is {epochs}", f"give one number from 1 on, or {len(chosen)} of them")
    passes = passes * len(chosen) if len(passes) == 1 else passes
    try:
        from isthmus.split.exit_training import Recipe
    except ModuleNotFoundError as error:
        raise ModelError("training exits needs PyTorch", get_torch()) from error
    rows, stays = [], []
    with working(opened, work, threads) as run:
        tokenizer, room = opened.tokenizer(), opened.config.context_length
        taught = [*chunks(tokenizer, texts.taught, room), *run.answered(questions(texts.taught, answers))]
        states = run.states("taught", taught, chosen)
        held = run.states("documents", chunks(tokenizer, texts.held, room), chosen)
        own = run.states("answers", run.answered(check_questions(texts.held, checks)), chosen)
        for layer, times in zip(chosen, passes, strict=True):
            recipe = Recipe(d_ff=d_ff, epochs=times, seed=seed)
            count = usual_head(layer, n_layers) if head_tokens is None else head_tokens
            entry, data, found = run.train(states, held, own, layer, recipe, count)
            manifest, old = opened.manifest, None if force else run.standing(layer, held, own)
            if old is not None and old.agreement.answers > found.agreement.answers:
                stays.append(
                    f"the exit before layer {layer} that the bundle had stays: it names {old.agreement.answers:.1%} of "
                    f"the tokens of answers, and the new one {found.agreement.answers:.1%}; --force replaces it"
                )
                found = old
            else:
                manifest = put_exits(bundle, opened.model_id, [(entry, data)])
            emits, megabytes = would_emit(found.answers, 0.05), manifest.exit_bytes(layer) / 1e6
            rows.append(
                (
                    f"layer {layer}",
                    f"{manifest.exit(layer).head_tokens or 'all'}",
                    f"{found.agreement.documents:.3f}",
                    f"{found.agreement.answers:.3f}",
                    f"{emits:.3f}",
                    f"{megabytes:.1f}",
                    f"{megabytes / emits:.1f}" if emits else "-",
                )
            )
    table(["exit", "names", "texts", "answers", "emits", "MB/token", "MB/emitted"], rows)
    print(AGREES)
    for line in stays:
        print(line)
    print("next, how sure they must be to speak for the model: isthmus exits calibrate")


@app.command()
def calibrate(
    bundle: BundleFolder,
    layers: Layers = None,
    disagreement: Annotated[float, typer.Option(help="Share of an answer that may differ from the model's")] = 0.05,
    confidence: Annotated[float, typer.Option(help="With which that is promised")] = 0.95,
    text: Text = None,
    prompts: Prompts = None,
    count: Count = 320,
    codec_loss: Annotated[
        float, typer.Option(help="Share of the model's choices that the codec of hidden states may change, beyond f16")
    ] = 0.01,
    force: Annotated[bool, typer.Option("--force", help="Take away the certificate if none is found anew")] = False,
    work: Work = None,
    threads: Threads = 0,
) -> None:
    """Certify from which confidence on each exit may emit tokens in the model's place (learn then test).

    The prompt is the unit: of the tokens of an answer, a mean share of at most --disagreement is emitted by the exit
    and is not the model's own greedy choice after the same tokens; that holds with --confidence, for prompts like those
    of the calibration. These are built-in questions that no exit is trained on; with --text also questions about the
    held-out tenth of the files, which must be the ones of the training.

    A certificate that an exit has is replaced by one that is found. If none is found it stays, unless these very
    prompts gave it; --force takes it away.

    It also picks how the hidden states before each exit travel to the cloud: in the smallest codec that changes no more
    of the model's choices along these answers than f16 does, but for --codec-loss of them.
    """
    from rich.console import Console

    from isthmus.protocol.errors import ModelError
    from isthmus.split.bundle import Bundle
    from isthmus.split.certificate import calibrate as certified
    from isthmus.split.certificate import data_hash, fewest_prompts
    from isthmus.split.exit_writer import put_certificates, put_codecs

    for name, value in (("--disagreement", disagreement), ("--confidence", confidence)):
        if not 0 < value < 1:
            raise ModelError(f"{name} {value:g} is impossible", "choose one between 0 and 1, as 0.05 and 0.95")
    if not 0 <= codec_loss < 1:
        raise ModelError(
            f"--codec-loss {codec_loss:g} is impossible", "choose 0, for none, or a share below 1, as 0.01"
        )
    opened = Bundle.open(bundle)
    entries = _chosen(opened, layers)
    console = Console(highlight=False, soft_wrap=True)
    with working(opened, work, threads) as run:
        samples = _asked(run, text, prompts, count)
        states, data = _states(run, samples), data_hash(samples)
        for entry, said in _said(run, entries, states):
            sha256 = opened.manifest.files[entry.file].sha256
            found = certified(said, disagreement=disagreement, confidence=confidence, exit=sha256, data=data)
            kept = None if force or found else entry.certificate
            if kept and (kept.data, kept.disagreement, kept.confidence) == (data, disagreement, confidence):
                kept = None  # it does not follow from its own data
            old = entry.codec
            travels = run.codec(opened.exit(entry.layer), sha256, entry.layer, states, data, codec_loss)
            if kept is None:
                put_certificates(bundle, {entry.layer: found})
            if not force and old is not None and old.exit == sha256 and old.tokens > travels.tokens:
                travels = old  # more was known of that
            put_codecs(bundle, {entry.layer: travels})
            where = f"exit before layer {entry.layer}"
            if found is None:
                asked = f"{disagreement:.1%} with confidence {confidence:.0%}"
                console.print(f"{where}: no threshold keeps {asked} on {len(said)} prompts; {_without(kept)}")
                least = fewest_prompts(disagreement, confidence)
                if len(said) < least:
                    console.print(f"  that takes at least {least} prompts, even if none of them has an error")
                console.print(f"  {codec_text(travels)}")
                continue
            megabytes = opened.manifest.exit_bytes(entry.layer) / 1e6
            console.print(f"{where}: {certificate_text(found)}")
            if found.emitted:
                console.print(f"  {megabytes:.1f} MB read a token, {megabytes / found.emitted:.1f} an emitted one")
            console.print(f"  {codec_text(travels)}")


@app.command()
def measure(
    bundle: BundleFolder,
    layers: Layers = None,
    text: Text = None,
    prompts: Prompts = None,
    count: Count = 320,
    check: Annotated[
        bool, typer.Option("--check", help="Make each certificate again from these prompts and compare")
    ] = False,
    work: Work = None,
    threads: Threads = 0,
) -> None:
    """Show what exits do along the model's own answers to prompts: agreement, emitted share, disagreement.

    With --check the prompts must be those of the calibration, and the certificates must follow from them.
    """
    import numpy as np

    from isthmus.engine.threshold import NEVER
    from isthmus.split.bundle import Bundle
    from isthmus.split.certificate import emitted, losses
    from isthmus.split.exit_scores import agreement

    opened = Bundle.open(bundle)
    entries = _chosen(opened, layers)
    rows = []
    with working(opened, work, threads) as run:
        samples = _asked(run, text, prompts, count)
        for entry in entries if check else []:
            _check_data(entry, samples)
        for entry, said in _said(run, entries, _states(run, samples)):
            if check:
                _check(entry, said)
            threshold = entry.certificate.threshold if entry.certificate else NEVER
            share = emitted(said, threshold)
            megabytes = opened.manifest.exit_bytes(entry.layer) / 1e6
            rows.append(
                (
                    f"layer {entry.layer}",
                    f"{agreement(said):.3f}",
                    f"{threshold:.3f}" if entry.certificate else "never",
                    f"{share:.3f}",
                    f"{np.mean(losses(said, threshold)):.4f}",
                    f"{megabytes:.1f}",
                    f"{megabytes / share:.1f}" if share else "-",
                )
            )
    table(["exit", "agrees", "threshold", "emits", "disagrees", "MB/token", "MB/emitted"], rows)
    if check:
        print("the certificates follow from these prompts and answers")


@app.command()
def export(
    bundle: BundleFolder,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write to")],
    made_by: Annotated[list[str] | None, typer.Option(help="A command that made them; repeat it for more")] = None,
) -> None:
    """Write a bundle's exits and what is known of them into a folder, as they come with isthmus."""
    from isthmus.split.bundle import Bundle
    from isthmus.split.shipped import export as write

    opened = Bundle.open(bundle)
    _chosen(opened, None)
    write(opened, output, tuple(made_by or ()))
    print(f"{output}: {len(opened.exits)} exits of {opened.name}, model {opened.model_id[:12]}")


def _without(kept: Certificate | None) -> str:
    """What an exit does for which no certificate was found."""
    if kept is None:
        return "it drafts, but never emits"
    return (
        f"the certificate of {kept.prompts} prompts (at most {kept.disagreement:.1%} allowed) stays; "
        "use more prompts, or take it away with --force"
    )


def get_torch() -> str:
    """How PyTorch is installed without gigabytes for GPUs."""
    import platform
    import sys

    if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64"):
        return "pip install torch --index-url https://download.pytorch.org/whl/cpu"
    return "pip install 'isthmus[train]'"


def certificate_text(found: Certificate) -> str:
    """A certificate in one line."""
    return (
        f"emits {found.emitted:.1%} of tokens from confidence {found.threshold:.3f} on; disagreement {found.risk:.2%}, "
        f"below {found.bound:.2%} with confidence {found.confidence:.0%} (at most {found.disagreement:.1%} allowed; "
        f"{found.prompts} prompts, {found.tokens} tokens, data {found.data[:12]})"
    )


def codec_text(found: CodecChoice) -> str:
    """How hidden states travel, in one line."""
    behind = f", {found.exact:.1%} behind f16" if found.name != "f16" else ""
    return (
        f"hidden states travel as {found.name}, {found.row_bytes:.0f} bytes a token; the model keeps "
        f"{found.agreement:.1%} of its choices{behind} ({found.tokens} tokens)"
    )


def _check_data(entry: ExitEntry, samples: list[Sample]) -> None:
    """Raises a ModelError if a certificate is missing or of other samples."""
    from isthmus.protocol.errors import ModelError
    from isthmus.split.certificate import data_hash

    where, kept, data = f"the exit before layer {entry.layer}", entry.certificate, data_hash(samples)
    if kept is None:
        raise ModelError(f"{where} has no certificate", "make one: isthmus exits calibrate")
    if kept.data != data:
        problem = f"the certificate of {where} was made of data {kept.data[:12]}, and these are {data[:12]}"
        raise ModelError(problem, "give the prompts of its calibration, or calibrate it again")


def _check(entry: ExitEntry, said: list[Said]) -> None:
    """Raises a ModelError if a certificate does not follow from what the exit says on its data."""
    from isthmus.protocol.errors import ModelError
    from isthmus.split.certificate import calibrate as certified

    where, kept = f"the exit before layer {entry.layer}", entry.certificate
    assert kept is not None
    again = certified(said, disagreement=kept.disagreement, confidence=kept.confidence, exit=kept.exit, data=kept.data)
    if again is None or abs(again.threshold - kept.threshold) > 1e-9 or abs(again.risk - kept.risk) > 1e-3:
        found = "none" if again is None else f"threshold {again.threshold:.3f} and risk {again.risk:.4f}"
        problem = f"the certificate of {where} says {kept.threshold:.3f} and {kept.risk:.4f}, and its data give {found}"
        raise ModelError(problem, "calibrate it again")


def _states(run: ExitRun, samples: list[Sample]) -> States:
    return run.states("answers", samples, [entry.layer for entry in run.bundle.exits])


def _said(run: ExitRun, entries: list[ExitEntry], states: States) -> Iterator[tuple[ExitEntry, list[Said]]]:
    for entry in entries:
        sha256 = run.bundle.manifest.files[entry.file].sha256
        yield entry, run.said(run.bundle.exit(entry.layer), sha256, entry.layer, states)


def _asked(run: ExitRun, text: list[Path] | None, prompts: Path | None, count: int) -> list[Sample]:
    """The model's answers to what is asked."""
    from isthmus.split.exit_run import read_prompts
    from isthmus.split.exit_samples import check_questions, divided, text_files

    if prompts is not None:
        return run.answered(read_prompts(prompts))
    return run.answered(check_questions(divided(text_files(text)).held if text else [], count))


def _chosen(bundle: Bundle, layers: str | None) -> list[ExitEntry]:
    from isthmus.protocol.errors import ModelError

    if not bundle.exits:
        raise ModelError(f"{bundle.path} has no exits", "train some: isthmus exits train")
    found = list(bundle.exits)
    if layers is not None:
        found = [bundle.manifest.exit(layer) for layer in _numbers(layers, bundle.config.n_layers)]
    for entry in found:
        bundle.exit(entry.layer)  # refused now, if it is another model's
    return found


def _integers(option: str, text: str) -> list[int]:
    from isthmus.protocol.errors import ModelError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ModelError(f"{option} is {text!r}", "give numbers, as 15,20,24,27") from error


def _numbers(layers: str, n_layers: int) -> list[int]:
    from isthmus.protocol.errors import ModelError

    found = _integers("--layers", layers)
    if found != sorted(set(found)):
        raise ModelError(f"--layers is {layers!r}", "give ascending numbers, as 15,20,24,27")
    if not 0 < found[0] <= found[-1] < n_layers:
        wrong = found[0] if found[0] < 1 else found[-1]
        raise ModelError(f"there is no exit before layer {wrong}", f"choose 1..{n_layers - 1}")
    return found


def table(titles: list[str], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
