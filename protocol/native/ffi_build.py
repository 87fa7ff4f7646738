"""Builds `isthmus.protocol._rans`: the C source of this folder behind cffi, one binary for every Python version."""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
FOLDER = "protocol/native"  # relative to the repository, as setuptools wants it
_SHARED = re.compile(r"// BEGIN SHARED WITH PYTHON\n(.*?)// END SHARED WITH PYTHON", re.DOTALL)

ffibuilder = FFI()
ffibuilder.cdef(re.sub(r"//.*", "", "\n".join(_SHARED.findall((HERE / "rans.h").read_text()))))
ffibuilder.set_source(
    "isthmus.protocol._rans",
    '#include "rans.h"',
    sources=[f"{FOLDER}/rans.c"],
    include_dirs=[FOLDER],
    depends=[f"{FOLDER}/rans.h"],
    extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=off"],  # the same bits everywhere
    py_limited_api=True,
)
