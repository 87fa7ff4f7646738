"""This device's part of the model over the token log of one conversation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from isthmus.edge.coverage import Coverage
from isthmus.edge.model_drafts import Said
from isthmus.edge.shallow import ShallowStates
from isthmus.engine.part import Part, Rows, StepResult, Want
from isthmus.engine.sampling import Sampling
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import DeviceError, OutOfBlocks

CHUNK = 128  # rows of prefill in one step: short enough to be interrupted, long enough to run at full speed


class LocalPart:
    """Layers [0, part.end) and the KV of one conversation.

    What was computed with a cut has no KV in the layers after it; asking for a deeper result fills those from the
    states at the cut, where they are still held, or computes the positions again from the token log. KV is held for the
    tokens that it was computed from: a log that goes on otherwise begins where the two part.

    Args:
        window: attention window in positions, 0 for all.
    """

    def __init__(self, part: Part, window: int = 0) -> None:
        self.part = part
        self._window = window
        self._sequence = part.open(window=window)
        self._coverage = Coverage()
        self._log = Chain()  # that the KV is for
        self._last: tuple[int, int, NDArray[np.float32]] | None = None  # cut, position, hidden [n, d_model]
        self._shallow = ShallowStates()
        self._sampled: tuple[bytes, Sampling, Said] | None = None  # a log's head, how, and what comes after it

    def held(self, log: Chain, depth: int | None = None) -> int:
        """Leading positions of a log whose KV of layers [0, depth) is held; None for all of them."""
        return min(self._coverage.at(self.part.end if depth is None else depth), self._log.common(log))

    def remembers(self, log: Chain, sampling: Sampling) -> bool:
        """Whether `sample` was asked for just that the last time."""
        return self._sampled is not None and self._sampled[:2] == (log.head, sampling)

    def sample(self, log: Chain, sampling: Sampling) -> int:
        """The token after the whole log.

        Raises:
            DeviceError: no room is left for KV.
        """
        return self._say(log, sampling, Want.SAMPLE).token

    def draft(self, log: Chain, sampling: Sampling) -> Said:
        """See `model_drafts.Speaker`.

        Raises:
            DeviceError: no room is left for KV.
        """
        return self._say(log, sampling, Want.SAMPLE | Want.CONFIDENCE)

    def advance(self, log: Chain, rows: int, anew: bool = False) -> bool:
        """Computes KV of up to `rows` more positions before the log's last; whether there were any.

        What was computed with a cut is filled from the states there.

        Args:
            anew: whether it may also be computed again, where those are not held: that takes it from those who work
                with the cut.

        Raises:
            DeviceError: no room is left for KV.
        """
        depth = self.part.end
        self.truncate(self._log.common(log))
        start = self._coverage.at(depth)
        end = min(start + rows, len(log) - 1)
        if start < self._coverage.length:
            if self._filled(end) or not anew:
                return self._coverage.at(depth) > start
            self._back_to(start)
        if end > start:
            self._step(log, start, end, depth, Want.NONE)
        return end > start

    def hidden(
        self, log: Chain, start: int, cut: int, chunk: int = CHUNK, end: int | None = None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The hidden states before layer `cut` of positions [start, end), in chunks of at most `chunk`.

        Args:
            end: the log's by default; KV of what lies behind is given up.

        Yields:
            The first position and the states [n, d_model] f32 of each chunk.

        Raises:
            DeviceError: no room is left for KV.
        """
        end = len(log) if end is None else end
        self.truncate(self._log.common(log))
        if self._last is not None and self._last[0] == cut and start >= self._last[1] and end - start <= chunk:
            position, hidden = self._last[1], self._last[2]
            if position + len(hidden) == end == self._coverage.at(cut):
                yield start, hidden[start - position :]
                return
        at = min(self._coverage.at(cut), start)
        while at < end:
            stop = min(at + min(chunk, CHUNK), end, start if at < start else end)
            states = self._deepened(at, stop, cut)
            if states is None:
                if (back := self._back_to(at)) < at:
                    at = back
                    continue
                states = self._step(log, at, stop, cut, Want.HIDDEN).hidden
                self._shallow.add(cut, at, states)
                self._last = (cut, at, states) if at >= start else None
            if at >= start:
                yield at, states
            at += len(states)

    def gives(self, log: Chain, start: int, cut: int) -> bool:
        """Whether the states before layer `cut` of position `start` take nothing from those who work with another cut.

        They do where KV of later positions would have to be given up for them.
        """
        length = min(self._coverage.length, self._log.common(log))
        return start >= length or self._made_before(start, 1, cut) is not None

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on."""
        if length < self._coverage.length:
            self._back_to(length)

    def close(self) -> None:
        """Frees KV and weights."""
        self._sequence.close()
        self.part.close()

    def _say(self, log: Chain, sampling: Sampling, want: Want) -> Said:
        if self._sampled is not None and self.remembers(log, sampling):
            said = self._sampled[2]
            if not (want & Want.CONFIDENCE and math.isnan(said.confidence)):
                return said
        depth, end = self.part.end, len(log)
        self.truncate(self._log.common(log))
        while self._filled(end - 1):
            pass
        start = self._back_to(min(self._coverage.at(depth), end - 1))
        while end - start > CHUNK:
            self._step(log, start, start + CHUNK, depth, Want.NONE, sampling)
            start += CHUNK
        result = self._step(log, start, end, depth, want, sampling)
        said = Said(result.tokens[0], float(result.confidence[0]) if want & Want.CONFIDENCE else math.nan)
        self._sampled = log.head, sampling, said
        return said

    def _made_before(self, at: int, most: int, cut: int) -> NDArray[np.float32] | None:
        """States of a position and some after it that are held, before layer `cut` or such as lead there."""
        held, reached = self._shallow, self._coverage.at(cut)
        if self._window or at >= self._coverage.length:
            return None
        if held.cut != cut and (held.cut > cut or at != reached):
            return None
        return held.at(at, min(most, self._coverage.length - at))

    def _deepened(self, at: int, end: int, cut: int) -> NDArray[np.float32] | None:
        """States before layer `cut` of positions that have KV up to some layer, out of states that are held."""
        states = self._made_before(at, end - at, cut)
        if states is None or self._shallow.cut == cut:
            return states
        rows = Rows().hidden(
            self._sequence, at, states, enter=self._shallow.cut, leave=cut, want=Want.HIDDEN, want_all=True
        )
        hidden = self._stepped(rows, at + len(states)).hidden
        self._coverage.deepen(at + len(states), cut)
        return hidden

    def _filled(self, end: int) -> bool:
        """Fills the last layers of some positions before `end` from states that are held; whether there were any."""
        depth, start = self.part.end, self._coverage.at(self.part.end)
        end = min(end, start + CHUNK, self._coverage.length)
        if self._window or end <= start or (states := self._shallow.at(start, end - start)) is None:
            return False
        rows = Rows().hidden(self._sequence, start, states, enter=self._shallow.cut, leave=depth, want=Want.NONE)
        self._stepped(rows, start + len(states))
        self._coverage.deepen(start + len(states), depth)
        return True

    def _back_to(self, length: int) -> int:
        """Cuts the sequence back to `length`; where a window has given the needed blocks back, to nothing."""
        if length == self._coverage.length:
            return length
        self._last = None
        self._shallow.truncate(length)
        if self._window and self._coverage.length > self._window:
            length = 0
            self._shallow.truncate(0)
            self._sequence.close()
            self._sequence = self.part.open(window=self._window)
        else:
            self._sequence.truncate(length)
        self._coverage.truncate(length)
        self._log.truncate(length)
        return length

    def _step(
        self, log: Chain, start: int, end: int, depth: int, want: Want, sampling: Sampling | None = None
    ) -> StepResult:
        rows = Rows().tokens(
            self._sequence,
            start,
            log.tokens[start:end],
            leave=depth,
            want=want,
            want_all=want is Want.HIDDEN,
            sampling=sampling or Sampling(),
        )
        result = self._stepped(rows, end)
        self._coverage.extend(end, depth)
        self._log.follow(log, end)
        return result

    def _stepped(self, rows: Rows, end: int) -> StepResult:
        try:
            return self.part.step(rows)
        except OutOfBlocks as error:
            raise DeviceError(
                f"no room is left for the KV of position {end - 1}",
                "begin a new conversation, raise kv_tokens, or choose overflow='slide'",
            ) from error
