"""SmolLM2 in 4 bits, from its file through a bundle to the native engine, against float32 `transformers`.

The reference has the file's own dequantized weights, so what differs is the engine: int8 activations and f16 KV.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="torch is what the engine is held against; pip install torch transformers")
transformers = pytest.importorskip("transformers", reason="transformers is what the engine is held against")

from isthmus.apps.bench.quality import InFloat  # noqa: E402
from isthmus.engine.binding import cpu_names  # noqa: E402
from isthmus.engine.native_part import NativePart, open_native  # noqa: E402
from isthmus.engine.part import KvConfig, Rows, Want  # noqa: E402
from isthmus.split.bundle import Bundle  # noqa: E402
from isthmus.split.checkpoints import open_checkpoint  # noqa: E402
from isthmus.split.gguf_file import GgufFile  # noqa: E402
from isthmus.split.writer import write_bundle  # noqa: E402
from tests.conformance.smollm2 import HEAD_DIM, smollm2, values  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not cpu_names(), reason="the native engine is not built (no C compiler?)"),
    pytest.mark.timeout(600),
]

TOKENS = 40
PROMPTS = [
    "What is the capital of Italy?",
    "Write a short poem about the sea.",
    "Explain how a bicycle stays upright.",
    "List three uses of salt.",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
    "Tell me a story about a fox.",
    "What is 12 times 7?",
    "How do I boil an egg?",
    "Summarize the plot of Romeo and Juliet.",
]
_HF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def path() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def bundle(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundles") / "smollm2"
    source = open_checkpoint(path)
    tokenizer = source.tokenizer()
    write_bundle(folder, source, name=source.name, weights="keep", tokenizer=tokenizer.to_json(), entry=tokenizer.entry)
    return Bundle.open(folder)


def hf_name(name: str) -> str:
    """transformers' name of a GGUF tensor."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in names:
        return names[name]
    _, index, role, _ = name.split(".")
    return f"model.layers.{index}.{_HF_LAYER[role]}.weight"


@pytest.fixture(scope="module")
def reference(path: Path) -> Any:
    """LlamaForCausalLM in float32 with the numbers that the gguf package reads from the file."""
    file = GgufFile(path)
    fields = {key.removeprefix("llama."): value for key, value in file.fields.items()}
    config = transformers.LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=int(fields["embedding_length"]),
        intermediate_size=int(fields["feed_forward_length"]),
        num_hidden_layers=int(fields["block_count"]),
        num_attention_heads=int(fields["attention.head_count"]),
        num_key_value_heads=int(fields["attention.head_count_kv"]),
        head_dim=HEAD_DIM,
        max_position_embeddings=int(fields["context_length"]),
        rms_norm_eps=float(fields["attention.layer_norm_rms_epsilon"]),
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["rope.freq_base"])},
        tie_word_embeddings=True,
    )
    state = {}
    for name, tensor in file.tensors.items():
        state[hf_name(name)] = torch.from_numpy(values(tensor))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table does not come from the file
    return model.float().eval()


def reference_logits(model: Any, tokens: list[int], count: int) -> NDArray[np.float32]:
    """transformers' logits after each of the last `count` tokens, [count, vocab_size] f32."""
    with torch.no_grad():
        return np.asarray(model(torch.tensor([tokens]), logits_to_keep=count).logits[0].numpy())


def native_logits(part: NativePart, tokens: list[int], count: int) -> NDArray[np.float32]:
    """The same from the engine, in one step."""
    sequence, before = part.open(), len(tokens) - count
    rows = Rows().tokens(sequence, 0, tokens[:before], want=Want.NONE)
    rows.tokens(sequence, before, tokens[before:], want=Want.LOGITS, want_all=True)
    logits = part.step(rows).logits
    sequence.close()
    return logits


@dataclass(frozen=True)
class Answer:
    """What the reference says to a prompt: its greedy tokens, and the logits that they were taken from."""

    prompt: list[int]
    tokens: list[int]
    logits: NDArray[np.float32]  # [TOKENS, vocab_size]


