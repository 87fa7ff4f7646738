"""Decode, prefill and batched decode of SmolLM2-135M, beside llama.cpp, ONNX Runtime and the reference prototype.

usage: python benchmarks/decode.py [--reference DIR] [--turns 6]

llama.cpp is measured when its environment is there:

    python -m venv ~/.cache/isthmus/peers/llama
    CMAKE_ARGS=-DGGML_NATIVE=ON ~/.cache/isthmus/peers/llama/bin/pip install \\
        --no-binary llama-cpp-python llama-cpp-python==0.3.36
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

from models import BENCH, bundle, gguf, peer_python
from record import Record

from isthmus.apps.bench.contenders import Contender, Elsewhere, Engine, kv_for, quietly
from isthmus.apps.bench.prototype import Prototype
from isthmus.apps.bench.quality import QUESTIONS, Quality
from isthmus.apps.bench.roofline import read_bandwidth
from isthmus.apps.bench.turns import CASES, Case, Speed, measure
from isthmus.engine import cpu_names, open_part
from isthmus.protocol.errors import EngineError

HERE = Path(__file__).resolve().parent
BATCH = 8
# name, bundle, bits of the nested weights, format of the prototype
FORMATS = (("4-bit", "q4", 0, "q4"), ("nested 2+2", "nested", 4, "n4"), ("4-bit with minimum", "keep", 0, None))


def native(name: str, format: str, bits: int, threads: int, cpu: str | None = None) -> Engine:
    """This project's engine on a bundle of that format."""
    source = bundle(format)
    part = open_part(source, 0, source.config.n_layers, threads=threads, kv=kv_for(BATCH), cpu=cpu, bits=bits)
    return Engine(name, part)


def llama(threads: int) -> Contender:
    """llama.cpp with Q4_0 weights and an 8-bit head."""
    python, model = peer_python("llama"), BENCH / "smollm2-q4_0.gguf"
    if not python.exists():
        raise EngineError("llama.cpp has no environment", "this file's head tells how to make one")
    script = HERE / "peers" / "llama.py"
    if not model.exists():
        BENCH.mkdir(parents=True, exist_ok=True)
        partial = model.with_suffix(".part")
        command = [str(python), str(script), "--requantize", str(gguf()), str(partial)]
        subprocess.run(command, check=True, capture_output=True)
        partial.rename(model)
    return Elsewhere("llama.cpp Q4_0", python, script, [str(model), str(threads)])


def onnxruntime(threads: int) -> Contender:
    """ONNX Runtime through this project's own back end; the same 4-bit codes."""
    source = bundle("q4")
    part = open_part(source, 0, source.config.n_layers, backend="onnx-q4", threads=threads, kv=kv_for(BATCH))
    return Engine("ONNX Runtime int4", part)


def contenders(threads: int, reference: Path | None, record: Record) -> list[Contender]:
    """All that can be measured with that many threads."""
    found: list[Contender] = [native(f"isthmus {name}", format, bits, threads) for name, format, bits, _ in FORMATS]
    for name, format, _, kind in FORMATS:
        if reference and kind:
            make = partial(Prototype, f"prototype {name}", reference, bundle(format), kind, threads)
            made = quietly(make, "the prototype")
            found += [made] if made else []
    if not reference:
        record.skip("the reference prototype", "no --reference folder was named")
    others = (quietly(lambda: llama(threads), "llama.cpp"), quietly(lambda: onnxruntime(threads), "ONNX Runtime"))
    for what, other in zip(("llama.cpp", "ONNX Runtime"), others, strict=True):
        if other:
            found.append(other)
        else:
            record.skip(what, "it is not installed")
    return found


