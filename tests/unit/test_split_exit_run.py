"""The work folder of exits: what it may be, and who may work in it."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from isthmus.apps.cli.main import main
from isthmus.protocol.errors import ModelError
from isthmus.split.bundle import Bundle
from isthmus.split.exit_run import working_in
from isthmus.split.exit_writer import put_exits
from tests.edge_bundle import an_exit, write_tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """With an exit."""
    path = write_tiny(tmp_path / "b")
    model_id = Bundle.open(path).model_id
    put_exits(path, model_id, [an_exit(model_id)])
    return path


def calibrate(bundle: Path, work: Path) -> int:
    return main(["exits", "calibrate", str(bundle), "--count", "2", "--threads", "1", "--work", str(work)])


@pytest.mark.parametrize("kind", ["file", "below a file", "loop", "states are a file", "answers are a folder"])
def test_what_is_no_work_folder_gets_one_line(kind: str, bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    work = tmp_path / "w"
    if kind == "loop":
        work.symlink_to(work)
    elif kind == "states are a file":
        work.mkdir()
        (work / "answers").write_text("x")
    elif kind == "answers are a folder":
        assert calibrate(bundle, work) == 0
        (answers,) = work.glob("answers-*.json")
        answers.unlink()
        answers.mkdir()
    else:
        work.write_text("x")
    capsys.readouterr()
    assert calibrate(bundle, work / "deeper" if kind == "below a file" else work) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("error:")] == said[-1:] and str(work) in said[-1]


def test_a_link_to_a_folder_will_do(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "w").symlink_to(tmp_path / "there")
    assert calibrate(bundle, tmp_path / "w") == 0 and (tmp_path / "there" / "answers").is_dir()


def test_no_room_for_answers_is_one_line(
    bundle: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    assert calibrate(bundle, tmp_path / "w") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: no room in {tmp_path / 'w'}: No space left on device; make room, or choose")


def test_one_process_works_in_a_folder(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    with working_in(tmp_path / "w"):
        assert calibrate(bundle, tmp_path / "w") == 2
        assert f"another process works in {tmp_path / 'w'}; wait until it is done" in capsys.readouterr().err
        assert calibrate(bundle, tmp_path / "other") == 0
    assert calibrate(bundle, tmp_path / "w") == 0
    with pytest.raises(ModelError, match="another process"), working_in(tmp_path / "w"), working_in(tmp_path / "w"):
        pass


def test_pytorch_is_named_without_its_gigabytes(
    bundle: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "texts.jsonl"
    text.write_text(
        "".join(f'{{"text": "A fox went to the sea {i} times. And the sea was wide."}}\n' for i in range(30))
    )
    monkeypatch.delitem(sys.modules, "isthmus.split.exit_training", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    for machine, says in (
        ("x86_64", "pip install torch --index-url https://download.pytorch.org/whl/cpu"),
        ("riscv64", "pip install 'isthmus[train]'"),
    ):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert main(["exits", "train", str(bundle), "--text", str(text)]) == 2
        assert capsys.readouterr().err == f"error: training exits needs PyTorch; {says}\n"


def test_inspect_breaks_no_line_in_a_pipe(bundle: Path, capsys: Capture) -> None:
    assert main(["inspect", str(bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("exit ")]
    assert lines[at].endswith("agrees on 50.0% of documents, 60.0% of own answers")
    assert lines[at + 1].strip() == "no certificate: it drafts, but never emits (isthmus exits calibrate)"
