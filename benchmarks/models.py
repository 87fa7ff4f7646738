"""The real model in every format that the benchmarks compare, made once and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from isthmus.split.bundle import Bundle
from isthmus.split.checkpoints import open_checkpoint
from isthmus.split.exit_writer import put_exits
from isthmus.split.fetch import cache_folder, fetch
from isthmus.split.shipped import shipped
from isthmus.split.writer import write_bundle

BENCH = cache_folder().parent / "bench"


def gguf() -> Path:
    """SmolLM2-135M-Instruct as it is shipped (Q4_1 with an 8-bit head)."""
    return fetch("smollm2")


def bundle(format: str) -> Bundle:
    """SmolLM2 as a bundle: keep (Q4_1), q4, nested, f32, ..."""
    folder = BENCH / f"smollm2-{format}"
    if not folder.exists():
        print(f"making {folder.name}", file=sys.stderr)
        BENCH.mkdir(parents=True, exist_ok=True)
        checkpoint = open_checkpoint(gguf(), format=format)
        tokenizer = checkpoint.tokenizer()
        write_bundle(
            folder,
            checkpoint,
            name=checkpoint.name,
            weights=format,
            tokenizer=tokenizer.to_json(),
            entry=tokenizer.entry,
        )
    found = Bundle.open(folder)
    exits = shipped(found.model_id)
    listed = {name: entry.sha256 for name, entry in found.manifest.files.items()}
    known = {one.layer: one for one in found.exits}
    if any(known.get(one.layer) != one or listed[one.file] != hashlib.sha256(data).hexdigest() for one, data in exits):
        put_exits(folder, found.model_id, exits)  # made before they came, or with others
        found = Bundle.open(folder)
    return found


def part_of(source: Bundle, held: int, folder: Path) -> Path:
    """A folder with the first layers of a bundle and the exits before them."""
    if held == source.config.n_layers:
        return source.path
    files = source.manifest.part_files(0, held)
    names = ["bundle.json", source.manifest.tokenizer.file, *files]
    names += [entry.file for entry in source.exits if entry.layer <= held]
    for name in dict.fromkeys(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(source.path / name, folder / name)
    return folder


def peer_python(name: str) -> Path:
    """The Python of a peer engine's own environment, which may not be there."""
    return cache_folder().parent / "peers" / name / "bin" / "python"
