"""A conversation on a terminal or from standard input, a line at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.apps.cli.tokens import Screen
    from isthmus.edge import Device

HELP = """/help           show this
/mode [MODE]    show or change where tokens are computed: auto, local, stream, verify, exit, split
/new            begin a new conversation
/stats          what the last answer cost
/quit           end; so does Ctrl-D. Ctrl-C stops an answer."""


def chat(device: Device, screen: Screen, raw: bool, cloud: bool, options: dict[str, Any]) -> None:
    """Reads lines until the end of input; each is answered, or is a command.

    Args:
        screen: shows the answers.
        raw: whether lines go to the model without its chat template.
        cloud: whether the device has a cloud.
        options: for each answer, as `Device.generate` takes them.
    """
    import sys

    from isthmus.apps.cli.tokens import dim, has_color, legend, summary
    from isthmus.apps.cli.wording import worded
    from isthmus.edge.text import utf8
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
                _command(device, line, cloud, options)
                continue
            utf8(line)
            tokens = device.generate(line, **options) if raw else device.chat(line, **options)
            note = tell_note(device)
            try:
                screen.show(tokens)
            except KeyboardInterrupt:
                tokens.close()  # type: ignore[attr-defined]
            tell_note(device, note)
            cut_off(device, options["max_tokens"])
            if terminal:
                print(dim(summary(device.stats), sys.stderr), file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except IsthmusError as error:
            print(f"error: {worded(error, chatting=True)}", file=sys.stderr)


def _command(device: Device, line: str, cloud: bool, options: dict[str, Any]) -> None:
    from isthmus.apps.cli.tokens import summary
    from isthmus.edge.options import as_mode
    from isthmus.protocol.errors import DeviceError

    name, _, argument = line.partition(" ")
    if name == "/mode":
        if argument.strip():
            mode = as_mode(argument.strip())
            if mode in ("split", "stream", "verify", "exit") and not cloud:
                raise DeviceError(f"{mode} mode needs a cloud", "leave with /quit and begin again with --cloud ADDRESS")
            options["mode"] = mode
        print(f"mode: {options.get('mode', device.mode)}")
    elif name == "/new":
        device.reset()
    elif name == "/stats":
        print(summary(device.stats))
        if device.stats.note:
            print(f"note: {device.stats.note}")
    else:
        print(HELP if name == "/help" else f"there is no command {name}\n{HELP}")


def tell_note(device: Device, said: str = "") -> str:
    """Says on standard error what did not go as asked, unless it was `said` before; gives what stands there now."""
    import sys

    note = device.stats.note
    if note and note != said:
        print(f"note: {note}", file=sys.stderr)
    return note


def cut_off(device: Device, max_tokens: int) -> None:
    """Says on a terminal that an answer is not whole."""
    import sys

    if device.stats.finish == "length" and sys.stderr.isatty():
        print(f"note: it ended at --max-tokens {max_tokens}; allow more for a longer answer", file=sys.stderr)
