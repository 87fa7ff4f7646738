"""What hidden states cost on the wire and what coding them does to the text, by codec and layer.

States of held-out documents go through a codec and then through the rest of the model, teacher-forced; its choices and
probabilities are held against those that the uncoded states give. Keys and values come from coded states, too; the
first position of a document travels in f16. Statistics of the channels are those of other documents.

The quantized model rounds its own activations to 8 bits, so that a change in a state's last bit already alters some
choices; the same weights in float32 show what the codec alone does, and choose the rates. Both are told.

usage: python benchmarks/codecs.py [--tokens 5000] [--calibrate 20000]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import util

import numpy as np
from models import bundle
from numpy.typing import NDArray
from record import Cell, Record

from isthmus.engine import KvConfig, open_part
from isthmus.engine.part import Part, Rows, Want
from isthmus.protocol import tensors
from isthmus.protocol.channels import ChannelStats
from isthmus.split.exit_states import read_texts
from isthmus.split.fetch import fetch
from isthmus.split.tokenizer import Tokenizer

LAYERS = (15, 20, 24, 27)
CODECS = ("f16", "int8", "ecsq3", "ecsq4", "ecsq6", "ecsq8", "ecsq16")
ENGINES = {"f32": "float32 weights", "keep": "as it runs"}
DOCUMENT_TOKENS = 384
TIMED_ROWS, TURNS = 40, 15
MAX_BYTES = 384  # a third of f16
AGREEMENTS = (0.99, 0.98)


@dataclass
class Tally:
    """Sums over the held-out tokens behind one codec."""

    tokens: int = 0
    agreed: int = 0
    divergence: float = 0.0  # nats
    errors: list[float] = field(default_factory=list)  # of rows, relative
    coded_bytes: int = 0
    rows: int = 0

    @property
    def agreement(self) -> float:
        """Share of tokens with the same choice."""
        return self.agreed / self.tokens


States = dict[int, NDArray[np.float32]]  # by layer: [n, d_model]


def documents(tokenizer: Tokenizer, tokens: int, *, held: bool) -> list[list[int]]:
    """Documents of every kind in turn, from the files' beginnings, or ends when held out, of about so many tokens."""
    kinds = [read_texts([path]) for path in sorted(fetch("texts").glob("*.jsonl"))]
    texts = [text for turn in zip(*(reversed(kind) if held else kind for kind in kinds), strict=False) for text in turn]
    found: list[list[int]] = []
    for text in texts:
        ids = tokenizer.encode(text)[:DOCUMENT_TOKENS]
        if len(ids) >= 32:
            found.append(ids)
        if sum(map(len, found)) >= tokens:
            break
    return found


def states_of(part: Part, tokens: list[int]) -> States:
    """States before every layer of LAYERS."""
    found: States = {}
    sequence, hidden, enter = part.open(), None, 0
    for leave in LAYERS:
        rows = Rows()
        if hidden is None:
            rows.tokens(sequence, 0, tokens, leave=leave, want=Want.HIDDEN, want_all=True)
        else:
            rows.hidden(sequence, 0, hidden, enter=enter, leave=leave, want=Want.HIDDEN, want_all=True)
        hidden = found[leave] = part.step(rows).hidden
        enter = leave
    sequence.close()
    return found


