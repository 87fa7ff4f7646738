"""`isthmus demo`: one question, answered in every mode by a device process and a cloud process on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from isthmus.apps.bench.relay import Relay
    from isthmus.edge import Device, Stats, Token

MODEL = "smollm2"
MODES = (
    ("local", "this device computes everything"),
    ("stream", "the cloud computes everything: the prompt goes up, tokens come down"),
    ("split", "the device computes layers [0, {cut}), the cloud the rest: a hidden state up for every token"),
    ("verify", "the device guesses ahead, the cloud checks several tokens at once"),
    ("exit", "the device says what its early exit is sure of, the cloud the rest; the text may be another"),
)
BEFORE = 40
CUT_TOKENS, CUT_S, CUT_RTT_MS = 20, 0.5, 30  # when and for how long the link is cut in the last answer


def command(
    question: Annotated[str, typer.Option(help="What to ask")] = "Why is the sky blue? Answer in two sentences.",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of an answer at most")] = 80,
    cut: Annotated[int | None, typer.Option(help="Layers on the device in split mode; by default the middle")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each of the two processes")] = 1,
    bundle: Annotated[Path | None, typer.Option(help="A bundle in place of SmolLM2 from its registry package")] = None,
) -> None:
    """Watch one question answered by a device alone, by a cloud, by both together, and over a link that is cut.

    The model is fetched and split when it is not here yet. The cloud is a process of its own on a free local port,
    with fresh keys that are thrown away afterwards.
    """
    from shlex import quote

    from rich.console import Console

    from isthmus.apps.bench.cloud_process import START_S, CloudProcess, fresh_keys
    from isthmus.apps.bench.relay import Relay
    from isthmus.apps.bench.shaping import LinkProfile
    from isthmus.apps.cli.run import check_bundle
    from isthmus.edge import Device, Timeouts
    from isthmus.edge.options import check_cut
    from isthmus.split.bundle import Bundle

    console = Console(highlight=False, soft_wrap=True)
    folder = bundle if bundle is not None else _bundle(console)
    check_bundle(folder)
    opened = Bundle.open(folder)
    deepest = max(opened.exits, key=lambda one: one.layer, default=None)  # which speaks where none is named
    can_exit = deepest is not None and deepest.certificate is not None
    if cut is not None:
        check_cut(cut, opened.config)
    with fresh_keys("demo") as keys:
        options: dict[str, Any] = {
            "keys": keys,
            "mode": "split",
            "threads": threads,
            "timeouts": Timeouts(connect_ms=int(START_S * 1e3)),
        }
        with CloudProcess(folder, keys, threads) as cloud:
            with Device(folder, cloud.address, cut=cut, codec="f32", **options) as device:
                console.print(f"[bold]{question}[/bold]  ({device.name}; device process and cloud process, CURVE on)")
                modes = [(mode, about) for mode, about in MODES if mode != "exit"]
                rows = [_ask(console, device, mode, about, question, max_tokens) for mode, about in modes]
            if can_exit:
                with Device(folder, cloud.address, **options) as device:
                    rows.append(_ask(console, device, *MODES[-1], question, max_tokens))
            with (
                Relay(cloud.address, LinkProfile.of_rtt(CUT_RTT_MS)) as relay,
                Device(folder, relay.address, standby=True, **options) as device,
            ):
                rows.append(_survive(console, device, relay, question, max_tokens))
    _table(console, rows)
    console.print(f"next, a chat with it: isthmus run {quote(str(folder))}", markup=False)


def _bundle(console: Console) -> Path:
    """The demo model's bundle in the cache folder, made when it is not there."""
    from isthmus.protocol.errors import BundleError
    from isthmus.split.bundle import Bundle
    from isthmus.split.checkpoints import open_checkpoint
    from isthmus.split.exit_writer import put_exits
    from isthmus.split.fetch import cache_folder, fetch
    from isthmus.split.shipped import shipped
    from isthmus.split.writer import write_bundle

    folder = cache_folder().parent / "bundles" / MODEL
    try:
        found = Bundle.open(folder)
        if found.whole:
            if not found.exits and (exits := shipped(found.model_id)):
                put_exits(folder, found.model_id, exits)  # split before they came with the package
            return folder
    except BundleError:
        pass  # absent, or left by another version: written anew
    with console.status(f"fetching {MODEL}"):
        checkpoint = open_checkpoint(fetch(MODEL))
    with console.status(f"splitting {MODEL} into one weight file a layer"):
        tokenizer = checkpoint.tokenizer()
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_bundle(
            folder,
            checkpoint,
            name=checkpoint.name,
            weights="keep",
            tokenizer=tokenizer.to_json(),
            entry=tokenizer.entry,
            force=True,
        )
    return folder


def _ask(console: Console, device: Device, mode: str, about: str, question: str, max_tokens: int) -> tuple[str, Stats]:
    """One answer, shown as it comes; a short one before it warms caches on both sides."""
    from isthmus.apps.cli.tokens import Screen

    for _ in device.chat(question, max_tokens=2, mode=mode):
        pass
    device.reset()
    console.print(f"\n[bold]{mode}[/bold]: {about.format(cut=device.cut)}")
    Screen().show(device.chat(question, max_tokens=max_tokens, mode=mode))
    stats = device.stats
    device.reset()
    return mode, stats


def _survive(console: Console, device: Device, relay: Relay, question: str, max_tokens: int) -> tuple[str, Stats]:
    """One answer of the cloud's, over a link that is cut in its middle and comes back."""
    from threading import Timer

    from isthmus.apps.cli.tokens import Screen

    for _ in device.chat(question, max_tokens=BEFORE, mode="stream"):
        pass  # long enough for the device to make itself ready
    device.reset()
    about = f"the link is cut after {CUT_TOKENS} tokens, for {CUT_S:g} s: underlined is what the device says meanwhile"
    console.print(f"\n[bold]stream, over a link of {CUT_RTT_MS} ms[/bold]: {about}")

    def cut_short() -> Iterator[Token]:
        for number, token in enumerate(device.chat(question, max_tokens=max_tokens, mode="stream"), 1):
            yield token
            if number == CUT_TOKENS:
                relay.cut()
                timer.start()

    timer = Timer(CUT_S, relay.mend)
    Screen().show(cut_short())
    if timer.is_alive():
        timer.join()
    return "stream, cut", device.stats


def _table(console: Console, rows: list[tuple[str, Stats]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="first: time to the first token; alone: tokens said while the link was cut",
        title_justify="left",
        title_style="bold",
    )
    columns = ("mode", "first", "tok/s", "bytes up", "down", "trips", "alone", "same")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if 1 <= index <= 6 else "left", no_wrap=True)
    first = rows[0][1]
    for mode, stats in rows:
        alone = stats.sources.count("device") if "cut" in mode else 0
        table.add_row(
            mode,
            f"{stats.ttft_ms:.0f} ms",
            f"{stats.tok_s:.1f}",
            f"{stats.bytes_up:,}",
            f"{stats.bytes_down:,}",
            f"{stats.round_trips}",
            f"{alone}" if alone else "",
            "" if stats is first else "yes" if stats.tokens == first.tokens else "no",
        )
    console.print()
    console.print(table)
