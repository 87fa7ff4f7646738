"""Text to token ids and back, with a chat template and text that streams without breaking a character."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from isthmus.protocol.errors import ModelError
from isthmus.split.manifest import TokenizerEntry

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}


class Tokenizer:
    """A tokenizer of the `tokenizers` package with what its file cannot say. Safe to share between threads.

    Attributes:
        entry: chat template, first and last tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, entry: TokenizerEntry) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self.entry = entry

    @classmethod
    def from_entry(cls, data: bytes, entry: TokenizerEntry) -> Tokenizer:
        """From the bytes of a tokenizer.json.

        Raises:
            ModelError: they are none.
        """
        return cls(_parse(data), entry)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From a Hugging Face folder's tokenizer.json, tokenizer_config.json, chat_template.jinja and
        generation_config.json; only the first must be there.

        Raises:
            ModelError: tokenizer.json is missing or cannot be read.
        """
        try:
            backend = _parse((folder / "tokenizer.json").read_bytes())
        except OSError as error:
            raise ModelError(f"{folder} has no tokenizer.json", "save the tokenizer in its fast form") from error
        settings = _json(folder / "tokenizer_config.json")
        ids = {name: backend.token_to_id(_content(settings.get(name)) or "") for name in ("bos_token", "eos_token")}
        configs = [_json(folder / "generation_config.json"), _json(folder / "config.json")]
        bos = ids["bos_token"]
        if bos is None:
            bos = next((c["bos_token_id"] for c in configs if isinstance(c.get("bos_token_id"), int)), None)
        eos: list[int] = [] if ids["eos_token"] is None else [ids["eos_token"]]
        for config in configs:
            found = config.get("eos_token_id")
            eos += found if isinstance(found, list) else [] if found is None else [found]
        first = backend.encode("a", add_special_tokens=True).ids[:1]
        template = folder / "chat_template.jinja"
        chat = template.read_text(encoding="utf-8") if template.is_file() else _default(settings.get("chat_template"))
        add_bos = bos is not None and first == [bos] and backend.encode("a", add_special_tokens=False).ids[:1] != [bos]
        return cls(backend, TokenizerEntry("tokenizer.json", chat, bos, tuple(dict.fromkeys(eos)), add_bos))

    def to_json(self) -> bytes:
        """The bytes of tokenizer.json."""
        return str(self._backend.to_str()).encode()

    @property
    def bos(self) -> int | None:
        """The token that stands before a text, if the model has one."""
        return self.entry.bos

    @property
    def eos(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return self.entry.eos

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True, bos: bool | None = None) -> list[int]:
        """The ids of a text.

        Args:
            special: whether names of special tokens in the text become those tokens; else they are plain text.
            bos: whether `bos` is put first; None does what the model wants.
        """
        with self._lock:
            self._backend.encode_special_tokens = not special
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        first = self.entry.add_bos if bos is None else bos
        return [self.entry.bos, *ids] if first and self.entry.bos is not None else ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ids; names of special tokens only with `special`."""
        return str(self._backend.decode(list(ids), skip_special_tokens=not special))

    def stream(self, *, special: bool = False) -> TextStream:
        """Turns ids into text one by one."""
        return TextStream(self, special)

    def render(self, messages: Sequence[Message], *, answer: bool = True) -> str:
        """Messages written as the model's chat template has them.

        Args:
            answer: whether the opening of the assistant's answer is appended.

        Raises:
            ModelError: the model has no chat template, or the template refuses the messages.
        """
        from isthmus.split.chat import render

        if not self.entry.chat_template:
            raise ModelError("the model has no chat template", "send plain text instead (--raw)")
        names = {
            "bos_token": self._name(self.entry.bos),
            "eos_token": self._name(next(iter(self.entry.eos), None)),
        }
        return render(self.entry.chat_template, messages, answer, names)

    def chat(self, messages: Sequence[Message], *, answer: bool = True) -> list[int]:
        """The ids of rendered messages; the template itself writes `bos` where the model wants it.

        Raises:
            ModelError: as `render`.
        """
        return self.encode(self.render(messages, answer=answer), bos=False)

    def _name(self, token: int | None) -> str:
        return "" if token is None else str(self._backend.id_to_token(token) or "")


class TextStream:
    """Text of ids that arrive one by one; a character is given only when all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, special: bool) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._ids: list[int] = []  # decoded again with each new id: the last ones given, then those that wait
        self._given = 0

    def push(self, ids: int | Iterable[int]) -> str:
        """The text that further ids complete; often empty within a character of several tokens."""
        self._ids += [ids] if isinstance(ids, int) else ids
        before, now = self._texts()
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        before, now = self._texts()
        self._ids, self._given = [], 0
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._ids[: self._given], special=self._special), decode(self._ids, special=self._special)


def _parse(data: bytes) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the package raises bare Exception
        raise ModelError(f"tokenizer.json cannot be read: {error}", "fetch the model again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}", "fetch the model again") from error
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str | None:
    """A token's text; configs write it plain or as a mapping."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _default(template: Any) -> str | None:
    """The one chat template, or of several named ones that called "default"."""
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
