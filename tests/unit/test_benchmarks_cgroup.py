"""Where a benchmark would make its memory cgroup."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLD = "tmpfs /cg tmpfs rw 0 0\ncgroup /cg/cpu cgroup rw,cpu 0 0\ncgroup /cg/memory cgroup rw,relatime,memory 0 0\n"
NEW = "cgroup2 /cg cgroup2 rw,nsdelegate 0 0\n"
BOTH = OLD + "cgroup2 /cg/unified cgroup2 rw 0 0\n"


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    import cgroup

    return cgroup


def places(cgroup: Any, mounts: str, membership: str) -> list[tuple[int, str]]:
    """Version and folder of each place."""
    return [(version.number, str(folder)) for version, folder in cgroup.parents(mounts, membership)]


def test_an_old_group_goes_below_the_process_own(cgroup: Any) -> None:
    assert places(cgroup, OLD, "4:memory:/a/b\n1:cpu:/\n") == [(1, "/cg/memory/a/b")]
    assert places(cgroup, OLD, "4:memory:/\n1:cpu:/\n") == [(1, "/cg/memory")]


def test_a_new_group_goes_below_or_beside_it(cgroup: Any) -> None:
    assert places(cgroup, NEW, "0::/user/scope\n") == [(2, "/cg/user/scope"), (2, "/cg/user")]
    assert places(cgroup, NEW, "0::/\n") == [(2, "/cg")]


def test_the_old_memory_controller_comes_before_a_new_hierarchy_without_one(cgroup: Any) -> None:
    assert places(cgroup, BOTH, "0::/\n4:memory:/a\n") == [(1, "/cg/memory/a"), (2, "/cg/unified")]
    assert places(cgroup, "", "0::/\n") == []


def test_a_machine_without_cgroups_is_told(cgroup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text("")
    monkeypatch.setattr(cgroup, "MOUNTS", tmp_path / "mounts")
    with pytest.raises(cgroup.CgroupUnavailableError, match="mounted"):
        cgroup.MemoryGroup("x", 1 << 30)
    (tmp_path / "mounts").write_text(f"cgroup2 {tmp_path}/absent cgroup2 rw 0 0\n")
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(cgroup, "MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "own")
    with pytest.raises(cgroup.CgroupUnavailableError, match="version 2: No such file"):
        cgroup.MemoryGroup("x", 1 << 30)


def test_a_group_with_files_of_no_controller_is_removed(
    cgroup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mounts").write_text(f"cgroup2 {tmp_path} cgroup2 rw 0 0\n")
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(cgroup, "MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "own")

    def refuse(path: Path, text: str) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", refuse)
        with pytest.raises(cgroup.CgroupUnavailableError, match="no memory controller"):
            cgroup.MemoryGroup("x", 1 << 30)
    assert not list(tmp_path.glob("isthmus-*"))
