"""Parts of bundles are opened, and run once, in a child process with limits before they are opened in this one.

What was tried is remembered by its hash in the user's cache folder; so is what was cut on this machine.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from isthmus.protocol.errors import EngineError, ModelError, PlanError
from isthmus.split.confined import confined
from isthmus.split.fetch import cache_folder

SECONDS = 120  # of the processor
LEAST_BYTES = 4 << 30  # of addresses, of which the runtime takes more than of memory; else as many as there is memory
_OUT_OF_MEMORY = re.compile(r"bad_alloc|[Aa]lloc\w* ?(Raw|memory)|AllocateRaw")


def try_part(path: Path, sha256: str) -> None:
    """Opens a part elsewhere, and remembers that.

    Args:
        sha256: of the file, which was compared.

    Raises:
        PlanError: it cannot be opened, or not within limits.
    """
    memory = max(LEAST_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    what = f"opening {path}"
    confined("isthmus.split.tried:opened", str(path), what=what, memory_bytes=memory, seconds=SECONDS)
    remember(sha256)


def opened(path: str) -> None:
    """Opens a part, and runs it on random inputs, whose open dimensions are 1: in the child.

    Raises:
        PlanError: it is no model, or takes more memory than there is.
        EngineError: nothing runs it.
    """
    from isthmus.engine.graph_part import GraphPart
    from isthmus.split.onnx_file import read_model
    from isthmus.split.onnx_graph import OnnxGraph
    from isthmus.split.onnx_measure import given

    graph, part = OnnxGraph(read_model(Path(path))), GraphPart(Path(path), threads=1, limit_s=SECONDS / 4)
    kinds = {name: graph.info(name).type.tensor_type for name in graph.inputs}
    shapes = {name: [max(1, dim.dim_value) for dim in kind.shape.dim] for name, kind in kinds.items()}
    try:
        part.run(given(graph, shapes, ""))
    except PlanError:
        return  # an input that is no tensor
    except EngineError as error:  # not any numbers will do, which harms nobody
        if _OUT_OF_MEMORY.search(error.problem):
            raise PlanError(error.problem, "the model takes more memory than a bundle may") from error


def known(sha256: str) -> bool:
    """Whether a part was tried."""
    try:
        return (folder() / sha256).exists()
    except (OSError, ModelError):
        return False


def remember(sha256: str) -> None:
    """Notes that a part was tried; where that cannot be noted, it is tried again."""
    with suppress(OSError, ModelError):
        folder().mkdir(parents=True, exist_ok=True)
        (folder() / sha256).touch()


def folder() -> Path:
    """Where notes are."""
    return cache_folder().parent / "tried"
