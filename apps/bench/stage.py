"""A cloud in a process of its own behind an emulated link, and devices here: where ways to share are compared."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from isthmus.apps.bench.cloud_process import START_S, CloudProcess, fresh_keys
from isthmus.apps.bench.relay import Relay
from isthmus.apps.bench.shaping import LinkProfile
from isthmus.edge import Device, Timeouts
from isthmus.engine.slow import check_slow_down
from isthmus.split.bundle import Bundle

KV_TOKENS = 1024


class Stage:
    """See the module; a context manager.

    Args:
        bundle: of both sides.
        device_slowdown, cloud_step: how many times longer a step takes on either side.

    Raises:
        EngineError: no such factor.
    """

    def __init__(
        self, bundle: Bundle, link: LinkProfile, device_slowdown: float = 1.0, cloud_step: float = 1.0
    ) -> None:
        for factor in (device_slowdown, cloud_step):
            check_slow_down(factor)
        self._bundle, self._link, self._slow_down, self._cloud_step = bundle, link, device_slowdown, cloud_step
        self._opened = ExitStack()

    def __enter__(self) -> Stage:
        with self._opened as opening:
            self._keys = opening.enter_context(fresh_keys())
            cloud = opening.enter_context(CloudProcess(self._bundle.path, self._keys, 1, self._cloud_step))
            self._address = opening.enter_context(Relay(cloud.address, self._link)).address
            self._opened = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def device(self, **options: Any) -> Device:
        """A device of the stage.

        Args:
            options: a `Device`'s.
        """
        kv_tokens = min(KV_TOKENS, self._bundle.config.context_length)
        return Device(
            self._bundle.path,
            self._address,
            keys=self._keys,
            threads=1,
            slow_down=self._slow_down,
            timeouts=Timeouts(connect_ms=int(START_S * 1e3)),
            fallback=False,
            **{"kv_tokens": kv_tokens, **options},
        )