@pytest.fixture(scope="module")
def part(bundle: Bundle) -> Iterator[NativePart]:
    opened = open_native(bundle, 0, bundle.config.n_layers, kv=KvConfig(max_tokens=1024))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def answers(bundle: Bundle, part: NativePart, reference: Any) -> list[Answer]:
    """The reference's greedy answers. The engine drafts, so that few passes of the reference decide all tokens."""
    tokenizer, out = bundle.tokenizer(), []
    for prompt in PROMPTS:
        start = tokenizer.chat([{"role": "user", "content": prompt}])
        draft: list[int] = []
        while True:
            sequence = part.open()
            token = part.step(Rows().tokens(sequence, 0, start + draft)).tokens[0]
            while len(draft) < TOKENS - 1:
                draft.append(token)
                token = part.step(Rows().tokens(sequence, sequence.length, [token])).tokens[0]
            sequence.close()
            logits = reference_logits(reference, start + draft, TOKENS)
            greedy = logits.argmax(axis=1).tolist()
            wrong = [i for i, token in enumerate(draft) if token != greedy[i]]
            if not wrong:
                out.append(Answer(start, greedy, logits))
                break
            draft = greedy[: wrong[0] + 1]
    return out


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each row."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    found: NDArray[np.float64] = (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    return found


def test_greedy_tokens_and_logits_are_the_references(answers: list[Answer], part: NativePart) -> None:
    same, cosines = [], []
    for answer in answers:
        found = native_logits(part, answer.prompt + answer.tokens[:-1], TOKENS)
        same.append(found.argmax(axis=1) == np.array(answer.tokens))
        cosines.append(cosine(found, answer.logits))
    share, mean = float(np.mean(same)), float(np.mean(cosines))
    print(f"greedy tokens equal: {share:.4f}; logit cosine: mean {mean:.6f}, least {np.min(cosines):.6f}")
    assert np.size(same) == len(PROMPTS) * TOKENS
    assert share >= 0.95
    assert mean > 0.9995


def test_the_reference_itself_makes_sense(bundle: Bundle, part: NativePart, reference: Any) -> None:
    """Two readers that err alike would agree on nonsense."""
    tokenizer = bundle.tokenizer()
    tokens = tokenizer.encode("The capital of Italy is")
    assert tokenizer.decode([int(reference_logits(reference, tokens, 1)[0].argmax())]) == " Rome"
    assert part.step(Rows().tokens(part.open(), 0, tokens)).tokens == tokenizer.encode(" Rome")


def test_in_float32_nothing_is_lost(answers: list[Answer], bundle: Bundle) -> None:
    answer = answers[0]
    part = open_native(InFloat(bundle), 0, bundle.config.n_layers, kv=KvConfig("f32", 256))
    found = native_logits(part, answer.prompt + answer.tokens[:-1], TOKENS)
    error = np.abs(found - answer.logits).max(axis=1) / np.abs(answer.logits).max(axis=1)
    assert error.max() < 2e-4, error
    assert found.argmax(axis=1).tolist() == answer.tokens
    part.close()


def surprise(part: NativePart, text: list[int], first: int, **window: int) -> float:
    """Mean negative log-likelihood, in nats, of the tokens from `first` on."""
    sequence, found = part.open(**window), []
    for at in range(0, len(text) - 1, 64):
        ids = text[at : min(at + 64, len(text) - 1)]
        logits = part.step(Rows().tokens(sequence, at, ids, want=Want.LOGITS, want_all=True)).logits.astype(np.float64)
        top = logits.max(axis=1)
        total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        found.append(total - logits[np.arange(len(ids)), text[at + 1 : at + 1 + len(ids)]])
    sequence.close()
    return float(np.concatenate(found)[first:].mean())


def test_sinks_save_a_sliding_window(bundle: Bundle, part: NativePart) -> None:
    """What a text is worth to a model that sees all of it, the last 128 tokens, and the first 16 as well."""
    licence = (Path(__file__).resolve().parents[2] / "LICENSE").read_text()
    text = bundle.tokenizer().encode(licence)[:700]
    whole, blind, sinks = (
        surprise(part, text, 300, **window) for window in ({}, {"window": 128, "sinks": 0}, {"window": 128})
    )
    print(f"nats a token: all {whole:.3f}, window {blind:.3f}, window and sinks {sinks:.3f}")
    assert whole < sinks < whole + 0.35 < blind
