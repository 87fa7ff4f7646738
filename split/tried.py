"""Parts of bundles are opened, and run once, in a child process with limits before they are opened in this one.

What was tried is remembered by the hashes of its files in the user's cache folder; so is what was cut on this machine.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from isthmus.protocol.errors import EngineError, ModelError, PlanError
from isthmus.split.confined import confined
from isthmus.split.fetch import cache_folder
from isthmus.split.graph_manifest import part_files
from isthmus.split.manifest import FileEntry

SECONDS = 120  # of the processor
LEAST_BYTES = 4 << 30  # of addresses, of which the runtime takes more than of memory; else as many as there is memory
_CGROUP = Path("/sys/fs/cgroup/memory.max")
_OUT_OF_MEMORY = re.compile(r"bad_alloc|[Aa]lloc\w* ?(Raw|memory)|AllocateRaw")


def weights_of(path: Path) -> list[str]:
    """Opens a part elsewhere; the files beside it that its weights lie in, relative to its own.

    Raises:
        PlanError: it cannot be opened, or not within limits.
    """
    what, memory = f"opening {path}", max(LEAST_BYTES, _memory_bytes())
    call = "isthmus.split.tried:opened"
    names: list[str] = confined(call, str(path), what=what, memory_bytes=memory, seconds=SECONDS)
    return names


def opened(path: str) -> list[str]:
    """Opens a part, and runs it on random inputs, whose open dimensions are 1: in the child. Gives what `weights_of`
    does.

    Raises:
        PlanError: it is no model, or takes more memory or time than there is.
        EngineError: nothing runs it.
    """
    from isthmus.engine.graph_part import GraphPart
    from isthmus.split.onnx_file import beside, read_model
    from isthmus.split.onnx_graph import OnnxGraph
    from isthmus.split.onnx_measure import given

    file = Path(path)
    model = read_model(file)
    names = [str(one.relative_to(file.parent)) for one in beside(file, model)]
    graph, part = OnnxGraph(model), GraphPart(file, threads=1, limit_s=SECONDS / 4)
    kinds = {name: graph.info(name).type.tensor_type for name in graph.inputs}
    shapes = {name: [max(1, dim.dim_value) for dim in kind.shape.dim] for name, kind in kinds.items()}
    try:
        part.run(given(graph, shapes, ""))
    except PlanError:
        pass  # an input that is no tensor
    except EngineError as error:  # not any numbers will do, which harms nobody
        if _OUT_OF_MEMORY.search(error.problem) or "given up after" in error.problem:
            raise PlanError(error.problem, "the model takes more than a bundle may") from error
    return names


def key(part: str, files: Mapping[str, FileEntry]) -> str:
    """What a part is known by: the hashes of its files, weights beside it included."""
    told = sorted((name, files[name].sha256) for name in part_files(part, files))
    return hashlib.sha256(repr(told).encode()).hexdigest()


def known(note: str) -> bool:
    """Whether a part was tried."""
    try:
        return (folder() / note).exists()
    except (OSError, ModelError):
        return False


def remember(note: str) -> None:
    """Notes that a part was tried; where that cannot be noted, it is tried again."""
    with suppress(OSError, ModelError):
        folder().mkdir(parents=True, exist_ok=True)
        (folder() / note).touch()


def folder() -> Path:
    """Where notes are."""
    return cache_folder().parent / "tried"


def _memory_bytes() -> int:
    """What this machine has, or this container may take."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # there is none, or it says "max"
        found = min(found, int(_CGROUP.read_text()))
    return found
