"""Which positions have KV up to which layer."""

from __future__ import annotations


class Coverage:
    """Positions from 0 on, in runs that went through layers [0, depth).

    A sequence that was used with a cut has KV in the layers before the cut only; going deeper later needs the
    positions from the first shallow one on again.
    """

    __slots__ = ("_runs",)

    def __init__(self) -> None:
        self._runs: list[tuple[int, int]] = []  # (end position, depth)

    @property
    def length(self) -> int:
        """Positions held at any depth."""
        return self._runs[-1][0] if self._runs else 0

    def at(self, depth: int) -> int:
        """Leading positions whose layers [0, depth) all have KV."""
        reached = 0
        for end, run in self._runs:
            if run < depth:
                break
            reached = end
        return reached

    def extend(self, end: int, depth: int) -> None:
        """Positions up to `end` were added, each through layers [0, depth)."""
        if self._runs and self._runs[-1][1] == depth:
            self._runs[-1] = (end, depth)
        else:
            self._runs.append((end, depth))

    def deepen(self, end: int, depth: int) -> None:
        """Positions up to `end`, of those that are there, have KV in layers [0, depth) now, or in more, as they had."""
        runs, self._runs = self._runs, []
        for last, known in runs:
            begin = self.length
            if begin < end:
                self.extend(min(last, end), max(known, depth))
            if last > end:
                self.extend(last, known)

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on."""
        runs = self._runs
        while runs and (runs[-2][0] if len(runs) > 1 else 0) >= length:
            runs.pop()
        if runs and runs[-1][0] > length:
            runs[-1] = (length, runs[-1][1])
