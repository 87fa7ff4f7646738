"""`isthmus run` as people call it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.split.bundle import Bundle
from isthmus.split.exit_writer import put_exits
from tests.edge_bundle import an_exit, write_tiny


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bundles") / "tiny")


NOBODY = ("--cloud", "127.0.0.1:9", "--no-keys")


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isthmus.apps.cli", "run", *arguments]
    environment = {**os.environ, "NO_COLOR": "1"}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, env=environment)


def test_json_has_all_that_an_answer_cost(bundle: Path) -> None:
    arguments = (str(bundle), "--prompt", "hello", "--greedy", "--max-tokens", "5", "--json", "--threads", "1")
    chat, raw = run(*arguments), run(*arguments, "--raw")
    assert chat.returncode == raw.returncode == 0
    answer = json.loads(raw.stdout)
    keys = {"tokens", "text", "sources", "ttft_ms", "tok_s", "bytes_up", "bytes_down", "round_trips"}
    assert keys <= set(answer)
    assert len(answer["tokens"]) == len(answer["sources"]) <= 5
    assert set(answer["sources"]) == {"device"}
    assert answer["prompt_tokens"] == 5 < json.loads(chat.stdout)["prompt_tokens"]


def test_auto_explains_itself(bundle: Path) -> None:
    arguments = (str(bundle), "--prompt", "hello", "--greedy", "--max-tokens", "5", "--threads", "1", "--explain")
    private = ("--prefer", "privacy", "--cloud", "127.0.0.1:9", "--no-keys")  # where nobody is, and nobody is asked
    told = run(*arguments, *private)
    assert (told.returncode, told.stderr) == (0, "auto: local: there is no cloud, or none may be asked\n")
    answer = json.loads(run(*arguments, *private, "--json").stdout)
    assert answer["explain"] == ["local: there is no cloud, or none may be asked"]
    assert (answer["bytes_up"], answer["note"]) == (0, "")


def test_the_prompt_comes_from_standard_input_and_a_seed_fixes_the_text(bundle: Path) -> None:
    arguments = (str(bundle), "--prompt", "-", "--max-tokens", "20", "--temperature", "1")
    first, second, other = (run(*arguments, "--seed", seed, stdin="hello\n") for seed in ("1", "1", "2"))
    assert first.returncode == 0
    assert first.stdout == second.stdout != other.stdout
    assert "\x1b" not in first.stdout


def test_a_chat_without_a_terminal(bundle: Path) -> None:
    lines = "hello\n/mode\n/mode stream\nhi\n/mode magic\n/mode local\n/new\n/what\nhi\n/stats\n/quit\nnever\n"
    done = run(str(bundle), "--max-tokens", "4", "--greedy", stdin=lines)
    assert done.returncode == 0
    assert "mode: local" in done.stdout and "there is no command /what" in done.stdout
    assert "stream mode needs a cloud; leave with /quit" in done.stderr and "mode is 'magic'" in done.stderr
    assert "4 tokens (4 device)" in done.stdout


def test_bytes_that_are_no_text_are_one_line_each(bundle: Path) -> None:
    command = [sys.executable, "-m", "isthmus.apps.cli", "run", str(bundle), "--max-tokens", "2"]
    for arguments, lines, code in (([], b"hi\n\xff\xfe\nhi\n", 0), (["--prompt", "-"], b"\xff", 2)):
        done = subprocess.run([*command, *arguments], input=lines, capture_output=True, timeout=120)
        assert done.returncode == code
        assert done.stderr.count(b"\n") == 1
        assert b"not UTF-8 text" in done.stderr
        assert done.stdout.count(b"\n") >= (2 if code == 0 else 0)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--mode", "stream"], "stream mode needs a cloud"),
        (["--mode", "magic"], "mode is 'magic'"),
        (["--mode", "split"], "split mode needs a cloud; name one with --cloud"),
        ([*NOBODY, "--mode", "split", "--cut", "4"], "--cut is 4 and the model has 4 layers; choose one in 1..3"),
        ([*NOBODY, "--mode", "split", "--codec", "f8"], "--codec is 'f8'"),
        ([*NOBODY, "--codec", "f32"], "--codec has no effect without --mode split"),
        (["--cut", "2"], "--cut has no effect without --mode split"),
        (["--keys", "nowhere"], "--keys has no effect without --cloud"),
        (["--no-keys"], "--no-keys has no effect without --cloud"),
        ([*NOBODY, "--keys", "nowhere"], "--keys has no effect with --no-keys"),
        (["--prefer", "magic"], "--prefer is 'magic'; choose one of speed, cloud-cost, privacy"),
        ([*NOBODY, "--max-disagreement", "1.5"], "--max-disagreement is 1.5; give a share from 0 to 1"),
        ([*NOBODY, "--max-disagreement", "nan"], "--max-disagreement is nan"),
        (["--mode", "local", "--prefer", "speed"], "--prefer has no effect without --mode auto"),
        ([*NOBODY, "--mode", "stream", "--explain"], "--explain has no effect without --mode auto"),
        (["--greedy", "--temperature", "1"], "--temperature has no effect with --greedy"),
        (["question"], "ask with --prompt 'QUESTION'"),
        (["--memory-mb", "50"], "the budget is 50 MB"),
        (["--memory-mb", "nan"], "--memory-mb is nan"),
        (["--memory-mb", "inf"], "--memory-mb is inf"),
        (["--memory-mb", "-5"], "--memory-mb is -5"),
        (["--memory-mb", "0"], "--memory-mb is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "nan", "--greedy"], "temperature is nan"),
        (["--top-p", "nan"], "--top-p is nan"),
        (["--kv-tokens", "9999"], "--kv-tokens is 9999"),
        (["--kv-tokens", "4"], "room for 4; begin a new one, raise --kv-tokens, or choose --overflow slide"),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--max-tokens", "9" * 20], "--max-tokens is 999"),
        (["--top-k", "9" * 11], "--top-k is 999"),
        (["--stop", ""], "stop word is empty"),
        (["--cloud", "tcp://127.0.0.1:9", "--keys", "nowhere"], "isthmus keys"),
        (["--cloud", "", "--no-keys"], "has no port"),
        (["--cloud", "127.0.0.1:9", "--no-keys", "--mode", "stream"], "nothing answers at tcp://127.0.0.1:9"),
        (["--cloud", "tcp://:9", "--no-keys"], "'tcp://:9' has no host"),
        (["--cloud", "tcp://127.0.0.1:0", "--no-keys"], "no port in 1..65535"),
        (["--cloud", "tcp://127.0.0.1:99999", "--no-keys"], "no port in 1..65535"),
        (["--cloud", "tcp://127.0.0.1:9 ", "--no-keys"], "has a space"),
        (["--cloud", "tcp://192.0.2.7:9", "--no-keys"], "no keys"),
        (["--cloud", "tcp://127.0.0.1:9", "--no-keys", "--mode", "stream"], "nothing answers at tcp://127.0.0.1:9"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(bundle: Path, arguments: list[str], problem: str) -> None:
    done = run(str(bundle), "--prompt", "hello there", *arguments)
    assert done.returncode == 2
    assert problem in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_cloud_that_does_not_answer_is_named(bundle: Path, arguments: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    options = ["--prompt", "hello", "--greedy", "--max-tokens", "3", "--cloud", address, "--no-keys", *arguments]
    done = run(str(bundle), *options)
    assert done.returncode == 0
    hint = "(check that `isthmus serve` runs there)"
    assert done.stderr == f"note: nothing answers at {address}: this device goes on by itself {hint}\n"
    assert done.stdout


def test_other_bad_input(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for arguments, problem in [
        ([str(tmp_path / "none"), "--prompt", "x"], "holds no bundle"),
        ([str(file), "--prompt", "x"], f"isthmus split {file} -o model"),
        ([str(bundle), "--json"], "--json needs a prompt"),
        ([str(bundle), "--prompt", " "], "the prompt is empty"),
    ]:
        done = run(*arguments)
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
        assert problem in done.stderr


def test_the_demo_answers_from_two_processes_and_cleans_up(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = write_tiny(tmp_path_factory.mktemp("demo") / "tiny")
    model_id = Bundle.open(bundle).model_id
    put_exits(bundle, model_id, [an_exit(model_id, 1)])  # nobody says how sure it must be: it stays out
    command = [sys.executable, "-m", "isthmus.apps.cli", "demo", "--bundle", str(bundle), "--max-tokens", "6"]
    environment = {**os.environ, "NO_COLOR": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.split()[1:] and " ms " in line}
    assert set(rows) == {"local", "stream", "split", "verify", "stream,"}
    assert {row[-1] for mode, row in rows.items() if mode != "local"} == {"yes"}
    assert f"isthmus run {bundle}" in done.stdout.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "value"), [("--bundle", "nowhere"), ("--cut", "99")])
def test_a_demo_that_cannot_begin_is_one_plain_error(bundle: Path, option: str, value: str) -> None:
    command = [sys.executable, "-m", "isthmus.apps.cli", "demo", "--bundle", str(bundle), option, value]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("error:"), done.stderr.count("\n")) == (2, 1, 1)
