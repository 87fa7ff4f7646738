"""llama.cpp, driven by JSON lines (see isthmus.apps.bench.contenders.Elsewhere); runs in an environment of its own.

usage: python llama.py MODEL.gguf THREADS
       python llama.py --requantize IN.gguf OUT.gguf     (to Q4_0 with an 8-bit head, llama.cpp's fastest 4-bit path)
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as lc

CONTEXT, MAX_BATCH = 640, 16


def requantize(source: str, target: str) -> int:
    """Writes a Q4_0 copy of a model."""
    params = lc.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = lc.LLAMA_FTYPE_MOSTLY_Q4_0, True, 2
    params.token_embedding_type = params.output_tensor_type = lc.GGML_TYPE_Q8_0
    return int(lc.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


class Model:
    """One context that decodes up to 16 sequences."""

    def __init__(self, path: str, threads: int) -> None:
        lc.llama_backend_init()
        self._model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT * MAX_BATCH, 512, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = MAX_BATCH, threads, threads
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
    model = Model(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        question: dict[str, Any] = json.loads(line)
        do = question.pop("do")
        answer = "ready" if do == "ready" else getattr(model, do)(**question)
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
