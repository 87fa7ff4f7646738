"""Whether a part fits into this device's memory: a pure function of file sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from isthmus.engine.config import DecoderConfig
from isthmus.engine.part import KV_BLOCK, KvConfig
from isthmus.protocol.errors import DeviceError

MB = 1_000_000
OVERHEAD_BYTES = 100 * MB  # interpreter, numpy, tokenizer and scratch buffers, measured on Linux with SmolLM2
_KV_ITEM_BYTES = {"f16": 2, "f32": 4}


@dataclass(frozen=True, slots=True)
class PartSizes:
    """Bytes of a bundle's weights.

    Attributes:
        embed: the embedding.
        head: the last norm and the output head (the norm alone when the head is the embedding).
        layers: each layer, its experts with it where they all stay in memory.
        experts: what all layers' experts share otherwise.
    """

    embed: int
    head: int
    layers: tuple[int, ...]
    experts: int = 0

    @classmethod
    def from_files(cls, n_layers: int, file_bytes: Mapping[str, int], expert_budget: int | None = None) -> PartSizes:
        """From the sizes in a bundle's manifest, by file name.

        Args:
            expert_budget: bytes that experts may take in memory, None for all of them.
        """
        size = {name.rpartition("/")[2].removesuffix(".safetensors"): bytes_ for name, bytes_ in file_bytes.items()}
        resident = expert_budget is None
        layers = tuple(
            size.get(f"layer-{i:03d}", 0) + (size.get(f"experts-{i:03d}", 0) if resident else 0)
            for i in range(n_layers)
        )
        return cls(size.get("embed", 0), size.get("norm", 0) + size.get("head", 0), layers, expert_budget or 0)

    def weights_bytes(self, end: int) -> int:
        """Bytes of layers [0, end), with the head when those are all layers."""
        return self.embed + self.experts + sum(self.layers[:end]) + (self.head if end == len(self.layers) else 0)


def kv_bytes(config: DecoderConfig, n_layers: int, kv: KvConfig) -> int:
    """Bytes of the KV of `n_layers` layers when the pool is full."""
    positions = -(-kv.max_tokens // KV_BLOCK) * KV_BLOCK
    return n_layers * 2 * config.n_kv_heads * config.head_dim * positions * _KV_ITEM_BYTES[kv.format]


def needed_bytes(sizes: PartSizes, config: DecoderConfig, kv: KvConfig, end: int) -> int:
    """Memory of a process that runs layers [0, end): weights, KV and overhead."""
    return sizes.weights_bytes(end) + kv_bytes(config, end, kv) + OVERHEAD_BYTES


def layers_that_fit(sizes: PartSizes, config: DecoderConfig, kv: KvConfig, memory_mb: float) -> int:
    """The largest k for which layers [0, k) fit into `memory_mb` (10^6 bytes); 0 when not even one does."""
    fits = 0
    for end in range(1, len(sizes.layers) + 1):
        if needed_bytes(sizes, config, kv, end) > memory_mb * MB:
            break
        fits = end
    return fits


def refusal(sizes: PartSizes, config: DecoderConfig, kv: KvConfig, memory_mb: float, end: int) -> DeviceError:
    """The error for layers [0, end) that do not fit, naming what does."""
    need, fits, whole = needed_bytes(sizes, config, kv, end) / MB, layers_that_fit(sizes, config, kv, memory_mb), ""
    if end == config.n_layers:
        whole = "the whole model, "
    problem = (
        f"{whole}layers [0, {end}) need {need:.0f} MB (weights {sizes.weights_bytes(end) / MB:.0f}, KV of "
        f"{kv.max_tokens} tokens {kv_bytes(config, end, kv) / MB:.0f}, overhead {OVERHEAD_BYTES / MB:.0f}) and the "
        f"budget is {memory_mb:g} MB"
    )
    if fits:
        return DeviceError(problem, f"{fits} of {config.n_layers} layers fit: use split mode with a cut up to {fits}")
    return DeviceError(problem, "no layer fits: use stream mode, fewer KV tokens, or a larger budget")
