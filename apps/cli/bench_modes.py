"""`isthmus bench modes`: ways to share a model over emulated links, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, for both sides.")],
    rtt_ms: Annotated[str, typer.Option("--rtt-ms", help="Round trips to emulate, in ms, as 5,50,200.")] = "50",
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="PREFIX",
            help="Replay PREFIX.up and PREFIX.down (mahimahi) as the rate; or synthetic[:SEED], a made-up link.",
        ),
    ] = None,
    rate_mbps: Annotated[
        float | None, typer.Option(help="A fixed rate each way, in 10^6 bit/s; none is unlimited.")
    ] = None,
    device_slowdown: Annotated[float, typer.Option(help="How many times longer this device takes.")] = 1.0,
    cloud_step: Annotated[
        float, typer.Option(help="How many times longer the cloud takes, as for a larger model.")
    ] = 1.0,
    cut: Annotated[int | None, typer.Option(help="The exit's layer; by default the bundle's deepest.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Confidence from which on exit mode believes; by default its certificate's.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Questions to ask, out of a fixed list.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", "--max-tokens", min=2, help="Tokens of each answer at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.")] = 0.0,
    only: Annotated[
        str,
        typer.Option(
            help="Only ways whose names hold one of these words, as verify,exit; whole names apart by semicolons."
        ),
    ] = "",
    plot: Annotated[Path | None, typer.Option(help="Draw tokens per second against round trip into this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Compare ways to share a model over an emulated link: a few minutes for each round trip.

    The cloud is a process of its own behind a relay that delays, and limits, what passes; the ways take turns on the
    same questions. "asks/tok" is round trips and "cloud ms" the cloud's engine time for a token; bytes are those of
    messages, before encryption; "filled" is layers computed for a token that nobody asked about; "agrees" is the
    share of tokens that are the whole model's own greedy choice after the same prefix, where the bundle holds the
    whole model. "of best" is tok/s over that of the better of the device and the cloud alone: below 1 a way loses
    to not sharing, unless it is the cloud's time or the bytes that count.
    """
    from dataclasses import asdict
    from importlib import metadata

    from rich.console import Console

    from isthmus.apps.bench.machine import read_machine
    from isthmus.apps.bench.modes import Row, compare, select, table, ways, whole
    from isthmus.apps.bench.plot import check_drawing, draw
    from isthmus.apps.bench.shaping import LinkProfile
    from isthmus.apps.bench.stage import Stage
    from isthmus.apps.cli.bench import numbers
    from isthmus.engine.sampling import Sampling
    from isthmus.engine.slow import check_slow_down
    from isthmus.protocol.errors import EngineError
    from isthmus.split.bundle import Bundle
    from isthmus.split.exit_states import CHECK_TOPICS, questions

    trips = numbers("--rtt-ms", rtt_ms)
    for factor in (device_slowdown, cloud_step):
        check_slow_down(factor)
    if trace is not None and rate_mbps is not None:
        raise EngineError("--trace and --rate-mbps are both given", "choose one of them")
    if rate_mbps is not None and not 1e-6 <= rate_mbps <= 1e6:
        raise EngineError(f"--rate-mbps is {rate_mbps:g}", "give a positive number of 10^6 bit/s, or leave it out")
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise EngineError(f"the threshold is {threshold:g}", "choose a confidence in 0..1")
    if plot is not None:
        check_drawing(plot)
    rate = {} if rate_mbps is None else {way: int(rate_mbps * 1e6) for way in ("rate_up_bps", "rate_down_bps")}
    links = [LinkProfile.of_traces(trace, t) if trace else LinkProfile.of_rtt(t, **rate) for t in trips]
    source = Bundle.open(bundle)
    if source.exits:
        cut = source.manifest.exit(cut).layer if cut is not None else source.exits[-1].layer
    chosen = select(ways(cut, threshold, source.whole, exits=bool(source.exits)), only)
    believes = any(way.options["mode"] == "exit" and way.options["threshold"] is None for way in chosen)
    if believes and source.manifest.exit(cut or 0).certificate is None:
        problem = f"the exit before layer {cut} of {source.name} has no certificate"
        raise EngineError(problem, "name a --threshold, or calibrate it: isthmus exits calibrate")
    sampling, asked = Sampling(temperature, seed=1), questions([], prompts, topics=CHECK_TOPICS)
    console = Console(stderr=True)
    measured: list[tuple[LinkProfile, list[Row]]] = []
    if not source.exits:
        console.print(f"{source.name} has no exits: the ways that need one are left out (isthmus exits train)")
    with console.status("opening") as status:
        for link in links:
            with Stage(source, link, device_slowdown, cloud_step) as stage, whole(source) as teacher:
                rows = compare(
                    chosen, lambda way: stage.device(**way.options), asked, tokens, sampling, teacher, status.update
                )
            measured.append((link, rows))
            if not as_json:
                status.stop()
                print(table(f"round trip {link.rtt_ms:g} ms", rows), flush=True)
                status.start()
    if plot is not None:
        draw(plot, trips, {way.name: [rows[i].tok_s for _, rows in measured] for i, way in enumerate(chosen)})
    if as_json:
        settings: dict[str, object] = {"bundle": source.name, "cut": cut, "device_slowdown": device_slowdown}
        settings["cloud_step"] = cloud_step
        settings |= {"isthmus": metadata.version("isthmus"), "machine": asdict(read_machine())}
        settings |= {"threshold": threshold, "prompts": prompts, "tokens": tokens, "temperature": temperature}
        found = [{"link": link.describe(), "rows": [row.to_dict() for row in rows]} for link, rows in measured]
        print(json.dumps({**settings, "links": found}))
