"""What exits are trained and measured on: token sequences, the states before chosen layers, the model's own choices.

Sequences are documents, and the model's own greedy answers to questions about them: what it says itself is what an exit
will have to foresee. States are those of the engine that will run (quantized weights and all), kept as float16 in files
of a work folder, so that a run that was stopped goes on where it ended.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.part import Part, Rows, Sequence, Want
from isthmus.protocol.errors import ModelError
from isthmus.split.files import read_regular

if TYPE_CHECKING:
    from isthmus.split.tokenizer import Tokenizer

F16_MAX = 65504.0
BATCH = 16  # answers written at once
_SAVE_EVERY = 50
NO_ROOM = frozenset({errno.EDQUOT, errno.EFBIG, errno.ENOSPC})
Progress = Callable[[int, int], None]  # sequences done, in all

TOPICS = """the sea;a bicycle;photosynthesis;a black hole;the French Revolution;inflation;sleep;a dragon;chess;tea;rain;
computer viruses;gravity;volcanoes;democracy;the moon;bread;electric cars;a lost dog;honey bees;Rome;the violin;autumn;
antibiotics;an old lighthouse;friendship;saving money;soccer;jazz;recycling;the immune system;a robot;mathematics;yoga;
a garden;public speaking;coffee;a snowman;the climate;vaccines;a job interview;music;the stars;cooking rice;poetry"""
# Nothing is trained on these: what is measured and certified on the model's own answers is asked about them.
CHECK_TOPICS = """the desert;a train;evolution;a comet;the Silk Road;taxes;dreams;a giant;backgammon;chocolate;snow;
search engines;magnetism;earthquakes;elections;the sun;cheese;wind power;a missing cat;whales;Venice;the piano;spring;
painkillers;a haunted house;loyalty;insurance;tennis;opera;compost;the heart;a time machine;statistics;meditation;
a balcony;negotiation;wine;a kite;the ozone layer;pandemics;a first day at school;dancing;the planets;baking bread;
a museum"""
QUESTIONS = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "What is {}?",
    "Write a poem about {}.",
    "Give me five facts about {}.",
    "Why does {} matter?",
    "How can I learn more about {}?",
    "List three advantages and three disadvantages of {}.",
    "Write an email to a friend about {}.",
    "Describe {} in one paragraph.",
)
ABOUT_TEXT = ("Summarize the following text: {}", "What is this text about?\n\n{}")
MAX_QUOTED_CHARS = 1200


class Sample(NamedTuple):
    """Token ids; those from `answer` on are the model's own, 0 where the text is somebody else's."""

    tokens: list[int]
    answer: int = 0


def read_texts(paths: list[Path]) -> list[str]:
    """Documents out of text files (one each) and .jsonl files (one a line: its "text", or its first string).

    Raises:
        ModelError: a file cannot be read, or holds no text.
    """
    found: list[str] = []
    for path in paths:
        try:
            data = read_regular(path).decode()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
            raise ModelError(f"{path} cannot be read as text: {why}", "name text files, or .jsonl files") from error
        documents = list(_lines(path, data)) if path.suffix == ".jsonl" else [data]
        if not any(document.strip() for document in documents):
            raise ModelError(f"{path} holds no text", "name text files, or .jsonl files")
        found += [document for document in documents if document.strip()]
    return found


def _lines(path: Path, data: str) -> Iterator[str]:
    for number, line in enumerate(data.splitlines(), 1):
        try:
            fields = json.loads(line)
            texts = [value for value in fields.values() if isinstance(value, str)]
            text = fields["text"] if isinstance(fields.get("text"), str) else texts[0]
            yield text.encode().decode()  # half a character is no text
        except (ValueError, AttributeError, IndexError) as error:
            raise ModelError(f"line {number} of {path} is no JSON object with a text", "mend or remove it") from error


def questions(texts: list[str], count: int, seed: int = 0, topics: str = TOPICS) -> list[str]:
    """Questions to a model: half of them about topics, half about the given texts; all about topics without any.

    Args:
        count: at most so many; topics times kinds of questions bound the first half.
        topics: separated by semicolons.
    """
    rng = random.Random(seed)
    about = [question.format(topic.strip()) for question in QUESTIONS for topic in topics.split(";")]
    rng.shuffle(about)
    quoted = [rng.choice(ABOUT_TEXT).format(text[:MAX_QUOTED_CHARS]) for text in rng.sample(texts, len(texts))]
    found = [question for pair in zip(about, quoted, strict=False) for question in pair] if texts else about
    return found[:count]


def answers(
    part: Part,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_tokens: int,
    progress: Progress | None = None,
) -> list[Sample]:
    """The model's greedy answers to chat prompts, several written at once.

    Args:
        part: the whole model.

    Raises:
        ModelError: the model has no chat template.
    """
    waiting = [(i, tokenizer.chat([{"role": "user", "content": prompt}])) for i, prompt in enumerate(prompts)]
    waiting.reverse()
    eos = set(tokenizer.eos)
    found: dict[int, Sample] = {}
    running: list[_Answer] = []
    while waiting or running:
        while waiting and len(running) < BATCH:
            index, prompt = waiting.pop()
            sequence = part.open()
            (first,) = part.step(Rows().tokens(sequence, 0, prompt)).tokens
            running.append(_Answer(index, sequence, [*prompt, first], len(prompt)))
        rows = Rows()
        for one in running:
            rows.tokens(one.sequence, len(one.tokens) - 1, one.tokens[-1:])
        for one, token in zip(running, part.step(rows).tokens, strict=True):
            one.tokens.append(token)
        for one in [one for one in running if one.ended(eos, max_tokens)]:
            running.remove(one)
            one.sequence.close()
            found[one.index] = Sample(one.tokens, one.start)
            if progress:
                progress(len(found), len(prompts))
    return [found[i] for i in range(len(prompts))]


@dataclass(eq=False, slots=True)
class _Answer:
    index: int
    sequence: Sequence
    tokens: list[int]
    start: int

    def ended(self, eos: set[int], max_tokens: int) -> bool:
        return self.tokens[-1] in eos or len(self.tokens) - self.start >= max_tokens


@dataclass(frozen=True, slots=True)
class _File:
    """An array in a file, all of it reserved: a write to a mapped page without room would end the process."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def kept(self) -> np.memmap[Any, Any] | None:
        """What stands there; None if that is not such an array, or not a whole one."""
        try:
            found = np.lib.format.open_memmap(self.path, "r")  # which, unlike "r+", does not make up what is missing
        except (OSError, ValueError):
            return None
        if (found.dtype, found.shape) != (self.dtype, self.shape) or found.offset + self.bytes != self._size():
            return None
        self._reserve()
        return np.lib.format.open_memmap(self.path, "r+")

    def made(self) -> np.memmap[Any, Any]:
        """A new one."""
        found = np.lib.format.open_memmap(self.path, "w+", self.dtype, self.shape)
        self._reserve()
        return found

    def _size(self) -> int:
        return self.path.stat().st_size

    def _reserve(self) -> None:
        if not hasattr(os, "posix_fallocate"):
            return
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, self._size())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # not every file system can
                raise
        finally:
            os.close(descriptor)


