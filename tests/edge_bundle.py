"""A bundle of a tiny random model with a tokenizer of bytes, as `isthmus split` would write it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from isthmus.engine.config import DecoderConfig, ExpertsConfig
from isthmus.quant.groups import quantize
from isthmus.quant.packed import PackedMatrix
from isthmus.split.exit_entry import Agreement, ExitEntry, exit_file
from isthmus.split.exit_writer import exit_bytes
from isthmus.split.manifest import TokenizerEntry
from isthmus.split.roles import Weights as LayerWeights
from isthmus.split.writer import write_bundle

CONFIG = DecoderConfig(
    family="llama",
    n_layers=4,
    d_model=64,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    d_ff=96,
    vocab_size=258,
    context_length=512,
    norm_eps=1e-5,
    rope_inv_freq=tuple(10_000.0 ** (-i / 8) for i in range(8)),
    tied=True,
)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


class Weights:
    """Random weights, the same for a seed."""

    def __init__(self, seed: int, experts: ExpertsConfig | None = None, format: str = "f32") -> None:
        self._seed, self.config, self._format = seed, replace(CONFIG, experts=experts), format

    def _matrix(self, name: str, rows: int, cols: int) -> PackedMatrix:
        seed = int.from_bytes(hashlib.sha256(f"{self._seed} {name}".encode()).digest()[:4], "little")
        values = np.random.default_rng(seed).standard_normal((rows, cols), np.float32) / np.float32(cols**0.5)
        return quantize(values * np.float32(2.0), self._format if " experts." in name else "f32")

    def embedding(self) -> PackedMatrix:
        return self._matrix("embed", CONFIG.vocab_size, CONFIG.d_model)

    def head(self) -> PackedMatrix:
        return self.embedding()

    def final_norm(self) -> NDArray[np.float32]:
        return np.ones(CONFIG.d_model, np.float32)

    def layer(self, index: int) -> dict[str, Any]:
        d, q, kv, ff = (
            CONFIG.d_model,
            CONFIG.n_heads * CONFIG.head_dim,
            CONFIG.n_kv_heads * CONFIG.head_dim,
            CONFIG.d_ff,
        )
        shapes = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        experts = self.config.experts
        names = [""] if experts is None else [f"experts.{e}." for e in range(experts.n_experts)]
        for name in names:
            shapes |= {f"{name}gate": (ff, d), f"{name}up": (ff, d), f"{name}down": (d, ff)}
        made: dict[str, Any] = {name: self._matrix(f"{index} {name}", *shape) for name, shape in shapes.items()}
        if experts is not None:
            made["router"] = np.random.default_rng(index).standard_normal((experts.n_experts, d)).astype(np.float32)
        return made | {"attn_norm": np.ones(d, np.float32), "ffn_norm": np.ones(d, np.float32)}


def tokenizer_json() -> bytes:
    """A token a byte, and two special ones."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<e>", "<a>"])
    return str(backend.to_str()).encode()


def write_tiny(folder: Path, seed: int = 0, experts: ExpertsConfig | None = None, format: str = "f32") -> Path:
    """A tiny model's bundle; the format is of its experts."""
    entry = TokenizerEntry("tokenizer.json", TEMPLATE, None, (256,), False)
    source = Weights(seed, experts, format)
    write_bundle(folder, source, name="tiny", weights=format, tokenizer=tokenizer_json(), entry=entry)
    return folder


def exit_weights(seed: int = 0, d_ff: int = 48) -> LayerWeights:
    """An exit of random weights for the tiny model."""
    rng = np.random.default_rng(seed)
    queries, keys = CONFIG.n_heads * CONFIG.head_dim, CONFIG.n_kv_heads * CONFIG.head_dim
    shapes = {
        "input": (CONFIG.d_model, CONFIG.d_model),
        "q": (queries, CONFIG.d_model),
        "k": (keys, CONFIG.d_model),
        "v": (keys, CONFIG.d_model),
    }
    shapes |= {
        "o": (CONFIG.d_model, queries),
        "gate": (d_ff, CONFIG.d_model),
        "up": (d_ff, CONFIG.d_model),
        "down": (CONFIG.d_model, d_ff),
    }
    found: dict[str, PackedMatrix | NDArray[np.float32]] = {
        name: quantize(rng.standard_normal(shape).astype(np.float32), "q4") for name, shape in shapes.items()
    }
    vectors = ("attn_norm", "ffn_norm", "final_norm", "channel_mean", "channel_spread")
    return found | {name: rng.random(CONFIG.d_model).astype(np.float32) for name in vectors}


def an_exit(
    model_id: str, layer: int = 2, seed: int = 0, tokens: NDArray[np.int32] | None = None
) -> tuple[ExitEntry, bytes]:
    """Its entry and its file."""
    count = 0 if tokens is None else len(tokens)
    entry = ExitEntry(layer, exit_file(layer), 48, count, Agreement(0.5, 0.6))
    return entry, exit_bytes(model_id, exit_weights(seed), tokens)
