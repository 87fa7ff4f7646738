"""One set of hashes for every instruction set: of this machine's kernels, of ARM's under emulation, of WebAssembly."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isthmus.engine.binding import cpu_names, native
from isthmus.engine.native.ffi_build import FLAGS, SOURCES
from isthmus.engine.native_part import NUMERICS

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "engine" / "native"
VECTORS = json.loads((HERE.parent / "vectors" / "native_hash.json").read_text())
HASHES: dict[str, str] = VECTORS["hashes"]
ARM = "aarch64-linux-gnu-gcc"
# Runs the self-test's main() inside of the engine that Python loads: the very binary that is shipped.
INSIDE = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
arguments = [argument.encode() for argument in sys.argv[2:]]
main = ctypes.CDLL(sys.argv[2]).main
status = main(len(arguments), (ctypes.c_char_p * (len(arguments) + 1))(*arguments))
ctypes.CDLL(None).fflush(None)
sys.exit(status)
"""


def run(command: list[str]) -> str:
    """What a command printed; its errors when it failed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command[:3]} gave {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def hashes_of(printed: str) -> tuple[dict[str, str], list[str]]:
    """The hashes by "format kv", and the kernel families that all gave them."""
    *lines, last = printed.splitlines()
    return {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in lines}, last.split()[1:]


def test_the_hashes_belong_to_the_numerics_id() -> None:
    assert VECTORS["numerics"] == NUMERICS.id, "bits changed: print the hashes again, under the new id"
    assert NUMERICS.exact and len(HASHES) == 30 and len(set(HASHES.values())) == 30


@pytest.mark.parametrize("compiler", ["cc", ARM])
def test_the_sources_compile_without_a_warning(compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    sources = [str(NATIVE / name) for name in (*SOURCES, "selftest.c")]
    run([compiler, *FLAGS, "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *sources])


@pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)")
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler (cc) for the self-test")
@pytest.mark.skipif(sys.platform != "linux", reason="the self-test is loaded into the engine on Linux only")
def test_this_machine(tmp_path: Path) -> None:
    library = tmp_path / "selftest.so"
    source = str(NATIVE / "selftest.c")
    run(["cc", "-O2", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-shared", "-o", str(library), source, "-lm"])
    printed = run([sys.executable, "-c", INSIDE, native().__file__, str(library), "--quick"])
    found, families = hashes_of(printed)
    assert sorted(families) == sorted(cpu_names())
    assert found == {name: HASHES[name] for name in found}
    assert len(found) == 16
    printed = run([sys.executable, "-c", INSIDE, native().__file__, str(library), "n8"])  # with nothing left out
    found, _ = hashes_of(printed)
    assert found == {name: HASHES[name] for name in ("n8 kv-f16", "n8 kv-f32")}


def self_test(folder: Path, compiler: str, flags: list[str], linking: list[str], suffix: str = "") -> Path:
    """The self-test built by a cross compiler, once for these sources and this compiler."""
    digest = hashlib.blake2b(run([compiler, "--version"]).encode(), digest_size=8)
    digest.update(repr((flags, linking)).encode())
    for path in sorted([*NATIVE.glob("*.[ch]")]):
        digest.update(path.name.encode() + path.read_bytes())
    binary = folder / f"selftest-{digest.hexdigest()}{suffix}"
    if binary.exists():
        return binary
    for old in folder.iterdir():
        old.unlink()
    flags = [flag for flag in FLAGS if not flag.startswith("-O")] + ["-O2", *flags]

    def compile_one(name: str) -> str:
        target = folder / f"{name}.{os.getpid()}.o"
        run([compiler, *flags, "-c", "-o", str(target), str(NATIVE / name)])
        return str(target)

    names = sorted(["selftest.c", *SOURCES], key=lambda name: "kernels_" not in name)  # the slow ones first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, names))
    made = folder / f"linked.{os.getpid()}{suffix}"
    run([compiler, *linking, "-pthread", "-o", str(made), *objects, "-lm"])
    made.replace(binary)
    for name in objects:
        Path(name).unlink()
    return binary


@pytest.mark.skipif(shutil.which(ARM) is None, reason=f"no {ARM} to compile the NEON kernels with")
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="no qemu-aarch64 (qemu-user) to run the NEON kernels")
@pytest.mark.timeout(900)  # a minute to compile the first time, half of one to run; more on a busy machine
@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is ARM: test_this_machine ran its kernels")
def test_arm_under_emulation(request: pytest.FixtureRequest) -> None:
    cache = request.config.cache
    assert cache is not None
    binary = self_test(cache.mkdir("isthmus-arm"), ARM, [], ["-static"])
    found, families = hashes_of(run(["qemu-aarch64", str(binary), "--quick"]))
    assert families == ["plain", "neon", "neon-dotprod"]
    assert found == {name: HASHES[name] for name in found}
    assert len(found) == 16
    oldest = ["qemu-aarch64", "-cpu", "cortex-a53", str(binary), "--quick", "q4", "n8"]  # a core without dotprod
    found, families = hashes_of(run(oldest))
    assert families == ["plain", "neon"]
    assert found == {name: HASHES[name] for name in found} and len(found) == 3


@pytest.mark.skipif(shutil.which("emcc") is None, reason="no emcc (emscripten) to compile the plain kernels with")
@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run WebAssembly in")
@pytest.mark.timeout(900)
def test_webassembly(request: pytest.FixtureRequest) -> None:
    """The plain kernels with threads, as a browser would run them."""
    cache = request.config.cache
    assert cache is not None
    linking = ["-O0", "-g", "-sPTHREAD_POOL_SIZE=4", "-sEXIT_RUNTIME", "-sINITIAL_MEMORY=268435456", "-sSINGLE_FILE"]
    script = self_test(cache.mkdir("isthmus-wasm"), "emcc", ["-msimd128"], linking, ".js")
    found, families = hashes_of(run(["node", str(script), "--quick"]))
    assert families == ["plain"]
    assert found == {name: HASHES[name] for name in found} and len(found) == 16
