"""A conversation in a file, written as it goes on, so that it can be taken up again after anything."""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, get_args

from isthmus.edge.chat import parse
from isthmus.edge.lane import Lane
from isthmus.edge.options import MOST, GenerateOptions
from isthmus.edge.token import Source
from isthmus.protocol.errors import DeviceError, IsthmusError

VERSION = 2
_EPOCHS = 1024  # that a lane may have gone through since it was last written down


@dataclass(slots=True)
class Unfinished:
    """An answer that was cut off.

    Attributes:
        base: tokens of the log before it.
        options: how it was asked for, as `GenerateOptions.to_dict` gives it.
        asked: the messages that it answers, None without a chat.
    """

    base: int
    options: dict[str, Any]
    asked: list[dict[str, str]] | None


@dataclass(slots=True)
class Kept:
    """What a file holds of a conversation.

    Attributes:
        tokens: the token log.
        sources: where the tokens of the last answer were computed.
        messages: of the chat, its last answer included.
        told: whether the messages tell all that stands in the log.
        lanes: (alias, session, enter, epoch, codec) of each.
        unfinished: the last answer, where it did not come to its end.
        finish: how it ended, as in `Stats`; empty where nothing was said.
    """

    tokens: list[int] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    told: bool = True
    lanes: dict[int, tuple[int, bytes, int, int, str]] = field(default_factory=dict)
    unfinished: Unfinished | None = None
    finish: str = ""


