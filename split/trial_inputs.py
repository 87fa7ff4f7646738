"""Inputs to try codecs on: a folder of pictures, or of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from isthmus.protocol.errors import PlanError
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.onnx_measure import given
from isthmus.split.pictures import SUFFIXES, Picture, Preprocess, found_in, read_preprocess
from isthmus.split.profile import TensorSize

MOST = 64  # inputs that are tried; of more, some of all parts
ARRAYS = ".npz"


@dataclass(frozen=True)
class Inputs:
    """See the module.

    Attributes:
        feeds: each one as the network takes it.
        pictures: that they were made of, by `preprocess`; none where the folder has arrays.
        name: of the input that is the picture.
    """

    feeds: list[Mapping[str, Any]]
    pictures: list[Picture] = field(default_factory=list)
    preprocess: Preprocess | None = None
    name: str = ""

    @property
    def how(self) -> Preprocess | None:
        """What is done with a picture, and for which input."""
        return None if self.preprocess is None else msgspec.structs.replace(self.preprocess, input=self.name)


def read_inputs(folder: Path, graph: OnnxGraph, sizes: Mapping[str, TensorSize], preprocess: str = "") -> Inputs:
    """What a folder has.

    Args:
        sizes: of the inputs that the network was profiled with; others do not fit.
        preprocess: the file that says what is done with pictures; "" where the folder has .npz files.

    Raises:
        PlanError: it has nothing that fits.
    """
    if not folder.is_dir():
        raise PlanError(f"there is no folder {folder}", "name one with pictures or .npz files")
    if preprocess:
        return _pictures(folder, graph, sizes, read_preprocess(Path(preprocess)))
    names = sorted(folder.glob(f"*{ARRAYS}"))
    if not names:
        if any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()):
            raise PlanError(f"{folder} has pictures", "say what is done with them: --preprocess FILE.json")
        raise PlanError(f"{folder} has no {ARRAYS} files", "write one for each input with numpy.savez")
    found: list[Mapping[str, Any]] = []
    for path in (names[at * len(names) // MOST] for at in range(MOST)) if len(names) > MOST else names:
        feeds = given(graph, {name: size.shape for name, size in sizes.items()}, str(path))
        for name, value in feeds.items():
            _check(name, value, sizes, path)
        found.append(feeds)
    return Inputs(found)


def _pictures(folder: Path, graph: OnnxGraph, sizes: Mapping[str, TensorSize], how: Preprocess) -> Inputs:
    name = how.input or (graph.inputs[0] if len(graph.inputs) == 1 else "")
    if name not in graph.inputs:
        problem = f"the model has no input {name!r}" if name else f"the model has {len(graph.inputs)} inputs"
        raise PlanError(problem, f'say in the preprocessing which is the picture: "input": "{graph.inputs[0]}"')
    rest = {one: size.shape for one, size in sizes.items() if one != name}
    others = {one: value for one, value in given(graph, {**rest, name: (1,)}, "").items() if one != name}
    pictures, feeds = list[Picture](), list[Mapping[str, Any]]()
    for path in found_in(folder, MOST):
        pictures.append(how.shown(path))
        feeds.append({**others, name: how.array(pictures[-1])})
        _check(name, feeds[-1][name], sizes, path)
    return Inputs(feeds, pictures, how, name)


def _check(name: str, value: Any, sizes: Mapping[str, TensorSize], path: Path) -> None:
    wanted = sizes.get(name)
    if wanted is not None and (str(value.dtype), tuple(value.shape)) != (wanted.dtype, tuple(wanted.shape)):
        raise PlanError(
            f"{path.name} gives {name!r} as {value.dtype} {list(value.shape)}",
            f"the model was profiled with {wanted.dtype} {list(wanted.shape)}",
        )
