"""Builds `isthmus.engine._native`: the C sources of this folder behind cffi, one binary for every Python version."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = (
    "pool.c",
    "numbers.c",
    "rope.c",
    "sampler.c",
    "embed.c",
    "scratch.c",
    "attention.c",
    "feed_forward.c",
    "latent.c",
    "experts.c",
    "router.c",
    "reader.c",
    "store.c",
    "checksum.c",
    "probe.c",
    "decoder.c",
    "kernels_plain.c",
    "kernels_avx2.c",
    "kernels_avx512.c",
    "kernels_neon.c",
    "kernels_neon_dot.c",
)
# No contraction: the kernels name every fused multiply-add themselves, so that all compilers give the same bits.
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-pthread")


def declarations(header: str) -> str:
    """What a header shares with Python."""
    text = (HERE / header).read_text()
    return "\n".join(re.findall(r"// BEGIN SHARED WITH PYTHON\n(.*?)// END SHARED WITH PYTHON", text, re.DOTALL))


ffibuilder = FFI()
ffibuilder.cdef(
    re.sub(
        r"//.*",
        "",
        declarations("isthmus.h") + declarations("reader.h") + declarations("store.h") + declarations("decoder.h"),
    )
)
ffibuilder.set_source(
    "isthmus.engine._native",
    '#include "decoder.h"\n#include "store.h"',
    sources=[f"engine/native/{name}" for name in SOURCES],  # relative to the repository, as setuptools wants them
    include_dirs=["engine/native"],
    depends=[f"engine/native/{path.name}" for path in sorted(HERE.glob("*.h"))],
    extra_compile_args=list(FLAGS),
    extra_link_args=["-pthread"],
    libraries=[] if sys.platform == "win32" else ["m"],
    py_limited_api=True,
)
