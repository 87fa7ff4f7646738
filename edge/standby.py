"""Keeps a device ready to go on without its cloud, in the time in which it waits for it."""

from __future__ import annotations

import time

from isthmus.edge.holding import Holding
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import IsthmusError
from isthmus.split.bundle import Bundle

SLICE_S = 0.008  # of work at a time: by so much an answer may be taken in late
BATCH = 4  # positions that are worth a pass


class Standby:
    """The whole model, open, with KV for all but the last few tokens of the conversation.

    Args:
        log: the conversation's.
    """

    def __init__(self, bundle: Bundle, holding: Holding, log: Chain) -> None:
        self._bundle, self._holding, self._log = bundle, holding, log
        self._depth = bundle.config.n_layers
        self._row_s = 0.0
        self._asked = self._failed = False

    def work(self) -> bool:
        """Does a slice of what is to be done; False when there is nothing for now."""
        if self._failed:
            return False
        if not self._asked:
            self._asked = True
            self._bundle.prefetch(0, self._depth)
            return True
        if not self._bundle.prefetched(0, self._depth):
            return False
        try:
            part = self._holding.open(self._depth)
            missing = len(self._log) - 1 - part.held(self._depth, self._log)
            if missing < BATCH:
                return False
            rows = max(BATCH, min(missing, int(SLICE_S / self._row_s))) if self._row_s else BATCH
            began = time.perf_counter()
            part.advance(self._log, rows)
            self._row_s = (time.perf_counter() - began) / rows
        except IsthmusError:  # no memory, no room, damaged weights: then it goes on more slowly, if at all
            self._failed = True
        return not self._failed
