"""`isthmus plan`: how to share a network between a device and a cloud, or that sharing does not pay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from isthmus.split.plan import Plan, Row

SUFFIX = ".plan.json"


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX model")],
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
        typer.Option(metavar="FILE|N", help="The cloud's profile, or how many times as fast as the device it is"),
    ] = "8",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The plan to be; by default MODEL.plan.json here"),
    ] = None,
    slo_ms: Annotated[
        float | None, typer.Option(help="That an input may take at most, at the --p th percentile")
    ] = None,
    percentile: Annotated[float, typer.Option("--p", help="Of changing links and busy clouds")] = 95.0,
    memory_mb: Annotated[float | None, typer.Option(help="Of weights that the device may hold")] = None,
    energy_j: Annotated[float | None, typer.Option(help="That the device may spend on an input")] = None,
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
    measure: Annotated[bool, typer.Option(help="Time the finalists as fused models, here")] = True,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it, too")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan on standard output")] = False,
) -> None:
    """Say how to share a network: where to cut it, or that it is best left in one piece.

    All on the device, the input to the cloud, and the best of all cuts of the graph are compared on measured times;
    every row is printed, the losing ones too. The best cut is exact: all ways to give nodes to the two sides are
    searched, with budgets as a mixed-integer program. Over a trace, or with others in the cloud (--load), what each
    row takes is replayed 4,000 times.

    Profiles come from isthmus profile, on each machine. A cloud without one is declared: --cloud 8 is eight times as
    fast as the device.
    """
    import msgspec

    from isthmus.apps.bench.plot import check_drawing
    from isthmus.apps.cli.profile import SUFFIX as PROFILE
    from isthmus.protocol.errors import PlanError
    from isthmus.split.confined import confined
    from isthmus.split.files import is_there
    from isthmus.split.plan import Plan

    target = output if output is not None else Path(model.stem + SUFFIX)
    if not target.parent.is_dir():
        raise PlanError(f"there is no folder {target.parent}", "make it, or choose another file with -o")
    here = device if device is not None else Path(model.stem + PROFILE)
    if not is_there(here):
        raise PlanError(
            f"there is no profile {here}", f"measure it: isthmus profile {model}, or name one with --device"
        )
    if plot is not None:
        check_drawing(plot)
    if not cloud:
        raise PlanError(
            "--cloud is empty", "name the cloud's profile, or say how many times as fast as the device it is"
        )
    times = _number(cloud)
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
    }
    there = "" if times is not None else cloud
    call = "isthmus.split.onnx_plan:plan"
    told = confined(call, str(model), str(here), there, link, asked, what=f"planning {model.name}")
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
        _print(found, target)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _print(plan: Plan, target: Path) -> None:
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    tail = any(row.tail_ms is not None for row in plan.rows)
    table = Table("way", box=None, pad_edge=False)
    titles = ["ms", *([f"p{plan.percentile:g}, ms"] if tail else []), "device", "link", "cloud", "kB up", "kB down"]
    for title in titles:
        table.add_column(title, justify="right")
    failing = any(row.fails for row in plan.rows)
    if failing:
        table.add_column("fails")
    for at, row in enumerate(plan.rows):
        style = "bold" if at == plan.best else ""
        table.add_row(escape(row.name), *_cells(row, tail), *([escape(row.fails)] if failing else []), style=style)
    console.print(table)
    console.print(f"over {plan.link}", markup=False)
    console.print(plan.verdict, style="bold", markup=False)
    console.print(f"{target}", markup=False)


def _cells(row: Row, tail: bool) -> list[str]:
    late = [] if not tail else ["" if row.tail_ms is None else f"{row.tail_ms:.2f}"]
    times = (row.device_ms, row.link_ms, row.cloud_ms)
    sizes = (row.up_bytes / 1e3, row.down_bytes / 1e3)
    return [f"{row.expected_ms:.2f}", *late, *(f"{ms:.2f}" for ms in times), *(f"{size:.1f}" for size in sizes)]
