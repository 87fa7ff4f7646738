"""`isthmus experts place`: where the experts of a mixture should stand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from isthmus.engine.routing import RoutingFile
    from isthmus.split.bundle import Bundle
    from isthmus.split.placement import Problem

POLICIES = ("lru", "lfru", "belady")
OF_DEVICES = {"expert_mb", "expert_bits", "flash_mb_s", "flash_ms", "flash_mb", "link"}


def command(
    ctx: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle of a mixture of experts")],
    routing: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Routing that was recorded with --save-routing")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Record the routing along this: a text file, a .jsonl file with a document a line, or a folder of "
            "them; repeat it for more"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of --text, at most; the second half is held out")] = 3000,
    save_routing: Annotated[
        Path | None, typer.Option("--save-routing", metavar="FILE.npz", help="Keep what --text gave")
    ] = None,
    expert_mb: Annotated[
        float | None, typer.Option("--expert-mb", help="Of a device: memory that experts may take, in MB")
    ] = None,
    expert_bits: Annotated[
        int, typer.Option("--expert-bits", help="Nested experts with 2, 4 or 8 bits, as in run; 0 for all there are")
    ] = 0,
    flash_mb_s: Annotated[
        float, typer.Option("--flash-mb-s", help="MB that the device's flash reads in a second")
    ] = 200.0,
    flash_ms: Annotated[float, typer.Option("--flash-ms", min=0, help="What each read takes beside that")] = 0.1,
    flash_mb: Annotated[
        float | None, typer.Option("--flash-mb", help="MB of experts that flash holds; by default all")
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(help="To a cloud that computes experts, too: rtt=20,up=5,down=20 (ms and Mbit/s), or as in plan"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Share the experts of each layer among N workers of a cloud instead"),
    ] = None,
    balance: Annotated[
        float, typer.Option(help="With --workers: share that a worker's load in a layer may exceed the mean by")
    ] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Of local search and of random placement")] = 0,
    seconds: Annotated[float, typer.Option(min=0.1, help="That a program which is solved as a whole may take")] = 20.0,
    threads: Annotated[int, typer.Option(min=0, help="Threads of recording; 0 for one per core")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the placement here, as JSON")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The placement on standard output")] = False,
) -> None:
    """Say where the experts of a mixture should stand, by which of them a text needs.

    Of a device (--expert-mb): which experts its memory holds, which stay on flash, and with --link which a cloud would
    compute. `isthmus run BUNDLE --expert-mb N --placement FILE` reads those of memory before the first token. Of a
    cloud (--workers): which worker holds which experts, so that loads are even and tokens seldom pass from one worker
    to another between layers. isthmus does not yet compute single experts on other machines: what --link and --workers
    say is an estimate, which nothing else here reads.

    The first half of the text decides, the second half is held out, and what it costs there is counted token by token.
    Small problems are solved to the optimum as integer linear programs, large ones layer by layer and by local search;
    the gap says what a better placement could save at most.

    Record once and ask often:

    isthmus experts place BUNDLE --text FILE --save-routing r.npz --expert-mb 30 -o placement.json

    isthmus experts place BUNDLE --routing r.npz --workers 4
    """
    from importlib.util import find_spec

    from isthmus.apps.cli.given import given_options
    from isthmus.apps.cli.run import check_bundle, is_network
    from isthmus.apps.cli.targets import check_target
    from isthmus.edge.experts.settings import PLANES_OF
    from isthmus.protocol.errors import PlanError
    from isthmus.split.bundle import Bundle
    from isthmus.split.files import write_whole
    from isthmus.split.placement_report import compared, figures, halves, kept
    from isthmus.split.placement_search import balanced, place
    from isthmus.split.placement_trace import checked, expert_bytes

    given = given_options(ctx)
    if find_spec("scipy") is None:
        raise PlanError("placing experts needs scipy", "install it: pip install 'isthmus[plan]'")
    if (workers is None) == (expert_mb is None):
        raise PlanError(
            "it is not said for whom to place" if workers is None else "--workers and --expert-mb are two questions",
            "give --expert-mb for a device, or --workers for a cloud",
        )
    idle = given & (OF_DEVICES if workers is not None else {"balance"})
    if idle:
        option = "--" + sorted(idle)[0].replace("_", "-")
        raise PlanError(f"{option} has no effect {'with' if workers else 'without'} --workers", "leave it out")
    if (routing is None) == (not text):
        raise PlanError("give either --routing or --text", "--text FILE records what a text needs")
    for name in ("tokens", "save_routing", "threads"):
        if name in given and routing is not None:
            raise PlanError(f"--{name.replace('_', '-')} has no effect with --routing", "leave one of them out")
    if output is not None:
        check_target(output, [one for one in (routing, save_routing) if one is not None])
    check_bundle(bundle)
    if is_network(bundle):
        raise PlanError(f"{bundle.name} is a network without experts", "name the bundle of a mixture of experts")
    opened = Bundle.open(bundle)
    if expert_bits not in PLANES_OF:
        raise PlanError(f"--expert-bits is {expert_bits}", "choose 2, 4 or 8, or 0 for all")
    sizes = expert_bytes(opened, PLANES_OF[expert_bits])
    file = _routing(opened, routing, text or [], tokens, save_routing, threads)
    chosen = checked(opened, file)
    along, held = halves(chosen)
    if workers is not None:
        from isthmus.split.placement import workers as shared

        problem = balanced(shared(along, file.n_experts, sizes, workers), balance)
    else:
        problem = _of_device(opened, along, sizes, ctx.params)
    placed = place(problem, seed=seed, seconds=seconds)
    told = figures(problem, placed, compared(problem, placed, held, seed), len(held))
    if workers is None and link is None:  # with a cloud, memory is not there to be hit most often
        told["hits"] = hit_rates(problem, placed.place, chosen)
    found = kept(opened, problem, placed, told)
    if output is not None:
        write_whole(output, found.encoded())
    if as_json:
        print(found.encoded().decode())
    else:
        _print(told, found.places, device=workers is None)
        if output is not None and workers is None:
            print(f"{output}: isthmus run {bundle} --expert-mb {expert_mb:g} --placement {output}")
        elif output is not None:
            print(f"{output} is written")


def hit_rates(problem: Problem, place: NDArray[np.int64], chosen: NDArray[np.int32]) -> dict[str, float]:
    """Share of held-out uses that are in memory: as placed, and with policies that begin with the first half's memory.

    Args:
        chosen: int32 [positions, layers, top_k], both halves.
    """
    import numpy as np

    from isthmus.edge.experts.simulate import hit_rate
    from isthmus.engine.routing import Routing

    warm, layers = problem.positions, np.arange(problem.layers)[:, None]
    found = {"placed": float((place[layers, chosen[warm:]] == 0).mean())}
    capacity = int(problem.places[0].capacity_bytes // problem.expert_bytes.mean())
    if capacity < chosen.shape[2]:
        return found
    whole = Routing(chosen, np.ones(chosen.shape, np.float32), chosen)
    return found | {name: hit_rate(whole, problem.n_experts, capacity, name, warm=warm) for name in POLICIES}


def _of_device(bundle: Bundle, along: NDArray[np.int32], sizes: NDArray[np.int64], asked: dict[str, Any]) -> Problem:
    from isthmus.protocol.errors import PlanError
    from isthmus.split.link import read_link
    from isthmus.split.placement import device
    from isthmus.split.placement_report import trip_s
    from isthmus.split.placement_trace import mixture

    trip = None
    if asked["link"] is not None:
        link = read_link(asked["link"])
        rate = link.rate()
        trip = trip_s(bundle.config, link.trip_ms, rate.up_bps, rate.down_bps)
    if not 0 <= asked["expert_mb"] < float("inf"):
        raise PlanError(f"--expert-mb is {asked['expert_mb']}", "give megabytes, 0 for none in memory")
    return device(
        along,
        mixture(bundle).n_experts,
        sizes,
        memory_bytes=asked["expert_mb"] * 1e6,
        flash_bytes_s=asked["flash_mb_s"] * 1e6,
        flash_read_s=asked["flash_ms"] / 1e3,
        flash_bytes=float("inf") if asked["flash_mb"] is None else asked["flash_mb"] * 1e6,
        trip_s=trip,
    )


def _routing(
    bundle: Bundle, routing: Path | None, text: list[Path], tokens: int, save: Path | None, threads: int
) -> RoutingFile:
    import sys

    from isthmus.engine.routing import RoutingFile
    from isthmus.protocol.errors import PlanError
    from isthmus.split.exit_samples import text_files
    from isthmus.split.exit_states import read_texts
    from isthmus.split.placement_trace import recorded

    if routing is not None:
        return RoutingFile.load(routing)
    if save is not None and (save.suffix != ".npz" or not save.parent.is_dir() or save.is_dir()):
        raise PlanError(f"--save-routing is {save}", "name a .npz file in a folder that exists")

    def tell(done: int) -> None:
        print(f"\rrouting of {done} of {tokens} tokens", end="", file=sys.stderr, flush=True)

    shows = sys.stderr.isatty()
    found = recorded(bundle, read_texts(text_files(text)), tokens, threads=threads, tell=tell if shows else None)
    if shows:
        print(file=sys.stderr)
    if save is not None:
        found.save(save)
    return found


def _print(told: dict[str, Any], places: tuple[str, ...], *, device: bool) -> None:
    from isthmus.apps.cli.exits import table

    times, unit = (1e3, "ms") if device else (1.0, "hops")
    titles = ["placement", f"{unit} a token", "held out"]
    titles += [f"in {name}" for name in places] if device else ["workers a layer", "load of the fullest"]
    rows = []
    for way in told["ways"]:
        row = [way["name"], f"{way['cost'] * times:.2f}", f"{way['held_out_cost'] * times:.2f}"]
        if device:
            row += [f"{use:.1f}" for use in way["held_out_uses"]]
        else:
            row += [f"{way['held_out_spread']:.2f}", f"{way['held_out_imbalance']:.2f}"]
        rows.append(tuple(row))
    table(titles, rows)
    print(f"placed by {told['positions']} tokens, held out {told['held_out_positions']}; {_sure(told, times, unit)}")
    if device:
        print("in PLACE: experts that a held-out token takes there")
        if rates := told.get("hits"):
            words = {"placed": "as placed, never changed", "belady": "Belady, who knows what comes"}
            said = (f"{words.get(name, name.upper())} {rate:.1%}" for name, rate in rates.items())
            print(f"held-out experts in memory: {', '.join(said)}")
    else:
        print("hops: paths that pass to another worker; load: of the fullest worker in the worst layer, mean 1")


def _sure(told: dict[str, Any], times: float, unit: str) -> str:
    if told["proven"]:
        return "no placement is better along the first"
    return (
        f"{told['how']}, not proven: no placement is below {told['bound'] * times:.2f} {unit} (gap {told['gap']:.1%})"
    )
