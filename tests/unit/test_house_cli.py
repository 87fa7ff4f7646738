"""The front of the command line: what people see when they ask for help, mistype, or hit an error."""

from __future__ import annotations

import errno
import sys
import types
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import pytest

from isthmus.apps.cli.demo import MODES
from isthmus.apps.cli.main import COMMANDS, Entry, help_text
from isthmus.apps.cli.main import main as run
from isthmus.apps.cli.wording import worded
from isthmus.protocol.errors import BundleError, DeviceError, IsthmusError

NAMES = [name for commands in COMMANDS.values() for name in commands]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """Puts a function in the place of the command `doctor`."""

    def put(function: Callable[..., object]) -> None:
        module = types.ModuleType("isthmus_said")
        module.command = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "isthmus_said", module)
        monkeypatch.setitem(COMMANDS["Measure"], "doctor", Entry("isthmus_said", "says"))

    return put


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in NAMES if f"\n  {name} " not in shown] == []
    assert max(map(len, shown.splitlines())) <= 80
    assert "\x1b" not in shown
    assert "\x1b[" in help_text(color=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert f"isthmus {name}" in capsys.readouterr().out


def test_help_counts_the_modes_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    numbers = {4: "four", 5: "five", 6: "six"}
    assert f"in {numbers[len(MODES)]} modes" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("isthmus 0.")


@pytest.mark.parametrize(
    ("typed", "meant"), [("srve", "'isthmus serve'"), ("isnpect", "'isthmus inspect'"), ("zzz", "--help")]
)
def test_unknown_command_suggests_the_nearest(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([typed]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert typed in error
    assert meant in error


def test_unknown_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--no-such-option"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--no-such-option" in error
    assert "isthmus doctor --help" in error


@pytest.mark.parametrize("typed", ["--verson", "-v", "--vesion"])
def test_a_mistyped_version_is_named(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([typed]) == 2
    assert "did you mean 'isthmus --version'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["bench", "b-keep"], "see 'isthmus bench --help'"),
        (["bench", "mods"], "did you mean 'isthmus bench modes'?"),
        (["bench", "decode", "--nonsense"], "see 'isthmus bench decode --help'"),
        (["keys", "revoke"], "see 'isthmus keys revoke --help'"),
        (["keys", "alow"], "did you mean 'isthmus keys allow'?"),
        (["run", "b", "question"], "ask with --prompt 'QUESTION', or see 'isthmus run --help'"),
    ],
)
def test_usage_errors_say_where_to_go_on(arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert capsys.readouterr().err.rstrip().endswith(meant)


@pytest.mark.parametrize("name", NAMES)
def test_no_command_offers_completion(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert "completion" not in capsys.readouterr().out
    assert run([name, "--install-completion"]) == 2


def test_paragraphs_of_help_are_broken_by_the_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["run", "--help"]) == 0
    assert " device, cloud and link, and works in the way that ends the answer first, token " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DeviceError("kv_tokens is 9", "choose one in 1..8"), "--kv-tokens is 9; choose one in 1..8"),
        (
            DeviceError("no room", "raise kv_tokens, or choose overflow='slide'"),
            "--kv-tokens, or choose --overflow slide",
        ),
        (DeviceError("cannot read /x/kv_tokens/y"), "cannot read /x/kv_tokens/y"),
        (BundleError("top_k is 9 in bundle.json"), "top_k is 9 in bundle.json"),
    ],
)
def test_errors_speak_of_options(error: IsthmusError, text: str) -> None:
    assert text in worded(error)


def test_a_chat_knows_how_to_begin_anew() -> None:
    assert "(/new)" in worded(DeviceError("full", "begin a new one, raise kv_tokens"), chatting=True)


def test_error_is_one_line(say: Callable[[Callable[..., object]], None], capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise BundleError("bundle.json\nis of version 9", "use a newer isthmus")

    say(command)
    assert run(["doctor"]) == 2
    assert capsys.readouterr().err == "error: bundle.json is of version 9; use a newer isthmus\n"


def test_a_warning_is_one_line(
    say: Callable[[Callable[..., object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        warnings.simplefilter("default")
        warnings.warn("the engine is\nslow", RuntimeWarning, stacklevel=1)

    say(command)
    shown = warnings.showwarning
    assert run(["doctor"]) == 0
    assert capsys.readouterr().err == "warning: the engine is slow\n"
    assert warnings.showwarning is shown


@pytest.mark.parametrize("package", ["gguf", "huggingface-hub", "onnxruntime"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors say what pip can install; isthmus itself is on no index."""
    from isthmus.engine.onnx_session import onnxruntime
    from isthmus.split.fetch import fetch
    from isthmus.split.gguf_file import _unusual

    needing: dict[str, Callable[[], object]] = {
        "gguf": lambda: _unusual(99),
        "huggingface-hub": lambda: fetch("owner/name"),
        "onnxruntime": onnxruntime,
    }
    module = package.replace("-", "_")
    for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(IsthmusError, match=f"; pip install {package}$"):
        needing[package]()


def test_own_mistakes_are_not_hidden(say: Callable[[Callable[..., object]], None]) -> None:
    def command() -> None:
        raise ModuleNotFoundError("No module named 'isthmus.nowhere'", name="isthmus.nowhere")

    say(command)
    with pytest.raises(ModuleNotFoundError):
        run(["doctor"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "there is not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "Permission denied: /x; the system refused it"),
        (FileExistsError(errno.EEXIST, "File exists", "/x"), "File exists: /x; the system refused it"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "/x"), "Too many levels of symbolic links: /x; the"),
        (OSError(errno.EFBIG, "File too large"), "File too large; the system refused it"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files; the system refused it"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    say: Callable[[Callable[..., object]], None], capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    def command() -> None:
        raise error

    say(command)
    assert run(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1


def test_other_errors_of_the_system_are_ours(say: Callable[[Callable[..., object]], None]) -> None:
    def command() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")

    say(command)
    with pytest.raises(FileNotFoundError):
        run(["doctor"])


def test_interrupt_is_130(say: Callable[[Callable[..., object]], None]) -> None:
    def command() -> None:
        raise KeyboardInterrupt

    say(command)
    assert run(["doctor"]) == 130


def test_command_may_give_an_exit_code(say: Callable[[Callable[..., object]], None]) -> None:
    def command() -> int:
        return 3

    say(command)
    assert run(["doctor"]) == 3


def test_every_command_has_a_module() -> None:
    entries = [entry for commands in COMMANDS.values() for entry in commands.values()]
    assert [entry.module for entry in entries if find_spec(entry.module) is None] == []
