"""Exits of a bundle from texts to figures: samples, states, heads, what the heads say; all of it kept in a work folder.

What was done stays done: answers, states, trainings and scores are found again by what they were made from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from isthmus.engine import KvConfig, open_part
from isthmus.engine.part import KV_BLOCK, Part
from isthmus.protocol.errors import BundleError, ModelError
from isthmus.split.bundle import Bundle
from isthmus.split.certificate import Said
from isthmus.split.exit_codec import CodecTrials
from isthmus.split.exit_entry import MAX_HEAD_TOKENS, Agreement, CodecChoice, ExitEntry, exit_file
from isthmus.split.exit_samples import ANSWER_TOKENS, kept_answers
from isthmus.split.exit_scores import ExitScores, agreement
from isthmus.split.exit_states import BATCH, NO_ROOM, Progress, Sample, States, read_texts
from isthmus.split.exits import ExitSource
from isthmus.split.fetch import cache_folder
from isthmus.split.files import PARTIAL, locked

if TYPE_CHECKING:
    from isthmus.split.exit_training import Recipe

# Of a head's matrices. A linear map in 4 bits, too, cost the exit of SmolLM2 before layer 20 1.5 points of 51.5 %.
FORMAT, INPUT_FORMAT = "q4", "q8"
_ELSEWHERE = "choose another folder (--work, or ISTHMUS_CACHE for all)"
Say = Callable[[str], Progress]  # begins a step of that name


def work_folder(model_id: str) -> Path:
    """Where a model's samples, states and trainings are kept unless a folder is named."""
    return cache_folder().parent / "exits" / model_id[:16]


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Holds a work folder, which is made when it is not there, for this process alone.

    Raises:
        ModelError: it cannot be made, another process works in it, or what is inside found no room.
    """
    lock = folder / "lock"
    with ExitStack() as held:
        try:
            lock.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(lock))
        except BlockingIOError as error:
            raise ModelError(f"another process works in {folder}", f"wait until it is done, or {_ELSEWHERE}") from error
        except OSError as error:
            raise ModelError(f"{folder} cannot be the work folder: {error.strerror}", _ELSEWHERE) from error
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise ModelError(f"no room in {folder}: {error.strerror}", f"make room, or {_ELSEWHERE}") from error


def usual_layers(n_layers: int) -> list[int]:
    """Before which layers exits stand unless they are named: a half, two thirds, four fifths, nine tenths."""
    return sorted({max(1, round(n_layers * share)) for share in (0.5, 2 / 3, 0.8, 0.9)} - {n_layers})


def usual_head(layer: int, n_layers: int) -> int:
    """Tokens that an exit's head can name: a frequent few before two thirds of the depth, then all (0)."""
    return MAX_HEAD_TOKENS if 3 * layer < 2 * n_layers else 0


def read_prompts(path: Path) -> list[str]:
    """Prompts: of a .jsonl file as `read_texts` has them, of another file one a line.

    Raises:
        ModelError: the file cannot be read, or holds no prompt.
    """
    found = read_texts([path])
    return found if path.suffix == ".jsonl" else [line.strip() for line in found[0].splitlines() if line.strip()]


@dataclass(frozen=True, slots=True)
class Measured:
    """What an exit said on held-out samples."""

    documents: list[Said]
    answers: list[Said]

    @property
    def agreement(self) -> Agreement:
        """With the model."""
        return Agreement(agreement(self.documents), agreement(self.answers))


