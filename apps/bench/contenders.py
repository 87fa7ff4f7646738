"""What is measured: this engine and others, behind one small interface."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.engine.part import KvConfig, Part, Rows, Want
from isthmus.protocol.errors import EngineError

MAX_CONTEXT = 640
PREFILL = 512


class Contender(Protocol):
    """Something that decodes; every call gives seconds."""

    @property
    def name(self) -> str: ...

    def decode(self, context: int, batch: int, steps: int) -> list[float]:
        """Seconds of each of `steps` steps of `batch` sequences that begin at `context` positions."""
        ...

    def prefill(self, tokens: int) -> float:
        """Seconds to take in a prompt."""
        ...

    def logits(self, prompt: list[int], answer: list[int]) -> NDArray[np.float32]:
        """Logits [len(answer), vocab_size] for each token of an answer, given the prompt and the tokens before it."""
        ...


def prompt(tokens: int) -> list[int]:
    """Token ids spread over the vocabulary, so that embedding rows are not all in the cache."""
    return [100 + i * 37 % 40000 for i in range(tokens)]


class Engine:
    """A part of this project, called as device and cloud call it."""

    def __init__(self, name: str, part: Part) -> None:
        self.name, self.part = name, part

    def decode(self, context: int, batch: int, steps: int) -> list[float]:
        """See `Contender.decode`."""
        sequences = [self.part.open() for _ in range(batch)]
        vocabulary = self.part.config.vocab_size
        for i, sequence in enumerate(sequences):
            self.part.step(Rows().tokens(sequence, 0, [(5 + i) % vocabulary] * context, want=Want.NONE))
        seconds = []
        for step in range(steps):
            begin = time.perf_counter()
            rows = Rows()
            for sequence in sequences:
                rows.tokens(sequence, context + step, [(1000 + step) % vocabulary])
            self.part.step(rows)
            seconds.append(time.perf_counter() - begin)
        for sequence in sequences:
            sequence.close()
        return seconds

    def prefill(self, tokens: int) -> float:
        """See `Contender.prefill`."""
        sequence = self.part.open()
        ids = [t % self.part.config.vocab_size for t in prompt(tokens)]
        begin = time.perf_counter()
        self.part.step(Rows().tokens(sequence, 0, ids))
        seconds = time.perf_counter() - begin
        sequence.close()
        return seconds

    def logits(self, prompt: list[int], answer: list[int]) -> NDArray[np.float32]:
        """See `Contender.logits`."""
        return logits_along(self.part, prompt, answer)


def logits_along(part: Part, prompt: list[int], answer: list[int]) -> NDArray[np.float32]:
    """Logits [len(answer), vocab_size] of a whole model for each token of an answer; see `Contender.logits`."""
    sequence = part.open()
    rows = Rows().tokens(sequence, 0, prompt, want=Want.LOGITS)
    first = part.step(rows).logits
    if len(answer) == 1:
        others = first[:0]
    else:
        others = part.step(Rows().tokens(sequence, len(prompt), answer[:-1], want=Want.LOGITS, want_all=True)).logits
    sequence.close()
    return np.concatenate([first, others])


def kv_for(batch: int) -> KvConfig:
    """Room for every contender's longest run."""
    return KvConfig("f16", (batch + 1) * MAX_CONTEXT)


class Elsewhere:
    """An engine in another Python environment, driven over its standard input and output, a JSON line a call."""

    def __init__(self, name: str, python: Path, script: Path, arguments: Sequence[str]) -> None:
        self.name = name
        command = [str(python), str(script), *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        if self._ask({"do": "ready"}) != "ready":
            raise EngineError(f"{name} did not start", f"try it by hand: {' '.join(command)}")

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise EngineError(f"{self.name} ended without an answer (exit code {self._process.poll()})")
        return json.loads(line)

    def decode(self, context: int, batch: int, steps: int) -> list[float]:
        """See `Contender.decode`."""
        return [float(s) for s in self._ask({"do": "decode", "context": context, "batch": batch, "steps": steps})]

    def prefill(self, tokens: int) -> float:
        """See `Contender.prefill`."""
        return float(self._ask({"do": "prefill", "tokens": tokens}))

    def logits(self, prompt: list[int], answer: list[int]) -> NDArray[np.float32]:
        """See `Contender.logits`; the other process hands them over in a file."""
        with tempfile.NamedTemporaryFile(suffix=".f32") as file:
            self._ask({"do": "logits", "prompt": prompt, "answer": answer, "path": file.name})
            return np.fromfile(file.name, np.float32).reshape(len(answer), -1)

    def close(self) -> None:
        """Ends the other process."""
        self._process.kill()
        self._process.wait()


def quietly(make: Callable[[], Contender], what: str) -> Contender | None:
    """A contender, or None and a line on stderr that says why it is left out."""
    try:
        return make()
    except (EngineError, OSError) as error:
        print(f"{what} is left out: {error}", file=sys.stderr)
        return None
