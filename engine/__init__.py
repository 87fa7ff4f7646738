"""Runs a part of a model on this machine: native kernels, or ONNX Runtime where they were not built."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.engine.config import DecoderConfig, ExpertsConfig
    from isthmus.engine.experts import Expert, ExpertSource
    from isthmus.engine.part import KvConfig, Numerics, Part, Rows, Sequence, StepResult, Want, WeightSource
    from isthmus.engine.sampling import GREEDY, Sampling

__all__ = [
    "GREEDY",
    "DecoderConfig",
    "Expert",
    "ExpertSource",
    "ExpertsConfig",
    "KvConfig",
    "Numerics",
    "Part",
    "Rows",
    "Sampling",
    "Sequence",
    "StepResult",
    "Want",
    "WeightSource",
    "cpu_names",
    "open_part",
]

_HOMES = {
    "config": ("DecoderConfig", "ExpertsConfig"),
    "experts": ("Expert", "ExpertSource"),
    "part": ("KvConfig", "Numerics", "Part", "Rows", "Sequence", "StepResult", "Want", "WeightSource"),
    "sampling": ("GREEDY", "Sampling"),
    "binding": ("cpu_names",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"isthmus.engine.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def open_part(
    source: WeightSource,
    start: int,
    end: int,
    *,
    backend: str = "auto",
    threads: int = 0,
    kv: KvConfig | None = None,
    cpu: str | None = None,
    experts: ExpertSource | None = None,
    bits: int = 0,
) -> Part:
    """Loads layers [start, end) of a decoder, with the embedding at 0 and the output head at the end.

    Args:
        backend: "native", "onnx" (float32), "onnx-q4", or "auto": native where it was built, else onnx-q4.
        threads: threads of a step; 0 for one per core.
        kv: number format and size of the KV pool; 8,192 tokens of float16 by default.
        cpu: forces a kernel family ("avx512-vnni", "avx2", "neon-dotprod", "neon", "plain"), as ISTHMUS_CPU does.
        experts: brings experts on demand; without it all experts of the source stay resident.
        bits: reads nested weights at 2, 4 or 8 bits; 0 for all that are there.

    Raises:
        EngineError: a range, back end, kernel family or size that cannot be had.
    """
    from isthmus.engine.binding import cpu_names
    from isthmus.engine.part import KvConfig
    from isthmus.protocol.errors import EngineError

    kv = kv or KvConfig()
    if bits:
        from isthmus.engine.narrow import Narrowed

        source = Narrowed(source, bits)
    if backend == "auto":
        backend = "native" if cpu_names() else "onnx-q4"
        if backend != "native":
            if importlib.util.find_spec("onnxruntime") is None:
                raise EngineError(
                    "neither the native engine nor ONNX Runtime is here",
                    "install a C compiler and install isthmus again, or: pip install onnxruntime",
                )
            warnings.warn(
                "the native engine is not built: ONNX Runtime computes instead; `isthmus doctor` tells how to mend it",
                RuntimeWarning,
                stacklevel=2,
            )
    if backend == "native":
        from isthmus.engine.native_part import open_native

        return open_native(source, start, end, threads=threads, kv=kv, cpu=cpu, experts=experts)
    if backend in ("onnx", "onnx-q4"):
        from isthmus.engine.onnx_part import open_onnx

        precision = "q4" if backend == "onnx-q4" else "f32"
        return open_onnx(source, start, end, threads=threads, kv=kv, precision=precision)
    raise EngineError(f"the back end {backend!r} is unknown", "choose auto, native, onnx or onnx-q4")
