"""Text to token ids and back, with a chat template and text that streams without breaking a character."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from isthmus.protocol.errors import ModelError
from isthmus.split.files import read_regular
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
            ModelError: tokenizer.json is missing, or one of them cannot be read.
        """
        try:
            backend = _parse(read_regular(folder / "tokenizer.json"))
        except OSError as error:
            problem = f"{folder} has no tokenizer.json ({error.strerror})"
            raise ModelError(problem, "save the tokenizer in its fast form") from error
        settings = _json(folder / "tokenizer_config.json")
        ids = {name: backend.token_to_id(_content(settings.get(name)) or "") for name in ("bos_token", "eos_token")}
        configs = [_json(folder / "generation_config.json"), _json(folder / "config.json")]
        bos = ids["bos_token"]
        if bos is None:
            bos = next((id_ for config in configs for id_ in _ids(config, "bos_token_id")), None)
        eos: list[int] = [] if ids["eos_token"] is None else [ids["eos_token"]]
        for config in configs:
            eos += _ids(config, "eos_token_id")
        with _refusing("the tokenizer cannot take the text"):
            first, plain = (backend.encode("a", add_special_tokens=special).ids[:1] for special in (True, False))
        chat = _text(folder / "chat_template.jinja")
        if chat is None:
            chat = _default(settings.get("chat_template"))
        add_bos = bos is not None and first == [bos] and plain != [bos]
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

        Raises:
            ModelError: the tokenizer has no token for a part of the text.
        """
        with _refusing("the tokenizer cannot take the text"), self._lock:
            self._backend.encode_special_tokens = not special
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        first = self.entry.add_bos if bos is None else bos
        return [self.entry.bos, *ids] if first and self.entry.bos is not None else ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ids; names of special tokens only with `special`.

        Raises:
            ModelError: the tokenizer has no text for them.
        """
        with _refusing("the tokenizer cannot give the text"):
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


@contextmanager
def _refusing(problem: str) -> Iterator[None]:
    """Turns what the package raises into errors: bare exceptions, and panics, which are not even those.

    It panics when a pattern of tokenizer.json makes its search go on for too long.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # which has no public name
            raise
        raise ModelError(f"{problem}: {error}", "fetch the model again") from error


def _parse(data: bytes) -> tokenizers.Tokenizer:
    with _refusing("tokenizer.json cannot be read"):
        backend = tokenizers.Tokenizer.from_buffer(data)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _json(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        found = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}", "fetch the model again") from error
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str | None:
    """A file's text; None when there is no such file."""
    try:
        return read_regular(path).decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeError) as error:
        raise ModelError(f"cannot read {path}: {error}", "fetch the model again") from error


def _ids(config: dict[str, Any], name: str) -> list[int]:
    """The token ids, one or several, of a config's setting.

    Raises:
        ModelError: there is something else.
    """
    found = config.get(name)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(id_) is int for id_ in ids):
        raise ModelError(f"{name} is {str(found)[:60]}", "it must be a token id or several; mend the model's config")
    return ids


def _content(token: Any) -> str | None:
    """A token's text; configs write it plain or as a mapping."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _default(template: Any) -> str | None:
    """The one chat template, or of several named ones that called "default"."""
    if isinstance(template, list):
        named = [t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0] if named else None
    return template if isinstance(template, str) else None
