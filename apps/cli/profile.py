"""`isthmus profile`: what a model takes on this machine, or what a cloud and the link to it take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from isthmus.apps.cli.decoder_profile import DecoderProfile
    from isthmus.split.bundle import Bundle
    from isthmus.split.profile import Profile

SUFFIX = ".profile.json"
_SHOWN = 12  # operators of the table


def command(
    ctx: typer.Context,
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="An .onnx or .tflite model, or a bundle")
    ] = None,
    remote: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Measure a cloud and the link to it, in place of a model")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The profile to be, by default MODEL.profile.json here; of a link, link.json",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIMS", help="Of an input whose shape the model leaves open, as x=1,3,224,224"),
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option("--input", metavar="FILE.npz", help="Inputs by name; else they are random")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads of onnxruntime; 0 for one per core")] = 0,
    seconds: Annotated[float, typer.Option(min=0.05, max=600.0, help="That each of two rounds of runs takes")] = 3.0,
    keys: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="With --remote: this device's key and the cloud's, as in isthmus run"),
    ] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="With --remote: talk in the clear, to this machine")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The profile on standard output, too")] = False,
) -> None:
    """Measure what a model takes on this machine, or a cloud and the link to it (--remote), for isthmus plan.

    Of a language model (a bundle) layers, steps of several rows and a prompt's rows are timed.

    An ONNX model runs in onnxruntime, in a child process with limits, warmed, as it is fused there; a fused node's time
    is shared among those that it stands for, and all together take what the model takes. The file may be copied from
    one machine to another: a plan takes one of the device and one of the cloud. A .tflite model runs in LiteRT, and is
    measured in one piece.

    With --remote messages of some kilobytes go to a cloud and back: the round trip, the rates both ways, and what the
    cloud says of its models are measured through the protocol that devices speak.
    """
    from isthmus.apps.bench.machine import read_machine
    from isthmus.apps.cli.plan import check_model
    from isthmus.apps.cli.targets import check_target
    from isthmus.protocol.errors import PlanError

    _check_options(ctx)
    if remote is not None:
        _measure_remote(remote, output or Path("link.json"), keys, no_keys, as_json)
        return
    if model is None:
        raise PlanError("nothing to measure", "name a model, or a cloud with --remote HOST:PORT")
    target = output if output is not None else Path((model.resolve().name if model.is_dir() else model.stem) + SUFFIX)
    check_target(target, (path for path in (model, inputs) if path is not None))
    threads = threads or read_machine().cores
    if model.is_dir():
        if shape or inputs is not None:
            option = "--shape" if shape else "--input"
            raise PlanError(f"{option} has no effect: {model} is a bundle of a language model", "leave it out")
        _measure_decoder(model, target, threads, seconds, as_json)
        return
    check_model(model)
    found = measured(model, threads, seconds, shape or [], inputs)
    found.save(target)
    if as_json:
        print(target.read_text())
    else:
        _print(found, target, model)


def measured(model: Path, threads: int, seconds: float, shape: list[str], inputs: Path | None) -> Profile:
    """What a network takes on this machine.

    Raises:
        PlanError: it cannot be run, or an input's shape is not known.
    """
    from isthmus.apps.bench.machine import read_machine
    from isthmus.split.confined import SECONDS, confined
    from isthmus.split.profile import Profile
    from isthmus.split.tflite import is_tflite

    told = confined(
        f"isthmus.split.{'tflite' if is_tflite(model) else 'onnx_measure'}:measure",
        str(model),
        threads,
        shapes(shape),
        seconds,
        str(inputs) if inputs is not None else "",
        what=f"measuring {model.name}",
        seconds=SECONDS * threads + int(4 * threads * seconds),  # of all processors together
    )
    machine = read_machine()
    return Profile.of(told, machine.processor, machine.system)


def measured_decoder(bundle: Bundle, threads: int, seconds: float) -> DecoderProfile:
    """What a language model takes on this machine.

    Raises:
        EngineError: nothing runs it here.
    """
    from isthmus.apps.bench.machine import read_machine
    from isthmus.apps.cli.decoder_measure import measure

    machine = read_machine()
    return measure(bundle, threads, machine.system, machine.processor, 2 * seconds)


def _check_options(ctx: typer.Context) -> None:
    """Refuses options that would have no effect.

    Raises:
        PlanError: there is one.
    """
    from isthmus.apps.cli.given import given_options
    from isthmus.protocol.errors import PlanError

    given = given_options(ctx)
    idle = (
        given - {"remote", "output", "keys", "no_keys", "as_json"} if "remote" in given else given & {"keys", "no_keys"}
    )
    for name in sorted(idle):
        option = {"model": "a model", "inputs": "--input"}.get(name, f"--{name.replace('_', '-')}")
        problem = f"{option} has no effect {'with' if 'remote' in given else 'without'} --remote"
        raise PlanError(problem, "leave one of them out" if "remote" in given else "leave it out")


def _measure_remote(address: str, target: Path, keys: Path | None, no_keys: bool, as_json: bool) -> None:
    from isthmus.apps.cli.targets import check_target
    from isthmus.protocol.keys import default_folder, read_device
    from isthmus.protocol.survey import survey
    from isthmus.protocol.transport import DealerTransport
    from isthmus.split.link import LinkFile, Served

    check_target(target)
    transport = DealerTransport(address, None if no_keys else read_device(keys or default_folder()))
    try:
        found = survey(transport)
    finally:
        transport.close()
    rates = round(found.up_bps / 1e6, 6), round(found.down_bps / 1e6, 6)
    served = tuple(
        Served(one.model_id, one.name, tuple((rows, us * 1e-3) for rows, us in one.steps), one.row_us * 1e-3)
        for one in found.welcome.offers
        if one.steps
    )
    link = LinkFile(round(found.trip_ms, 3), *rates, served=served)
    link.save(target)
    if as_json:
        print(target.read_text())
        return
    print(
        f"a round trip of {link.rtt_ms:.1f} ms ({found.trip_high_ms:.1f} at times), {link.up_mbps:.1f} Mbit/s up and "
        f"{link.down_mbps:.1f} down"
    )
    for offer in found.welcome.offers:
        step = f"{offer.steps[0][1] / 1e3:.2f} ms a token" if offer.steps else "not timed"
        print(f"{offer.name}: {step}")
    for graph in found.welcome.graphs:
        print(f"{graph.name}, the second part: {f'{graph.step_us / 1e3:.2f} ms' if graph.step_us else 'not timed'}")
    model = "BUNDLE" if served else "MODEL.onnx"
    print(f"{target}; next: isthmus plan {model} --link {target}")


def _measure_decoder(folder: Path, target: Path, threads: int, seconds: float, as_json: bool) -> None:
    from isthmus.protocol.errors import PlanError
    from isthmus.split.bundle import Bundle, is_graph

    if is_graph(folder):
        raise PlanError(f"{folder} is a network that was cut", "measure the .onnx model that it was made from")
    found = measured_decoder(Bundle.open(folder), threads, seconds)
    found.save(target)
    if as_json:
        print(target.read_text())
        return
    layers, token_ms = found.layers_ms[-1][1] / found.n_layers, found.rows_ms[0][1]
    print(f"{found.name}: {token_ms:.2f} ms a token ({layers:.3f} a layer, {found.head_ms:.2f} the output head), "
          f"{found.prefill_row_ms:.3f} ms a token of a prompt, {found.threads} threads")  # fmt: skip
    device = "" if target == Path(folder.resolve().name + SUFFIX) else f" --device {target}"
    print(f"{target}; next: isthmus plan {folder}{device} --link rtt=20,up=5,down=20")


def shapes(texts: list[str]) -> dict[str, list[int]]:
    """Of inputs, by name, out of --shape options."""
    return dict(_shape(text) for text in texts)


def _shape(text: str) -> tuple[str, list[int]]:
    from isthmus.protocol.errors import PlanError

    name, _, dims = text.rpartition("=")
    numbers = dims.split(",")
    if not name or not all(one.strip().isdecimal() and len(one) < 10 for one in numbers):
        raise PlanError(f"--shape is {text!r}", "write an input's name and its dimensions, as x=1,3,224,224")
    return name, [int(one) for one in numbers]


def _print(found: Profile, target: Path, model: Path) -> None:
    import sys
    from collections import Counter, defaultdict

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    times: defaultdict[str, float] = defaultdict(float)
    counts, weights = Counter(found.ops), Counter[str]()
    for op, ms, size in zip(found.ops, found.nodes_ms, found.weights, strict=True):
        times[op] += ms
        weights[op] += size
    table = Table("operator", box=None, pad_edge=False)
    for title in ("nodes", "ms", "share", "weights, MB"):
        table.add_column(title, justify="right")
    order = sorted(times.items(), key=lambda one: -one[1])
    for op, ms in order[:_SHOWN]:
        table.add_row(
            escape(op), f"{counts[op]}", f"{ms:.3f}", f"{ms / found.whole_ms:.1%}", f"{weights[op] / 1e6:.2f}"
        )
    if len(times) > _SHOWN:
        rest = sum(ms for _, ms in order[_SHOWN:])
        table.add_row(f"{len(times) - _SHOWN} others", "", f"{rest:.3f}", f"{rest / found.whole_ms:.1%}", "")
    console.print(table)
    line = f"{found.name}: {found.whole_ms:.3f} ms an input, the first {found.first_ms:.3f}; {len(found.ops)} nodes, "
    line += f"{found.threads} threads, {found.runtime}"
    console.print(line, markup=False)
    device = "" if target == Path(model.stem + SUFFIX) else f" --device {target} (or --cloud {target})"
    console.print(f"{target}; next: isthmus plan {model}{device} --link rtt=20,up=5,down=20", markup=False)
