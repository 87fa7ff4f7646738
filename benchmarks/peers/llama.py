"""llama.cpp, driven by JSON lines (see isthmus.apps.bench.contenders.Elsewhere); runs in an environment of its own.

usage: python llama.py MODEL.gguf THREADS
       python llama.py MODEL.gguf THREADS --one WAY      (one sequence, as a memory limit wants it; see `WAYS`)
       python llama.py --requantize IN.gguf OUT.gguf     (to Q4_0 with an 8-bit head, llama.cpp's fastest 4-bit path)
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import llama_cpp as lc

CONTEXT, MAX_BATCH = 640, 16
# How weights stay in the mapped file: "defaults" copies those of 4 bits into another layout, experts too; "mapped"
# copies nothing; "experts mapped" copies all others. The last does so as well, and tells the kernel to read the
# aligned 2 MB about a page that is missing, instead of its readahead, which may be much longer than an expert. (Pages
# alone, without any readahead, are slower than all of these.)
_HUGE, _RANDOM = 14, 1  # Linux's MADV_HUGEPAGE and MADV_RANDOM
WAYS: Mapping[str, tuple[int, ...]] = {
    "defaults": (),
    "mapped": (),
    "experts mapped": (),
    "experts mapped, 2 MB a fault": (_HUGE, _RANDOM),
}


class Override(ctypes.Structure):
    """llama.h's `llama_model_tensor_buft_override`: tensors of that pattern go into buffers of that type."""

    _fields_: ClassVar = [("pattern", ctypes.c_char_p), ("type", ctypes.c_void_p)]


def requantize(source: str, target: str) -> int:
    """Writes a Q4_0 copy of a model."""
    params = lc.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = lc.LLAMA_FTYPE_MOSTLY_Q4_0, True, 2
    params.token_embedding_type = params.output_tensor_type = lc.GGML_TYPE_Q8_0
    return int(lc.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


def plain_buffers() -> Any:
    """The type of buffers that a mapped file can stand in for."""
    folder = Path(lc.__file__).parent / "lib"
    library = ctypes.CDLL(str(folder / "libggml-base.so"))
    library.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    return library.ggml_backend_cpu_buffer_type()


def advise(path: str, advice: int) -> None:
    """Tells the kernel how the mapping of a file will be read.

    Raises:
        OSError: it does not take that advice.
    """
    library = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(path):
            start, end = (int(place, 16) for place in line.split()[0].split("-"))
            if library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice):
                raise OSError(ctypes.get_errno(), f"madvise {advice}")


class Model:
    """One context that decodes up to 16 sequences, or one if a way to hold weights is named (see `WAYS`)."""

    def __init__(self, path: str, threads: int, way: str | None = None) -> None:
        if way not in (None, *WAYS):
            raise ValueError(f"{way!r} is none of {', '.join(WAYS)}")
        lc.llama_backend_init()
        loading = lc.llama_model_default_params()
        if way == "mapped":
            loading.use_extra_bufts = False
        elif way and way.startswith("experts mapped"):
            self._overrides = (Override * 2)(Override(b"ffn_(gate|up|down)_exps", plain_buffers()))
            loading.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
        self._model = lc.llama_model_load_from_file(path.encode(), loading)
        for advice in WAYS.get(way or "", ()):
            advise(path, advice)
        params = lc.llama_context_default_params()
        sequences, batch = (1, 16) if way else (MAX_BATCH, 512)
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT * sequences, batch, batch
        params.n_seq_max, params.n_threads, params.n_threads_batch = sequences, threads, threads
        self._context = lc.llama_init_from_model(self._model, params)
        self._memory = lc.llama_get_memory(self._context)
        self._batch = lc.llama_batch_init(512, 0, 1)

    def step(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Decodes rows of (token, position, sequence, whether logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, logits
            batch.seq_id[i][0] = sequence
        if lc.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        lc.llama_synchronize(self._context)

    def decode(self, context: int, batch: int, steps: int) -> list[float]:
        """Seconds of each step; see Contender.decode."""
        lc.llama_memory_clear(self._memory, True)
        for s in range(batch):
            self.step([(5 + s, p, s, p == context - 1) for p in range(context)])
        seconds = []
        for step in range(steps):
            begin = time.perf_counter()
            self.step([(1000 + step, context + step, s, True) for s in range(batch)])
            seconds.append(time.perf_counter() - begin)
        return seconds

    def along(self, tokens: list[int], path: str | None = None) -> list[float]:
        """Seconds of each token of a sequence, one after the other; logits [len(tokens), vocab_size] f32 to a file."""
        lc.llama_memory_clear(self._memory, True)
        vocab, seconds = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self._model)), []
        with Path(path or "/dev/null").open("wb") as file:
            for i, token in enumerate(tokens):
                begin = time.perf_counter()
                self.step([(token, i, 0, True)])
                seconds.append(time.perf_counter() - begin)
                if path:
                    file.write(ctypes.string_at(lc.llama_get_logits_ith(self._context, 0), 4 * vocab))
        return seconds

    def prefill(self, tokens: int) -> float:
        """Seconds; see Contender.prefill."""
        lc.llama_memory_clear(self._memory, True)
        begin = time.perf_counter()
        self.step([(100 + i * 37 % 40000, i, 0, i == tokens - 1) for i in range(tokens)])
        return time.perf_counter() - begin

    def logits(self, prompt: list[int], answer: list[int], path: str) -> None:
        """Writes logits [len(answer), vocab_size] float32 to a file; see Contender.logits."""
        lc.llama_memory_clear(self._memory, True)
        ids, last = prompt + answer[:-1], len(prompt) - 1
        self.step([(token, i, 0, i >= last) for i, token in enumerate(ids)])
        vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self._model))
        with Path(path).open("wb") as file:
            for i in range(last, len(ids)):
                file.write(ctypes.string_at(lc.llama_get_logits_ith(self._context, i), 4 * vocab))


def main() -> int:
    """Answers questions until standard input ends."""
    if sys.argv[1] == "--requantize":
        return requantize(sys.argv[2], sys.argv[3])
    model = Model(sys.argv[1], int(sys.argv[2]), sys.argv[4] if sys.argv[3:4] == ["--one"] else None)
    for line in sys.stdin:
        question: dict[str, Any] = json.loads(line)
        do = question.pop("do")
        answer = "ready" if do == "ready" else getattr(model, do)(**question)
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
