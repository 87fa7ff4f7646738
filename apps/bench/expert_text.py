"""How the routers of a mixture choose along a text, or along the model's own answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from isthmus.engine.native_part import NativePart
from isthmus.engine.part import Rows, Want
from isthmus.engine.recording import along, joined
from isthmus.engine.routing import Routing
from isthmus.protocol.errors import ModelError
from isthmus.split.bundle import Bundle
from isthmus.split.exit_samples import divided, text_files
from isthmus.split.exit_states import read_texts
from isthmus.split.fetch import find

DOCUMENT = 512  # tokens of a document at most
LEAST = 32  # tokens that say something
QUESTION = "Explain how a letter travels from one country to another, step by step, and name who handles it on its way."

Progress = Callable[[int, int], None]  # tokens so far, and in all


def recorded(
    bundle: Bundle, part: NativePart, tokens: int, text: Path | None = None, progress: Progress | None = None
) -> tuple[Routing, str]:
    """Records routing.

    Args:
        part: all layers of the bundle, with room for a document.
        tokens: how many at most.
        text: a file of documents; by default the held-out ones of `isthmus fetch texts`, and where they are not here,
            the model's answer to a question.

    Returns:
        The routing of all layers, and what it was recorded along.

    Raises:
        ModelError: the file cannot be read, or holds too little.
    """
    fetched = find("texts") if text is None else None
    if text is not None:
        documents, called = read_texts([text]), text.name
    elif fetched is not None:
        documents, called = divided(text_files([fetched])).held, "isthmus fetch texts"
    else:
        return _answer(bundle, part, tokens, progress), "the model's own answer"
    tokenizer, found, count = bundle.tokenizer(), list[Routing](), 0
    for document in documents:
        ids = tokenizer.encode(document)[: min(DOCUMENT, bundle.config.context_length, tokens - count)]
        if not ids:
            continue
        found.append(along(part, ids))
        count += len(ids)
        if progress:
            progress(count, tokens)
        if count >= tokens:
            break
    if count < LEAST:
        raise ModelError(f"{called} has {count} tokens", f"name a text of at least {LEAST} with --text")
    return joined(found), called


def _answer(bundle: Bundle, part: NativePart, tokens: int, progress: Progress | None) -> Routing:
    tokenizer = bundle.tokenizer()
    chats = bool(tokenizer.entry.chat_template)
    ids = tokenizer.chat([{"role": "user", "content": QUESTION}]) if chats else tokenizer.encode(QUESTION)
    ids = ids[: bundle.config.context_length // 2]
    count = min(tokens, DOCUMENT, bundle.config.context_length - len(ids))
    routing, sequence = part.record(len(ids) + count), part.open()
    assert routing is not None
    try:
        token = part.step(Rows().tokens(sequence, 0, ids, want=Want.SAMPLE)).tokens[0]
        for i in range(count):  # also behind an end of the answer: routers do not mind
            token = part.step(Rows().tokens(sequence, len(ids) + i, [token], want=Want.SAMPLE)).tokens[0]
            if progress:
                progress(i + 1, count)
    finally:
        sequence.close()
        part.record(0)
    start = len(ids)
    return Routing(routing.chosen[start:], routing.weights[start:], routing.foreseen[start:])
