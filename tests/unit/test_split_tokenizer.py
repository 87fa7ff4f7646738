"""Tokenizers built from GGUF metadata, their streams, and chat templates."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.protocol.errors import ModelError
from isthmus.split.manifest import TokenizerEntry
from isthmus.split.tokenizer import Tokenizer
from isthmus.split.tokenizer_gguf import SPLITS, merges_by_score, tokenizer_from_gguf


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [letters[byte] for byte in range(256)]


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "1 2", "12 3"]
TEMPLATE = (
    "{% for m in messages %}\n    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    tokens = [*SPECIAL, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 4] + [1] * (len(tokens) - 4),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


def sentencepiece(**changes: Any) -> dict[str, Any]:
    pieces = ["▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab", "abc"]
    scores = [-1, -2, -3, -4, -20, -10, -30, -40, -50]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [float(score) for score in scores],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


def texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([i], special=True) for i in ids]


def test_merges_and_pre_tokenizer_decide_the_tokens() -> None:
    tokenizer = tokenizer_from_gguf(byte_level())
    assert texts(tokenizer, tokenizer.encode("hello world")) == ["hello", " world"]
    assert texts(tokenizer, tokenizer.encode("123")) == ["1", "2", "3"]  # smollm: digits stand alone
    assert texts(tokenizer_from_gguf(byte_level("llama-bpe")), tokenizer.encode("x")) == ["x"]
    three = tokenizer_from_gguf(byte_level("llama-bpe", add_bos_token=False))
    assert texts(three, three.encode("1234")) == ["123", "4"]


@pytest.mark.parametrize("pre", SPLITS)
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=40))
def test_every_text_comes_back(pre: str, text: str) -> None:
    import unicodedata

    tokenizer = TOKENIZERS[pre]
    expected = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    ids = tokenizer.encode(text, special=False, bos=False)
    assert tokenizer.decode(ids, special=True) == expected
    stream = tokenizer.stream(special=True)
    assert "".join(stream.push(i) for i in ids) + stream.finish() == expected


TOKENIZERS = {pre: tokenizer_from_gguf(byte_level(pre)) for pre in SPLITS}


def test_special_tokens_only_where_asked_for() -> None:
    tokenizer = tokenizer_from_gguf(byte_level())
    assert tokenizer.encode("<|im_start|>hello<|im_end|>")[::2] == [1, 2]
    plain = tokenizer.encode("<|im_start|>hello", special=False)
    assert 1 not in plain and tokenizer.decode(plain) == "<|im_start|>hello"
    assert tokenizer.decode([1, *tokenizer.encode("hello"), 2]) == "hello"
    assert tokenizer.decode([1], special=True) == "<|im_start|>"


def test_first_and_last_tokens() -> None:
    tokenizer = tokenizer_from_gguf(byte_level())
    assert (tokenizer.bos, tokenizer.eos) == (1, (2, 0))
    assert tokenizer.encode("x") == tokenizer.encode("x", bos=False)
    assert tokenizer.encode("x", bos=True)[0] == 1
    llama3 = tokenizer_from_gguf(byte_level("llama-bpe"))
    assert llama3.encode("x")[0] == 1 and llama3.encode("x", bos=False)[0] != 1
    assert tokenizer.vocab_size == 4 + 256 + len(MERGES)


def test_a_bundle_keeps_all_of_it() -> None:
    tokenizer = tokenizer_from_gguf(byte_level())
    again = Tokenizer.from_entry(tokenizer.to_json(), tokenizer.entry)
    text = "<|im_start|>hello wörld 123 <tool>\n"
    assert again.encode(text) == tokenizer.encode(text) and again.entry == tokenizer.entry


def test_chat() -> None:
    tokenizer = tokenizer_from_gguf(byte_level())
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.render(messages) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render(messages, answer=False) == "<|im_start|>user\nhello<|im_end|>\n"
    assert tokenizer.chat(messages) == tokenizer.encode(tokenizer.render(messages))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "refuses"),
        ("{{ messages[7].content }}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
    ],
)
def test_templates_that_refuse_or_are_unsafe(template: str, says: str) -> None:
    tokenizer = Tokenizer.from_entry(TOKENIZERS["smollm"].to_json(), TokenizerEntry(chat_template=template))
    with pytest.raises(ModelError, match=says):
        tokenizer.render([{"role": "user", "content": "x"}])


def test_template_helpers() -> None:
    def render(template: str) -> str:
        entry = TokenizerEntry(chat_template=template, bos=1, eos=(2,))
        return Tokenizer.from_entry(TOKENIZERS["smollm"].to_json(), entry).render([{"role": "u", "content": "é"}])

    assert render("{{ bos_token }}{{ messages | tojson }}{{ eos_token }}") == (
        '<|im_start|>[{"role": "u", "content": "é"}]<|im_end|>'
    )
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    with pytest.raises(ModelError, match="no chat template"):
        Tokenizer.from_entry(TOKENIZERS["smollm"].to_json(), TokenizerEntry()).render([])


def test_a_stream_gives_whole_characters_only() -> None:
    tokenizer = TOKENIZERS["smollm"]
    stream, given = tokenizer.stream(), []
    for token in tokenizer.encode("a日é"):
        given.append(stream.push(token))
    assert given == ["a", "", "", "日", "", "é"]
    assert stream.push(tokenizer.encode("日")[:2]) == "" and stream.finish() == "\ufffd"
    assert stream.push(tokenizer.encode("ok")) == "ok" and stream.finish() == ""


def test_a_stream_recovers_from_broken_bytes() -> None:
    tokenizer = TOKENIZERS["smollm"]
    stream = tokenizer.stream()
    ids = [*tokenizer.encode("日")[:1], *tokenizer.encode("ok")]
    assert "".join(stream.push(i) for i in ids) + stream.finish() == "\ufffdok"


def test_sentencepiece_joins_the_best_score_first() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece())
    names = [tokenizer._backend.id_to_token(i) for i in tokenizer.encode("abc", bos=False)]
    assert names == ["▁a", "bc"]  # bc (-10) beats ab (-20), then ▁a is left
    assert tokenizer.encode("abc")[0] == 1


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", ["abc", " abc", "a  b", "日x\n", "a b c"])
def test_sentencepiece_texts_come_back(text: str, prefix: bool) -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece(add_space_prefix=prefix))
    ids = tokenizer.encode(text, bos=False)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) + stream.finish() == text


def test_merges_by_score() -> None:
    vocab = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    assert merges_by_score(vocab, [0, 0, 0, -2, -1, -3]) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "tokenizer None is not supported"),
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported; supported in GGUF files are gpt2, llama"),
        (byte_level("klingon"), "pre-tokenizer 'klingon' is not supported; supported are gpt-2"),
        (byte_level(merges=["no such", "x"]), "damaged"),
        (sentencepiece(scores=[1.0]), "no scores"),
        (sentencepiece(unknown_token_id=-1), "unknown token is -1"),
        ({"tokenizer.ggml.model": ["llama"]}, "is not supported"),
    ],
)
def test_tokenizers_that_are_not_supported(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        tokenizer_from_gguf(fields)


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZERS["smollm"].to_json())
    plain = Tokenizer.from_folder(tmp_path)
    assert plain.entry == TokenizerEntry()
    settings = {
        "bos_token": {"content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    full = Tokenizer.from_folder(tmp_path)
    assert full.entry == TokenizerEntry("tokenizer.json", "D", 1, (2, 0), False)
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_folder(tmp_path).entry.chat_template == "J"


def test_a_post_processor_tells_that_bos_is_wanted(tmp_path: Path) -> None:
    fields = json.loads(TOKENIZERS["smollm"].to_json())
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.entry.add_bos and tokenizer.encode("hello")[0] == 1


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("generation_config.json", b'{"eos_token_id": ["x"]}', r"eos_token_id is \['x'\]; it must be a token id"),
        ("config.json", b'{"eos_token_id": 1.5}', "eos_token_id is 1.5"),
        ("config.json", b'{"bos_token_id": true}', "bos_token_id is True"),
        ("tokenizer_config.json", b"[" * 100_000, "cannot read"),
        ("tokenizer_config.json", b"{", "cannot read"),
        ("chat_template.jinja", b"\xff\xfe", "cannot read"),
    ],
)
def test_damaged_files_beside_the_tokenizer(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZERS["smollm"].to_json())
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelError, match=says):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_fifo_in_a_checkpoints_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZERS["smollm"].to_json())
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match="not a regular file"):
        Tokenizer.from_folder(tmp_path)


def test_odd_chat_templates_are_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZERS["smollm"].to_json())
    for found in (5, [{"name": ["default"], "template": "D"}], [{"name": "default", "template": 1}], ["default"]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))
        assert Tokenizer.from_folder(tmp_path).entry.chat_template is None
    fields = byte_level() | {"tokenizer.chat_template": [1, 2]}
    assert tokenizer_from_gguf(fields).entry.chat_template is None


def test_a_text_without_tokens_is_an_error() -> None:
    data = b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "u"}}'
    with pytest.raises(ModelError, match="the tokenizer cannot take the text"):
        Tokenizer.from_entry(data, TokenizerEntry()).encode("b")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(?=(a+)+$)c"])
def test_a_pattern_that_searches_forever_is_an_error(tmp_path: Path, pattern: str) -> None:
    fields = json.loads(TOKENIZERS["smollm"].to_json())
    fields["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    tokenizer = Tokenizer.from_folder(tmp_path)
    with pytest.raises(ModelError, match=r"cannot take the text: Onig: .*retry-limit"):
        tokenizer.encode("a" * 5000 + "b")
    assert tokenizer.encode("a") == TOKENIZERS["smollm"].encode("a")


def test_ids_without_a_text_are_an_error() -> None:
    with pytest.raises(ModelError, match="cannot give the text"):
        TOKENIZERS["smollm"].decode([-1])


def test_damaged_tokenizer_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        Tokenizer.from_entry(b"\xff", TokenizerEntry())


def test_threads_share_a_tokenizer() -> None:
    tokenizer = TOKENIZERS["smollm"]
    text = "<|im_start|>hello"
    expected = {special: tokenizer.encode(text, special=special) for special in (True, False)}
    wrong: list[bool] = []

    def work(special: bool) -> None:
        wrong.extend(special for _ in range(200) if tokenizer.encode(text, special=special) != expected[special])

    threads = [threading.Thread(target=work, args=(special,)) for special in (True, False) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
