"""The files of bundles for devices that fetch them, a range at a time, while nothing more urgent is there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

from isthmus.cloud.peers import Peer
from isthmus.cloud.registry import Registry
from isthmus.cloud.work import Refusal
from isthmus.protocol.messages import Code, GetManifest, GetRange, Manifest, Range


class Bulk:
    """See the module.

    Args:
        max_ranges: of one connection that may wait.
        meanwhile: has the connections while a file is read.
        refuse: tells a connection that its request is refused.
    """

    def __init__(
        self,
        registry: Registry,
        max_ranges: int,
        meanwhile: AbstractContextManager[None],
        refuse: Callable[[Peer, GetRange, Refusal], None],
    ) -> None:
        self._registry, self._max_ranges, self._meanwhile, self._refuse = registry, max_ranges, meanwhile, refuse
        self._peers: deque[Peer] = deque()

    @property
    def waits(self) -> bool:
        """Whether anybody waits for a range."""
        return bool(self._peers)

    def manifest(self, peer: Peer, message: GetManifest, principal: str, size: int, now_s: float) -> None:
        """Answers with a bundle's manifest.

        Raises:
            Refusal: no such bundle, or it is not given out.
        """
        model = self._registry.model(message.model_id)
        if model.files is None:
            raise Refusal(Code.NOT_FOUND, "this cloud does not give its bundle out", "get the bundle elsewhere")
        peer.done(size)
        peer.send(Manifest(model.offer.model_id, model.files.manifest))

    def ask(self, peer: Peer, message: GetRange, principal: str, size: int, now_s: float) -> None:
        """Takes a request for a range in.

        Raises:
            Refusal: too many of this connection wait.
        """
        if len(peer.ranges) >= self._max_ranges:
            raise self._registry.busy(f"{len(peer.ranges)} ranges wait already")
        if not peer.ranges:
            self._peers.append(peer)
        peer.ranges.append((message, size))

    def send(self, most: int) -> None:
        """Answers up to so many requests, one connection after the other."""
        for _ in range(min(most, len(self._peers))):
            peer = self._peers.popleft()
            if peer.gone or not peer.ranges:
                continue
            if not peer.outbox:
                message, size = peer.ranges.popleft()
                peer.done(size)
                self._send(peer, message)
            else:
                peer.flush()
            if peer.ranges:
                self._peers.append(peer)

    def _send(self, peer: Peer, message: GetRange) -> None:
        try:
            model = self._registry.model(message.model_id)
            found = None
            if model.files is not None:
                with self._meanwhile:  # a disk may be slow
                    found = model.files.read(message.name, message.sha256, message.offset, message.length)
            if found is None:
                raise Refusal(Code.NOT_FOUND, f"no file {message.name!r} with that hash here", "get the manifest again")
        except Refusal as error:
            self._refuse(peer, message, error)
            return
        peer.send(Range(model.offer.model_id, message.name, message.offset, found[1], found[0]))
