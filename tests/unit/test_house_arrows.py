"""The rooms and the one direction between them, held by reading every import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("protocol", "quant", "engine", "split", "edge", "cloud", "apps")
# Who may import what, besides itself; everyone may import isthmus.protocol.errors.
ARROWS: dict[str, tuple[str, ...]] = {
    "protocol": (),
    "quant": (),
    "engine": ("isthmus.quant",),
    "split": ("isthmus.engine", "isthmus.quant", "isthmus.protocol"),
    "edge": ("isthmus.split.bundle", "isthmus.engine", "isthmus.protocol"),
    "cloud": ("isthmus.split.bundle", "isthmus.engine", "isthmus.protocol"),
    "apps": ("isthmus",),
}
# What a bundle is made of counts as the bundle.
BUNDLE = tuple(
    f"isthmus.split.{name}"
    for name in ("bundle", "expert_file", "files", "graph_bundle", "graph_manifest", "manifest", "tokenizer")
)
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    """Every module that a source imports, at its top or in a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from isthmus.split import bundle` may name a module or a member of the package.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def wrong_arrows(room: str, source: str) -> list[str]:
    """The imports of a module of `room` that go against the arrows."""
    allowed = (*ARROWS[room], f"isthmus.{room}", "isthmus.protocol.errors")
    if "isthmus.split.bundle" in allowed:
        allowed += BUNDLE
    return [m for m in imports(source) if m.split(".")[0] == "isthmus" and not within(m, allowed)]


def wrong_style(source: str) -> list[str]:
    """Imports that load a second copy of a module (bare or relative), and pickle."""
    return [m for m in imports(source) if m.startswith(".") or m.split(".")[0] in (*ROOMS, "pickle", "cPickle", "dill")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_the_arrows(path: Path) -> None:
    source = path.read_text()
    assert wrong_arrows(path.relative_to(ROOT).parts[0], source) == []
    assert wrong_style(source) == []


def test_wrong_arrows_are_seen() -> None:
    assert wrong_arrows("edge", "def f():\n    from isthmus.cloud import service") == ["isthmus.cloud.service"]
    assert wrong_arrows("quant", "import isthmus.engine.part") == ["isthmus.engine.part"]
    assert wrong_arrows("cloud", "from isthmus.split import plan") == ["isthmus.split.plan"]
    assert wrong_arrows("cloud", "from isthmus.split.bundle import Bundle") == []
    assert wrong_style("import engine.part") == ["engine.part"]
    assert wrong_style("from .part import Part") == [".part.Part"]


@pytest.mark.parametrize("folder", [*ROOMS, "tests", "benchmarks", "examples", "scripts"])
def test_no_file_is_two_nouns_long(folder: str) -> None:
    sources = [p for suffix in ("py", "c", "h") for p in (ROOT / folder).rglob(f"*.{suffix}")]
    assert [str(p.relative_to(ROOT)) for p in sources if len(p.read_text().splitlines()) > 500] == []


@pytest.mark.parametrize("folder", ROOMS)
def test_types_can_be_followed(folder: str) -> None:
    link = ROOT / ".typing" / "isthmus" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../../{folder}"
