"""How far to draft before asking: from acceptance, drafting time, round trip and the cloud's time, all as measured."""

from __future__ import annotations

import math

BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16)  # tokens that may be drafted for one question
SEVERAL = 2  # tokens at least of a block that follows another: a message has more bytes around them than they have
LIKELY = 0.22  # probability that all guesses are right below which they cost more than the questions that they save
FREE_S = 2e-4  # drafting that takes less costs nothing
_FORGET = 0.97  # of what was seen, with each answer
ROW_SHARE = 0.2  # what a further row of a pass costs the cloud, of the first
GUESSES = 8  # tokens that exit mode may go on for before it asks


class Pace:
    """Learns while drafts are checked; pure but for what it is told.

    Args:
        depth: blocks that may be under way at once; 1 waits for each answer.
        acceptance: share of drafted tokens that are right, until it is known.
        blocks: lengths to choose from.
        floor: guesses go on while they are all right with at least this probability, when they cost nothing but bytes
            (a device that has to draft drafts on anyway).

    Attributes:
        draft_s: what drafting a token takes, in seconds; 0 until that is known.
    """

    def __init__(
        self, depth: int = 1, acceptance: float = 0.5, floor: float = 0.06, blocks: tuple[int, ...] = BLOCKS
    ) -> None:
        self.depth, self.floor, self._blocks = depth, floor, blocks
        self._right, self._wrong = 4 * acceptance, 4 * (1 - acceptance)
        self.draft_s = self._trip_s = self._pass_s = 0.0

    @property
    def acceptance(self) -> float:
        """Probability that a drafted token is right when those before it are."""
        return self._right / (self._right + self._wrong)

    def drafted(self, tokens: int, took_s: float) -> None:
        """So many tokens were drafted."""
        if tokens:
            self.draft_s = _mean(self.draft_s, took_s / tokens)

    def answered(self, guesses: int, right: int, rows: int, took_s: float, engine_s: float) -> None:
        """An answer came.

        Args:
            guesses: drafted tokens that were checked, the first wrong one the last.
            right: how many of them were right.
            rows: tokens of the block.
            took_s: from question to answer.
            engine_s: the cloud's part of that.
        """
        self._right = _FORGET * self._right + right
        self._wrong = _FORGET * self._wrong + (guesses - right)
        self._trip_s = _mean(self._trip_s, max(0.0, took_s - engine_s))
        self._pass_s = _mean(self._pass_s, engine_s / (1 + ROW_SHARE * (rows - 1)))

    def length(self, idle: bool = False) -> int:
        """Tokens to draft for the next question.

        Args:
            idle: nothing is under way, so that several questions at once begin with a short one.

        One question at a time: as many as give most tokens a second, E / (g t_d + R + t_v(g + 1)) with
        E = (1 - a^(g+1)) / (1 - a). Several at once: as few as keep the cloud from falling behind, t_v(g) <= g t_d.
        """
        if not self._pass_s:
            return self._blocks[len(self._blocks) // 2]
        if self.depth > 1 and self.draft_s > FREE_S:
            if idle:
                return self._blocks[0]
            several = [g for g in self._blocks if g >= SEVERAL] or self._blocks
            return next((g for g in several if self._check_s(g) <= g * self.draft_s), 8)
        a = min(self.acceptance, 0.99)

        def rate(g: int) -> float:
            tokens = (1 - a ** (g + 1)) / (1 - a)
            return tokens / (g * self.draft_s + self._trip_s + self._check_s(g + 1) + 1e-4)

        return max(self._blocks, key=rate)

    def answer_s(self) -> float:
        """How long an answer takes; 0 until that is known."""
        return self._trip_s + self._pass_s

    @property
    def most(self) -> int:
        """Tokens that may be drafted for one question."""
        return self._blocks[-1]

    def even(self) -> float:
        """With which probability a further token must be right to pay: it takes its drafting and a row of the pass, and
        saves a trip and a pass. 0 until that is known.
        """
        saved_s = self.answer_s()
        return even(self.draft_s, self._pass_s, saved_s) if saved_s else 0.0

    def odds(self, guesses: int, sure: float | None = None) -> float:
        """Probability that so many guesses are all right, as far as acceptance tells, and who made them.

        Args:
            sure: how sure that one is, which may be too sure: the geometric mean of both counts; None for nothing.
        """
        told = min(self.acceptance, 0.98) ** guesses
        return told if sure is None else math.sqrt(told * sure)

    def _check_s(self, rows: int) -> float:
        return self._pass_s * (1 + ROW_SHARE * (rows - 1))


def even(draft: float, check: float, answer: float) -> float:
    """With which probability a further draft must be right to pay.

    Args:
        draft, check, answer: what a draft, a pass of one row, and an answer take, in the same unit.
    """
    return (draft + ROW_SHARE * check) / max(answer, 1e-9)


def guessing_pace(guesses: int = GUESSES) -> Pace:
    """Exit mode's: one question at a time, of so many guesses at most."""
    return Pace(acceptance=0.3, blocks=(guesses,))


def _mean(mean: float, seen: float) -> float:
    return seen if not mean else 0.8 * mean + 0.2 * seen
