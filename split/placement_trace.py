"""What a placement is made from: a bundle's routing along texts, and the bytes of its experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig, ExpertsConfig
from isthmus.engine.routing import Routing, RoutingFile
from isthmus.protocol.errors import PlanError
from isthmus.split.bundle import Bundle

DOCUMENT = 512  # tokens of a document at most


def expert_layers(config: DecoderConfig) -> list[int]:
    """The layers of a model that have experts."""
    return [layer for layer in range(config.n_layers) if config.experts_of(layer)]


def mixture(bundle: Bundle) -> ExpertsConfig:
    """What a bundle's layers with experts have in common.

    Raises:
        PlanError: it has none.
    """
    if bundle.config.experts is None:
        raise PlanError(f"{bundle.name} has no experts to place", "isthmus moefy makes a mixture of a dense model")
    return bundle.config.experts


def expert_bytes(bundle: Bundle, planes: int = 0) -> NDArray[np.int64]:
    """Bytes of an expert of each layer that has any, int64 [layers].

    Args:
        planes: leading ones that are used, 0 for all.

    Raises:
        PlanError: the model has no experts.
        BundleError: a file of experts is absent or was altered.
    """
    mixture(bundle)
    sizes = [bundle.records(layer).plane_sizes for layer in expert_layers(bundle.config)]
    return np.array([sum(one[: planes or len(one)]) for one in sizes], np.int64)


def recorded(
    bundle: Bundle, texts: Iterable[str], positions: int, *, threads: int = 0, tell: Callable[[int], None] | None = None
) -> RoutingFile:
    """Which experts a model takes along texts; each text begins a new sequence.

    Args:
        positions: tokens in all, at most.
        tell: called with the tokens that are done.

    Raises:
        PlanError: the model has no experts, or the texts have fewer than two tokens.
    """
    from isthmus.engine.native_part import open_native
    from isthmus.engine.part import KvConfig
    from isthmus.engine.recording import along, joined

    experts = mixture(bundle)
    part = open_native(
        bundle, 0, bundle.config.n_layers, threads=threads, kv=KvConfig(max_tokens=DOCUMENT + 16)
    )  # all in memory
    tokenizer, found, count = bundle.tokenizer(), list[Routing](), 0
    try:
        for text in texts:
            tokens = tokenizer.encode(text)[: min(DOCUMENT, bundle.config.context_length, positions - count)]
            if not tokens:
                continue
            found.append(along(part, tokens))
            count += len(tokens)
            if tell is not None:
                tell(count)
            if count >= positions:
                break
    finally:
        part.close()
    if count < 2:
        raise PlanError(f"the text has {count} tokens", "give one to learn from and one to be held out, better 2,000")
    return RoutingFile(joined(found), bundle.model_id, experts.n_experts)


def checked(bundle: Bundle, file: RoutingFile) -> NDArray[np.int32]:
    """The experts along the text in the layers that have any, int32 [positions, layers, top_k].

    Raises:
        PlanError: the routing is another model's.
    """
    config, experts = bundle.config, mixture(bundle)
    chosen, own = file.routing.chosen, (config.n_layers, experts.top_k)
    if chosen.shape[1:] != own or file.n_experts != experts.n_experts:
        raise PlanError(
            f"the routing is of {chosen.shape[1]} layers with {chosen.shape[2]} of {file.n_experts} experts, and "
            f"{bundle.name} has {own[0]} with {own[1]} of {experts.n_experts}",
            "record it with this bundle: --text FILE",
        )
    if file.model != bundle.model_id:
        raise PlanError(
            f"the routing was recorded with the model {file.model[:40]}, and {bundle.name} is {bundle.model_id}",
            "record it with this bundle: --text FILE",
        )
    if len(chosen) < 2:
        raise PlanError("the routing is of a single token", "one to learn from and one to be held out are needed")
    return np.ascontiguousarray(chosen[:, expert_layers(config)])