class States:
    """States along samples, in files of a folder; a folder that was begun for the same samples is gone on with.

    Args:
        folder: of its own; what stands there for other samples, layers or another model is replaced, and so is what
            is not whole.
        layers: before which layers; the states after the last one are kept, too.
        model_id: of the model that gives them.

    Raises:
        ModelError: there is no room for them.
        OSError: the folder cannot be written.

    Attributes:
        key: of samples, layers and model: states with the same key are the same.
        done: samples whose states are there.
    """

    def __init__(self, folder: Path, samples: list[Sample], layers: list[int], d_model: int, model_id: str) -> None:
        self.samples, self.layers = samples, layers
        self.offsets = np.cumsum([0, *(len(sample.tokens) for sample in samples)])
        self._folder, self._name = folder, folder / "states.json"
        key = json.dumps([model_id, layers, samples], separators=(",", ":"))
        self.key = hashlib.sha256(key.encode()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        total, names = int(self.offsets[-1]), [*(f"before-{layer}.npy" for layer in layers), "last.npy"]
        files = [_File(folder / name, np.dtype(np.float16), (total, d_model)) for name in names]
        files.append(_File(folder / "choices.npy", np.dtype(np.int32), (total,)))
        try:
            self.done = self._read_done()
            arrays = [file.kept() for file in files] if self.done else []
            if not arrays or any(array is None for array in arrays):
                self.done = 0
                self._name.unlink(missing_ok=True)  # first: it would vouch for files that are somebody else's by now
                arrays = [file.made() for file in files]
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            for file in [] if self.done else files:
                file.path.unlink(missing_ok=True)
            problem = f"no room in {folder} for {sum(file.bytes for file in files) / 1e6:.1f} MB of states"
            raise ModelError(
                f"{problem}: {error.strerror}", "make room, or choose another folder (--work, or ISTHMUS_CACHE for all)"
            ) from error
        *self._states, self._choices = [array for array in arrays if array is not None]

    def collect(self, part: Part, progress: Progress | None = None) -> None:
        """Computes what is missing.

        Args:
            part: the whole model.
        """
        for index in range(self.done, len(self.samples)):
            tokens, rows = self.samples[index].tokens, self._rows(index)
            sequence = part.open()
            hidden: NDArray[np.float32] | None = None
            for enter, leave, states in zip([0, *self.layers], [*self.layers, part.end], self._states, strict=True):
                want = Want.HIDDEN | (Want.SAMPLE if leave == part.end else Want.NONE)
                if hidden is None:
                    step = Rows().tokens(sequence, 0, tokens, leave=leave, want=want, want_all=True)
                else:
                    step = Rows().hidden(sequence, 0, hidden, enter=enter, leave=leave, want=want, want_all=True)
                result = part.step(step)
                hidden = result.hidden
                states[rows] = np.clip(hidden, -F16_MAX, F16_MAX)
            self._choices[rows] = result.tokens
            sequence.close()
            self.done = index + 1
            if self.done % _SAVE_EVERY == 0 or self.done == len(self.samples):
                self._save()
            if progress:
                progress(self.done, len(self.samples))

    def before(self, layer: int, index: int) -> NDArray[np.float16]:
        """States of a sample before a layer, [n, d_model] f16."""
        found: NDArray[np.float16] = self._states[self.layers.index(layer)][self._rows(index)]
        return found

    def last(self, index: int) -> NDArray[np.float16]:
        """States of a sample after the last layer, before the last norm, [n, d_model] f16."""
        found: NDArray[np.float16] = self._states[-1][self._rows(index)]
        return found

    def choices(self, index: int) -> NDArray[np.int32]:
        """The model's most likely token after each of a sample's tokens, [n]."""
        found: NDArray[np.int32] = self._choices[self._rows(index)]
        return found

    def _rows(self, index: int) -> slice:
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def _read_done(self) -> int:
        try:
            saved = json.loads(self._name.read_text())
            done = int(saved["done"]) if saved["key"] == self.key else 0
            return done if 0 <= done <= len(self.samples) else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _save(self) -> None:
        for states in (*self._states, self._choices):
            states.flush()
        part = self._name.with_suffix(".part")
        part.write_text(json.dumps({"key": self.key, "done": self.done}))
        part.replace(self._name)
