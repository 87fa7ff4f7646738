"""The samples of exits: which are trained on and which are held out, and answers kept in a work folder.

Of every file of texts the last tenth, at most `HELD` documents, is held out, so that whoever comes later with the same
files finds the same division.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from isthmus.engine.part import Part
from isthmus.protocol.errors import ModelError
from isthmus.split.exit_states import CHECK_TOPICS, Progress, Sample, answers, questions, read_texts
from isthmus.split.files import PARTIAL

if TYPE_CHECKING:
    from isthmus.split.tokenizer import Tokenizer

HELD = 100
CHUNK_TOKENS = 512
ANSWER_TOKENS = 120
_AT_ONCE = 64  # answers between two saves


class Texts(NamedTuple):
    """Documents to train on and held-out ones."""

    taught: list[str]
    held: list[str]


def text_files(paths: list[Path]) -> list[Path]:
    """Files and, of folders, the .jsonl and .txt files in them, by name.

    Raises:
        ModelError: a folder holds none.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.glob("*") if p.suffix in (".jsonl", ".txt")) if path.is_dir() else [path]
        if not inside:
            raise ModelError(f"{path} holds no .jsonl and no .txt file", "name text files")
        found += inside
    return found


def divided(paths: list[Path], documents: int | None = None) -> Texts:
    """Documents of files, divided.

    Args:
        documents: at most so many to train on, the same number of each file.

    Raises:
        ModelError: a file cannot be read, holds no text, or all of them hold too few to hold any out.
    """
    kinds = [read_texts([path]) for path in paths]
    held = [min(HELD, len(texts) // 10) for texts in kinds]
    if not sum(held):
        raise ModelError(f"{sum(map(len, kinds))} documents are too few", "give a file of at least 10")
    each = [len(texts) - n for texts, n in zip(kinds, held, strict=True)]
    if documents is not None:
        each = [min(documents // len(kinds), n) for n in each]
    taught = [text for texts, n in zip(kinds, each, strict=True) for text in texts[:n]]
    return Texts(taught, [text for texts, n in zip(kinds, held, strict=True) for text in texts[len(texts) - n :]])


def chunks(tokenizer: Tokenizer, texts: list[str], context_length: int) -> list[Sample]:
    """The beginnings of documents."""
    return [Sample(tokenizer.encode(text)[: min(CHUNK_TOKENS, context_length)]) for text in texts]


def check_questions(held: list[str], count: int) -> list[str]:
    """Questions that no head is trained on: about topics of their own and about held-out documents."""
    return questions(held, count, seed=1, topics=CHECK_TOPICS)


def kept_answers(
    folder: Path,
    opened: Callable[[], AbstractContextManager[Part]],
    tokenizer: Tokenizer,
    model_id: str,
    prompts: list[str],
    progress: Progress | None = None,
) -> list[Sample]:
    """The model's greedy answers to chat prompts, kept in a file of a work folder; what is there is not made again.

    Args:
        opened: opens the whole model, if any answer is lacking.

    Raises:
        ModelError: the model has no chat template.
    """
    key = hashlib.sha256(json.dumps([model_id, ANSWER_TOKENS, prompts], separators=(",", ":")).encode()).hexdigest()
    file = folder / f"answers-{key[:16]}.json"
    try:
        found = [Sample(list(map(int, tokens)), int(start)) for tokens, start in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError):
        found = []
    if len(found) >= len(prompts):
        return found[: len(prompts)]
    with opened() as part:
        while lacking := prompts[len(found) : len(found) + _AT_ONCE]:
            begun = len(found)

            def tell(done: int, _: int, begun: int = begun) -> None:
                if progress:
                    progress(begun + done, len(prompts))

            found += answers(part, tokenizer, lacking, ANSWER_TOKENS, tell)
            folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(file.name + PARTIAL)
            partial.write_text(json.dumps(found))
            partial.replace(file)
    return found
