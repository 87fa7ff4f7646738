"""A GGUF file of the shape of OLMoE-1B-7B with random 4-bit weights (Q4_0), and a stream of tokens to decode with it.

No two experts are alike. Tokens come in topics: the embeddings of a topic share a component, and a text stays with a
topic for a while. So routers, random as they are, choose many experts again from token to token, as trained ones do;
the shared component's size decides how many.
"""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from olmoe import ACTIVE, D_EXPERT, D_MODEL, EXPERTS, LAYERS, VOCAB

BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: an f16 scale, and 16 bytes with two codes each
TOPICS, STAY = 64, 24  # tokens of a topic that follow each other, on average
SHARED = 0.71  # of an embedding's length that its topic gives; its own component is the rest, squares adding up to 1
CODE_DEVIATION = 4.183  # of codes -7..7 with zero twice as likely
BRANCH = 0.35  # what attention and experts each add to the hidden state, whose embedding has length 1


def evened() -> NDArray[np.uint8]:
    """From any byte to one whose two codes are never -8: with it, codes would not be zero on average."""
    low, high = np.arange(256) & 15, np.arange(256) >> 4
    low, high = np.where(low, low, 8), np.where(high, high, 8)
    return (high << 4 | low).astype(np.uint8)


class Blocks:
    """Random Q4_0 matrices."""

    def __init__(self, seed: int) -> None:
        self._rng, self._even = np.random.default_rng(seed), evened()

    def matrix(self, *shape: int, gain: float = 1.0) -> NDArray[np.uint8]:
        """Bytes [..., rows, blocks * 18] of weights whose products with values of size 1 have size `gain`."""
        blocks = shape[-1] // BLOCK
        raw = np.frombuffer(self._rng.bytes(int(np.prod(shape[:-1])) * blocks * BLOCK_BYTES), np.uint8)
        found = self._even[raw].reshape(*shape[:-1], blocks, BLOCK_BYTES)
        scale = np.array([gain * shape[-1] ** -0.5 / CODE_DEVIATION], np.float16)
        found[..., :2] = scale.view(np.uint8)
        return found.reshape(*shape[:-1], blocks * BLOCK_BYTES)

    def normal(self, *shape: int) -> NDArray[np.float32]:
        """Standard normal numbers."""
        return self._rng.standard_normal(shape, np.float32)


def embeddings(blocks: Blocks) -> NDArray[np.uint8]:
    """Q4_0 rows [VOCAB, bytes]; token t is of topic t % TOPICS."""
    topics, own = blocks.normal(TOPICS, D_MODEL), blocks.normal(VOCAB, D_MODEL)
    own *= np.float32((1 - SHARED**2) ** 0.5)
    own += np.float32(SHARED) * topics[np.arange(VOCAB) % TOPICS]
    found: NDArray[np.uint8] = gguf.quants.quantize(own, Type.Q4_0)
    return found


def text(tokens: int, seed: int = 1) -> list[int]:
    """Tokens that stay with a topic for a while."""
    rng = np.random.default_rng(seed)
    topic, found = 0, list[int]()
    for _ in range(tokens):
        if rng.random() < 1 / STAY:
            topic = int(rng.integers(TOPICS))
        found.append(int(rng.integers(VOCAB // TOPICS)) * TOPICS + topic)
    return found


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges that a byte-level tokenizer accepts: all bytes, one pair, and names."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    pair = letters[:2]
    named = [f"<{i}>" for i in range(VOCAB - len(letters) - 1)]
    return [*letters, "".join(pair), *named], [" ".join(pair)]


def describe(writer: gguf.GGUFWriter, layers: int) -> None:
    """The metadata."""
    writer.add_name("OLMoE's shape")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(D_EXPERT)
    writer.add_head_count(16)
    writer.add_head_count_kv(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(ACTIVE)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def shapes(layers: int) -> dict[str, tuple[tuple[int, ...], float]]:
    """Each tensor's shape and gain; a gain of 0 stands for ones."""
    found: dict[str, tuple[tuple[int, ...], float]] = {"token_embd": ((VOCAB, D_MODEL), 1.0)}
    for i in range(layers):
        norms = ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm")
        of_layer: dict[str, tuple[tuple[int, ...], float]] = dict.fromkeys(norms, ((D_MODEL,), 0.0))
        of_layer |= {f"attn_{name}": ((D_MODEL, D_MODEL), 1.0) for name in "qkv"}
        of_layer["attn_output"] = ((D_MODEL, D_MODEL), BRANCH)
        of_layer["ffn_gate_inp"] = ((EXPERTS, D_MODEL), 1.0)
        of_layer |= {f"ffn_{name}_exps": ((EXPERTS, D_EXPERT, D_MODEL), 1.0) for name in ("gate", "up")}
        # SiLU of one times another is 0.6 on average, and so many experts with about 1/64 of the weight each add up
        of_layer["ffn_down_exps"] = ((EXPERTS, D_MODEL, D_EXPERT), 6 * BRANCH)
        found |= {f"blk.{i}.{name}": one for name, one in of_layer.items()}
    return found | {"output_norm": ((D_MODEL,), 0.0), "output": ((VOCAB, D_MODEL), 1.0)}


def values(name: str, shape: tuple[int, ...], gain: float, blocks: Blocks) -> NDArray[np.generic]:
    """A tensor's bytes, or f32 where it is a norm or a router."""
    if not gain:
        return np.ones(shape, np.float32)
    if name.endswith("gate_inp"):
        return blocks.normal(*shape) * np.float32(shape[-1] ** -0.5)
    return embeddings(blocks) if name == "token_embd" else blocks.matrix(*shape, gain=gain)


def write(path: Path, layers: int = LAYERS) -> Path:
    """Writes the file, 3.9 GB, a tensor at a time."""
    partial, blocks = path.with_suffix(".part"), Blocks(0)
    writer = gguf.GGUFWriter(partial, "olmoe")
    describe(writer, layers)
    listed = shapes(layers)
    for name, (shape, gain) in listed.items():
        packed = bool(gain) and not name.endswith("gate_inp")
        in_bytes = (*shape[:-1], shape[-1] // BLOCK * BLOCK_BYTES) if packed else shape
        writer.add_tensor_info(
            f"{name}.weight",
            in_bytes,
            np.dtype(np.uint8 if packed else np.float32),
            int(np.prod(in_bytes)) * (1 if packed else 4),
            raw_dtype=Type.Q4_0 if packed else Type.F32,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (shape, gain) in listed.items():
        writer.write_tensor_data(values(name, shape, gain, blocks))
    writer.close()
    return partial.rename(path)


def forget(path: Path) -> None:
    """Sees to it that the page cache holds nothing of a file; whoever reads it next is charged for its pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
