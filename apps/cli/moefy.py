"""`isthmus moefy`: makes a mixture of experts of a dense model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from isthmus.split.moefy_run import Figure


def command(
    model: Annotated[str, typer.Argument(help="A .gguf file, a Hugging Face folder, or the name of a fetched model")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The bundle's folder to be")],
    experts: Annotated[int, typer.Option(help="Experts a layer")] = 32,
    active: Annotated[int, typer.Option(help="Experts that a token is sent to")] = 8,
    pre_gate: Annotated[
        bool, typer.Option("--pre-gate", help="Choose a layer's experts from the layer before, one layer ahead")
    ] = False,
    tune: Annotated[
        float, typer.Option(min=0, metavar="EPOCHS", help="Passes of distillation over texts and answers; 0 for none")
    ] = 0,
    tune_rounded: Annotated[
        float,
        typer.Option(
            "--tune-rounded", min=0, metavar="EPOCHS", help="Passes after that with experts in few nested bits"
        ),
    ] = 0,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text file, a .jsonl file with a document a line, or a folder of them; repeat it for more. A tenth "
            "of each file is held out. By default what isthmus fetch texts brought"
        ),
    ] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Documents to train on at most")] = None,
    checks: Annotated[int, typer.Option(min=1, help="Held-out documents to measure with at most")] = 100,
    answers: Annotated[int, typer.Option(min=0, help="Own answers of the dense model to tune on")] = 240,
    counts: Annotated[str | None, typer.Option(help="Active experts to measure with, as 4,8,16")] = None,
    format: Annotated[
        str, typer.Option("--format", "-f", help="Of the experts: n8 (nested), q8, f16, f32, ...")
    ] = "n8",
    rest: Annotated[str, typer.Option(help="Of all else: a format of isthmus split")] = "keep",
    name: Annotated[str | None, typer.Option(help="The model's name, for people")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of grouping and of the samples' order")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that stands there")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The figures on standard output as JSON")] = False,
    work: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where what is made is kept; by default in the cache folder"),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 for one per core")] = 0,
) -> None:
    """Turn a dense model's feed-forward networks into mixtures of experts, with a router in every layer.

    Neurons that are needed for the same tokens go into one expert, and a router foresees how much each expert adds for
    a token (the logarithm of its output's energy); the foremost are active, and each counts in full. Nothing else
    changes: with all experts active the model says what the dense one does, but for rounding.

    With fewer it says worse things, the more so the fewer. --tune lets experts and routers learn from the dense model
    what to say with --active of them; then all experts together are another, tuned dense model. --tune-rounded goes on
    with experts as they are read with 3 bits in the mean, so that `isthmus run --experts bounded` loses less.

    It needs PyTorch, on the CPU. Stopped, it goes on where it was when it is called again.
    """
    from isthmus.apps.cli.exit_work import bars
    from isthmus.apps.cli.exits import get_torch
    from isthmus.apps.cli.signals import ending_cleanly
    from isthmus.apps.cli.split import found_model
    from isthmus.protocol.errors import ModelError
    from isthmus.split.checkpoints import open_checkpoint
    from isthmus.split.exit_run import working_in
    from isthmus.split.exit_samples import chunks, divided, text_files
    from isthmus.split.exit_states import questions
    from isthmus.split.fetch import find
    from isthmus.split.writer import BundleWriter, write_bundle

    try:
        import torch

        from isthmus.split.moefy_decoder import keep_freed_memory
        from isthmus.split.moefy_mixture import Mixture
        from isthmus.split.moefy_nested import NestedMixture
        from isthmus.split.moefy_run import MoefyRun, identity, known_format, usual_counts, work_folder
        from isthmus.split.moefy_source import ConvertedSource, Shape
        from isthmus.split.moefy_training import Recipe, in_nested_bits
    except ModuleNotFoundError as error:
        raise ModelError("making experts needs PyTorch", get_torch()) from error
    shape = Shape(experts, active, pre_gate)
    measured = _counts(counts, experts) if counts is not None else usual_counts(shape)
    path = found_model(model)
    source = open_checkpoint(path, format=rest)
    shape.of(source.config)
    known_format(format)
    recipes = [Recipe(epochs=tune, seed=seed)]
    if tune_rounded:
        recipes.append(in_nested_bits(format, epochs=tune_rounded, seed=seed))
    BundleWriter(output, force=force)  # a place that is taken is told now
    paths = text or [folder for folder in [find("texts")] if folder is not None]
    if not paths:
        raise ModelError("there is no text to learn from", "name files with --text; isthmus fetch texts brings some")
    texts, tokenizer = divided(text_files(paths), documents), source.tokenizer()
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    called = identity(source)
    folder = work or work_folder(called)
    with ending_cleanly(), working_in(folder), bars() as say:
        run = MoefyRun(source, called, shape, folder, say)
        samples = chunks(tokenizer, texts.taught, source.config.context_length)
        mixture = run.convert(samples, seed)
        if tune or tune_rounded:
            taught = [*samples, *run.answered(tokenizer, questions(texts.taught, answers), threads)]
            for recipe in recipes:
                mixture = run.tune(mixture, taught, recipe)
        held = chunks(tokenizer, texts.held[:: max(1, len(texts.held) // checks)], source.config.context_length)
        read: Mixture = mixture
        if tune_rounded:
            read = nested = NestedMixture(mixture, format)
            nested.round()
        dense, figures = run.measure(read, held[:checks], measured)
        rounded = run.experts(mixture, None if tune_rounded else samples, format)
        tell = say("bundle")
        manifest = write_bundle(
            output,
            ConvertedSource(source, shape, rounded, mixture.routers),
            name=name or f"{source.name}-{experts}x{active}",
            weights=format,
            tokenizer=tokenizer.to_json(),
            entry=tokenizer.entry,
            force=force,
            progress=lambda _, done, total: tell(done, total),
        )
    if as_json:
        import json
        from dataclasses import asdict

        told = {
            "bundle": str(output),
            "model_id": manifest.model_id,
            **asdict(shape),
            "tuned_epochs": tune,
            "rounded_epochs": tune_rounded,
            "dense_perplexity": dense,
            "figures": [asdict(figure) for figure in figures],
        }
        print(json.dumps(told))
        return
    _show(dense, figures, f"with experts in {format}" if tune_rounded else "before experts are rounded")
    size_mb = sum(entry.bytes for entry in manifest.files.values()) / 1e6
    width = source.config.d_ff // experts
    print(f"{output}: {manifest.name}, {experts} experts of {width} neurons a layer, {active} active, {size_mb:.1f} MB")
    if tune or tune_rounded:
        print("tuned: with all experts active it is another model than the dense one")


def _show(dense: float, figures: Sequence[Figure], read: str) -> None:
    from isthmus.apps.cli.exits import table

    rows = [
        (f"{one.active}", f"{one.share:.0%}", f"{one.perplexity:.2f}", f"{one.recall:.3f}" if one.share < 1 else "")
        for one in figures
    ]
    table(["active", "share", "perplexity", "recall"], [*rows, ("dense", "", f"{dense:.2f}", "")])
    print(f"perplexity of held-out documents, {read}")
    print("recall: of the experts that add most, the share that routers chose")


def _counts(text: str, experts: int) -> list[int]:
    from isthmus.protocol.errors import ModelError

    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ModelError(f"--counts is {text!r}", "give numbers, as 4,8,16") from error
    if not all(1 <= count <= experts for count in found):
        raise ModelError(f"--counts is {text!r}", f"give numbers from 1 to {experts}, the experts of a layer")
    return found
