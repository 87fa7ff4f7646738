"""How far a long measurement has come."""

from __future__ import annotations

import sys
from collections.abc import Callable


def tenths(what: str) -> Callable[[int, int], None]:
    """Tells every tenth of the way; called with how many are done, and of how many."""

    def tell(done: int, total: int) -> None:
        if done * 10 // total != (done - 1) * 10 // total:
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return tell