class Journal:
    """See the module: one record a line, each with a checksum of all up to it; a torn last line is forgotten.

    A killed process loses nothing that it had written. What only the power's loss can lose is the last second or so.

    Args:
        path: made when it is not there; only its owner may read it.
        model_id, name: of the model that the conversation is with.

    Attributes:
        kept: what the file held when it was opened.

    Raises:
        DeviceError: it cannot be written, is in use, no conversation, damaged, or with another model.
    """

    def __init__(self, path: str | Path, model_id: str, name: str) -> None:
        self._path, self._model_id, self._name = Path(path), model_id, name
        self.kept = Kept()
        self._known: dict[int, tuple[int, bytes, int, int, str]] = {}
        self._sum = 0  # of all records so far
        self._unsure = 0  # tokens at the log's end that nobody confirmed
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600)
            self._file: IO[bytes] = os.fdopen(descriptor, "r+b")
        except OSError as error:  # one that cannot be sought has no errno
            raise DeviceError(f"{path} cannot be written: {error.strerror or error}", "name another file") from error
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise DeviceError(f"{path} is no file that can be kept", "name a file of its own")
            self._lock()
            os.fchmod(self._file.fileno(), 0o600)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def said(self, tokens: Sequence[int], source: Source | None = None) -> None:
        """The log has grown; `source` tells an answer's tokens from a prompt's."""
        if tokens:
            self._write("tokens", list(tokens), source)

    def cut(self, length: int) -> None:
        """The log is cut back."""
        self._write("cut", length)

    def began(self, base: int, options: dict[str, Any], asked: list[dict[str, str]] | None) -> None:
        """An answer begins; as in `Unfinished`."""
        self._write("asked", base, options, asked)

    def ended(self, messages: list[dict[str, str]], finish: str, unsure: int = 0) -> None:
        """An answer has come to its end, or its reader has gone, and the chat is this now.

        Args:
            unsure: its last tokens, which nobody confirmed: who opens the file goes on before them, if nothing was said
                since.
        """
        self._write("ended", messages, "cancelled" if unsure else finish)
        if unsure:
            self._write("unsure", unsure)
        with suppress(OSError):
            os.fsync(self._file.fileno())

    def lane(self, lane: Lane) -> None:
        """A lane may have got another session or epoch."""
        now = (lane.alias, lane.session, lane.enter, lane.epoch, lane.codec)
        if self._known.get(lane.alias) != now:
            self._known[lane.alias] = now
            self._write("lane", lane.alias, lane.session.hex(), lane.enter, lane.epoch, lane.codec)

    def restore(self, lane: Lane) -> None:
        """Gives a fresh lane the session that it had, with an epoch above all that it may have used."""
        kept = self.kept.lanes.get(lane.alias)
        if kept is not None and (kept[2], kept[4]) == (lane.enter, lane.codec):
            lane.session, lane.epoch = kept[1], kept[3] + _EPOCHS

    def close(self) -> None:
        """Ends writing."""
        with suppress(OSError):  # what does not fit on a full disk was said when it was written
            self._file.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not on this system
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DeviceError(
                f"{self._path} is in use by another device", "end that one, or name another file"
            ) from error

    def _read(self) -> None:
        sound = 0
        for number, (end, body) in enumerate(self._records(), 1):
            try:
                record = json.loads(body)
                if number > 1:
                    self._replay(*record)
            except (TypeError, ValueError, KeyError, AttributeError, RecursionError, IsthmusError) as error:
                raise self._damaged(number) if number > 1 else self._foreign() from error
            if number == 1:
                self._check(record)
            sound = end
        self._file.seek(sound)
        self._file.truncate()
        if self._unsure:
            length = len(self.kept.tokens) - self._unsure
            self._replay("cut", length)
            self.cut(length)
        if not sound:
            self._write("isthmus", VERSION, self._model_id, self._name)

    def _records(self) -> Iterator[tuple[int, bytes]]:
        """Where each record ends, and its JSON."""
        data = self._file.read()
        lines = data.split(b"\n")
        end = 0
        for number, line in enumerate(lines[:-1]):
            end += len(line) + 1
            body = line[9:]
            told = zlib.crc32(body, self._sum)
            if line[:9] != b"%08x " % told:
                if not number:
                    raise self._foreign()
                if end == len(data):
                    return  # the last one, torn
                raise self._damaged(number + 1)
            self._sum = told
            yield end, body
        if len(lines) == 1 and not _torn_head(data):
            raise self._foreign()

    def _check(self, record: Any) -> None:
        if not isinstance(record, list) or len(record) != 4 or record[0] != "isthmus":
            raise self._foreign()
        _, version, model_id, name = record
        if version != VERSION:
            raise DeviceError(f"{self._path} was written by another version of isthmus", "name another file")
        if not isinstance(model_id, str) or not isinstance(name, str):
            raise self._foreign()
        if model_id != self._model_id:
            problem = f"{self._path} holds a conversation with {name} ({model_id[:12]}) and not {self._name}"
            raise DeviceError(problem, "use that model's bundle, or name another file")

    def _replay(self, kind: str, *told: Any) -> None:
        kept = self.kept
        if kind in ("tokens", "cut", "asked"):
            self._unsure = 0
        if kind == "tokens":
            ids, source = told
            kept.tokens += [_number(token, MOST) for token in ids]
            if source in get_args(Source):
                kept.sources += [source] * len(ids)
            else:
                kept.unfinished, kept.told = None, False  # a prompt: nobody goes on with the answer before it
        elif kind == "cut":
            (length,) = told
            del kept.tokens[_number(length, len(kept.tokens)) :]
            if kept.unfinished is not None and length < kept.unfinished.base:
                kept.unfinished = None
            if kept.unfinished is not None:
                del kept.sources[length - kept.unfinished.base :]
            kept.told = False
            if not length:
                kept.messages = []
        elif kind == "asked":
            base, options, asked = told
            if _number(base, MOST) != len(kept.tokens):
                raise ValueError(base)
            asked = None if asked is None else _messages(asked)
            kept.unfinished, kept.sources, kept.told = Unfinished(base, _options(options), asked), [], False
        elif kind == "ended":
            messages, finish = told
            kept.messages, kept.told, kept.finish = _messages(messages), True, str(finish)
            if finish != "cancelled":
                kept.unfinished = None
        elif kind == "unsure":
            (count,) = told
            self._unsure = _number(count, len(kept.sources))
        elif kind == "lane":
            alias, session, enter, epoch, codec = told
            name = bytes.fromhex(session)
            if len(name) != 16 or not isinstance(codec, str):
                raise ValueError(told)
            layer, passed = _number(enter, 2**16 - 1), _number(epoch, MOST)
            kept.lanes[alias] = (_number(alias, MOST), name, layer, passed, codec)
        else:
            raise ValueError(kind)

    def _write(self, *record: Any) -> None:
        body = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")
        self._sum = zlib.crc32(body, self._sum)
        try:
            self._file.write(b"%08x " % self._sum + body + b"\n")
            self._file.flush()
        except OSError as error:
            raise DeviceError(
                f"{self._path} cannot be written: {error.strerror}", "make room, or name another file"
            ) from error

    def _damaged(self, number: int) -> DeviceError:
        return DeviceError(f"{self._path} is damaged in line {number}", "remove it and begin anew")

    def _foreign(self) -> DeviceError:
        return DeviceError(f"{self._path} is no conversation of isthmus", "name another file")


def _number(value: Any, most: int) -> int:
    """A whole number in 0..most, which a bool is not."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(value)
    return value


def _messages(told: Any) -> list[dict[str, str]]:
    """Messages as they were written: mappings of texts."""
    if not isinstance(told, list) or not all(isinstance(text, str) for one in told for text in one.values()):
        raise TypeError(told)
    return [one.to_dict() for one in parse(told)]


def _options(told: Any) -> dict[str, Any]:
    """Options of an answer as they were written, with what they did not name."""
    read = GenerateOptions.read(told)
    sampling, most = read.sampling, 2**64 - 1
    for count in (read.max_tokens, sampling.top_k, sampling.seed, sampling.stream, read.cut or 0, read.guesses or 0):
        _number(count, most)
    for share in (sampling.temperature, sampling.top_p, read.threshold or 0.0):
        if type(share) not in (int, float):
            raise TypeError(share)
    if not isinstance(told["stop"], list) or not all(isinstance(word, str) for word in (read.codec, *read.stop)):
        raise TypeError(told)
    return read.to_dict()


def _torn_head(data: bytes) -> bool:
    """Whether a first line without its end may have been the head of a journal."""
    digits = all(byte in b"0123456789abcdef" for byte in data[:8])
    return digits and data[8:9] in (b"", b" ") and b'["isthmus"'.startswith(data[9:19])
