"""Tokenizers from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece's BPE with byte fallback ("llama")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from isthmus.protocol.errors import ModelError
from isthmus.split.manifest import TokenizerEntry
from isthmus.split.tokenizer import Tokenizer

Fields = Mapping[str, Any]
_CONTROL, _USER = 3, 4
# Tokens that end an answer whatever the metadata say.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `tokenizer.ggml.pre` -> the patterns that split a text, one after the other
SPLITS: Mapping[str, Sequence[str]] = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "qwen2": [_CONTRACTIONS + r"\p{N}" + _REST],
    "llama-bpe": [_CONTRACTIONS + r"\p{N}{1,3}" + _REST],
    "tekken": [_TEKKEN],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}
_IGNORE_MERGES = ("llama-bpe", "tekken")


def tokenizer_from_gguf(fields: Fields) -> Tokenizer:
    """The tokenizer that GGUF metadata describe.

    Raises:
        ModelError: there is none, it is damaged, or of a kind that is not supported.
    """
    kind = fields.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if not isinstance(kind, str) or kind not in builders:
        supported = ", ".join(builders)
        raise ModelError(f"tokenizer {kind!r} is not supported", f"supported in GGUF files are {supported}")
    try:
        return _build(fields, kind, builders[kind])
    except ModelError:
        raise
    except Exception as error:  # the tokenizers package raises bare Exception
        raise ModelError(f"the file's tokenizer is damaged: {error}", "fetch the model again") from error


def _build(fields: Fields, kind: str, builder: Callable[[Fields, Sequence[str]], Backend]) -> Tokenizer:
    tokens: list[str] = fields.get("tokenizer.ggml.tokens", [])
    types = [int(t) for t in fields.get("tokenizer.ggml.token_type", [1] * len(tokens))]
    backend = builder(fields, tokens)
    for wanted, special in ((_CONTROL, True), (_USER, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, of in zip(tokens, types, strict=False)
            if of == wanted
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    eos = [int(fields[f"tokenizer.ggml.{k}"]) for k in ("eos_token_id", "eot_token_id", "eom_token_id")
           if f"tokenizer.ggml.{k}" in fields]  # fmt: skip
    controls = {token: i for i, (token, of) in enumerate(zip(tokens, types, strict=False)) if of == _CONTROL}
    eos += [controls[token] for token in _ENDS if token in controls]
    bos = fields.get("tokenizer.ggml.bos_token_id")
    pre = fields.get("tokenizer.ggml.pre")
    template = fields.get("tokenizer.chat_template")
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _IGNORE_MERGES))
    entry = TokenizerEntry(
        "tokenizer.json",
        template if isinstance(template, str) else None,
        None if bos is None else int(bos),
        tuple(dict.fromkeys(eos)),
        add_bos and bos is not None,
    )
    return Tokenizer(backend, entry)


def _byte_level(fields: Fields, tokens: Sequence[str]) -> Backend:
    pre = str(fields.get("tokenizer.ggml.pre", "default"))
    if pre not in SPLITS:
        raise ModelError(f"pre-tokenizer {pre!r} is not supported", f"supported are {', '.join(SPLITS)}")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", [])]
    backend = Backend(models.BPE(vocab, merges, ignore_merges=pre in _IGNORE_MERGES))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Fields, tokens: Sequence[str]) -> Backend:
    scores = fields.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ModelError("the file's SentencePiece tokenizer has no scores", "fetch the model again")
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = int(fields.get("tokenizer.ggml.unknown_token_id", 0))
    if not 0 <= unknown < len(tokens):
        raise ModelError(f"the file's unknown token is {unknown} of {len(tokens)}", "fetch the model again")
    backend = Backend(
        models.BPE(vocab, merges_by_score(vocab, scores), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def merges_by_score(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best; as BPE that is a list of merges by score."""
    ranked = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-float(scores[index]), vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]
