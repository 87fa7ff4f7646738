"""What a device drafts with, and how far, while a cloud checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from isthmus.edge.drafts import NgramDrafts
from isthmus.edge.exits import Exits
from isthmus.edge.holding import Holding
from isthmus.edge.link import Link
from isthmus.edge.local import LocalPart
from isthmus.edge.model_drafts import ModelDrafts
from isthmus.edge.pace import Pace
from isthmus.edge.verify import VerifyRunner
from isthmus.engine.part import KvConfig
from isthmus.engine.sampling import Sampling
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import DeviceError
from isthmus.protocol.messages import CAN_VERIFY
from isthmus.split.bundle import Bundle

NGRAMS, EXIT = "ngrams", "exit"
Chosen = tuple[str, int, int]


class Drafting:
    """Drafts by the conversation's n-grams, by an exit, or by a small model of the same tokenizer.

    Args:
        bundle: the model that the cloud runs.
        source: "ngrams", "exit", or the folder of the small model's bundle.
        exits: of the bundle.
        depth: blocks that may be under way at once, 1 waits for each answer before it drafts on.
        holding: this device's engine, for the small model.
        kv_tokens: positions that a conversation may have.

    Raises:
        DeviceError: the small model has another tokenizer.
        BundleError: there is no bundle.
    """

    def __init__(
        self, bundle: Bundle, source: str | Path, exits: Exits, holding: Holding, depth: int, kv_tokens: int
    ) -> None:
        self._ngrams = NgramDrafts()
        self._model: ModelDrafts | None = None
        self._by_exits: dict[int, ModelDrafts] = {}
        self._part: LocalPart | None = None
        self._exits, self._source = exits, str(source)
        self.pace = Pace(depth, acceptance=0.3 if source == NGRAMS else 0.5)
        self._paces: dict[tuple[str, int, int], Pace] = {}
        if source not in (NGRAMS, EXIT):
            small = Bundle.open(source)
            check_tokenizer(small, bundle)
            kv = KvConfig(max_tokens=min(kv_tokens, small.config.context_length) + 32)
            self._part = LocalPart(holding.open_part(small, 0, small.config.n_layers, kv))
            self._model = ModelDrafts(self._part)

    @property
    def speaker(self) -> LocalPart | None:
        """The small model, None where there is none."""
        return self._part

    def runner(
        self, link: Link, log: Chain, sampling: Sampling, eos: Sequence[int], chosen: Chosen | None = None
    ) -> VerifyRunner:
        """A runner for one answer.

        Args:
            chosen: "ngram" or "exit", the exit's layer, and the depth, in place of the device's own.

        Raises:
            DeviceError: the cloud cannot check drafts.
        """
        welcome = link.welcome()
        if welcome is None or CAN_VERIFY not in welcome.capabilities:
            raise DeviceError("this cloud does not check drafts", "update isthmus there, or use stream mode")
        pace, model = self.pace, self._model
        if chosen is not None:
            pace = self._paces.setdefault(chosen, Pace(chosen[2], acceptance=0.3 if chosen[0] == "ngram" else 0.5))
            model = self._exit(chosen[1]) if chosen[0] == EXIT else None
        elif self._source == EXIT:
            model = self._exit(self._exits.layer(None))
        if model is not None:
            model.speak(sampling)
            return VerifyRunner(link, log, sampling, eos, model, pace)
        return VerifyRunner(link, log, sampling, eos, self._ngrams, pace)

    def truncate(self, length: int) -> None:
        """The conversation is cut back to `length` tokens."""
        for drafts in (self._ngrams, self._model, *self._by_exits.values()):
            if drafts is not None:
                drafts.truncate(min(length, len(drafts)))

    def _exit(self, layer: int) -> ModelDrafts:
        if layer not in self._by_exits:
            self._by_exits[layer] = ModelDrafts(self._exits.speaker(layer))
        return self._by_exits[layer]

    def close(self) -> None:
        """Frees the small model."""
        if self._part is not None:
            self._part.close()


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
