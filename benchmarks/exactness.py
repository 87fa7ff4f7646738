"""Do all kernel families give the same bits? Hashes of logits, hidden states, samples and KV of a synthetic decoder.

Each hash covers a weight format, a KV format and a kernel family, over several chunkings, mixed rows and thread counts
(engine/native/selftest.c). It is built for this machine and, where a cross compiler and qemu-user are there, for
aarch64.

usage: python benchmarks/exactness.py [--quick]
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from record import Record

from isthmus.engine.native.ffi_build import FLAGS, SOURCES

NATIVE = Path(__file__).resolve().parent.parent / "engine" / "native"
Case = tuple[str, str]  # weight format, KV format


@dataclass(frozen=True)
class Found:
    """What one build's self-test printed.

    Attributes:
        hashes: of its first family, by case.
        families: kernel families that ran, the plain one first.
        differing: families that gave other bits in some chunking or thread count, by case.
    """

    hashes: dict[Case, str]
    families: list[str]
    differing: dict[Case, set[str]]


def build(compiler: list[str], program: Path) -> None:
    """Compiles the self-test with the engine's own sources and flags."""
    sources = [str(NATIVE / name) for name in ("selftest.c", *SOURCES)]
    subprocess.run([*compiler, *FLAGS, *sources, "-o", str(program), "-lm"], check=True)


def run(command: list[str]) -> Found:
    """Runs a self-test and reads its lines: `FORMAT kv-KV HASH`, `DIFFERS FORMAT kv-KV FAMILY ...`, `families ...`.

    Raises:
        RuntimeError: it ended without saying which families ran.
    """
    result = subprocess.run(command, capture_output=True, text=True)
    found = Found({}, [], {})
    for line in result.stdout.splitlines():
        words = line.split()
        if words[:1] == ["families"]:
            found.families.extend(words[1:])
        elif words[:1] == ["DIFFERS"]:
            found.differing.setdefault((words[1], words[2]), set()).add(words[3])
        elif len(words) == 3 and words[1].startswith("kv-"):
            found.hashes[words[0], words[1]] = words[2]
    if not found.families or not found.hashes or result.returncode not in (0, 1):
        raise RuntimeError(
            f"the self-test ended with {result.returncode}: {result.stdout[-500:]}{result.stderr[-500:]}"
        )
    return found


def compare(everywhere: dict[str, Found]) -> tuple[list[list[str]], int, int]:
    """The table's rows, the number of configurations, and how many differ from the first build's plain kernels."""
    first = next(iter(everywhere.values()))
    rows, hashed, differ = [], 0, 0
    for case, golden in first.hashes.items():
        agree: list[str] = []
        other: list[str] = []
        for architecture, found in everywhere.items():
            same = found.hashes.get(case) == golden
            for family in found.families:
                fits = same and family not in found.differing.get(case, set())
                (agree if fits else other).append(f"{architecture} {family}")
        hashed += len(agree) + len(other)
        differ += len(other)
        rows.append([case[0], case[1].removeprefix("kv-"), golden, ", ".join(agree), ", ".join(other)])
    return rows, hashed, differ


def main() -> int:
    """Hashes and writes results/exactness.json; exit code 1 when something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer chunkings and thread counts")
    quick = ["--quick"] if parser.parse_args().quick else []
    record = Record("exactness", {"quick": bool(quick)})
    everywhere: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        for architecture, compiler, runner in (
            (platform.machine(), ["cc"], []),
            ("aarch64", ["aarch64-linux-gnu-gcc", "-static"], ["qemu-aarch64"]),
        ):
            needed = [tool for tool in (compiler[0], *runner) if shutil.which(tool) is None]
            if architecture in everywhere:
                continue
            if needed:
                record.skip(f"{architecture} kernels", f"no {' and no '.join(needed)}")
                continue
            program = Path(folder) / architecture
            begin = time.monotonic()
            build(compiler, program)
            everywhere[architecture] = found = run([*runner, str(program), *quick])
            families = ", ".join(found.families)
            print(f"{architecture}: {families}; {time.monotonic() - begin:.0f} s", file=sys.stderr)
            record.notes.append(f"{architecture}{' under qemu-user' if runner else ''}: {families}")
    if not everywhere:
        record.write()
        return 0
    rows, hashed, differ = compare(everywhere)
    record.figure("configurations hashed", hashed, "weight format x KV format x kernel family")
    exact = record.figure("configurations differing", differ, "of them", target=0, at_most=True)
    runs = "a chunking on 1 thread and one on 2" if quick else "3 chunkings on 1, 2 and 3 threads each"
    note = f"One hash over logits, hidden states, samples and KV; it must be the same for {runs}."
    record.table("exactness", ["weights", "KV", "hash", "the same bits", "other bits"], rows, note=note)
    record.write()
    return int(not exact)


if __name__ == "__main__":
    sys.exit(main())
