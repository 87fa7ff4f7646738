"""This project's engine with experts on flash, driven by JSON lines (see isthmus.apps.bench.contenders.Elsewhere).

usage: python flash.py BUNDLE BUDGET_BYTES THREADS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.edge.experts.report import ExpertReport
from isthmus.edge.experts.store import ExpertStore
from isthmus.engine.native_part import open_native
from isthmus.engine.part import KvConfig, Rows, Want
from isthmus.engine.routing import Routing
from isthmus.split.bundle import Bundle

CONTEXT = 640  # as peers/llama.py has it


class Model:
    """All layers of a bundle, and a store with its own defaults."""

    def __init__(self, path: str, budget: int, threads: int) -> None:
        bundle = Bundle.open(path)
        self._store = ExpertStore(bundle, budget)
        source = bundle.without_experts()
        kv = KvConfig("f16", CONTEXT)
        self._part = open_native(source, 0, bundle.config.n_layers, threads=threads, kv=kv, experts=self._store)
        self._routing = list[Routing]()

    def along(self, tokens: list[int], path: str | None = None) -> list[float]:
        """Seconds of each token of a sequence, one after the other; logits [len(tokens), vocab_size] f32 to a file."""
        routing, sequence, seconds = self._part.record(len(tokens)), self._part.open(), list[float]()
        assert routing is not None
        with Path(path or "/dev/null").open("wb") as file:
            for i, token in enumerate(tokens):
                begin = time.perf_counter()
                logits = self._part.step(Rows().tokens(sequence, i, [token], want=Want.LOGITS)).logits
                seconds.append(time.perf_counter() - begin)
                file.write(logits.tobytes())
        sequence.close()
        self._routing.append(routing)
        return seconds

    def routing(self, path: str) -> int:
        """Writes what routers chose so far to a file; how many positions there are."""
        kept = {
            name: np.concatenate([getattr(one, name) for one in self._routing])
            for name in ("chosen", "weights", "foreseen")
        }
        np.savez(path, allow_pickle=False, **kept)
        return len(kept["chosen"])

    def report(self) -> dict[str, Any]:
        """See `ExpertReport`."""
        return ExpertReport.of(self._store).to_dict()


def main() -> int:
    """Answers questions until standard input ends."""
    model = Model(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    for line in sys.stdin:
        question: dict[str, Any] = json.loads(line)
        do = question.pop("do")
        answer = "ready" if do == "ready" else getattr(model, do)(**question)
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
