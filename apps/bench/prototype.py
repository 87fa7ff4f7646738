"""A reference engine: a folder with an engine.py (and what that builds), measured in turns with this engine.

engine.py has two classes:

    class Engine:
        def __init__(self, weights, format, max_context, threads): ...
        pos: int                        # positions that are filled; writable
        def step(self, ids): ...        # takes in token ids at `pos`; the last one's logits [vocab_size] f32
        def decode(self, context, n): ...  # microseconds of each of n steps that begin at `context` positions
        def prefill(self, n): ...       # microseconds for a prompt of n tokens

    class Batch:
        def __init__(self, engine, sequences, max_context): ...
        def decode(self, context, n): ...  # as above, of all sequences together

`weights` are f32 arrays under the names of a GGUF file (see `weights_of`), `format` is "q4" (4 bits) or "n4" (nested
planes, read at 4).
"""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.apps.bench.contenders import MAX_CONTEXT
from isthmus.engine.part import WeightSource
from isthmus.protocol.errors import EngineError
from isthmus.quant.groups import dequantize
from isthmus.quant.packed import PackedMatrix


class Prototype:
    """A contender on the weights of the given source, rounded to the reference's own formats.

    Raises:
        EngineError: the folder has no engine.py, or that cannot be used here.
    """

    def __init__(self, name: str, folder: Path, source: WeightSource, format: str, threads: int) -> None:
        self.name = name
        self._module = load(folder)
        self._engine = self._module.Engine(weights_of(source), format, MAX_CONTEXT, threads)
        self._batches: dict[int, Any] = {}

    def decode(self, context: int, batch: int, steps: int) -> list[float]:
        """See `Contender.decode`."""
        if batch == 1:
            return [us / 1e6 for us in self._engine.decode(context, steps)]
        if batch not in self._batches:
            self._batches[batch] = self._module.Batch(self._engine, batch, MAX_CONTEXT)
        return [us / 1e6 for us in self._batches[batch].decode(context, steps)]

    def prefill(self, tokens: int) -> float:
        """See `Contender.prefill`."""
        return float(self._engine.prefill(tokens)) / 1e6

    def logits(self, prompt: list[int], answer: list[int]) -> NDArray[np.float32]:
        """See `Contender.logits`."""
        self._engine.pos = 0
        return np.stack([self._engine.step(ids).copy() for ids in (prompt, *([token] for token in answer[:-1]))])


def load(folder: Path) -> ModuleType:
    """The prototype's driver as a module.

    Raises:
        EngineError: there is none, or it does not build on this machine.
    """
    if not (folder / "engine.py").is_file():
        raise EngineError(f"{folder} has no engine.py", "name the folder of a reference engine, or leave it out")
    spec = importlib.util.spec_from_file_location("isthmus_reference", folder / "engine.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EngineError(f"the reference in {folder} does not build: {error}") from error
    return module


def weights_of(source: WeightSource) -> dict[str, Any]:
    """A source's weights as float32 under the names of a GGUF file."""

    def dense(value: Any) -> Any:
        return dequantize(value) if isinstance(value, PackedMatrix) else np.asarray(value, np.float32)

    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up"}
    names |= {"down": "ffn_down", "attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}
    found = {"token_embd.weight": dense(source.embedding()), "output_norm.weight": dense(source.final_norm())}
    for i in range(source.config.n_layers):
        found |= {
            f"blk.{i}.{names[key]}.weight": dense(value) for key, value in source.layer(i).items() if key in names
        }
    return found