def probabilities(part: Part, layer: int, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities [n, vocab_size] f32 after layers [layer, end) and the head."""
    sequence = part.open()
    logits = part.step(Rows().hidden(sequence, 0, hidden, enter=layer, want=Want.LOGITS, want_all=True)).logits
    sequence.close()
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def choices(part: Part, layer: int, hidden: NDArray[np.float32]) -> NDArray[np.int64]:
    """The most likely tokens [n] after layers [layer, end) and the head."""
    sequence = part.open()
    found = part.step(Rows().hidden(sequence, 0, hidden, enter=layer, want_all=True)).tokens
    sequence.close()
    return np.array(found)


def compare(
    part: Part, layer: int, held: Sequence[States], stats: ChannelStats, *, divergence: bool
) -> dict[str, Tally]:
    """Every codec before a layer, on one engine."""
    tallies = {codec: Tally() for codec in CODECS}
    for states in held:
        hidden = states[layer]
        plain = probabilities(part, layer, hidden) if divergence else None
        chosen = choices(part, layer, hidden) if plain is None else plain.argmax(axis=1)
        weights = np.empty(0, np.float32) if plain is None else np.exp(plain)
        for codec, tally in tallies.items():
            tensor = tensors.encode(hidden, codec, plain=1, stats=stats)
            decoded = tensors.decode(tensor, hidden.shape[1], stats=stats)
            tally.tokens += len(hidden)
            if plain is None:
                tally.agreed += int((choices(part, layer, decoded) == chosen).sum())
            else:
                coded = probabilities(part, layer, decoded)
                tally.agreed += int((coded.argmax(axis=1) == chosen).sum())
                np.subtract(plain, coded, out=coded)
                tally.divergence += float(np.einsum("ij,ij->", weights, coded))
            rest = hidden[1:]
            tally.errors += (np.linalg.norm(decoded[1:] - rest, axis=1) / np.linalg.norm(rest, axis=1)).tolist()
            tally.coded_bytes += len(tensor.data) - 2 * hidden.shape[1]
            tally.rows += len(rest)
    return tallies


def took_us(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Medians of alternating turns, of each turn's quickest call."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(TURNS):
        for name, work in works.items():
            best = float("inf")
            for _ in range(TIMED_ROWS):
                begin = time.perf_counter()
                work()
                best = min(best, time.perf_counter() - begin)
            times[name].append(best * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def coders(record: Record, rows: NDArray[np.float32], stats: ChannelStats) -> None:
    """One row's codes through this coder and others, and whole codecs: bytes and microseconds."""
    steps, width = 8, rows.shape[1]
    spreads = stats.spreads(steps)
    step = stats.unit / steps
    codes = np.clip(np.rint((rows - stats.mean) / step), -32767, 32767).astype(np.int64)
    coder, row = stats.coder(steps), codes[0]
    stream = coder.encode(row)
    small = np.clip(row, -128, 127).astype(np.int8).tobytes()
    packed = zlib.compress(small, 6)
    works: dict[str, Callable[[], object]] = {
        "this, encode": lambda: coder.encode(row),
        "this, decode": lambda: coder.decode(stream),
        "zlib, encode": lambda: zlib.compress(small, 6),
        "zlib, decode": lambda: zlib.decompress(packed),
    }
    sizes: dict[str, float] = {
        "this": statistics.mean(len(coder.encode(one)) for one in codes),
        "zlib": statistics.mean(len(zlib.compress(np.clip(one, -128, 127).astype(np.int8), 6)) for one in codes),
    }
    if util.find_spec("constriction"):
        model, models, order = _categorical(spreads)
        words = _range_encode(row[order], model, models)
        works["constriction, encode"] = lambda: _range_encode(row[order], model, models)
        works["constriction, decode"] = lambda: _range_decode(words, model, models)
        sizes["constriction"] = statistics.mean(4 * len(_range_encode(one[order], model, models)) for one in codes)
    else:
        record.skip("constriction's range coder", "it is not installed")
    for codec in ("f16", "int8", "ecsq4", "ecsq8"):
        tensor = tensors.encode(rows[:1], codec, stats=stats)
        works[f"{codec}, encode"] = lambda codec=codec: tensors.encode(rows[:1], codec, stats=stats)  # type: ignore[misc]
        works[f"{codec}, decode"] = lambda tensor=tensor: tensors.decode(tensor, width, stats=stats)  # type: ignore[misc]
        sizes[codec] = len(tensor.data)
    times = took_us(works)
    for name, us in times.items():
        record.figure(f"time/{name}", us, "us a row", target=100.0 if "ecsq" in name else None, at_most=True)
    record.table(
        "coders",
        ["coder", "bytes a row", "encode, us", "decode, us"],
        [[name, size, times[f"{name}, encode"], times[f"{name}, decode"]] for name, size in sizes.items()],
        note="One row of codes at 8 steps a spread; zlib clips codes to 8 bits; the last lines are whole codecs.",
    )


def _categorical(spreads: tuple[int, ...]) -> tuple[object, list[tuple[object, int, int]], NDArray[np.int64]]:
    """A model for each k, the runs of channels that share one, and the channels in that order."""
    import constriction

    k = np.array(spreads)
    order = np.argsort(k, kind="stable")
    at, runs = 0, []
    for one in np.unique(k).tolist():
        codes = np.arange(-2000, 2001) / 2.0 ** (one / 2)
        weights = (1 + codes * codes / 7) ** -5.0
        model = constriction.stream.model.Categorical((weights / weights.sum()).astype(np.float32), perfect=False)
        count = int((k == one).sum())
        runs.append((model, at, at + count))
        at += count
    return constriction.stream.queue, runs, order


def _range_encode(codes: NDArray[np.int64], queue: object, runs: list[tuple[object, int, int]]) -> NDArray[np.uint32]:
    encoder = queue.RangeEncoder()  # type: ignore[attr-defined]
    shifted = np.clip(codes + 2000, 0, 4000).astype(np.int32)
    for model, begin, end in runs:
        encoder.encode(shifted[begin:end], model)
    found: NDArray[np.uint32] = encoder.get_compressed()
    return found


def _range_decode(
    words: NDArray[np.uint32], queue: object, runs: list[tuple[object, int, int]]
) -> list[NDArray[np.int32]]:
    decoder = queue.RangeDecoder(words)  # type: ignore[attr-defined]
    return [decoder.decode(model, end - begin) for model, begin, end in runs]


def report(record: Record, layer: int, found: dict[str, dict[str, Tally]]) -> None:
    """One layer's table, and the smallest rates that keep the agreements."""
    rows: list[list[Cell]] = []
    for codec in CODECS:
        clean, used = (found[engine][codec] for engine in ENGINES)
        size = clean.coded_bytes / clean.rows
        rows.append(
            [
                codec,
                size,
                statistics.mean(clean.errors),
                clean.agreement,
                clean.divergence / clean.tokens,
                used.agreement,
            ]
        )
        record.figure(f"layer {layer}/{codec}/bytes", size, "bytes a row")
        record.figure(f"layer {layer}/{codec}/agreement", clean.agreement, "share")
        record.figure(f"layer {layer}/{codec}/agreement as it runs", used.agreement, "share")
    columns = ["codec", "bytes a row", "relative error", "agreement", "divergence, nats"]
    record.table(
        f"before layer {layer}",
        [*columns, "agreement as it runs"],
        rows,
        note="Agreement with uncoded states in float32, and in the quantized engine, which rounds activations itself.",
    )
    for least in AGREEMENTS:
        enough = {row[0]: row[1] for row in rows if isinstance(row[3], float) and row[3] >= least}
        smallest = min(enough, key=lambda codec: float(enough[codec] or 0.0))
        size = float(enough[smallest] or 0.0)
        record.figure(
            f"layer {layer}/smallest with {least:.0%} agreement/{smallest}",
            size,
            "bytes a row",
            target=MAX_BYTES,
            at_most=True,
        )


def main() -> int:
    """Measures and writes results/codecs.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--calibrate", type=int, default=20000)
    options = parser.parse_args()
    source = bundle("keep")
    tokenizer = source.tokenizer()
    part = open_part(source, 0, source.config.n_layers, kv=KvConfig("f16", 1024))
    others = [states_of(part, ids) for ids in documents(tokenizer, options.calibrate, held=False)]
    held = [states_of(part, ids) for ids in documents(tokenizer, options.tokens, held=True)]
    part.close()
    stats = {k: ChannelStats.of(np.concatenate([states[k][1:] for states in others])) for k in LAYERS}
    record = Record(
        "codecs",
        {
            **vars(options),
            "documents": len(held),
            "tokens held out": sum(len(states[LAYERS[0]]) for states in held),
            "tokens calibrated on": sum(len(states[LAYERS[0]]) for states in others),
        },
    )
    coders(record, held[0][LAYERS[0]][1 : 1 + TIMED_ROWS], stats[LAYERS[0]])
    for layer in LAYERS:
        found: dict[str, dict[str, Tally]] = {}
        for engine in ENGINES:
            part = open_part(bundle(engine), layer, source.config.n_layers, kv=KvConfig("f16", 1024))
            found[engine] = compare(part, layer, held, stats[layer], divergence=engine == "f32")
            print(f"layer {layer}, {ENGINES[engine]}: done", file=sys.stderr, flush=True)
            part.close()
        report(record, layer, found)
    record.write()  # all layers or none: a run that was stopped does not pass for a whole one
    return 0


if __name__ == "__main__":
    sys.exit(main())
