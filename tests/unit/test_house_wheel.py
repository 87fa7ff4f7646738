"""What is installed: the wheel's contents, made from the source distribution, and the fallback without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = CONFIG["tool"]["setuptools"]["package-dir"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], zipfile.ZipFile, str]:
    """Names in the source distribution, the wheel built from it with no compiler at hand, and the build's output."""
    out = tmp_path_factory.mktemp("dist")
    copy = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = ROOT / name
        if source.is_file() and not source.is_symlink():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(source.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)],
        env={**os.environ, "CC": "no-such-compiler"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    return names, zipfile.ZipFile(next(out.glob("*.whl"))), done.stdout


def test_wheel_holds_every_module_and_nothing_else(built: tuple[list[str], zipfile.ZipFile, str]) -> None:
    expected = set()
    for package, folder in FOLDERS.items():
        expected |= {f"{package.replace('.', '/')}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        expected.add(f"{package.replace('.', '/')}/py.typed")
    heads = [path for path in (ROOT / "split" / "heads").glob("*/*") if path.is_file()]
    expected |= {f"isthmus/{path.relative_to(ROOT)}" for path in heads}
    assert sum(path.stat().st_size for path in heads) <= 8_000_000
    assert {name for name in built[1].namelist() if ".dist-info/" not in name} == expected


def test_every_folder_with_code_is_a_listed_package() -> None:
    rooms = {folder.split("/")[0] for folder in FOLDERS.values()}
    with_code = {str(path.parent.relative_to(ROOT)) for room in rooms for path in (ROOT / room).rglob("*.py")}
    assert with_code == set(FOLDERS.values())
    assert set(CONFIG["tool"]["setuptools"]["packages"]) == set(FOLDERS)


def test_wheel_names_the_command_and_the_licence(built: tuple[list[str], zipfile.ZipFile, str]) -> None:
    info = {name.partition(".dist-info/")[2]: name for name in built[1].namelist() if ".dist-info/" in name}
    assert "isthmus = isthmus.apps.cli.main:main" in built[1].read(info["entry_points.txt"]).decode()
    assert "licenses/LICENSE" in info
    assert "cp311-abi3" in built[1].read(info["WHEEL"]).decode()


def test_install_without_a_compiler_goes_on_and_says_so(built: tuple[list[str], zipfile.ZipFile, str]) -> None:
    assert "the native engine could NOT be built" in built[2]
    assert "pip install onnxruntime" in built[2]
    assert not [name for name in built[1].namelist() if name.endswith(".so")]


def test_source_distribution_holds_the_engine(built: tuple[list[str], zipfile.ZipFile, str]) -> None:
    sources = {
        f"engine/native/{path.name}" for suffix in ("c", "h") for path in (ROOT / "engine/native").glob(f"*.{suffix}")
    }
    assert sources
    assert sources | {"LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md"} <= set(built[0])
