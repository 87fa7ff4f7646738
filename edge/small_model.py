"""A small model on the device that drafts for a large one with the same tokenizer, and how fast it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from isthmus.edge import priors
from isthmus.edge.holding import Holding
from isthmus.edge.local import LocalPart
from isthmus.edge.model_drafts import ModelDrafts
from isthmus.edge.stopwatch import ENOUGH, Stopwatch
from isthmus.engine.part import KvConfig, Rows, Want
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import DeviceError, IsthmusError
from isthmus.split.bundle import Bundle

SLACK = 32  # drafts beyond a conversation's end


class SmallModel:
    """See the module.

    Args:
        folder: of its bundle.
        large: the model that it drafts for.
        holding: this device's engine.
        kv_tokens: positions that a conversation may have.
        clock: seconds, to time its steps by.

    Attributes:
        part: the model over the conversation.
        drafts: what it drafts.

    Raises:
        DeviceError: it has another tokenizer.
        BundleError: there is no bundle.
    """

    def __init__(
        self, folder: str | Path, large: Bundle, holding: Holding, kv_tokens: int, clock: Callable[[], float]
    ) -> None:
        bundle = Bundle.open(folder)
        check_tokenizer(bundle, large)
        self._watch, n_layers = Stopwatch(priors.sizes(bundle), clock), bundle.config.n_layers
        kv = KvConfig(max_tokens=min(kv_tokens, bundle.config.context_length) + SLACK)
        self.part = LocalPart(self._watch.timed(holding.open_part(bundle, 0, n_layers, kv)))
        self.drafts = ModelDrafts(self.part)

    @property
    def times_ms(self) -> tuple[float, float] | None:
        """What a drafted token takes, and a row of a prompt; None until that is known."""
        if not self._watch.knows:
            return None
        sizes = self._watch.sizes
        return self._watch.ms_per_mb * sizes.of(sizes.n_layers, True) / 1e6, self._watch.row_ms

    def missing(self, log: Chain) -> int:
        """Rows of a log that it has not seen."""
        return len(log) - self.part.held(log)

    def try_out(self) -> None:
        """Times a few steps, if none were made yet."""
        if self._watch.knows:
            return
        with suppress(IsthmusError):  # there is no room beside the conversation
            sequence = self.part.part.open()
            try:
                for at in range(ENOUGH + 1):
                    self.part.part.step(Rows().tokens(sequence, at, [0], want=Want.SAMPLE))
            finally:
                sequence.close()

    def close(self) -> None:
        """Frees it."""
        self.part.close()


def check_tokenizer(small: Bundle, large: Bundle) -> None:
    """Refuses a model that drafts in other tokens.

    Raises:
        DeviceError: its tokenizer is another.
    """
    files = [bundle.manifest.files[bundle.manifest.tokenizer.file].sha256 for bundle in (small, large)]
    sizes = [bundle.config.vocab_size for bundle in (small, large)]
    if files[0] != files[1] or sizes[0] != sizes[1]:
        problem = f"{small.name} has another tokenizer than {large.name}, so it cannot draft for it"
        raise DeviceError(problem, "draft with a model of the same family, or with n-grams")
