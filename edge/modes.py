"""The runner of each mode, made from what this device holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isthmus.edge.bridge import Bridge, Retold, Speak
from isthmus.edge.drafting import Chosen, Drafting
from isthmus.edge.exit import ExitRunner, ExitSpeaker
from isthmus.edge.exits import Exits
from isthmus.edge.holding import Holding
from isthmus.edge.link import Link
from isthmus.edge.options import GenerateOptions, middle_cut
from isthmus.edge.pace import Pace, guessing_pace
from isthmus.edge.runners import LocalRunner, Runner, SplitRunner, StreamRunner
from isthmus.edge.standby import Ready
from isthmus.edge.token import Source
from isthmus.edge.verify import VerifyRunner
from isthmus.engine.part import Numerics
from isthmus.engine.sampling import Sampling
from isthmus.protocol import messages as m
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import DeviceError
from isthmus.protocol.messages import CAN_VERIFY
from isthmus.split.bundle import Bundle


class Modes:
    """See the module.

    Args:
        where: the cloud, for people.
        say: takes notes on what does not go as asked.
    """

    def __init__(
        self,
        bundle: Bundle,
        holding: Holding,
        drafting: Drafting,
        exits: Exits,
        log: Chain,
        where: str,
        say: Callable[[str], None],
    ) -> None:
        self._bundle, self._holding, self._drafting, self._exits = bundle, holding, drafting, exits
        self._log, self._where, self.say = log, where, say
        self._eos = tuple(bundle.manifest.tokenizer.eos)
        self._pace = guessing_pace()

    def local(self, options: GenerateOptions) -> Runner:
        """The whole model on this device."""
        return LocalRunner(self._holding.open(self._bundle.config.n_layers), self._log, options.sampling)

    def shared(self, options: GenerateOptions, link: Link, draft: Chosen | None = None) -> Runner:
        """Any mode that needs the cloud, which has answered.

        Args:
            draft: what verify mode drafts with, in place of the device's own.

        Raises:
            DeviceError: this device or the cloud cannot do that.
            BundleError: there is no such exit.
        """
        if options.mode == "verify":
            return self._drafting.runner(link, self._log, options.sampling, self._eos, draft)
        if options.mode == "split":
            cut = self.default_cut() if options.cut is None else options.cut
            part = self._holding.open(cut)
            codec = options.codec or "f16"
            self._check_offer(link, codec, part.part.numerics)
            return SplitRunner(part, link, self._log, options.sampling, cut, codec)
        if options.mode == "exit":
            return self._exit(options, link)
        return StreamRunner(link, self._log, options.sampling, self._eos)

    @property
    def can_bridge(self) -> bool:
        """Whether this device can go on without the cloud: by the whole model, an exit, or the model that drafts."""
        return self._holding.whole or self._exits.any or self._drafting.speaker is not None

    def bridge(self, options: GenerateOptions) -> Bridge:
        """What goes on without the cloud: as near to it as this device gets, in exit mode after an exit's first words.

        Raises:
            DeviceError: this device cannot.
        """
        if options.mode == "exit":
            speaker = self._exits.speaker(self._exits.layer(options.cut))
            return Bridge(speaker.sample, "exit", self._log, options.sampling, self._whole_sample())
        alone = self.alone()
        source: Source = "exit" if isinstance(alone, ExitSpeaker) else "device"
        return Bridge(alone.sample, source, self._log, options.sampling)

    def alone(self) -> Ready:
        """Who goes on without the cloud: the whole model, an exit, or the model that drafts.

        Raises:
            DeviceError: nobody can.
        """
        if self._holding.whole:
            return self._holding.open(self._bundle.config.n_layers)
        if self._exits.any:
            return self._exits.speaker(self._exits.layer(None))
        small = self._drafting.speaker
        if small is None:
            raise DeviceError("this device holds nothing to go on with", "give it all layers, or a model that drafts")
        return small

    def _whole_sample(self) -> Speak | None:
        """The whole model's word, where this device holds it: opened when it is first asked for."""
        if not self._holding.whole:
            return None

        def sample(log: Chain, sampling: Sampling) -> int:
            return self._holding.open(self._bundle.config.n_layers).sample(log, sampling)

        return sample

    def retold(self, options: GenerateOptions, link: Link, guesses: Sequence[int]) -> Runner | None:
        """Has the cloud confirm guesses in few passes; None where it cannot."""
        welcome = link.welcome()
        if welcome is None or CAN_VERIFY not in welcome.capabilities:
            return None
        drafts = Retold([*self._log.tokens, *guesses])
        pace = Pace(depth=8, acceptance=0.95, blocks=(m.MAX_DRAFT,))
        return VerifyRunner(link, self._log, options.sampling, self._eos, drafts, pace)

    def default_cut(self) -> int:
        """Where a model is cut when nobody says where."""
        return max(1, min(middle_cut(self._bundle.config), self._holding.layers))

    def _exit(self, options: GenerateOptions, link: Link) -> Runner:
        layer = self._exits.layer(options.cut)
        threshold = self._exits.threshold(layer, options.threshold)
        speaker = self._exits.speaker(layer)
        stats, welcome = self._exits.stats(layer), link.welcome()
        if welcome is None or CAN_VERIFY not in welcome.capabilities:
            raise DeviceError("this cloud does not answer exits", "update isthmus there, or use stream mode")
        known = any(stats.digest in offer.channels for offer in welcome.offers)
        codec = options.codec or self._exits.codec(layer, known)
        self._check_offer(link, codec, self._holding.open(layer).part.numerics)
        pace = self._pace if options.guesses is None else guessing_pace(options.guesses)
        return ExitRunner(
            link,
            self._log,
            options.sampling,
            self._eos,
            speaker,
            threshold,
            codec,
            stats if known else None,
            pace,
            self._bundle.config.n_layers,
        )

    def _check_offer(self, link: Link, codec: str, numerics: Numerics) -> None:
        welcome = link.welcome()
        link.session.numerics = numerics.id if numerics.exact else ""
        assert welcome is not None
        for offer in welcome.offers:
            if offer.model_id != self._bundle.model_id:
                continue
            if codec not in offer.codecs:
                raise DeviceError(f"{self._where} does not take {codec}", f"choose {' or '.join(offer.codecs)}")
            if offer.numerics != numerics.id:
                self.say(f"{self._where} computes with {offer.numerics}, this device with {numerics.id}")
