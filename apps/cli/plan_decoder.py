"""`isthmus plan` with a language model: every mode at every cut, priced before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

    from isthmus.apps.cli.decoder_plan import DecoderPlan
    from isthmus.apps.cli.decoder_profile import DecoderProfile
    from isthmus.apps.cli.decoder_ways import Way
    from isthmus.split.bundle import Bundle

SHOWN = 3  # ways of a mode; all stand in the file


def plan_decoder(ctx: typer.Context) -> None:
    """Plans for the bundle that `isthmus plan` was given, and prints what came of it.

    Raises:
        PlanError: an option of networks, no profile, or no way that keeps to what was asked for.
    """
    import sys
    from dataclasses import replace

    from isthmus.apps.bench.machine import read_machine
    from isthmus.apps.bench.plot import check_drawing
    from isthmus.apps.cli.decoder_plan import check, plan
    from isthmus.apps.cli.decoder_profile import load_decoder_profile
    from isthmus.apps.cli.decoder_ways import Answer, Setting, priced
    from isthmus.apps.cli.exit_work import working
    from isthmus.apps.cli.foreseen import foreseen
    from isthmus.apps.cli.given import given_options
    from isthmus.apps.cli.picture import KINDS
    from isthmus.apps.cli.plan import OF_BOTH, OF_DECODERS, PROFILE_S, SUFFIX, only
    from isthmus.apps.cli.profile import SUFFIX as PROFILE
    from isthmus.apps.cli.profile import measured_decoder
    from isthmus.apps.cli.targets import check_target
    from isthmus.protocol.errors import PlanError
    from isthmus.split.bundle import Bundle, is_graph
    from isthmus.split.exit_run import read_prompts
    from isthmus.split.files import is_there
    from isthmus.split.link import read_link

    asked = ctx.params
    folder = Path(asked["model"])
    if is_graph(folder):
        raise PlanError(f"{folder} is a network that was cut", "plan for the .onnx model that it was made from")
    only(ctx, OF_BOTH | OF_DECODERS, f"{folder} is a bundle of a language model")
    name = folder.resolve().name
    target = asked["output"] or Path(name + SUFFIX)
    here = asked["device"] or Path(name + PROFILE)
    given = (here, asked["plot"], asked["prompts"], Path(asked["cloud"]), Path(asked["link"]))
    check_target(target, (path for path in given if path is not None))
    if asked["plot"] is not None:
        check_drawing(asked["plot"], KINDS)
    if not asked["cloud"]:
        remedy = "name the cloud's profile, or say how many times as fast as the device it is"
        raise PlanError("--cloud is empty", remedy)
    answer = Answer(
        asked["prompt"],
        asked["tokens"],
        asked["memory_mb"],
        asked["max_disagreement"],
        *(asked[name] for name in ("slo_ms", "percentile", "energy_j", "device_watts", "radio_watts", "load")),
    )
    bundle, link = Bundle.open(folder), read_link(asked["link"])
    cloud, times = _cloud(ctx, bundle)
    prompts = read_prompts(asked["prompts"]) if asked["prompts"] is not None else None
    if not is_there(here):
        if asked["device"] is not None:
            raise PlanError(f"there is no profile {here}", f"measure it: isthmus profile {folder} -o {here}")
        print(f"measuring {name} on this machine, for {here} (isthmus profile does that by itself)", file=sys.stderr)
        measured_decoder(bundle, read_machine().cores, PROFILE_S).save(here)
    device = load_decoder_profile(here)
    cloud = cloud or device
    check(bundle, device, cloud, times)
    if gone := [str(one.layer) for one in bundle.exits if not bundle.holds(one.file)]:
        before = f"before layer{'s' if len(gone) > 1 else ''} {', '.join(gone)}"
        print(f"note: {folder} lacks the exits {before}: they are left out", file=sys.stderr)
    counted = None
    if prompts is not None:
        with working(bundle) as run:
            counted = foreseen(run, prompts)
        means = {"prompt": counted.prompt, "tokens": counted.tokens}
        answer = replace(answer, **{name: mean for name, mean in means.items() if name not in given_options(ctx)})
    setting = Setting(bundle, device, cloud, times, link, answer, counted)
    found = plan(setting)
    found.save(target)
    if asked["plot"] is not None:
        from isthmus.apps.cli.decoder_picture import draw

        plain = replace(answer, load=0.0)
        draw(asked["plot"], found, link, lambda over: priced(replace(setting, link=over, answer=plain)))
    if asked["as_json"]:
        print(target.read_text())
    else:
        _print(found, target)


def _cloud(ctx: typer.Context, bundle: Bundle) -> tuple[DecoderProfile | None, float]:
    """The cloud's profile, and how many times as fast it is: a file, or what the link's says; None for the device's."""
    from isthmus.apps.cli.decoder_profile import DecoderProfile, load_decoder_profile
    from isthmus.apps.cli.given import given_options
    from isthmus.apps.cli.plan import number
    from isthmus.protocol.errors import PlanError
    from isthmus.split.files import is_there
    from isthmus.split.link import read_link_file

    cloud, link = ctx.params["cloud"], ctx.params["link"]
    if "cloud" not in given_options(ctx) and link.endswith(".json"):
        for served in read_link_file(Path(link)).served:
            if served.model == bundle.manifest.model_id:
                return DecoderProfile.of_cloud(bundle, served), 1.0
    if (times := number(cloud)) is not None:
        return None, times
    if not is_there(Path(cloud)):
        raise PlanError(f"there is no profile {cloud}", "copy the cloud's here, or say how fast it is")
    return load_decoder_profile(Path(cloud)), 1.0


