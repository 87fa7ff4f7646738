"""Reads the experts that a placement gives to memory before the first token is computed.

No kernel knows of this: single layers are stepped over a state that nobody looks at, with a router that names those
experts. Behind that they count as often used as the placement's text used them, so that eviction begins where it would
be had it seen that text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from isthmus.edge.experts.store import ExpertStore
from isthmus.engine.native_layers import HALF_LIFE
from isthmus.engine.native_part import NativePart
from isthmus.engine.part import KV_BLOCK, Rows, Want
from isthmus.engine.placement import Placement
from isthmus.engine.routing import Routing
from isthmus.protocol.errors import DeviceError
from isthmus.split.bundle import Bundle

_AGAIN = "make one for this bundle: isthmus experts place BUNDLE --text FILE -o FILE"


def check(placement: Placement, bundle: Bundle) -> None:
    """Refuses a placement that says nothing about a device's memory for this model.

    Raises:
        DeviceError: it is another model's, or one of workers, or experts cannot be read before a token is there.
    """
    config, experts = bundle.config, bundle.config.experts
    if placement.model != bundle.model_id:
        problem = f"the placement is for {placement.name[:60]} ({placement.model[:40]}), not for {bundle.name}"
        raise DeviceError(f"{problem} ({bundle.model_id})", _AGAIN)
    if placement.kind != "device":
        raise DeviceError("the placement is one of workers, not of a device", "make one with --expert-mb")
    sizes = [experts.n_experts if experts and config.experts_of(i) else 0 for i in range(config.n_layers)]
    if [len(row) for row in placement.stands] != sizes:
        raise DeviceError("the placement has other layers or experts than the model", _AGAIN)
    if experts is not None and experts.pre_gate:
        raise DeviceError(
            f"{bundle.name} chooses experts one layer ahead: none can be read by themselves", "leave the placement out"
        )


def within(placement: Placement, store: ExpertStore) -> list[NDArray[np.int64]]:
    """For each layer that is here the placement's experts of memory, the least used first; where the budget is smaller
    than the placement's, the most used of all layers that fit."""
    memory, uses = placement.memory[: store.n_layers], placement.uses
    order = sorted(((uses[layer][e], layer, int(e)) for layer, row in enumerate(memory) for e in row), reverse=True)
    left, kept = store.budget, set[tuple[int, int]]()
    for _, layer, expert in order:
        left -= store.expert_bytes(layer)
        if left < 0:
            break
        kept.add((layer, expert))
    return [np.array([e for e in row if (layer, e) in kept], np.int64) for layer, row in enumerate(memory)]


def warm(part: NativePart, store: ExpertStore, placement: Placement) -> int:
    """Reads a placement's experts of memory, and waits for them.

    Args:
        part: all the store's layers, with no sequence under way.

    Returns:
        How many experts were read.

    Raises:
        DeviceError: the disk does not give them.
        BundleError: one was altered or is damaged.
    """
    experts = part.config.experts
    assert experts is not None
    held = within(placement, store)
    with part.lock:
        foresees, store.foresee = store.foresee, False
        part.record(0)  # takes over what the store foresees
        part.tolerate(None)  # all planes, whatever the shares
        try:
            for layer, row in enumerate(held):
                rows = _rows(row, experts.top_k)
                for at in range(0, len(rows), KV_BLOCK):
                    _read(part, layer, rows[at : at + KV_BLOCK])
        finally:
            part.replay(None)
            store.foresee = foresees
            part.record(0)
            part.tolerate(store.tolerance)
        _believe(store, placement)
    return sum(map(len, held))


def _rows(experts: NDArray[np.int64], top_k: int) -> NDArray[np.int64]:
    """A layer's experts as rows of as many as a token takes, [n, top_k]: the last row has some of the others, too, and
    an expert twice only where there is no other."""
    if len(experts) < top_k:
        return np.resize(experts, (min(1, len(experts)), top_k))
    whole = len(experts) // top_k * top_k
    rows = experts[:whole].reshape(-1, top_k)
    return rows if whole == len(experts) else np.concatenate([rows, experts[None, -top_k:]])


def _read(part: NativePart, layer: int, rows: NDArray[np.int64]) -> None:
    """Steps one layer with rows that take these experts, [n, top_k]."""
    chosen = np.zeros((len(rows), part.end - part.start, rows.shape[1]), np.int32)
    chosen[:, layer] = rows
    part.replay(Routing(chosen, np.ones(chosen.shape, np.float32), chosen))
    sequence = part.open()
    try:
        hidden = np.ones((len(rows), part.config.d_model), np.float32)
        part.step(Rows().hidden(sequence, 0, hidden, enter=layer, leave=layer + 1, want=Want.NONE))
    finally:
        sequence.close()


def _believe(store: ExpertStore, placement: Placement) -> None:
    """Lets every expert count as it would if the placement's text went before: a use a step, halved each half-life."""
    tables = store.tables
    steady, now = 1 / (1 - 0.5 ** (1 / HALF_LIFE)), int(tables.last.max())
    for layer in range(store.n_layers):
        if placement.uses[layer]:
            share = np.array(placement.uses[layer], np.float32)[:, None]
            tables.rate[layer], tables.last[layer] = share * np.float32(steady), now
            tables.layer(layer).count_anew()
