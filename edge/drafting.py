"""What a device drafts with, and how far, while a cloud checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from isthmus.edge.drafts import NgramDrafts
from isthmus.edge.exits import Exits
from isthmus.edge.holding import Holding
from isthmus.edge.link import Link
from isthmus.edge.local import LocalPart
from isthmus.edge.model_drafts import ModelDrafts
from isthmus.edge.options import as_mode
from isthmus.edge.pace import Pace
from isthmus.edge.small_model import SmallModel
from isthmus.edge.token import Mode
from isthmus.edge.verify import VerifyRunner
from isthmus.engine.sampling import Sampling
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import DeviceError
from isthmus.protocol.messages import CAN_VERIFY
from isthmus.split.bundle import Bundle

NGRAMS, EXIT, MODEL = "ngrams", "exit", "model"
Chosen = tuple[str, int, int]
FLOOR = 0.02  # as `Pace.floor`, of drafts that say how sure they are: fewer of them go up in vain


def files_for(mode: str, draft: str | Path) -> Mode:
    """The mode whose files of a bundle are needed: an exit drafts with those that exit mode takes."""
    return "exit" if (mode, draft) == ("verify", EXIT) else as_mode(mode)


class Drafting:
    """Drafts by the conversation's n-grams, by an exit, or by a small model of the same tokenizer.

    Args:
        bundle: the model that the cloud runs.
        source: "ngrams", "exit", or the folder of the small model's bundle.
        exits: of the bundle.
        depth: blocks that may be under way at once, 1 waits for each answer before it drafts on.
        holding: this device's engine, for the small model.
        kv_tokens: positions that a conversation may have.
        clock: seconds, to time the small model by.

    Attributes:
        small: the small model, None where there is none.

    Raises:
        DeviceError: the small model has another tokenizer.
        BundleError: there is no bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        source: str | Path,
        exits: Exits,
        holding: Holding,
        depth: int,
        kv_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self._ngrams = NgramDrafts()
        self._by_exits: dict[int, ModelDrafts] = {}
        self.small: SmallModel | None = None
        self._exits, self._source = exits, str(source)
        self.pace = _pace(source == NGRAMS, depth)
        self._paces: dict[tuple[str, int, int], Pace] = {}
        if source not in (NGRAMS, EXIT):
            self.small = SmallModel(source, bundle, holding, kv_tokens, clock)

    @property
    def speaker(self) -> LocalPart | None:
        """The small model, None where there is none."""
        return self.small.part if self.small is not None else None

    def runner(
        self, link: Link, log: Chain, sampling: Sampling, eos: Sequence[int], chosen: Chosen | None = None
    ) -> VerifyRunner:
        """A runner for one answer.

        Args:
            chosen: "ngram", "exit" or "model", the exit's layer, and the depth, in place of the device's own.

        Raises:
            DeviceError: the cloud cannot check drafts.
        """
        welcome = link.welcome()
        if welcome is None or CAN_VERIFY not in welcome.capabilities:
            raise DeviceError("this cloud does not check drafts", "update isthmus there, or use stream mode")
        model = self.small.drafts if self.small is not None else None
        pace = self.pace
        if chosen is not None:
            pace = self._paces.setdefault(chosen, _pace(chosen[0] == "ngram", chosen[2]))
            model = self._exit(chosen[1]) if chosen[0] == EXIT else model if chosen[0] == MODEL else None
        elif self._source == EXIT:
            model = self._exit(self._exits.layer(None))
        if model is not None:
            model.speak(sampling)
            return VerifyRunner(link, log, sampling, eos, model, pace)
        return VerifyRunner(link, log, sampling, eos, self._ngrams, pace)

    def truncate(self, length: int) -> None:
        """The conversation is cut back to `length` tokens."""
        models = [*self._by_exits.values(), *([self.small.drafts] if self.small is not None else [])]
        for model in models:
            model.truncate(min(length, len(model)))
        self._ngrams.truncate(min(length, len(self._ngrams)))

    def _exit(self, layer: int) -> ModelDrafts:
        if layer not in self._by_exits:
            self._by_exits[layer] = ModelDrafts(self._exits.speaker(layer))
        return self._by_exits[layer]

    def close(self) -> None:
        """Frees the small model."""
        if self.small is not None:
            self.small.close()


def _pace(ngrams: bool, depth: int) -> Pace:
    return Pace(depth, acceptance=0.3) if ngrams else Pace(depth, acceptance=0.5, floor=FLOOR)