def _print(plan: DecoderPlan, target: Path) -> None:
    import sys
    from collections import Counter

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from isthmus.apps.cli.decoder_plan import PRIORS
    from isthmus.apps.cli.plan import WIDE

    terminal = sys.stdout.isatty()
    console = Console(highlight=False, soft_wrap=not terminal, width=None if terminal else WIDE)
    shown: list[Way] = []
    counts: Counter[str] = Counter()
    for way in plan.sorted:
        counts[way.mode] += 1
        if counts[way.mode] <= SHOWN:
            shown.append(way)
    table, tail = Table("way", box=None, pad_edge=False), any(way.tail_ms is not None for way in shown)
    late, spent = ([f"p{plan.percentile:g}, ms"] if tail else []), any(way.energy_j for way in shown)
    titles = ["s in all", "ms a token", *late, "first, ms", "cloud, ms", "bytes up a token", "device, MB"]
    for title in [*titles, *(["J"] if spent else [])]:
        table.add_column(title, justify="right")
    failing = any(way.fails for way in shown)
    if failing:
        table.add_column("fails")
    for way in shown:
        cells = [f"{way.total_ms / 1e3:.2f}", f"{way.token_ms:.1f}"]
        cells += ["-" if way.tail_ms is None else f"{way.tail_ms:.1f}"] if tail else []
        cells += [f"{way.first_ms:.0f}", f"{way.cloud_ms:.1f}", f"{way.up_bytes:.0f}", f"{way.device_mb:.0f}"]
        cells += ([f"{way.energy_j:.3g}"] if spent else []) + ([escape(way.fails)] if failing else [])
        table.add_row(escape(way.name), *cells, style="bold" if way == plan.ways[plan.best] else "")
    console.print(table)
    console.print(f"over {plan.link}, with {plan.cloud}", markup=False)
    console.print(f"{plan.tokens} tokens to a prompt of {plan.prompt}", markup=False)
    hint = "" if plan.foreseen != PRIORS else " (--prompts FILE: along answers to yours)"
    console.print(f"what drafts and exits foresee was counted along {plan.foreseen}{hint}", markup=False)
    console.print(plan.verdict, style="bold", markup=False)
    if (rest := len(plan.ways) - len(shown)) > 0:
        console.print(f"{target} has {rest} more ways", markup=False)
    else:
        console.print(f"{target}", markup=False)