class ExitRun:
    """The model of a bundle and a work folder.

    Args:
        say: begins a step of the given name and gives what is told of its progress.
        threads: of the engine.
    """

    def __init__(self, bundle: Bundle, work: Path, say: Say, threads: int = 1) -> None:
        self.bundle, self.work = bundle, work
        self._say, self._threads = say, threads

    def answered(self, prompts: list[str]) -> list[Sample]:
        """The model's greedy answers to those chat prompts that leave room for one.

        Raises:
            ModelError: no prompt does, or the model has no chat template.
        """
        tokenizer, model_id = self.bundle.tokenizer(), self.bundle.model_id
        room = self.bundle.config.context_length - ANSWER_TOKENS
        lengths = [len(tokenizer.chat([{"role": "user", "content": prompt}])) for prompt in prompts]
        prompts = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= room]
        if not prompts:
            problem = f"no prompt leaves room for {ANSWER_TOKENS} tokens in a context of {room + ANSWER_TOKENS}"
            raise ModelError(problem, "give shorter ones")
        tell = self._say(f"{len(prompts)} answers")
        kv_tokens = BATCH * (min(max(lengths), room) + ANSWER_TOKENS)
        return kept_answers(self.work, lambda: self._whole(kv_tokens), tokenizer, model_id, prompts, tell)

    def states(self, name: str, samples: list[Sample], layers: list[int]) -> States:
        """States of samples before layers, in a folder of that name."""
        config, tell = self.bundle.config, self._say(f"states along {len(samples)} {name}")
        states = States(self.work / name, samples, layers, config.d_model, self.bundle.model_id)
        if states.done < len(samples):
            with self._whole(max(len(sample.tokens) for sample in samples)) as part:
                states.collect(part, tell)
        return states

    def train(
        self, states: States, documents: States, answers: States, layer: int, recipe: Recipe, head_tokens: int
    ) -> tuple[ExitEntry, bytes, Measured]:
        """A head for the exit before a layer: what the bundle will say of it, its file, what it said.

        Args:
            states: of the samples to train on.
            documents, answers: of held-out ones.
            head_tokens: that its output head can name, 0 for all.
        """
        from isthmus.split.exit_training import Teacher, channels, frequent_tokens, train
        from isthmus.split.exit_writer import exit_bytes

        indices, tell = list(range(len(states.samples))), self._say(f"training the exit before layer {layer}")
        teacher, kept = Teacher(self.bundle), self.work / f"training-{layer:03d}.pt"
        head = train(states, indices, layer, teacher, recipe, lambda done, total, _: tell(done, total), kept)
        stats = channels(states, indices, layer)
        weights = {**head.weights(FORMAT, INPUT_FORMAT), "channel_mean": stats.mean, "channel_spread": stats.spread}
        tokens = None
        if 0 < head_tokens < self.bundle.config.vocab_size:
            tokens = np.sort(frequent_tokens(states, indices, head_tokens)).astype(np.int32)
        data, source = (
            exit_bytes(self.bundle.model_id, weights, tokens),
            ExitSource(self.bundle, layer, weights, tokens),
        )
        sha256 = hashlib.sha256(data).hexdigest()
        measured = Measured(*(self.said(source, sha256, layer, held) for held in (documents, answers)))
        count = 0 if tokens is None else len(tokens)
        return ExitEntry(layer, exit_file(layer), recipe.d_ff, count, measured.agreement), data, measured

    def standing(self, layer: int, documents: States, answers: States) -> Measured | None:
        """What the bundle's own exit before a layer says on the same samples; None if it has none that can be used."""
        try:
            source = self.bundle.exit(layer)
        except BundleError:
            return None
        sha256 = self.bundle.manifest.files[exit_file(layer)].sha256
        return Measured(*(self.said(source, sha256, layer, held) for held in (documents, answers)))

    def said(self, exit: ExitSource, sha256: str, layer: int, states: States) -> list[Said]:
        """What an exit says along all samples.

        Args:
            sha256: of the exit's file.
        """
        name = hashlib.sha256(f"{sha256} {layer} {states.key}".encode()).hexdigest()[:24]
        file = self.work / "said" / f"{name}.npz"
        tell = self._say(f"what the exit before layer {layer} says")
        try:
            with np.load(file, allow_pickle=False) as kept:
                edges = np.cumsum(kept["lengths"])[:-1]
                pieces = zip(np.split(kept["confidence"], edges), np.split(kept["right"], edges), strict=True)
                return [Said(confidence, right) for confidence, right in pieces]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            pass  # not there, or not whole
        with ExitScores(exit, layer, states, self._threads) as scores:
            found = scores.all(range(len(states.samples)), tell)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + PARTIAL)
        with partial.open("wb") as out:
            confidence, right = (np.concatenate([one[i] for one in found]) for i in range(2))
            np.savez(out, lengths=[len(one.right) for one in found], confidence=confidence, right=right)
        partial.replace(file)
        return found

    def codec(self, exit: ExitSource, sha256: str, layer: int, states: States, data: str, loss: float) -> CodecChoice:
        """How states before an exit are to travel.

        Args:
            sha256: of the exit's file.
            states: of answers.
            data: hash of the answers.
            loss: see `CodecTrials.smallest`.
        """
        tell = self._say(f"codecs before layer {layer}")
        with CodecTrials(self.bundle, layer, states, exit.channels, self._threads) as trials:
            return trials.smallest(loss, exit=sha256, data=data, progress=tell)

    def _whole(self, kv_tokens: int) -> closing[Part]:
        kv = KvConfig("f16", (-(-kv_tokens // KV_BLOCK) + BATCH) * KV_BLOCK)
        return closing(open_part(self.bundle, 0, self.bundle.config.n_layers, threads=self._threads, kv=kv))
