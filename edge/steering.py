"""Who makes the next token: this device, the cloud, or both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from isthmus.edge import policy
from isthmus.edge.controller import Controller
from isthmus.edge.events import Busy
from isthmus.edge.exit import ExitRunner
from isthmus.edge.fallback import Rest, may_go_on, offering_local, with_local
from isthmus.edge.holding import Holding
from isthmus.edge.link import Link
from isthmus.edge.modes import Modes
from isthmus.edge.notes import Notes
from isthmus.edge.options import GenerateOptions
from isthmus.edge.runners import Runner
from isthmus.edge.token import Stats
from isthmus.edge.verify import VerifyRunner
from isthmus.protocol.errors import DeviceError, IsthmusError, LinkError

GLANCE_S = 0.05  # how long a device that does without its cloud looks for it before an answer


class Steering:
    """See the module.

    Args:
        link: to the cloud, None without one.
        absent: why the cloud could not be reached when the device was opened.
        fallback: whether this device goes on by itself when the cloud goes away.
        clock: the link's seconds.
        controller: decides in "auto" while the cloud answers; None where there is nothing to decide.
        tell: called with why "auto" does without a cloud.
    """

    def __init__(
        self,
        modes: Modes,
        holding: Holding,
        link: Link | None,
        absent: IsthmusError | None,
        notes: Notes,
        *,
        fallback: bool,
        clock: Callable[[], float],
        controller: Controller | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._controller, self._tell = controller, tell
        self._modes, self._holding, self._link, self._notes = modes, holding, link, notes
        self._fallback, self._clock = fallback, clock
        self._cloud_error = absent  # of when the cloud was last looked for
        self._counted = (0, 0, 0, 0) if link is None else link.costs  # fetching a bundle is no answer's cost
        self._served = False  # whether the cloud ever has
        self._rest = Rest()

    def runner(self, options: GenerateOptions) -> Runner:
        """The one to begin with.

        Raises:
            IsthmusError: what was asked for cannot be had.
        """
        mode, whole = options.mode, self._holding.whole
        if self._link is not None:
            self._link.session.patience.impatient = mode == "auto" and whole and self._fallback
        if mode == "auto":
            with offering_local(whole):
                link_up = self._link_up()
            if self._cloud_error is not None and not whole:
                raise self._cloud_error
            mode = policy.choose(policy.Situation(self._link is not None, link_up, whole))
            if self._cloud_error is not None:
                hint = "" if self._served else f" ({self._cloud_error.remedy})"
                self._notes.add(f"{self._cloud_error.problem}: this device goes on by itself{hint}")
            if self._controller is not None and link_up:
                with offering_local(whole):
                    return self._controller.begin(options)
            if self._tell is not None:
                why = "there is no cloud, or none may be asked" if self._link is None else "the cloud does not answer"
                self._tell(f"{mode}: {why}")
        if mode == "local":
            return self._modes.local(options)
        if self._link is None:
            raise DeviceError(f"{mode} mode needs a cloud", "name one, such as tcp://host:5757")
        with offering_local(whole):
            self._link.welcome()
        self._served = True
        with offering_local(whole):
            return self._modes.shared(replace(options, mode=mode), self._link)

    def turn(self, options: GenerateOptions, runner: Runner, wanted: int) -> Runner:
        """The one for the next token, of which so many are still wanted: in "auto" it may be another."""
        if self._controller is None:
            return runner
        following = self._controller.turn(options, runner, wanted)
        if following is not runner:
            self._left(runner)
        return following

    def came(self, runner: Runner) -> None:
        """The token has come."""
        if self._controller is not None:
            self._controller.came(runner)

    def given_up(self, options: GenerateOptions, runner: Runner) -> Runner:
        """The one that goes on when it pays no more to wait for the cloud."""
        assert self._controller is not None
        self._left(runner)
        return self._controller.given_up(options, runner)

    def alone(self, options: GenerateOptions, runner: Runner, error: IsthmusError) -> Runner:
        """The one that goes on when the cloud failed.

        Raises:
            IsthmusError: there is none.
        """
        if self._controller is not None and (other := self._controller.refused(options, runner, error)) is not None:
            self._left(runner)
            return other
        if runner.source == "device" or not self._holding.whole:
            raise error
        if not (self._fallback and may_go_on(error, options.mode, self._served)):
            raise with_local(error) from error
        if self._controller is not None:
            self._controller.leave()
        with suppress(IsthmusError):
            runner.stop()
        self._cloud_error = error
        if isinstance(error, Busy):
            self._rest.begin(self._clock())
        said = len(self._notes.stats.tokens)
        self._notes.add(f"{error.problem}: this device went on by itself after {said} tokens")
        return self._modes.local(options)

    def finish(self, runner: Runner, stats: Stats) -> None:
        """An answer has ended: its costs are known."""
        try:
            runner.stop()
        except LinkError:
            pass  # the answer is complete, or its reader has gone: a cancel that is lost costs nothing
        self._left(runner)
        if stats.tokens and runner.source != "device":
            self._cloud_error = None
            self._rest.end()
        if self._link is not None:
            now = self._link.costs
            spent = [a - b for a, b in zip(now, self._counted, strict=True)]
            stats.bytes_up, stats.bytes_down, stats.round_trips, stats.cloud_ms = *spent[:3], spent[3] * 1e-3
            self._counted = now
        if self._controller is not None:
            self._controller.ended()

    def _left(self, runner: Runner) -> None:
        """Counts what a runner has drafted that makes no more tokens."""
        if isinstance(runner, VerifyRunner | ExitRunner):
            self._notes.stats.drafted += runner.drafted
            self._notes.stats.accepted += runner.accepted

    def _link_up(self) -> bool:
        if self._link is None or not self._rest.over(self._clock()):
            return False
        try:
            if self._cloud_error is None:
                self._link.welcome()
            elif self._link.glance(GLANCE_S):
                self._cloud_error = None
        except IsthmusError as error:
            if not may_go_on(error, "auto", self._served):
                raise
            self._cloud_error = error
        self._served = self._served or self._cloud_error is None
        return self._cloud_error is None
