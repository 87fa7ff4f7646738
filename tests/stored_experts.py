"""Random models as bundles whose experts are read from flash."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.edge.experts.store import ExpertStore, StoreReport
from isthmus.engine.config import DecoderConfig
from isthmus.engine.native_part import NativePart
from isthmus.engine.routing import Routing
from isthmus.split.bundle import Bundle
from isthmus.split.manifest import TokenizerEntry
from isthmus.split.writer import write_bundle
from tests.native_tools import open_part
from tests.random_model import RandomModel


def full_store(resident: int) -> Any:
    """What is asked of a store with so many bytes in memory that has read nothing since."""
    nothing = SimpleNamespace(bytes=0, busy=0.0)
    return SimpleNamespace(
        report=lambda: StoreReport(resident, resident, 0, 0, 0, 0), reader=SimpleNamespace(report=lambda: nothing)
    )


class _Named:
    """A model under a family's name that bundles know."""

    def __init__(self, model: RandomModel) -> None:
        self.embedding, self.layer = model.embedding, model.layer
        self.final_norm, self.head = model.final_norm, model.head
        self.config: DecoderConfig = replace(model.config, family="qwen3_moe")


def stored(model: RandomModel, folder: Path) -> Bundle:
    """The model as a bundle."""
    entry = TokenizerEntry()
    write_bundle(folder, _Named(model), name="random", weights="keep", tokenizer=b"{}", entry=entry, force=True)
    return Bundle.open(folder)


def record_bytes(bundle: Bundle) -> int:
    """The bytes of the bundle's largest expert."""
    config = bundle.config
    return max(bundle.records(layer).record_bytes for layer in range(config.n_layers) if config.experts_of(layer))


@contextmanager
def paged(
    bundle: Bundle, budget: int, *, threads: int = 1, **settings: Any
) -> Iterator[tuple[NativePart, ExpertStore]]:
    """A part of all layers, and the store that its experts come from."""
    store = ExpertStore(bundle, budget, **settings)
    part = open_part(bundle.without_experts(), threads=threads, experts=store)
    try:
        yield part, store
    finally:
        part.close()
        store.close()


def record(chosen: list[list[int]]) -> Routing:
    """The same experts in all three layers, foreseen rightly."""
    named: NDArray[np.int32] = np.repeat(np.array(chosen, np.int32)[:, None], 3, axis=1)
    return Routing(named, np.full(named.shape, 0.5, np.float32), named)
