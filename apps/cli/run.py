"""`isthmus run`: asks a model once, or chats with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from isthmus.edge import Device

HELP = """/help           show this
/mode [MODE]    show or change where tokens are computed: auto, local, stream, split
/new            begin a new conversation
/stats          what the last answer cost
/quit           end; so does Ctrl-D. Ctrl-C stops an answer."""


def command(
    bundle: Annotated[
        Path, typer.Argument(help="The bundle's folder; with --cloud, one that is not there is fetched from the cloud")
    ],
    prompt: Annotated[str | None, typer.Option(help="Ask this and end; - reads it from standard input")] = None,
    mode: Annotated[str, typer.Option(help="auto, local, stream (the cloud computes all) or split")] = "auto",
    cut: Annotated[int | None, typer.Option(help="Layers on this device in split mode; default: the middle")] = None,
    codec: Annotated[str, typer.Option(help="How hidden states travel in split mode: f32, f16 or int8")] = "f16",
    cloud: Annotated[str | None, typer.Option(help="The cloud's address, such as tcp://host:5757")] = None,
    keys: Annotated[
        Path | None, typer.Option(help="Folder with this device's key and the cloud's public key [default: your own]")
    ] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Talk in the clear, to a cloud on this machine only")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens up to this probability")] = 0.95,
    top_k: Annotated[int, typer.Option("--top-k", help="Keep the k likeliest tokens, 0 for all")] = 0,
    seed: Annotated[
        int, typer.Option(help="Fixes the text at a temperature (with --codec f32 wherever it is computed)")
    ] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="A word that ends the answer; may be repeated")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens of an answer at most")] = 512,
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template")] = False,
    threads: Annotated[int, typer.Option(help="Threads of the engine, 0 for one a core")] = 0,
    memory_mb: Annotated[
        float | None, typer.Option("--memory-mb", help="Refuse what needs more memory than this, in MB")
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option("--kv-tokens", help="Tokens of a conversation [default: the model's, up to 4096]")
    ] = None,
    overflow: Annotated[
        str, typer.Option(help="When a conversation grows longer: error, or slide (the last tokens only)")
    ] = "error",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text")] = False,
) -> None:
    """Ask a model, or chat with it when there is no --prompt.

    Without --cloud everything is computed on this device. With it, auto lets the cloud answer while it can be reached
    and goes on alone when it cannot. With the codec f32 the text does not depend on where its tokens are
    computed; f16 and int8 send less and may change it.
    """
    from isthmus.edge import Device
    from isthmus.engine.sampling import Sampling
    from isthmus.protocol.errors import DeviceError

    if json and prompt is None:
        raise DeviceError("--json needs a prompt", "give one with --prompt, or --prompt - for standard input")
    text = _read(prompt) if prompt is not None else ""
    sampling = Sampling(temperature, top_k, top_p, seed)
    if greedy:
        sampling = Sampling()
    with (
        _Fetching() as fetching,
        Device(
            bundle,
            cloud,
            keys=keys,
            encrypted=not no_keys,
            mode="local" if cloud is None and mode == "auto" else mode,
            cut=cut,
            codec=codec,
            threads=threads,
            memory_mb=memory_mb,
            kv_tokens=kv_tokens,
            overflow=overflow,  # type: ignore[arg-type]
            progress=fetching.progress,
        ) as device,
    ):
        fetching.done()
        options: dict[str, Any] = {"max_tokens": max_tokens, "sampling": sampling, "stop": stop or ()}
        if prompt is None:
            _chat(device, raw, options)
        else:
            _ask(device, text, raw, json, options)


def _read(prompt: str) -> str:
    import sys

    from isthmus.protocol.errors import DeviceError

    try:
        text = _checked(sys.stdin.read() if prompt == "-" else prompt)
    except (UnicodeDecodeError, OSError) as error:
        raise DeviceError("standard input cannot be read", "give UTF-8 text there, or as the prompt itself") from error
    if not text.strip():
        raise DeviceError("the prompt is empty", "write what the model shall answer or go on from")
    return text


def _checked(text: str) -> str:
    """A text as it is when it is UTF-8; other bytes are there as surrogates."""
    from isthmus.protocol.errors import DeviceError

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DeviceError("the prompt is not UTF-8 text", "give text, or - with text on standard input") from error
    return text


def _ask(device: Device, text: str, raw: bool, json: bool, options: dict[str, Any]) -> None:
    import sys
    from json import dumps

    from isthmus.apps.cli.tokens import dim, has_color, show, summary

    tokens = device.generate(text, **options) if raw else device.chat(text, **options)
    note = _note(device)
    if json:
        for _ in tokens:
            pass
        _note(device, note)
        print(dumps(device.stats.to_dict(), ensure_ascii=False))
        return
    show(tokens)
    _note(device, note)
    if has_color(sys.stdout):
        print(dim(summary(device.stats), sys.stderr), file=sys.stderr)


def _note(device: Device, said: str = "") -> str:
    """Says on standard error what did not go as asked, unless it was `said` before; gives what stands there now."""
    import sys

    note = device.stats.note
    if note and note != said:
        print(f"note: {note}", file=sys.stderr)
    return note


def _chat(device: Device, raw: bool, options: dict[str, Any]) -> None:
    import sys

    from isthmus.apps.cli.tokens import dim, has_color, legend, show, summary
    from isthmus.protocol.errors import IsthmusError

    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        import readline  # noqa: F401  line editing and history for input()

        colors = f"; tokens are coloured by where they are computed: {legend()}" if has_color(sys.stdout) else ""
        print(dim(f"/help lists commands{colors}", sys.stdout))
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends)")
            continue
        if not line:
            continue
        try:
            if line.startswith("/"):
                if line in ("/quit", "/exit", "/q"):
                    return
                _command(device, line, options)
                continue
            _checked(line)
            tokens = device.generate(line, **options) if raw else device.chat(line, **options)
            note = _note(device)
            try:
                show(tokens)
            except KeyboardInterrupt:
                tokens.close()  # type: ignore[attr-defined]
            _note(device, note)
            if terminal:
                print(dim(summary(device.stats), sys.stderr), file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except IsthmusError as error:
            print(f"error: {error}", file=sys.stderr)


def _command(device: Device, line: str, options: dict[str, Any]) -> None:
    from isthmus.apps.cli.tokens import summary
    from isthmus.edge.options import as_mode

    name, _, argument = line.partition(" ")
    if name == "/mode":
        if argument.strip():
            options["mode"] = as_mode(argument.strip())
        print(f"mode: {options.get('mode', device.mode)}")
    elif name == "/new":
        device.reset()
    elif name == "/stats":
        print(summary(device.stats))
        if device.stats.note:
            print(f"note: {device.stats.note}")
    else:
        print(HELP if name == "/help" else f"there is no command {name}\n{HELP}")


class _Fetching:
    """A progress bar that appears when a bundle has to be fetched."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Fetching:
        return self

    def __exit__(self, *_: object) -> None:
        self.done()

    def progress(self, name: str, done: int, total: int) -> None:
        """Shows how far a file is."""
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            console = Console(stderr=True)
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
            self._bar.start()
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(f"fetching {name}", total=total)
        self._bar.update(self._tasks[name], completed=done, visible=done < total)

    def done(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
