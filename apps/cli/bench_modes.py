"""`isthmus bench modes`: ways to share a model over emulated links, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from isthmus.apps.bench.modes import Row

COLUMNS = (  # key of a row in --json, title, format
    ("tok_s", "tok/s", ".1f"),
    ("ttft_ms", "first, ms", ".0f"),
    ("requests_per_token", "asks/tok", ".2f"),
    ("up_bytes_per_token", "up B/tok", ".0f"),
    ("down_bytes_per_token", "down B", ".0f"),
    ("cloud_ms_per_token", "cloud ms", ".2f"),
    ("acceptance", "accepted", ".0%"),
    ("agreement", "agrees", ".1%"),
)


def command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, for both sides.")],
    rtt_ms: Annotated[str, typer.Option("--rtt-ms", help="Round trips to emulate, in ms, as 5,50,200.")] = "50",
    trace: Annotated[
        Path | None, typer.Option(metavar="PREFIX", help="Replay PREFIX.up and PREFIX.down (mahimahi) as the rate.")
    ] = None,
    rate_mbps: Annotated[
        float | None, typer.Option(help="A fixed rate each way, in 10^6 bit/s; none is unlimited.")
    ] = None,
    device_slowdown: Annotated[float, typer.Option(help="Times that the device is slower than this machine.")] = 1.0,
    cloud_step: Annotated[float, typer.Option(help="How many times longer a step of the cloud's model takes.")] = 1.0,
    cut: Annotated[int | None, typer.Option(help="The exit's layer; by default the bundle's deepest.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Of exit mode; by default its certificate's.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Questions to ask, out of a fixed list.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; the seed is that of the prompt's number.")] = 0.0,
    only: Annotated[str, typer.Option(help="Ways whose names hold one of these words, as verify,exit; all else.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Draw tokens per second against round trip into this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Compare ways to share a model over an emulated link: a minute or two for each round trip.

    The cloud is a process of its own behind a relay that delays (and limits) what passes. "agrees" is the share of
    tokens that are the whole model's own choice after the same prefix; "cloud ms" the cloud's engine time for a token.
    """
    from rich.console import Console

    from isthmus.apps.bench.shaping import LinkProfile
    from isthmus.apps.cli.bench import numbers
    from isthmus.engine.slow import check_slow_down
    from isthmus.protocol.errors import EngineError
    from isthmus.split.bundle import Bundle

    trips = numbers("--rtt-ms", rtt_ms)
    for factor in (device_slowdown, cloud_step):
        check_slow_down(factor)
    if trace is not None and rate_mbps is not None:
        raise EngineError("--trace and --rate-mbps are both given", "choose one of them")
    rate = {} if rate_mbps is None else {way: int(rate_mbps * 1e6) for way in ("rate_up_bps", "rate_down_bps")}
    links = [LinkProfile.of_traces(trace, t) if trace else LinkProfile.of_rtt(t, **rate) for t in trips]
    source = Bundle.open(bundle)
    if source.exits:
        cut = source.manifest.exit(cut).layer if cut is not None else source.exits[-1].layer
    measured = []
    with Console(stderr=True).status("opening") as status:
        for link in links:
            factors = device_slowdown, cloud_step
            rows = _measure(source, link, factors, cut, threshold, prompts, tokens, temperature, only, status.update)
            measured.append({"link": link.describe(), "rows": [row.to_dict() for row in rows]})
            if not as_json:
                status.stop()
                print(_table(link.rtt_ms, rows), flush=True)
                status.start()
    if plot is not None:
        _plot(plot, trips, measured)
    if as_json:
        settings = {"bundle": source.name, "device_slowdown": device_slowdown, "cloud_step": cloud_step, "cut": cut}
        settings |= {"prompts": prompts, "tokens": tokens, "temperature": temperature}
        print(json.dumps({**settings, "links": measured}))


def _measure(
    source: Any,
    link: Any,
    factors: tuple[float, float],
    cut: int | None,
    threshold: float | None,
    prompts: int,
    tokens: int,
    temperature: float,
    only: str,
    tell: Any,
) -> list[Row]:
    from tempfile import TemporaryDirectory

    from isthmus.apps.bench.modes import Way, compare, ways
    from isthmus.apps.bench.relay import Relay
    from isthmus.apps.cli.cloud_process import START_S, CloudProcess
    from isthmus.edge import Device, Timeouts
    from isthmus.engine import KvConfig, open_part
    from isthmus.engine.sampling import Sampling
    from isthmus.protocol.errors import EngineError
    from isthmus.protocol.keys import AllowList, write_pair
    from isthmus.split.exit_states import questions

    words = [word.strip() for word in only.split(",") if word.strip()]
    chosen = [way for way in ways(cut, threshold, source.whole) if not words or any(w in way.name for w in words)]
    if not chosen:
        raise EngineError(f"--only {only!r} names no way", "leave it out to see their names")
    teacher = open_part(source, 0, source.config.n_layers, kv=KvConfig("f16", 2048))
    with TemporaryDirectory(prefix="isthmus-bench-") as temporary:
        keys = Path(temporary)
        write_pair(keys, "server")
        AllowList(keys / "allowed").allow(write_pair(keys, "device").public, "bench")
        with CloudProcess(source.path, keys, 1, factors[1]) as cloud, Relay(cloud.address, link) as relay:

            def opened(way: Way) -> Device:
                return Device(
                    source.path,
                    relay.address,
                    keys=keys,
                    threads=1,
                    slow_down=factors[0],
                    kv_tokens=1024,
                    timeouts=Timeouts(connect_ms=int(START_S * 1e3)),
                    fallback=False,
                    **way.options,
                )

            rows = compare(chosen, opened, questions([], prompts), tokens, Sampling(temperature, seed=1), teacher, tell)
    teacher.close()
    return rows


def _table(rtt_ms: float, rows: Sequence[Row]) -> str:
    lines = [f"\nround trip {rtt_ms:g} ms".ljust(33) + "".join(f"{title:>10}" for _, title, _ in COLUMNS)]
    for row in rows:
        cells = row.to_dict()
        shown = [format(cells[key], form) if cells[key] is not None else "" for key, _, form in COLUMNS]
        lines.append(f"{row.way:<32}" + "".join(f"{cell:>10}" for cell in shown))
        lines += [f"    {note}" for note in row.notes]
    return "\n".join(lines)


def _plot(path: Path, trips: Sequence[int], measured: Sequence[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for index, row in enumerate(measured[0]["rows"]):
        axes.plot(trips, [link["rows"][index]["tok_s"] for link in measured], marker="o", label=row["way"])
    axes.set(xlabel="round trip, ms", ylabel="tokens per second", xscale="log", yscale="log")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
