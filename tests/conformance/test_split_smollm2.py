"""The real model: every number that the file stands for, and llama.cpp's tokens. Skipped until it was fetched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isthmus.quant.groups import dequantize
from isthmus.quant.packed import PackedMatrix
from isthmus.split.checkpoints import Checkpoint, open_checkpoint
from isthmus.split.gguf_config import GGUF_NAMES
from isthmus.split.gguf_file import GgufFile
from tests.conformance.smollm2 import smollm2, values


@pytest.fixture(scope="module")
def path() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def source(path: Path) -> Checkpoint:
    return open_checkpoint(path)


def test_the_numbers_are_the_files(path: Path, source: Checkpoint) -> None:
    tensors = GgufFile(path).tensors
    assert source.config.n_layers == 30 and source.config.tied and source.name == "SmolLM2-135M-Instruct"
    assert source.embedding().format == "q8"
    assert np.array_equal(dequantize(source.embedding()), values(tensors["token_embd.weight"]))
    for index in (0, 13, 29):
        for role, value in source.layer(index).items():
            found = dequantize(value) if isinstance(value, PackedMatrix) else value
            assert np.array_equal(found, values(tensors[f"blk.{index}.{GGUF_NAMES[role]}"])), (index, role)
            assert not isinstance(value, PackedMatrix) or value.format == "q4m"


# What llama.cpp gives for these texts.
TOKENS = {
    "The capital of France is Paris.": [504, 3575, 282, 4649, 314, 7042, 30],
    "  two  spaces\n\n\tand a tab ": [216, 827, 216, 5600, 1116, 197, 397, 253, 10147, 216],
    "3.14159 and 1,000 in 2024": [35, 30, 33, 36, 33, 37, 41, 284, 216, 33, 28, 32, 32, 32, 281, 216, 34, 32, 34, 36],
    "don't I'll we've": [12420, 982, 339, 3060, 392, 3543],
    "naïve café “quotes” 日本語": [3546, 46494, 37366, 619, 385, 2346, 573, 17097, 241, 115, 40993, 179, 120, 248],
    "😀 def f(x):\r\n    return x**2": [10813, 242, 218, 753, 275, 24, 104, 727, 3136, 1003, 1792, 828, 34],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
    "½²Ⅷ ٣٤": [16738, 19133, 173, 223, 117, 216, 164, 113, 164, 114],
}


@pytest.mark.parametrize("text", TOKENS)
def test_tokens_are_llama_cpps(text: str, source: Checkpoint) -> None:
    tokenizer = source.tokenizer()
    assert tokenizer.encode(text) == TOKENS[text]
    assert tokenizer.decode(TOKENS[text], special=True) == text


def test_the_chat_template_and_the_ends(source: Checkpoint) -> None:
    tokenizer = source.tokenizer()
    assert (tokenizer.bos, tokenizer.eos, tokenizer.entry.add_bos) == (1, (2, 0), False)
    rendered = tokenizer.render([{"role": "user", "content": "Hi"}])
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
