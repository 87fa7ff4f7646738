"""The native engine's memory as C sees it: matrices, layers and thread pools."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import EngineError
from isthmus.quant.packed import GROUP, LANES, PackedMatrix

FORMAT_IDS = {
    name: i for i, name in enumerate(("f32", "f16", "bf16", "q8", "q8x", "q4", "q4m", "q4x", "n2", "n4", "n8"))
}
_CODES = {"n2": "p0", "n4": "p0", "n8": "p0", "f32": "w", "f16": "w", "bf16": "w"}
_SCALES = {"n2": "s2", "n4": "s4", "n8": "s4"}


def native() -> Any:
    """The compiled module.

    Raises:
        EngineError: it was not built.
    """
    try:
        from isthmus.engine import _native
    except ImportError as error:
        raise EngineError(
            "the native engine is not built",
            "install a C compiler and reinstall isthmus, or choose backend='onnx' (pip install onnxruntime)",
        ) from error
    return _native


def cpu_names() -> tuple[str, ...]:
    """Kernel families that this CPU can run, the best first; empty without the native engine."""
    try:
        lib = native().lib
    except EngineError:
        return ()
    return tuple(
        n for n in ("avx512-vnni", "avx2", "neon-dotprod", "neon", "plain") if lib.im_cpu_supported(n.encode())
    )


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """A pool of threads and the scratch memory of one step at a time."""

    def __init__(self, threads: int, cpu: str | None = None) -> None:
        module = native()
        name = cpu or os.environ.get("ISTHMUS_CPU") or ""
        if not module.lib.im_cpu_supported(name.encode()):
            raise EngineError(f"this machine cannot run the {name!r} kernels", f"choose among {', '.join(cpu_names())}")
        if not 1 <= threads <= 256:
            raise EngineError(f"{threads} threads", "choose 1 to 256")
        engine = module.lib.im_engine_new(threads, name.encode())
        if engine == module.ffi.NULL:
            raise EngineError(f"{threads} threads could not be started", "ask for fewer")
        self.engine = module.ffi.gc(engine, module.lib.im_engine_free)
        self.threads = threads
        self.cpu: str = module.ffi.string(module.lib.im_engine_cpu(engine)).decode()
        self.lock = threading.RLock()
        self.lost = False  # in a forked child, which has none of these threads
        self.stores = 0  # of experts that are open for parts of this pool, each with reading threads
        self._alive.add(self)

    _alive: weakref.WeakSet[Workers] = weakref.WeakSet()
    _shared: dict[tuple[int, str], Workers] = {}
    _shared_lock = threading.Lock()

    @classmethod
    def shared(cls, threads: int = 0, cpu: str | None = None) -> Workers:
        """The process's pool of that many threads (0: one per core); parts that never run at once share it."""
        threads = threads or default_threads()
        key = (threads, cpu or os.environ.get("ISTHMUS_CPU") or "")
        with cls._shared_lock:
            if key not in cls._shared:
                cls._shared[key] = cls(threads, cpu)
            return cls._shared[key]

    @classmethod
    def forget(cls) -> None:
        """Forgets the shared pools and marks all as lost; a forked child has none of their threads."""
        for workers in cls._alive:
            workers.lost = workers.threads > 1 or workers.stores > 0
        cls._shared = {}
        cls._shared_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Workers.forget)


class Memory:
    """Builds C structs and keeps what they point to alive."""

    def __init__(self) -> None:
        self._module = native()
        self._alive: list[Any] = []

    def keep(self, thing: Any) -> Any:
        """Keeps `thing` as long as this object lives."""
        self._alive.append(thing)
        return thing

    def pointer(self, array: NDArray[Any], ctype: str = "void *") -> Any:
        """A pointer to a contiguous array's data."""
        if not array.flags.c_contiguous:
            raise EngineError("a weight array is not contiguous", "pack it again")
        self.keep(array)
        return self._module.ffi.cast(ctype, array.ctypes.data)

    def vector(self, array: NDArray[np.float32] | None) -> Any:
        """A float vector, padded with zeros to whole lanes; NULL for None."""
        if array is None:
            return self._module.ffi.NULL
        padded = np.zeros(-(-array.size // GROUP) * GROUP, np.float32)
        padded[: array.size] = array
        return self.pointer(padded, "float *")

    def matrix(self, target: Any, matrix: PackedMatrix | None) -> None:
        """Fills the `im_matrix` at `target`.

        Raises:
            EngineError: the arrays do not have the format's sizes.
        """
        if matrix is None:
            target.format = -1
            return
        check(matrix)
        name = matrix.format
        target.format, target.rows, target.cols = FORMAT_IDS[name], matrix.rows, matrix.cols
        target.codes = self.pointer(np.asarray(matrix.arrays[_CODES.get(name, "codes")]))
        for field, key in (("p1", "p1"), ("p2", "p2"), ("scales", _SCALES.get(name, "scales")), ("mins", "mins")):
            if key in matrix.arrays and not (field in ("p1", "p2") and name == "n2"):
                setattr(target, field, self.pointer(np.asarray(matrix.arrays[key])))
        if name in ("n4", "n8"):  # so that it can be read with 2 bits as well
            target.mins = self.pointer(np.asarray(matrix.arrays["s2"]))


def check(matrix: PackedMatrix) -> None:
    """Refuses arrays that a kernel would read past.

    Raises:
        EngineError: an unknown format, or arrays of another size.
    """
    if matrix.format not in FORMAT_IDS or min(matrix.rows, matrix.cols) < 1:
        raise EngineError(f"a weight matrix is {matrix.rows} x {matrix.cols} in format {matrix.format!r}")
    blocks, groups = -(-matrix.rows // LANES), -(-matrix.cols // GROUP)
    for key, expected in expected_bytes(matrix.format, blocks, groups).items():
        have = matrix.arrays[key].nbytes if key in matrix.arrays else 0
        if have != expected:
            raise EngineError(
                f"{key} of a {matrix.format} matrix {matrix.rows} x {matrix.cols} has {have} bytes, not {expected}"
            )


def expected_bytes(format: str, blocks: int, groups: int) -> Mapping[str, int]:
    """Bytes of each array of a matrix of 16 `blocks` rows and 32 `groups` columns."""
    n = blocks * groups
    if format in ("f32", "f16", "bf16"):
        return {"w": n * 512 * (4 if format == "f32" else 2)}
    if format in ("q8", "q8x"):
        return {"codes": n * 512, "scales": n * (32 if format == "q8" else 128)}
    if format in ("q4", "q4m", "q4x"):
        scales = n * (64 if format == "q4x" else 32)
        return {"codes": n * 256, "scales": scales} | ({} if format == "q4" else {"mins": scales})
    planes = {"p0": n * 128, "s2": n * 32}
    if format in ("n4", "n8"):
        planes |= {"p1": n * 128, "s4": n * 32}
    return planes | ({"p2": n * 256} if format == "n8" else {})