def compare(record: Record, threads: int, speeds: dict[Case, dict[str, Speed]]) -> None:
    """Figures with their targets: ratios to the prototype, to llama.cpp and between formats."""
    for case, by_name in speeds.items():
        for name in sorted(by_name, key=lambda n: n.startswith("isthmus")):
            of, target = None, None
            if name == "isthmus 4-bit with minimum":
                of, target = "isthmus 4-bit", 0.85
            elif name.startswith("isthmus"):
                of, target = name.replace("isthmus", "prototype"), 0.95
            if of not in by_name:
                of = target = None
            key = f"{{}}/{case}/{threads} threads"
            record.figure(
                key.format(name), by_name[name].median, "tok/s", target=target, of=key.format(of) if of else None
            )
        if "llama.cpp Q4_0" in by_name and case.batch == 1:
            ratio = by_name["isthmus 4-bit"].median / by_name["llama.cpp Q4_0"].median
            record.figure(f"isthmus 4-bit over llama.cpp Q4_0/{case}/{threads} threads", ratio, "ratio", target=1.5)


def main() -> int:
    """Measures and writes results/decode.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="folder of a prototype, as apps/bench/prototype.py has it")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--threads", default="1,2")
    options = parser.parse_args()
    counts = [int(n) for n in options.threads.split(",")]
    record = Record("decode", {"turns": options.turns, "steps a turn": 20, "cases": [str(c) for c in CASES]})
    tokenizer, cosines = bundle("keep").tokenizer(), dict[str, float]()
    prompts = [tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    quality = Quality(bundle("f32"), prompts)
    rows: list[list[float | str | None]] = []
    speeds: dict[int, dict[Case, dict[str, Speed]]] = {}
    for threads in counts:
        running = contenders(threads, options.reference, record)
        for contender in running:
            if contender.name not in cosines:
                cosines[contender.name] = quality.cosine(contender)
        speeds[threads] = {case: measure(running, case, turns=options.turns) for case in CASES}
        compare(record, threads, speeds[threads])
        weights = sum(w.nbytes for i in range(30) for w in bundle("q4").layer(i).values()) + bundle("q4").head().nbytes
        roof = read_bandwidth(threads, buffer_bytes=weights) / weights
        record.figure(f"memory roofline/{threads} threads", roof, "tok/s")
        share = speeds[threads][CASES[0]]["isthmus 4-bit"].median / roof
        record.figure(f"share of the memory roofline/{threads} threads", share, "ratio")
        for contender in running:
            if isinstance(contender, Engine):
                contender.part.close()
            elif isinstance(contender, Elsewhere):
                contender.close()
    shown = [(case, t) for case in CASES for t in counts if t == counts[-1] or case == CASES[0]]
    for name in speeds[counts[0]][CASES[0]]:
        if not name.startswith("prototype"):
            rows.append([name, *(speeds[t][case][name].median for case, t in shown), cosines.get(name)])
    roofs = [float(record.figures[f"memory roofline/{t} threads"]["value"]) for t in counts]
    shares = [float(record.figures[f"share of the memory roofline/{t} threads"]["value"]) for t in counts]
    for name, values in (("memory roofline", roofs), ("share of it, 4-bit", shares)):
        rows.append([name, *values, *[None] * (len(shown) + 1 - len(values))])
    columns = ["tok/s", *(f"{case}, {t} thread{'s' * (t > 1)}" for case, t in shown), "cosine to float32"]
    record.table("decode", columns, rows, note="Medians of contenders taking turns in one run.")
    others = []
    for cpu in [name for name in cpu_names() if name != cpu_names()[0]]:
        part = native(f"isthmus 4-bit {cpu}", "q4", 0, counts[-1], cpu)
        turns = max(1, options.turns // 3) if cpu != "plain" else 1
        got = {case: measure([part], case, turns=turns, steps=8)[part.name].median for case in CASES[:1] + CASES[-1:]}
        for case, value in got.items():
            record.figure(f"isthmus 4-bit {cpu}/{case}/{counts[-1]} threads", value, "tok/s")
        others.append([cpu, *got.values()])
    record.table("families", ["kernels", *(f"{c}, {counts[-1]} thr." for c in CASES[:1] + CASES[-1:])], others)
    for name, cosine in cosines.items():
        record.figure(
            f"cosine/{name}", cosine, "ratio", target=0.9995 if name == "isthmus 4-bit with minimum" else None
        )
    record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
