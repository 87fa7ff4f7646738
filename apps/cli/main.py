"""The front of the command line: finds the command, loads only its module, turns errors into one line.

A command's module has either `command`, a function with typer's annotations, or `app`, a `typer.Typer` with
commands of its own. Nothing but the standard library is imported here, so that `isthmus --help` is immediate.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from isthmus.apps.cli import streams
from isthmus.apps.cli.wording import worded
from isthmus.protocol.errors import IsthmusError

FAILED = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
UNREAD = 141  # 128 + SIGPIPE
# What the system refuses for its own reasons, not because of a mistake here.
SYSTEM = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A command: where it lives and what it does, in one line."""

    module: str
    help: str


COMMANDS: Mapping[str, Mapping[str, Entry]] = {
    "Prepare": {
        "fetch": Entry("isthmus.apps.cli.fetch", "Download a model: smollm2, or a Hugging Face repository"),
        "split": Entry("isthmus.apps.cli.split", "Turn a model into a bundle that can be cut at any layer"),
        "exits": Entry("isthmus.apps.cli.exits", "Train early exits for a bundle, certify and measure them"),
        "moefy": Entry("isthmus.apps.cli.moefy", "Make a mixture of experts of a dense model"),
        "experts": Entry("isthmus.apps.cli.experts", "Say with how few bits experts do, and where they should stand"),
        "inspect": Entry("isthmus.apps.cli.inspect", "Show a bundle's layers, bytes, family and hashes"),
        "keys": Entry("isthmus.apps.cli.keys", "Make keys and say which devices a cloud lets in"),
    },
    "Run": {
        "demo": Entry("isthmus.apps.cli.demo", "Watch one question answered in five modes and over a cut link"),
        "run": Entry("isthmus.apps.cli.run", "Ask a model, or chat with it: on this device alone or with a cloud"),
        "serve": Entry("isthmus.apps.cli.serve", "Be the cloud: serve bundles to devices over encrypted links"),
    },
    "Measure": {
        "profile": Entry("isthmus.apps.cli.profile", "Measure what a network's nodes take on this machine"),
        "plan": Entry("isthmus.apps.cli.plan", "Say where to cut a network, or that sharing does not pay"),
        "bench": Entry("isthmus.apps.cli.bench", "Measure this machine, and ways to share a model over a link"),
        "doctor": Entry("isthmus.apps.cli.doctor", "Tell what this machine has and why something is slow"),
    },
}

EXAMPLES = (
    ("isthmus demo", "everything at once, on this machine"),
    ("isthmus fetch smollm2", "prints where the model file is"),
    ("isthmus split MODEL -o smollm2", "makes the bundle folder smollm2/"),
    ("isthmus run smollm2 --prompt 'Why is the sky blue?'", ""),
)

# What a person probably wanted who gave a command one argument too many.
HINTS: Mapping[str, str] = {"isthmus run": "ask with --prompt 'QUESTION', or "}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the command and its options; None for the program's own, whose standard streams are guarded then.

    Returns:
        the exit code: 0, 2 for an error that a person can mend, 130 when interrupted, 141 when what reads standard
        output has ended.
    """
    if argv is None:
        streams.guard()
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except streams.OutputFailed as error:
        streams.discard()
        if error.reader_gone:
            return UNREAD
        return _fail(f"cannot write to standard output: {error.problem}; make room, or send it elsewhere")
    return code


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        if arguments[:1] == ["help"] and len(arguments) > 1:
            return _run(arguments[1], ["--help"])
        sys.stdout.write(help_text(color=_wants_color(sys.stdout)))
        return 0
    if arguments[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(f"isthmus {version('isthmus')}")
        return 0
    return _run(arguments[0], arguments[1:])


def help_text(*, color: bool) -> str:
    """What `isthmus --help` prints."""

    def paint(code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if color else text

    lines = [
        "isthmus runs one model across a device and a cloud.",
        "",
        f"{paint('1', 'Usage:')} isthmus COMMAND [OPTIONS]",
    ]
    for section, commands in COMMANDS.items():
        lines += ["", paint("1", section)]
        lines += [f"  {paint('36', f'{name:<9}')}{entry.help}" for name, entry in commands.items()]
    lines += ["", paint("1", "Try")]
    width = max(len(line) for line, note in EXAMPLES if note) + 2
    lines += [f"  {line:<{width}}{paint('2', note)}".rstrip() for line, note in EXAMPLES]
    lines += ["", "'isthmus COMMAND --help' explains a command; 'isthmus --version' is for reports."]
    lines += ["ISTHMUS_CPU=plain (or avx2, ...) in the environment forces kernels."]
    return "\n".join(lines) + "\n"


def _run(name: str, arguments: list[str]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return _call(name, arguments)
    except IsthmusError as error:
        return _fail(worded(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except MemoryError:
        return _fail("there is not enough memory; close other programs, or choose a smaller model or fewer KV tokens")
    except OSError as error:
        if error.errno not in SYSTEM:
            raise
        return _fail(f"{error.strerror}{f': {error.filename}' if error.filename else ''}; the system refused it")


def _call(name: str, arguments: list[str]) -> int:
    entries = {key: entry for commands in COMMANDS.values() for key, entry in commands.items()}
    if name.startswith("-"):
        known = ["--version", "--help"]
        near = "--version" if name == "-v" else name
        return _fail(f"there is no option '{name}'; {_suggest(near, known)}")
    if name not in entries:
        return _fail(f"there is no command '{name}'; {_suggest(name, list(entries))}")
    from importlib import import_module

    module = import_module(entries[name].module)
    import typer

    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False)
        app.command(help=entries[name].help)(module.command)
    for command in app.registered_commands:
        if command.callback is not None and command.callback.__doc__:
            command.help = _paragraphs(command.callback.__doc__)
    runner = typer.main.get_command(app)
    try:
        result: Any = runner.main(args=arguments, prog_name=f"isthmus {name}", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(getattr(error, "message", ""))
            return FAILED
        # The class of usage errors is not public in every version of typer; this method is its mark.
        if not hasattr(error, "format_message"):
            raise
        return _fail(_usage(error, f"isthmus {name}"))
    return result if isinstance(result, int) else 0


def _paragraphs(text: str) -> str:
    """A docstring with one line a paragraph, for whoever breaks lines at the terminal's width."""
    import inspect

    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


def _usage(error: Any, called: str) -> str:
    """A usage error on one line, with what was meant or where it is explained."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else called
    problem = error.format_message().rstrip(".")
    commands = list(getattr(context.command, "commands", ())) if context is not None else []
    if problem.startswith("No such command"):
        import difflib

        mistyped = problem.partition("'")[2].partition("'")[0]
        near = difflib.get_close_matches(mistyped, commands, n=1, cutoff=0.5)
        if near:
            return f"{problem.partition(' (')[0]}; did you mean '{path} {near[0]}'?"
    hint = HINTS.get(path, "") if "unexpected extra argument" in problem else ""
    return f"{problem}; {hint}see '{path} --help'"


def _suggest(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean 'isthmus {near[0]}'?" if near else "'isthmus --help' lists them"


def _fail(text: str) -> int:
    """Prints one line on stderr and gives the exit code of errors."""
    _say("error:", "31", text)
    return FAILED


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """A warning in one line, without the source line that the interpreter would show."""
    _say("warning:", "33", str(message))


def _say(mark: str, color: str, text: str) -> None:
    mark = f"\x1b[1;{color}m{mark}\x1b[0m" if _wants_color(sys.stderr) else mark
    print(mark, " ".join(text.split()), file=sys.stderr)


def _wants_color(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
