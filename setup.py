"""The build step of what is written in C; everything else stands in pyproject.toml."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext

LOST = """
isthmus: WARNING: {what} could NOT be built ({why}).
isthmus: The installation goes on; {instead}.
isthmus: To mend it install a C compiler (Debian: apt-get install gcc libc6-dev) and install isthmus again.
isthmus: `isthmus doctor` tells what is in use.
"""
WITHOUT = {
    "isthmus.engine._native": (
        "the native engine",
        "ONNX Runtime computes instead (pip install onnxruntime), more slowly",
    ),
    "isthmus.protocol._rans": ("the coder of arrays", "they are coded in Python instead, far more slowly"),
}


def warn(text: str) -> None:
    """Says it on stderr and, because pip hides that when a build succeeds, on the terminal too."""
    print(text, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        try:
            Path("/dev/tty").write_text(text)
        except OSError:
            return  # no terminal: nobody is looking


class BuildNative(build_ext):  # type: ignore[misc]  # setuptools has no types
    """Builds what can be built and says so where it cannot."""

    def build_extension(self, ext: Any) -> None:
        compile_all = self.compiler.compile

        def compile_at_once(sources: list[str], *args: Any, **named: Any) -> list[str]:
            """The compiler's own method, a process for each source: the kernels take half a minute each."""
            order = sorted(sources, key=lambda source: "kernels_" not in source)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = dict(zip(order, pool.map(lambda one: compile_all([one], *args, **named), order), strict=True))
            return [target for source in sources for target in made[source]]

        self.compiler.compile = compile_at_once
        try:
            super().build_extension(ext)
        except Exception as error:  # compilers' errors share no narrower base across setuptools versions
            ext.optional = True
            lines = str(error).strip().splitlines() or [type(error).__name__]
            what, instead = WITHOUT[ext.name]
            warn(LOST.format(what=what, why=lines[-1], instead=instead))

    def get_outputs(self) -> list[str]:
        """Only what was built: an engine that is missing is not to be packed."""
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(
    cffi_modules=["engine/native/ffi_build.py:ffibuilder", "protocol/native/ffi_build.py:ffibuilder"],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # one wheel serves every Python from 3.11 on
)
