"""`isthmus profile` and `isthmus plan` with a language model, as a person would type them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.engine.config import ExpertsConfig
from tests.edge_bundle import write_tiny


def isthmus(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isthmus.apps.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("decoder")
    write_tiny(made / "tiny")
    done = isthmus("profile", "tiny", "--seconds", "0.1", "--threads", "1", folder=made)
    assert done.returncode == 0, done.stderr
    assert "ms a token" in done.stdout and "next: isthmus plan tiny" in done.stdout
    return made


def test_every_mode_is_a_row_and_the_verdict_is_a_sentence(folder: Path) -> None:
    done = isthmus("plan", "tiny", "--link", "rtt=20,up=5,down=20", folder=folder)
    assert done.returncode == 0, done.stderr
    for word in ("local", "stream", "split", "verify", "s in all", "120 tokens to a prompt of 64", "against"):
        assert word in done.stdout
    told = json.loads((folder / "tiny.plan.json").read_text())
    assert told["ways"][told["best"]]["fails"] == "" and told["verdict"] in done.stdout


def test_as_one_object_over_a_trace_with_a_budget(folder: Path) -> None:
    asked = ["--link", "rtt=20,trace=synthetic", "--memory-mb", "200", "--tokens", "10", "--cloud", "tiny.profile.json"]
    done = isthmus("plan", "tiny", *asked, "--json", "-o", "other.json", folder=folder)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["tokens"] == 10 and all(way["device_mb"] <= 200 for way in told["ways"] if not way["fails"])


def test_over_a_trace_it_is_replayed_and_drawn(folder: Path) -> None:
    asked = ["--link", "rtt=20,trace=synthetic", "--p", "90", "--load", "0.3", "--tokens", "20"]
    asked += ["--device-watts", "2", "--radio-watts", "1", "--energy-j", "1000"]
    for name in ("plan.html", "plan.png"):
        done = isthmus("plan", "tiny", *asked, "--plot", name, folder=folder)
        assert done.returncode == 0, done.stderr
        assert "p90, ms" in done.stdout and " J" in done.stdout
    page = (folder / "plan.html").read_text()
    told = json.loads((folder / "tiny.plan.json").read_text())
    assert "<svg" in page and told["ways"][told["best"]]["name"] in page and 'class="best"' in page
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_cloud_at_the_links_other_end_says_what_it_takes(folder: Path, tmp_path: Path) -> None:
    link = str(tmp_path / "link.json")
    with fresh_keys() as keys, CloudProcess(folder / "tiny", keys, 1, 4.0) as cloud:
        done = isthmus("profile", "--remote", cloud.address, "--keys", str(keys), "-o", link, folder=folder)
    assert done.returncode == 0 and "next: isthmus plan BUNDLE" in done.stdout, done.stderr
    (served,) = json.loads(Path(link).read_text())["served"]
    done = isthmus("plan", "tiny", "--link", link, "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    stream = next(way for way in told["ways"] if way["mode"] == "stream")
    assert stream["cloud_ms"] == pytest.approx(served["rows_ms"][0][1]) and "the link's other end" in told["cloud"]
    declared = json.loads(isthmus("plan", "tiny", "--link", link, "--cloud", "8", "--json", folder=folder).stdout)
    assert declared["cloud"] == "a cloud 8 times as fast as the device"
    other = json.loads(Path(link).read_text())
    other["served"][0]["rows_ms"] = [[1, -1.0]]
    Path(link).write_text(json.dumps(other))
    done = isthmus("plan", "tiny", "--link", link, folder=folder)
    assert done.returncode == 2 and "has no times of" in done.stderr


def test_a_machine_without_a_profile_is_measured(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    done = isthmus("plan", "tiny", "--link", "rtt=20,up=5,down=20", "--json", folder=tmp_path)
    assert done.returncode == 0 and "measuring tiny on this machine" in done.stderr
    assert json.loads(done.stdout)["ways"] and (tmp_path / "tiny.profile.json").exists()


def test_a_mixture_of_experts_is_planned_at_every_cut(tmp_path: Path) -> None:
    write_tiny(tmp_path / "moe", experts=ExpertsConfig(8, 2, 96, True))
    done = isthmus("profile", "moe", "--seconds", "0.1", "--threads", "1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    done = isthmus("plan", "moe", "--link", "rtt=20,up=5,down=20", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    ways = json.loads(done.stdout)["ways"]
    assert {"local", "stream", "split", "verify"} <= {way["mode"] for way in ways}
    assert {way["cut"] for way in ways if way["mode"] == "split"} >= {1, 2, 3}


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (["--exit", "a=1"], "--exit has no effect"),
        (["--throughput"], "--throughput has no effect: tiny is a bundle"),
        (["--p", "100"], "the percentile is 100"),
        (["--energy-j", "1"], "a budget of energy is given, and no watts"),
        (["--load", "1"], "others take 1 of the cloud's time"),
        (["--plot", "none/x.png"], "there is no folder none"),
        (["--plot", "/tmp"], "is no file that could be replaced"),
        (["--plot", "x.pdf"], "name a file that ends in .png or .html"),
        (["-o", "/dev/null"], "/dev/null is no file that could be replaced"),
        (["-o", ""], "names no file"),
        (["-o", "/tmp"], "is no file that could be replaced"),
        (["-o", "tiny.profile.json"], "tiny.profile.json would be replaced"),
        (["-o", "x.png", "--plot", "x.png"], "x.png would be replaced"),
        (["--cloud", "/tmp"], "/tmp cannot be read"),
        (["--device", "/tmp"], "/tmp cannot be read"),
        (["--link", "none.json"], "none.json cannot be read"),
        (["--link", "deep.json"], "nested too deep"),
        (["--inputs", "x"], "--inputs has no effect"),
        (["--cloud", "none.json"], "none.json"),
        (["--cloud", ""], "--cloud is empty"),
        (["--device", "none.json"], "there is no profile none.json"),
        (["-o", "none/x.json"], "there is no folder none"),
        (["--link", "rtt=20,up=0,down=1"], "carries 0 bit/s up"),
        (["--slo-ms", "0.0001"], "no way keeps"),
    ],
)
def test_what_cannot_be_is_one_line(folder: Path, asked: list[str], problem: str) -> None:
    (folder / "deep.json").write_text(
        '{"rtt_ms": 20, "up_mbps": 5, "down_mbps": 20, "q": ' + "[" * 100_000 + "]" * 100_000 + "}"
    )
    link = [] if "--link" in asked else ["--link", "rtt=20,up=5,down=20"]
    done = isthmus("plan", "tiny", *link, *asked, folder=folder)
    assert done.returncode == 2 and problem in done.stderr and len(done.stderr.strip().splitlines()) <= 2


def test_files_that_are_needed_are_not_replaced(folder: Path) -> None:
    (folder / "loop.json").unlink(missing_ok=True)
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "notes.txt").write_text("mine")
    (folder / "fifo.txt").unlink(missing_ok=True)
    os.mkfifo(folder / "fifo.txt")
    link = ["--link", "rtt=20,up=5,down=20"]
    before = {path: path.stat().st_mtime_ns for path in (folder / "tiny").rglob("*")}
    for command, problem in (
        (["plan", "tiny", *link, "-o", "tiny/bundle.json"], "lies in the bundle tiny"),
        (["plan", "tiny", *link, "-o", "tiny/weights/new.json"], "lies in the bundle tiny"),
        (["profile", "tiny", "-o", "tiny/bundle.json"], "lies in the bundle tiny"),
        (["plan", "tiny", *link, "-o", "notes.txt"], "is no file of this kind"),
        (["plan", "tiny", *link, "-o", "loop.json"], "is no file that could be replaced"),
        (["plan", "tiny", *link, "-o", "/proc/x.json"], "no file can be written in /proc"),
        (["plan", "tiny", *link, "--device", "loop.json"], "loop.json"),
        (["plan", "tiny", *link, "--prompts", "fifo.txt"], "not a regular file"),
        (["plan", "tiny", *link, "--prompts", "/dev/zero"], "not a regular file"),
    ):
        done = isthmus(*command, folder=folder)
        assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr, (
            command,
            done.stderr,
        )
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "tiny").rglob("*")}
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_long_name_is_a_name(folder: Path) -> None:
    name = "x" * 250 + ".json"
    done = isthmus("plan", "tiny", "--link", "rtt=20,up=5,down=20", "-o", name, folder=folder)
    assert done.returncode == 0 and json.loads((folder / name).read_text())["ways"], done.stderr


def test_what_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    for command in (["plan", "none.onnx", "--link", "rtt=20,up=5,down=20"], ["profile", "none.onnx"]):
        done = isthmus(*command, folder=tmp_path)
        assert done.returncode == 2 and "there is no model none.onnx" in done.stderr
        assert "measuring" not in done.stderr and not list(tmp_path.iterdir())


def test_options_of_language_models_are_refused_with_a_network(folder: Path) -> None:
    (folder / "model.onnx").touch()
    done = isthmus("plan", "model.onnx", "--link", "rtt=20,up=5,down=20", "--tokens", "5", folder=folder)
    assert done.returncode == 2 and "--tokens has no effect" in done.stderr


def test_what_drafts_bring_is_counted_along_answers_to_ones_own_prompts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("what is this\n\nand that\n")
    asked = ["--link", "rtt=20,up=5,down=20", "--prompts", str(tmp_path / "mine.txt")]
    done = isthmus("plan", "tiny", *asked, folder=folder)
    assert done.returncode == 0 and "2 answers: 2 of 2" in done.stderr, done.stderr
    assert "what drafts and exits foresee was counted along 2 of its own answers" in done.stdout
    means = json.loads((folder / "tiny.plan.json").read_text())
    done = isthmus("plan", "tiny", *asked, "--tokens", "7", "--prompt", "9", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["prompt"], told["tokens"]) == (9, 7) != (means["prompt"], means["tokens"])
    for text, problem in (
        (None, "as text: No such file"),
        ("\n", "holds no text"),
        ("x" * 600, "no prompt leaves room"),
    ):
        path = tmp_path / "bad.txt"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        done = isthmus("plan", "tiny", "--link", "rtt=20,up=5,down=20", "--prompts", str(path), folder=folder)
        assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr, done.stderr
