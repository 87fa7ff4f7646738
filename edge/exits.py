"""A bundle's exits on this device, opened when they are first asked for."""

from __future__ import annotations

from isthmus.edge.exit import ExitSpeaker
from isthmus.edge.holding import Holding
from isthmus.protocol.channels import ChannelStats
from isthmus.protocol.errors import DeviceError
from isthmus.protocol.tensors import ENTROPY_CODECS
from isthmus.split.bundle import Bundle

UNMEASURED = "ecsq6"  # how states travel where nobody has tried codecs, or the cloud lacks the statistics


class Exits:
    """The exits that this device can speak through, on the layers that it holds.

    Args:
        holding: this device's layers; an exit's own layer runs on the same engine.
    """

    def __init__(self, bundle: Bundle, holding: Holding) -> None:
        self._bundle, self._holding = bundle, holding
        self._open: dict[int, ExitSpeaker] = {}
        self._stats: dict[int, ChannelStats] = {}

    @property
    def any(self) -> bool:
        """Whether there is one that this device can run."""
        return bool(self._layers()) and not self._holding.slides

    def layer(self, wanted: int | None) -> int:
        """Which exit to use: that before the wanted layer, or the deepest that this device can run.

        Raises:
            DeviceError: there is none.
            BundleError: there is none before that layer.
        """
        if wanted is not None:
            return self._bundle.manifest.exit(wanted).layer
        if not (layers := self._layers()):
            held = self._holding.layers
            where = f" among the first {held} layers" if self._bundle.exits else ""
            raise DeviceError(f"{self._bundle.name} has no exit{where}", "train some: isthmus exits train")
        return max(layers)

    def threshold(self, layer: int, wanted: float | None) -> float:
        """From which confidence on an exit is believed: as wanted, or as its certificate says.

        Raises:
            DeviceError: no certificate.
        """
        if wanted is not None:
            return wanted
        certificate = self._bundle.manifest.exit(layer).certificate
        if certificate is None:
            problem = f"the exit before layer {layer} of {self._bundle.name} has no certificate"
            raise DeviceError(problem, "calibrate it: isthmus exits calibrate; or name a threshold")
        return certificate.threshold

    def speaker(self, layer: int) -> ExitSpeaker:
        """The layers before an exit, and the exit.

        Raises:
            DeviceError: the conversation slides, or the layers are not here.
        """
        if self._holding.slides:
            raise DeviceError("an exit cannot go on where a conversation slides", "choose overflow='error'")
        part = self._holding.open(layer)
        if layer not in self._open:
            head = self._holding.open_part(self._bundle.exit(layer), layer, layer + 1, self._holding.kv)
            self._open[layer] = ExitSpeaker(part, head, layer)
        return self._open[layer]

    def stats(self, layer: int) -> ChannelStats:
        """What is known of the channels before a layer."""
        if layer not in self._stats:
            self._stats[layer] = self._bundle.exit(layer).channels
        return self._stats[layer]

    def codec(self, layer: int, known: bool) -> str:
        """How states before a layer travel unless somebody says so.

        Args:
            known: whether the cloud has the exit's statistics of the channels.
        """
        measured = self._bundle.manifest.exit(layer).codec
        usable = measured is not None and (known or measured.name not in ENTROPY_CODECS)
        return measured.name if measured is not None and usable else UNMEASURED

    def _layers(self) -> list[int]:
        held = self._holding.layers
        return [e.layer for e in self._bundle.exits if e.layer <= held and self._bundle.holds(e.file)]

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on."""
        for speaker in self._open.values():
            speaker.truncate(length)

    def close(self) -> None:
        """Frees the exits."""
        for speaker in self._open.values():
            speaker.close()
        self._open.clear()
