"""The rest of a network on an edge server: a part of it here, and what follows in a cloud behind."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from isthmus.edge.graph import GraphDevice
from isthmus.protocol.arrays import Array
from isthmus.protocol.errors import EngineError, IsthmusError

_log = logging.getLogger("isthmus.cloud")


class Onward:
    """In place of a `GraphPart`: this server is a device of the next cloud, and runs all here where that is silent.

    Args:
        folder: of the bundle by which the two share the network's rest.
        upstream: HOST:PORT of the cloud.
        keys: a folder, None for the usual one.
        plain: whether nothing is encrypted.

    Raises:
        BundleError, DeviceError, ProtocolError: as `GraphDevice`.
    """

    def __init__(self, folder: Path, upstream: str, keys: Path | None, plain: bool, threads: int) -> None:
        self._device = GraphDevice(folder, upstream, keys=keys, encrypted=not plain, threads=threads)
        manifest = self._device.bundle.manifest
        self.inputs = tuple(one.name for one in manifest.inputs)
        self.outputs = tuple(one.name for one in manifest.outputs)
        self._note = ""

    def run(self, arrays: Mapping[str, Array], wanted: Sequence[str] | None = None) -> dict[str, Array]:
        """The outputs, by name.

        Raises:
            EngineError: it cannot be run on that.
        """
        try:
            found = self._device.infer({name: arrays[name] for name in self.inputs})
        except EngineError:
            raise
        except IsthmusError as error:
            raise EngineError(error.problem, error.remedy) from error
        note = self._device.stats.note
        if note and note != self._note:
            _log.warning("%s", note)
        self._note = note
        return found if wanted is None else {name: found[name] for name in wanted}

    def close(self) -> None:
        """Ends the connection."""
        self._device.close()
