"""`isthmus profile`: what a network's nodes take on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from isthmus.split.profile import Profile

TOP = 12  # nodes that are shown


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="A network in ONNX")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="By default MODEL.profile.json here")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of the runtime")] = 1,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=1,3,224,224", help="The shape of an input that the model leaves open; repeatable"),
    ] = None,
    arrays: Annotated[
        Path | None, typer.Option("--input", metavar="FILE.npz", help="Inputs by name, where random ones will not do")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="To measure for, three times over")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as well")] = False,
) -> None:
    """Measure what each node of a network takes on this machine, and keep it as a device profile.

    The file may be copied: `isthmus plan` takes one of the device and one of the cloud, of the same model. The model
    is opened and run in a process of its own, which may take so much memory and time and no more.
    """
    import sys

    from rich.console import Console

    from isthmus.apps.bench.machine import read_machine
    from isthmus.split.confined import confined
    from isthmus.split.profile import Profile

    target = output or Path(f"{model.stem}.profile.json")
    given = str(arrays.resolve()) if arrays is not None else ""
    with Console(stderr=True).status(f"measuring {model.name}"):
        told = confined(
            "isthmus.split.onnx_measure:measure",
            str(model.resolve()),
            threads,
            shapes(shape or []),
            seconds,
            given,
            what=f"measuring {model.name}",
        )
    machine = read_machine()
    profile = Profile.of(told, machine.processor, f"{machine.system}, {machine.architecture}")
    profile.save(target)
    if as_json:
        sys.stdout.write(target.read_text() + "\n")
    else:
        _print(profile, target)


def shapes(told: list[str]) -> dict[str, list[int]]:
    """Shapes of inputs by name, out of NAME=1,3,224,224.

    Raises:
        PlanError: another form.
    """
    from isthmus.protocol.errors import PlanError

    found: dict[str, list[int]] = {}
    for one in told:
        name, equals, dims = one.rpartition("=")
        parts = [part.strip() for part in dims.split(",")] if dims.strip() else []
        if not equals or not name or not all(part.isdecimal() for part in parts):
            raise PlanError(f"--shape {one!r} is no shape", "write it as NAME=1,3,224,224")
        found[name] = [int(part) for part in parts]
    return found


def _print(profile: Profile, target: Path) -> None:
    import sys

    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    sizes = sum(profile.weights) / 1e6
    console.print(
        f"{profile.name}: {len(profile.ops)} nodes, {sizes:.1f} MB of weights, {profile.whole_ms:.3g} ms "
        f"({profile.first_ms:.3g} ms the first time) with {profile.threads} of {profile.processor}'s threads",
        markup=False,
    )
    table = Table(box=None)
    for column in ("node", "operator", "ms", "share"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    order = sorted(range(len(profile.ops)), key=lambda at: -profile.nodes_ms[at])
    for at in order[:TOP]:
        ms = profile.nodes_ms[at]
        table.add_row(str(at), profile.ops[at], f"{ms:.3g}", f"{ms / profile.whole_ms:.1%}")
    console.print(table)
    rest = sum(profile.nodes_ms[at] for at in order[TOP:])
    if rest:
        console.print(f"the other {len(order) - TOP} nodes take {rest:.3g} ms")
    console.print(f"kept in {target}", markup=False)
