"""`isthmus plan`: how to share a model between a device and a cloud, or that sharing does not pay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from isthmus.split.plan import Plan, Row

SUFFIX = ".plan.json"
PROFILE_S = 3.0  # that each of two rounds of runs takes, where this machine is measured first
TRIES = 20  # times the processor's seconds that a plan may take where codecs are tried
WIDE = 160  # columns where the output is no terminal


OF_DECODERS = {"prompt", "tokens", "prompts", "max_disagreement"}
OF_BOTH = {"ctx", "model", "link", "device", "cloud", "output", "slo_ms", "percentile", "memory_mb", "energy_j"}
OF_BOTH |= {"device_watts", "radio_watts", "load", "plot", "as_json"}


def command(
    ctx: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="An .onnx or .tflite model, or the bundle of a language model")
    ],
    link: Annotated[
        str,
        typer.Option(
            help="rtt=20,up=5,down=20 (ms and Mbit/s), rtt=20,trace=PREFIX (mahimahi), rtt=20,trace=synthetic, or a "
            "link's .json file"
        ),
    ],
    device: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The device's profile; by default MODEL.profile.json here")
    ] = None,
    cloud: Annotated[
        str,
        typer.Option(
            metavar="FILE|N",
            help="The cloud's profile, or how many times as fast as the device it is; of a language model by default "
            "what the link's file says of it",
        ),
    ] = "8",
    edge: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The profile of a server between device and cloud")
    ] = None,
    edge_link: Annotated[
        str | None,
        typer.Option(metavar="LINK", help="From the device to that server; --link is from there to the cloud"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The plan to be; by default MODEL.plan.json here"),
    ] = None,
    slo_ms: Annotated[
        float | None,
        typer.Option(help="That an input (of a language model a token) may take at most, at the --p th percentile"),
    ] = None,
    percentile: Annotated[
        float, typer.Option("--p", help="The percentile, where links change or others use the cloud")
    ] = 95.0,
    memory_mb: Annotated[float | None, typer.Option(help="Of weights that the device may hold")] = None,
    energy_j: Annotated[
        float | None, typer.Option(help="That the device may spend on an input, or on an answer")
    ] = None,
    device_watts: Annotated[float, typer.Option(min=0.0, help="Of the device while it computes, declared")] = 0.0,
    radio_watts: Annotated[float, typer.Option(min=0.0, help="Of the device while something travels, declared")] = 0.0,
    load: Annotated[float, typer.Option(help="Share of the cloud's time that others take")] = 0.0,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="The most inputs a second through a pipeline, not the least time")
    ] = False,
    inputs: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE.npz", help="Inputs by name to time the finalists on; else random ones"),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--inputs", metavar="FOLDER", help="Pictures, or .npz files, to try codecs on (64 at most)"),
    ] = None,
    preprocess: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="What is done with pictures before the network; see above")
    ] = None,
    min_agreement: Annotated[
        float, typer.Option(help="Share of answers that codecs and exits must leave as they are without them")
    ] = 0.99,
    exits: Annotated[
        list[str] | None,
        typer.Option(
            "--exit", metavar="OUTPUT=P", help="An output that answers early, final where its likeliest class has P"
        ),
    ] = None,
    agree: Annotated[
        str, typer.Option(help="When an answer is the same: top1 (where it is largest) or values (each to within 1 %)")
    ] = "top1",
    prompt: Annotated[int, typer.Option(min=1, help="Of a language model: tokens of a prompt")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Of a language model: tokens of an answer")] = 120,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of a language model: a prompt a line, or .jsonl, to be answered; see above"),
    ] = None,
    max_disagreement: Annotated[
        float, typer.Option(help="Of a language model: share of tokens that may differ from the cloud's, as in run")
    ] = 0.0,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIMS", help="Of an input whose shape is open, where no profile was made yet"),
    ] = None,
    measure: Annotated[bool, typer.Option(help="Time the finalists as fused models, here")] = True,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it, too: .png, or .html with the table")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan on standard output")] = False,
) -> None:
    """Say how to share a model: where to cut it, or that it is best left in one piece.

    All on the device, the input to the cloud, and the best of all cuts of the graph are compared on measured times;
    every row is printed, the losing ones too. The best cut is exact: all ways to give nodes to the two sides are
    searched, with budgets as a mixed-integer program. Over a trace, or with others in the cloud (--load), what each
    row takes is replayed 4,000 times.

    With --inputs codecs are tried on them: the smallest that leaves --min-agreement of the answers as they are stands
    in the row. Pictures need --preprocess, and are sent as JPEG and as WebP in two more rows. It is a JSON file as
    {"size": [224, 224], "resize": 256, "mean": [127, 127, 127], "std": [128, 128, 128]}: the shorter side is brought
    to 256 pixels, 224 x 224 are cut from the middle, and a value is (pixel - mean) / std. "layout": "NHWC",
    "channels": "BGR", "dtype": "uint8" and "input": NAME are understood, too.

    A network that has early exits gives their classes as outputs of their own. With --exit, ways that end there on the
    device where they are sure are compared as well, by how often they are on --inputs: of exits all choices, of costs
    the averages.

    Of a language model (a bundle) every mode is priced at every cut, for an answer of --tokens to a prompt of --prompt:
    local, stream, split, exit and verify, by the formulas by which auto decides; over a trace, or with --load, 400
    answers are replayed in each. How much exits, and drafts for the cloud to check, foresee of an answer depends on
    what is asked: with --prompts the model answers those, with 120 tokens at most, and it is counted; --prompt and
    --tokens are then their means unless they are given.

    With --edge a server stands between device and cloud, and ways over all three are compared, too: the best of all, by
    layered minimum cuts. `isthmus split` writes two bundles for such a way, of which the server runs one through the
    other (isthmus serve --upstream).

    Profiles come from isthmus profile, on each machine; without one this machine is measured, as the device. A cloud
    without one is declared: --cloud 8 is eight times as fast as the device.
    """
    import os
    import sys

    import msgspec

    from isthmus.apps.bench.plot import check_drawing
    from isthmus.apps.cli.picture import KINDS
    from isthmus.apps.cli.profile import SUFFIX as PROFILE
    from isthmus.apps.cli.targets import check_target
    from isthmus.protocol.errors import PlanError
    from isthmus.split.confined import SECONDS, confined
    from isthmus.split.files import is_there
    from isthmus.split.plan import Plan
    from isthmus.split.tflite import is_tflite

    if model.is_dir():
        from isthmus.apps.cli.plan_decoder import plan_decoder

        plan_decoder(ctx)
        return
    check_model(model)
    only(ctx, set(ctx.params) - OF_DECODERS, f"{model.name} is no bundle of a language model")
    target = output if output is not None else Path(model.stem + SUFFIX)
    here = device if device is not None else Path(model.stem + PROFILE)
    given = (model, here, edge, inputs, preprocess, plot, Path(cloud), Path(link))
    check_target(target, (path for path in given if path is not None))
    if plot is not None:
        check_drawing(plot, KINDS)
    if not cloud:
        raise PlanError(
            "--cloud is empty", "name the cloud's profile, or say how many times as fast as the device it is"
        )
    if device is None and not is_there(here):
        _measure(model, here, shape or [], inputs)
    elif not is_there(here) or shape:
        again = f"measure it: isthmus profile {model}"
        if is_there(here):
            problem = f"--shape has no effect: {here} has what the model was measured with"
            raise PlanError(problem, f"{again} --shape {(shape or [''])[0]}")
        raise PlanError(f"there is no profile {here}", f"{again}, or name one with --device")
    times = number(cloud)
    asked = {
        "aim": "throughput" if throughput else "latency",
        "slo_ms": slo_ms,
        "percentile": percentile,
        "memory_mb": memory_mb,
        "energy_j": energy_j,
        "device_watts": device_watts,
        "radio_watts": radio_watts,
        "load": load,
        "times": times,
        "measure": measure,
        "arrays": str(inputs) if inputs is not None else "",
        "folder": str(folder) if folder is not None else "",
        "preprocess": str(preprocess) if preprocess is not None else "",
        "agreement": min_agreement,
        "agree": agree,
        "exits": named(exits or []),
        "edge": str(edge) if edge is not None else "",
        "edge_link": edge_link or "",
    }
    there = "" if times is not None else cloud
    call = "isthmus.split.onnx_plan:plan"
    limit_s = SECONDS * (TRIES if folder is not None else 1) * (os.cpu_count() or 1)
    if measure and not is_tflite(model) and sys.stderr.isatty():
        print("timing the best ways on this machine (--no-measure leaves that out)", file=sys.stderr)
    told = confined(call, str(model), str(here), there, link, asked, what=f"planning {model.name}", seconds=limit_s)
    found = msgspec.convert(told, Plan)
    found.save(target)
    if plot is not None:
        from isthmus.apps.cli.plan_picture import draw
        from isthmus.split.link import read_link
        from isthmus.split.profile import load_profile

        draw(plot, found, load_profile(here), read_link(link))
    if as_json:
        print(target.read_text())
    else:
        _print(found, target, load)
        if folder is None and not is_tflite(model):
            print("codecs, JPEG and WebP are tried on inputs: --inputs FOLDER, with --preprocess for pictures")


def _measure(model: Path, target: Path, shape: list[str], inputs: Path | None) -> None:
    """Makes the profile that is not there, as `isthmus profile` does."""
    import sys

    from isthmus.apps.bench.machine import read_machine
    from isthmus.apps.cli.profile import measured

    print(
        f"measuring {model.name} on this machine, for {target} (isthmus profile does that by itself)", file=sys.stderr
    )
    measured(model, read_machine().cores, PROFILE_S, shape, inputs).save(target)


def check_model(model: Path) -> None:
    """Refuses a model that is not there.

    Raises:
        PlanError: it is none.
    """
    from isthmus.protocol.errors import PlanError

    if not model.is_file():
        raise PlanError(f"there is no model {model}", "name an .onnx or .tflite file, or a bundle's folder")


def only(ctx: typer.Context, known: set[str], why: str) -> None:
    """Refuses options that would have no effect.

    Raises:
        PlanError: there is one.
    """
    from isthmus.apps.cli.given import given_options
    from isthmus.protocol.errors import PlanError

    names = {"inputs": "--input", "folder": "--inputs", "percentile": "--p", "exits": "--exit"}
    for name in (name for name in ctx.params if name in given_options(ctx) - known):
        option = names.get(name, f"--{name.replace('_', '-')}")
        raise PlanError(f"{option} has no effect: {why}", "leave it out")


def named(exits: list[str]) -> dict[str, float]:
    """Probabilities by the names of outputs.

    Raises:
        PlanError: one is not written so, or given twice.
    """
    from isthmus.protocol.errors import PlanError

    found: dict[str, float] = {}
    for text in exits:
        name, _, sure = text.rpartition("=")
        if not name or (value := number(sure)) is None or name in found:
            raise PlanError(f"--exit is {text!r}", "give each output once, with a probability: --exit NAME=0.9")
        found[name] = value
    return found


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _print(plan: Plan, target: Path, load: float) -> None:
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from isthmus.split.onnx_network import SERVICE_MS
    from isthmus.split.plan import shown

    terminal = sys.stdout.isatty()
    console = Console(highlight=False, soft_wrap=not terminal, width=None if terminal else WIDE)
    spent = any(row.energy_j for row in plan.rows)
    tail = any(row.tail_ms is not None for row in plan.rows)
    tried = any(row.agreement is not None for row in plan.rows)
    table = Table(box=None, pad_edge=False)
    table.add_column("row", justify="right")
    table.add_column("way")
    middle = any(row.edge for row in plan.rows)
    titles = ["ms", *([f"p{plan.percentile:g}, ms"] if tail else []), "device", *(["edge"] if middle else [])]
    titles += ["link", "cloud", "kB up", "kB down"]
    titles += (["J"] if spent else []) + (["agree"] if tried else [])
    for title in titles:
        table.add_column(title, justify="right")
    failing = any(row.fails for row in plan.rows)
    if failing:
        table.add_column("fails")
    for at, row in enumerate(plan.rows):
        style = "bold" if at == plan.best else ""
        table.add_row(
            str(at + 1),
            escape(row.name),
            *_cells(row, tail, middle, spent, tried),
            *([escape(row.fails)] if failing else []),
            style=style,
        )
    console.print(table)
    if plan.inputs:
        told = ", ".join(f"{shown([name])} {size.dtype} {list(size.shape)}" for name, size in plan.inputs.items())
        console.print(f"measured with {told}", markup=False)
    others = f"; others take {load:.0%} of the cloud's time" if load else ""
    console.print(f"over {plan.link}; a request takes {SERVICE_MS:g} ms beside that{others}", markup=False)
    if plan.tried:
        how = "each value stays, to within 1 %" if plan.agree == "values" else "the largest value stays where it is"
        told = f"agree: {how}, on {plan.tried} inputs, on which the codecs were chosen as well (--agree chooses)"
        console.print(told, markup=False)
    for at, row in enumerate(plan.rows):
        if row.leaves and (at == plan.best or row.kind == "device"):
            left = ", ".join(
                f"{one.share:.1%} after {one.ms:.2f} ms at {shown([one.exit.output])}" for one in row.leaves
            )
            console.print(f"{row.name}: {left}", markup=False)
    console.print(plan.verdict, style="bold", markup=False)
    console.print(f"{target}", markup=False)


def _cells(row: Row, tail: bool, middle: bool, spent: bool, tried: bool) -> list[str]:
    late = [] if not tail else ["" if row.tail_ms is None else f"{row.tail_ms:.2f}"]
    times = (row.device_ms, *([row.edge_ms] if middle else []), row.link_ms, row.cloud_ms)
    sizes = (row.up_bytes / 1e3, row.down_bytes / 1e3)
    same = [] if not tried else ["" if row.agreement is None else f"{row.agreement:.1%}"]
    cells = [f"{row.ms:.2f}", *late, *(f"{ms:.2f}" for ms in times), *(f"{size:.1f}" for size in sizes)]
    return cells + ([f"{row.energy_j:.3g}"] if spent else []) + same
