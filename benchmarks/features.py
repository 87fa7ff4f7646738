"""What coding features costs and saves: time of an encoding, and bytes at the same answers, against a WebP.

EfficientNet-Lite0 is cut behind each of its blocks. On crops of photographs the smallest codec is taken that leaves
99 % of the answers (top-1) as they are without it; beside it stand the smallest JPEG and WebP of the network's input
that do. Codecs are chosen on the photographs that they are judged by, as a plan does; beside that, each is chosen again
on the crops of every other photograph and judged on those of the rest, and the other way round.

usage: python benchmarks/features.py
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import msgspec
import numpy as np
from networks import CROPS, PREPROCESS, efficientnet, photographs
from record import Cell, Record

from isthmus.apps.bench.calm import Calm
from isthmus.protocol import features
from isthmus.split.onnx_file import read_model
from isthmus.split.onnx_graph import OnnxGraph
from isthmus.split.pictures import Preprocess, called
from isthmus.split.trials import Trials

NOTE = (
    "The smallest that leaves 99 % of the answers as they are, of JPEG the best where none does; on 200 crops of 20 "
    "photographs, by which they were chosen as well. Held out: chosen on the crops of ten of them, judged on those of "
    "the other ten, and the other way round."
)
VALUES, TURNS = 100_000, 41
LEAST, SMALLER, ENCODE_MS = 0.99, 10.0, 1.0


def main() -> int:
    """Measures and writes results/features.json."""
    how = msgspec.convert(PREPROCESS, Preprocess)
    pictures = photographs()
    record = Record("features", {"photographs": len(pictures), "agreement": LEAST, "threads": 1})
    _times(record)
    path = efficientnet().path
    graph = OnnxGraph(read_model(path))
    inputs = [{"x": how.array(one)} for one in pictures]
    trials = Trials(graph, path, inputs, LEAST)
    halves = [[one for at, one in enumerate(inputs) if at // CROPS % 2 == odd] for odd in (0, 1)]
    folds = [Trials(graph, path, half, LEAST) for half in halves]
    rows: list[list[Cell]] = []
    images = trials.images(pictures, how, "x")
    for one in images:
        format = called(one.codec)
        record.figure(f"{format.split()[0]}/bytes", one.bytes, "bytes")
        record.figure(f"{format.split()[0]}/answers that stay", one.agreement, "share")
        rows.append([format, "the picture", pictures[0].size, one.bytes, None, one.agreement, None, None])
    ratios, held = list[float](), list[tuple[float, float]]()
    for name, nodes in _blocks(graph):
        tried = trials.smallest(nodes)
        ratio = tried.plain_bytes / tried.bytes
        ratios.append(ratio)
        judged = [there.again(nodes, here.smallest(nodes)) for here, there in (folds, folds[::-1])]
        smaller = statistics.fmean(one.plain_bytes for one in judged) / statistics.fmean(one.bytes for one in judged)
        held.append((smaller, statistics.fmean(one.agreement for one in judged)))
        rows.append([tried.codec, name, tried.plain_bytes / 4, tried.bytes, ratio, tried.agreement, *held[-1]])
        print(*rows[-1], sep="; ", file=sys.stderr, flush=True)
    record.figure("blocks/smaller than float32, worst", min(ratios), "times", target=SMALLER)
    record.figure("blocks/smaller than float32, median", statistics.median(ratios), "times")
    record.figure("held out/smaller than float32, worst", min(ratio for ratio, _ in held), "times")
    record.figure("held out/answers that stay, mean", statistics.fmean(stay for _, stay in held), "share")
    record.figure("held out/answers that stay, worst", min(stay for _, stay in held), "share")
    best = min((row for row in rows if row[1] != "the picture"), key=lambda row: float(row[3] or 0))
    webp = next(one for one in images if one.codec.startswith("webp"))
    record.figure("the smallest block's bytes of WebP's", float(best[3] or 0) / webp.bytes, "ratio")
    columns = ["codec", "what travels", "values", "bytes", "times smaller than float32", "answers that stay"]
    columns += ["held out, times smaller", "held out, answers that stay"]
    record.table("features", columns, rows, note=NOTE)
    record.write()
    return 0


def _blocks(graph: OnnxGraph) -> list[tuple[str, tuple[int, ...]]]:
    """Cuts behind each block: the tensor's name, and the nodes on the device."""
    found = []
    for at in range(1, len(graph.nodes)):
        crossing = graph.crossing(range(at))
        if len(crossing) == 1 and (crossing[0].endswith(".sum") or "_bn2." in crossing[0]):
            found.append((crossing[0].split("._")[0].strip("_").removesuffix(".sum"), tuple(range(at))))
    return found


def _times(record: Record) -> None:
    """Of a tensor of 100,000 values, by codec."""
    chance = np.random.default_rng(0)
    values = np.maximum(chance.standard_normal(VALUES), 0).astype(np.float32)
    calm = Calm()
    for codec in ("int8", "int4", "int2", "f16", "zstd"):
        data = features.encode(values, codec)
        there = _ms(calm, lambda codec=codec: features.encode(values, codec))  # type: ignore[misc]
        back = _ms(
            calm,
            lambda codec=codec, data=data: features.decode(memoryview(data), codec, values.dtype, values.shape),  # type: ignore[misc]
        )
        target = ENCODE_MS if codec.startswith("int") else None
        record.figure(f"encode/{codec}", there, "ms", target=target, at_most=target is not None)
        record.figure(f"decode/{codec}", back, "ms")
        record.figure(f"bits a value/{codec}", 8 * len(data) / VALUES, "bits")


def _ms(calm: Calm, call: Callable[[], object]) -> float:
    calm.wait(10.0)
    took = []
    for _ in range(TURNS):
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1e3)
    return statistics.median(took)


if __name__ == "__main__":
    sys.exit(main())
