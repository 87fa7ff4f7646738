"""One conversation through everything that may happen to its device, link and cloud, as a state machine."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from isthmus.edge import Device, Rollback
from isthmus.engine.sampling import Sampling
from tests.edge_exits import CUT, Oracle, give_exit
from tests.edge_toys import PATIENT, PROMPT, lie
from tests.edge_world import LossyWire, ToyBundle, ToyService

MODES = ("auto", "stream", "verify", "split", "exit", "local")
SAMPLINGS = (Sampling(), Sampling(0.9, top_k=40, seed=7))
LENGTH = 400
THRESHOLD = 0.6
ORACLE = Oracle()


class Survival(RuleBasedStateMachine):
    """Whatever is done to it, a reader has seen the right text in the end: no token lost, doubled or wrong.

    Right is what the model says, and in exit mode what the exit says where it is sure.

    Attributes:
        done: how often each thing was done, over all runs.
    """

    done: Counter[str] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory(prefix="isthmus-survival-")
        self.path = Path(self.folder.name) / "talk"
        self.service = ToyService(0.005)
        self.sampling = SAMPLINGS[0]
        self.seed = 0
        self.seen: list[int] = []  # by the reader of this conversation, guesses included
        self.certain = 0
        self.right: list[int] = []  # as far as it was looked at
        self.mode = "stream"  # of the last answer
        self.answer: Any = None
        self.device: Any = None

    @initialize(
        seed=st.integers(0, 2**32), sampling=st.sampled_from(SAMPLINGS), whole=st.booleans(), lies=st.booleans()
    )
    def begin(self, seed: int, sampling: Sampling, whole: bool, lies: bool) -> None:
        self.seed, self.sampling, self.whole, self.lies = seed, sampling, whole, whole and lies
        self._start()

    @rule(count=st.integers(1, 30), mode=st.sampled_from(MODES))
    def ask(self, count: int, mode: str) -> None:
        self._end()
        if mode == "local" and (self.lies or not self.whole):
            mode = "stream"
        room = LENGTH - len(self.seen)
        if room > 0:
            prompt = None if len(self.device.tokens) else PROMPT
            self.right = self._right(len(self.seen))  # which may go on otherwise
            self.mode = mode
            options = {"max_tokens": min(count, room), "mode": mode, "sampling": self.sampling}
            self.answer = self.device.generate(prompt, **options)
            self.done["answers"] += 1

    @rule(count=st.integers(1, 12))
    def read(self, count: int) -> None:
        for _ in range(count if self.answer is not None else 0):
            token = next(self.answer, None)
            if token is None:
                self._over()
                return
            self._see(token)

    @rule(
        drop=st.sampled_from([0.0, 0.1, 0.3]), repeat=st.sampled_from([0.0, 0.3]), slow_s=st.sampled_from([0.005, 0.3])
    )
    def spoil(self, drop: float, repeat: float, slow_s: float) -> None:
        self.wire.spoil(drop, repeat, (0.001, slow_s))
        self.done["drops, repeats and reorders"] += 1

    @rule(for_s=st.sampled_from([0.05, 0.4, 3.0, 20.0]), count=st.integers(0, 12))
    def cut(self, for_s: float, count: int) -> None:
        self.wire.dark.append((self.wire.now, self.wire.now + for_s))
        self.done["cuts" if self.answer is None else "cuts in an answer"] += 1
        self.read(count)

    @rule()
    def forsake(self) -> None:
        """The link is lost for good while an answer is said."""
        if self.answer is not None:
            self.wire.dark.append((self.wire.now, math.inf))
            for token in self.answer:
                self._see(token)
            self._over()
            self.wire.dark.clear()

    @rule()
    def reconnect(self) -> None:
        self.wire.reconnect()
        self.done["broken connections"] += 1

    @rule()
    def restart_cloud(self) -> None:
        self.service.forget()
        self.wire.reconnect()
        self.done["restarts of the cloud"] += 1

    @rule(torn=st.integers(0, 40))
    def kill_device(self, torn: int) -> None:
        """Nobody hears of it, and the end of its file may be lost with the power."""
        self._begin_again(torn)

    def _begin_again(self, torn: int) -> None:
        data = self.path.read_bytes()
        self._drop()
        lines = data.rstrip(b"\n").rpartition(b"\n")
        self.path.write_bytes(data[: max(len(lines[0]) + 1, len(data) - torn)])
        self._start()
        self.done["restarts of the device"] += 1
        self.seen = self.device.tokens[len(PROMPT) :]
        self.certain = len(self.seen)
        self.right = self._right(
            len(self.seen)
        )  # an earlier answer, whose end was lost, goes on in the last one's mode
        if self.device.unfinished is not None:
            self.answer = self.device.go_on()

    @invariant()
    def what_is_certain_is_right(self) -> None:
        if self.device is not None:
            assert self.seen[: self.certain] == self._right(self.certain)
            kept = self.device.tokens[len(PROMPT) :]
            assert kept == self._right(len(kept))

    def teardown(self) -> None:
        if self.device is not None:
            self._end()
            assert self.seen == self._right(len(self.seen))
            self._drop()
        self.folder.cleanup()
        self.done["sequences"] += 1

    def _start(self) -> None:
        self.seed += 1
        self.wire = LossyWire(self.service, self.seed, delay_s=(0.005, 0.01))
        self.wire.poll_s = 0.004
        self.device = Device(
            ToyBundle() if self.whole else ToyBundle(held=3),  # type: ignore[arg-type]
            wire=self.wire,
            clock=self.wire.clock,
            timeouts=replace(PATIENT, confirm_ms=3_000),
            mode="exit" if self.mode == "exit" else "stream",
            cut=CUT,
            codec="f32",
            threshold=THRESHOLD,
            resume=self.path,
            on_rollback=self._rolled_back,
        )
        give_exit(self.device)
        if self.lies:
            lie(self.device)

    def _drop(self) -> None:
        self.wire.cloud = None
        if self.answer is not None:
            self.answer.close()
            self.answer = None
        self.device.close()

    def _end(self) -> None:
        """Reads the answer to its end on a link that has come back for good."""
        if self.answer is not None:
            self.wire.dark.clear()
            self.wire.spoil(0.0, 0.0, (0.005, 0.01))
            for token in self.answer:
                self._see(token)
            self._certain()
            self.answer = None
            assert self.device.stats.unverified == 0

    def _over(self) -> None:
        """An answer has come to its end; who opens the file goes on before what nobody has confirmed."""
        self.answer, unsure = None, self.device.stats.unverified
        if not unsure:
            self._certain()
            return
        sure = len(self.seen) - unsure
        assert sure >= self.certain
        self._begin_again(0)
        assert len(self.seen) == sure and self.answer is not None
        self.done["answers whose end nobody confirmed"] += 1

    def _see(self, token: Any) -> None:
        assert token.position == len(PROMPT) + len(self.seen)
        self.seen.append(token.id)
        if token.verified:
            self._certain()
        self.done["tokens" if token.verified else "guesses"] += 1
        self.done["tokens in exit mode"] += self.mode == "exit"

    def _certain(self) -> None:
        self.certain = len(self.seen)

    def _right(self, count: int) -> list[int]:
        """The first tokens of the right text."""
        threshold = THRESHOLD if self.mode == "exit" else None
        while len(self.right) < count:
            self.right.append(ORACLE.after([*PROMPT.encode(), *self.right], self.sampling, threshold))
        return self.right[:count]

    def _rolled_back(self, wrong: Rollback) -> bool:
        at = wrong.position - len(PROMPT)
        assert self.seen[at:] == list(wrong.tokens) and at >= self.certain
        del self.seen[at:]
        self.done["tokens taken back"] += len(wrong.tokens)
        return True
