"""`isthmus plan` with a language model: every mode at every cut, priced before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

    from isthmus.apps.cli.decoder_plan import DecoderPlan, Way

SHOWN = 3  # ways of a mode; all stand in the file
WIDE = 160  # columns where the output is no terminal


def plan_decoder(ctx: typer.Context) -> None:
    """Plans for the bundle that `isthmus plan` was given, and prints what came of it.

    Raises:
        PlanError: an option of networks, no profile, or no way that keeps to what was asked for.
    """
    from isthmus.apps.cli.decoder_plan import Answer, plan
    from isthmus.apps.cli.decoder_profile import load_decoder_profile
    from isthmus.apps.cli.plan import OF_BOTH, OF_DECODERS, SUFFIX, number, only
    from isthmus.apps.cli.profile import SUFFIX as PROFILE
    from isthmus.protocol.errors import PlanError
    from isthmus.split.bundle import Bundle, is_graph
    from isthmus.split.files import is_there
    from isthmus.split.link import read_link

    asked = ctx.params
    folder = Path(asked["model"])
    if is_graph(folder):
        raise PlanError(f"{folder} is a network that was cut", "plan for the .onnx model that it was made from")
    only(ctx, OF_BOTH | OF_DECODERS, f"{folder} is a bundle of a language model")
    name = folder.resolve().name
    target = asked["output"] or Path(name + SUFFIX)
    if not target.parent.is_dir():
        raise PlanError(f"there is no folder {target.parent}", "make it, or choose another file with -o")
    here = asked["device"] or Path(name + PROFILE)
    if not is_there(here):
        remedy = f"measure it: isthmus profile {folder}, or name one with --device"
        raise PlanError(f"there is no profile {here}", remedy)
    if not asked["cloud"]:
        remedy = "name the cloud's profile, or say how many times as fast as the device it is"
        raise PlanError("--cloud is empty", remedy)
    answer = Answer(asked["prompt"], asked["tokens"], asked["memory_mb"], asked["max_disagreement"], asked["slo_ms"])
    device, times = load_decoder_profile(here), number(asked["cloud"])
    if times is None and not is_there(Path(asked["cloud"])):
        raise PlanError(f"there is no profile {asked['cloud']}", "copy the cloud's here, or say how fast it is")
    cloud = load_decoder_profile(Path(asked["cloud"])) if times is None else device
    bundle, link = Bundle.open(folder), read_link(asked["link"])
    found = plan(bundle, device, cloud, 1.0 if times is None else times, link, answer)
    found.save(target)
    if asked["as_json"]:
        print(target.read_text())
    else:
        _print(found, target)


def _print(plan: DecoderPlan, target: Path) -> None:
    import sys
    from collections import Counter

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    terminal = sys.stdout.isatty()
    console = Console(highlight=False, soft_wrap=not terminal, width=None if terminal else WIDE)
    shown: list[Way] = []
    counts: Counter[str] = Counter()
    for way in plan.ways:
        counts[way.mode] += 1
        if counts[way.mode] <= SHOWN:
            shown.append(way)
    shown.sort(key=lambda way: (bool(way.fails), way.total_ms))
    table = Table("way", box=None, pad_edge=False)
    for title in ("s in all", "ms a token", "first, ms", "cloud, ms", "bytes up", "device, MB"):
        table.add_column(title, justify="right")
    failing = any(way.fails for way in shown)
    if failing:
        table.add_column("fails")
    for way in shown:
        cells = [f"{way.total_ms / 1e3:.2f}", f"{way.token_ms:.1f}", f"{way.first_ms:.0f}", f"{way.cloud_ms:.1f}"]
        cells += [f"{way.up_bytes:.0f}", f"{way.device_mb:.0f}"] + ([escape(way.fails)] if failing else [])
        table.add_row(escape(way.name), *cells, style="bold" if way == plan.ways[plan.best] else "")
    console.print(table)
    console.print(f"over {plan.link}; {plan.tokens} tokens to a prompt of {plan.prompt}", markup=False)
    console.print(plan.verdict, style="bold", markup=False)
    if (rest := len(plan.ways) - len(shown)) > 0:
        console.print(f"{target} has {rest} more ways", markup=False)
    else:
        console.print(f"{target}", markup=False)
