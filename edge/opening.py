"""What a device begins with: the connection to its cloud, and a bundle that is here or comes from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.edge.link import Link, Wire
from isthmus.edge.offers import is_meant
from isthmus.edge.session import Session
from isthmus.edge.token import Mode
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import DeviceError, LinkError
from isthmus.split.bundle import Bundle
from isthmus.split.files import is_there

if TYPE_CHECKING:
    from isthmus.edge.events import Timeouts
    from isthmus.edge.provision import Progress
    from isthmus.protocol.keys import DeviceKeys


class Opening:
    """The way from a bundle's name and a cloud's address to the bundle and a link.

    Args:
        cloud, timeouts, wire, clock: as in `Device`.
        on_waiting: as in `Link`.

    Attributes:
        wire: the connection to the cloud, None without a cloud.
        where: the cloud, for people.
        absent: why the cloud cannot be there; None as far as that is known.
    """

    def __init__(
        self,
        cloud: str | None,
        timeouts: Timeouts,
        wire: Wire | None,
        clock: Callable[[], float],
        on_waiting: Callable[[str], None],
    ) -> None:
        self.wire = wire
        self.where = f"the cloud at {cloud}" if cloud else "the cloud"
        self.absent: LinkError | None = None
        self._cloud, self._timeouts, self._clock, self._on_waiting = cloud, timeouts, clock, on_waiting

    def connect(self, keys: str | Path | DeviceKeys | None, encrypted: bool, mode: Mode) -> None:
        """Connects to the cloud, if there is one that is not connected yet.

        Raises:
            LinkError: the address is none; or its host does not exist, and the mode needs a cloud.
            ProtocolError: the keys cannot be read.
        """
        if self.wire is not None or self._cloud is None:
            return
        from isthmus.protocol.address import check_host
        from isthmus.protocol.link import connect

        self.wire = connect(self._cloud, _device_keys(keys) if encrypted else None, agent="isthmus device", wait=False)
        if mode == "local":
            return
        try:
            check_host(self._cloud, self._timeouts.connect_ms)
        except LinkError as error:
            if mode != "auto":
                raise
            self.absent = error

    def bundle(
        self, bundle: str | Path | Bundle, mode: Mode, cut: int | None, model: str, progress: Progress | None
    ) -> Bundle:
        """The bundle, open; what a folder lacks of it is fetched from the cloud.

        Raises:
            BundleError, DeviceError, LinkError: as `provision`; or it is another model than the one that is meant.
        """
        if isinstance(bundle, str | Path):
            bundle = self._opened(Path(bundle), mode, cut, model, progress)
        if model and not is_meant(model, bundle.model_id, bundle.name):
            problem = f"the bundle holds {bundle.name} ({bundle.model_id[:12]}) and not {model!r}"
            raise DeviceError(problem, "name another folder, or the model that this one holds")
        return bundle

    def link(self, model_id: str, log: Chain, window: int = 0) -> Link:
        """A link to the cloud for that model."""
        assert self.wire is not None
        session = Session(model_id, log, self._timeouts, where=self.where, window=window)
        return Link(session, self.wire, self._clock, self._on_waiting)

    def close(self) -> None:
        """Ends the connection."""
        if self.wire is not None:
            self.wire.close()

    def _opened(self, path: Path, mode: Mode, cut: int | None, model: str, progress: Progress | None) -> Bundle:
        if self.wire is None:
            return Bundle.open(path)
        if self.absent is not None:
            if is_there(path / "bundle.json"):
                return Bundle.open(path)
            raise self.absent
        from isthmus.edge.provision import provision

        return provision(path, lambda model_id: self.link(model_id, Chain()), mode, cut, progress, model=model)


def _device_keys(keys: str | Path | DeviceKeys | None) -> DeviceKeys:
    from isthmus.protocol.keys import DeviceKeys, default_folder, read_device

    if isinstance(keys, DeviceKeys):
        return keys
    return read_device(Path(keys) if keys is not None else default_folder())
