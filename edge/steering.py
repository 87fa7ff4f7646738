"""Who makes the next token: this device, the cloud, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

from isthmus.edge import policy
from isthmus.edge.bridge import Bridge
from isthmus.edge.controller import Controller
from isthmus.edge.events import Busy, Timeouts
from isthmus.edge.exit import ExitRunner
from isthmus.edge.fallback import Rest, may_go_on, offering_local, with_local
from isthmus.edge.holding import Holding
from isthmus.edge.link import Link, Silent
from isthmus.edge.modes import Modes
from isthmus.edge.notes import Notes
from isthmus.edge.options import GenerateOptions
from isthmus.edge.runners import Runner, SplitRunner, StreamRunner
from isthmus.edge.standby import Standby
from isthmus.edge.token import Source, Stats
from isthmus.edge.verify import VerifyRunner
from isthmus.protocol.errors import DeviceError, IsthmusError, LinkError

MOMENT_S = 1.0  # that a complete answer waits for a cloud that has been away for long
SEEK_S = 0.05  # how long a device that does without its cloud looks for it before an answer


class Steering:
    """See the module.

    Args:
        link: to the cloud, None without one.
        absent: why the cloud could not be reached when the device was opened.
        fallback: whether this device goes on by itself when the cloud goes away.
        standby: makes this device ready to go on by itself, None where it cannot.
        timeouts: how long a complete answer waits for a silent cloud that has guesses to confirm.
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
        standby: Standby | None,
        timeouts: Timeouts,
        clock: Callable[[], float],
        controller: Controller | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._controller, self._tell = controller, tell
        self._modes, self._holding, self._link, self._notes = modes, holding, link, notes
        self._fallback, self._standby, self._timeouts, self._clock = fallback, standby, timeouts, clock
        self._cloud_error = absent  # of when the cloud was last looked for
        self._counted = (0, 0, 0, 0) if link is None else link.costs  # fetching a bundle is no answer's cost
        self._served = False  # whether the cloud ever has
        self._rest = Rest()
        self._bridging = False  # whether this answer goes on without the cloud
        self._waits = False  # whether it was said that it is complete and waits
        self._silent_at = float("-inf")  # when the link was last found silent
        self._connections = 0  # that there were then; it is asked again on another one
        self._retelling: Runner | None = None  # which has guesses confirmed

    def runner(self, options: GenerateOptions) -> Runner:
        """The one to begin with.

        Raises:
            IsthmusError: what was asked for cannot be had.
        """
        mode, whole = options.mode, self._holding.whole
        if self._controller is not None:
            self._controller.leave()
        self._retelling, self._waits = None, False
        self._bridging = self._fallback and self._link is not None and mode != "local" and self._modes.can_bridge
        if self._link is not None:
            self._link.session.patience.impatient = mode == "auto" and whole and self._fallback
        if mode == "auto":
            with offering_local(whole):
                link_up = self._link_up()
            waits = not (link_up or whole) and self._bridging and self._silent  # with what bridges meanwhile
            if self._cloud_error is not None and not whole and not waits:
                raise self._cloud_error
            mode = "stream" if waits else policy.choose(self._link is not None, link_up, whole)
            if self._cloud_error is not None:
                hint = "" if self._served else f" ({self._cloud_error.remedy})"
                self._notes.add(f"{self._cloud_error.problem}: this device goes on by itself{hint}")
            if self._controller is not None and (link_up or self._may_return()):
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

    def _may_return(self) -> bool:
        """Whether an answer that this device begins alone may go on in the cloud as soon as that is back."""
        informed = self._controller is not None and self._controller.informed
        return informed and self._silent and self._holding.whole and self._fallback

    @property
    def _silent(self) -> bool:
        """Whether a cloud that has served this device does not answer now, and did not refuse either."""
        error = self._cloud_error
        return self._served and isinstance(error, LinkError) and not isinstance(error, Busy)

    def _confirm_s(self, guessed: Sequence[Source]) -> float:
        """How long the cloud may be silent while a complete answer waits for it to confirm guesses."""
        return self._timeouts.confirm_s(self._holding.whole and "exit" not in guessed)

    def _rest_s(self, link: Link, guessed: Sequence[Source]) -> float:
        """What is left of that for one that was lost, or a moment: each answer after it waits only so long."""
        confirm_s = self._confirm_s(guessed)
        return max(min(confirm_s, MOMENT_S), confirm_s - (self._clock() - link.heard_s))

    @contextmanager
    def listening(
        self, runner: Runner, options: GenerateOptions, guessed: Sequence[Source], ended: bool
    ) -> Iterator[None]:
        """While a token that counts is waited for: `Silent` ends that where this device can go on by itself.

        Args:
            runner: makes it.
            options: of the answer.
            guessed: where the tokens were made by which it has gone on already.
            ended: whether it has come to the answer's end so.
        """
        link = self._link
        if link is None or not self._bridging:
            yield
            return
        silent = bool(guessed) and link.heard_s <= self._silent_at
        if self._standby is not None and not guessed and self._rests(runner):
            begins, anew = not self._notes.stats.tokens, not isinstance(runner, SplitRunner)
            link.idle = partial(self._standby.work, options.sampling, begins, anew)
        due_s, confirm_s = link.session.trips.due_s, 0.0
        if ended:
            confirm_s = self._confirm_s(guessed)
            if self._rest_s(link, guessed) <= MOMENT_S:  # it has been away for long
                confirm_s = min(confirm_s, MOMENT_S)
        if silent and confirm_s > MOMENT_S and not self._waits:
            self._waits = True
            self._notes.waits(
                f"the answer is complete; its last {len(guessed)} tokens wait for the cloud to confirm them"
            )
        link.hush = (lambda: max(confirm_s, due_s())) if ended else (lambda: 0.0) if silent else due_s
        try:
            yield
        except Silent:
            if not silent:
                self._silent_at, self._connections = self._clock(), link.session.connections
                link.race()
            raise
        finally:
            link.hush = link.idle = None

    def _rests(self, runner: Runner) -> bool:
        """Whether who goes on alone does nothing meanwhile, and nothing that it does is in a runner's way."""
        if isinstance(runner, SplitRunner):
            return not self._holding.slides
        return isinstance(runner, StreamRunner) or (isinstance(runner, VerifyRunner) and not runner.by_model)

    def bridge(self, options: GenerateOptions) -> Bridge | None:
        """What goes on while the cloud is silent; None where nothing can after all, for the rest of the answer."""
        try:
            return self._modes.bridge(options)
        except IsthmusError as error:
            self.unbridged(error)
            return None

    def unbridged(self, error: IsthmusError) -> None:
        """This device cannot go on alone in this answer."""
        self._bridging = False
        self._notes.add(f"this device cannot go on alone: {error.problem}")

    def turn(self, options: GenerateOptions, runner: Runner, guesses: Sequence[int], wanted: int) -> Runner:
        """The one for the next token that counts.

        Args:
            runner: who made the last one.
            guesses: what this device has said beyond it.
            wanted: tokens that are still asked for at most.
        """
        following = runner
        if runner is self._retelling and not guesses:
            following = self.again(runner, options)
        elif guesses and isinstance(runner, StreamRunner) and self._reconnected:
            with suppress(IsthmusError):
                runner.stop()
            following = self._retell(options, guesses)
        elif not guesses and self._controller is not None:
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
        following = self._controller.given_up(options, runner)
        if following is not runner:
            self._left(runner)
            if following.source == "device" and runner.source != "device":
                said = len(self._notes.stats.tokens)
                self._notes.add(f"the cloud took too long after {said} tokens: this device went on by itself")
        return following

    def stop(self, runner: Runner) -> None:
        """The log is about to go on otherwise than a runner made it."""
        with suppress(IsthmusError):
            runner.stop()
        self._left(runner)

    def again(self, runner: Runner, options: GenerateOptions) -> Runner:
        """A new one, after `stop` or when guesses are confirmed."""
        with suppress(IsthmusError):
            runner.stop()
        self._retelling = None
        return self._shared(options) if self._link is not None else self._modes.local(options)

    def lost(self, options: GenerateOptions, runner: Runner, error: IsthmusError, guessed: int) -> bool:
        """The cloud failed; whether this device goes on with guesses until it is `back`.

        Args:
            guessed: tokens that it has said by itself already.
        """
        link = self._link
        if link is None or not isinstance(error, LinkError) or isinstance(error, Busy):
            return False
        if not (self._bridging and may_go_on(error, options.mode, self._served)):
            return False
        there = link.up and not link.session.closing
        if there and self._holding.whole:
            return False  # what answers nonsense is not waited for
        self._connections = link.session.connections if there else -1
        self._left(runner)
        with suppress(IsthmusError):
            runner.stop()
        self._gone(error, guessed)
        return True

    def back(
        self, options: GenerateOptions, guesses: Sequence[int], guessed: Sequence[Source], ended: bool
    ) -> Runner | None:
        """A runner once a cloud that was lost is there again; it is waited for when the answer has `ended`.

        Args:
            guesses, guessed: what this device has said without it, and where that was made.

        Raises:
            IsthmusError: it is not, and this device cannot go on alone after all.
        """
        assert self._link is not None
        if not self._bridging and self._cloud_error is not None:
            raise self._cloud_error
        try:
            if not self._reconnected:
                self._link.look()
            if not self._link.glance(self._rest_s(self._link, guessed) if ended else 0.0) or not self._reconnected:
                return None
            runner = self._retell(options, guesses)
        except IsthmusError as error:
            if not isinstance(error, LinkError):  # it is there, and will not: it is asked no more
                self._notes.add(error.problem)
                self._connections = self._link.session.connections
            self._cloud_error = error
            return None
        self._cloud_error, self._connections = None, self._link.session.connections
        self._notes.add(f"it is back after {len(self._notes.stats.tokens)}")
        return runner

    def alone(self, options: GenerateOptions, runner: Runner, error: IsthmusError) -> Runner:
        """The one that goes on for the rest of the answer when the cloud failed.

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
        self._left(runner)
        with suppress(IsthmusError):
            runner.stop()
        self._gone(error)
        return self._modes.local(options)

    def _gone(self, error: IsthmusError, guessed: int = 0) -> None:
        if self._controller is not None:
            self._controller.leave()
        self._cloud_error = error
        if isinstance(error, Busy):
            self._rest.begin(self._clock())
        said = len(self._notes.stats.tokens) - guessed
        self._notes.add(f"{error.problem}: this device went on by itself after {said} tokens")

    @property
    def _reconnected(self) -> bool:
        """Whether the connection is another one than when the link was last found silent."""
        return self._link is not None and self._link.session.connections > self._connections

    def _retell(self, options: GenerateOptions, guesses: Sequence[int]) -> Runner:
        assert self._link is not None
        if len(guesses) > 1 and options.mode in ("auto", "stream"):
            self._link.welcome()
            self._connections = self._link.session.connections
            self._retelling = self._modes.retold(options, self._link, guesses)
            if self._retelling is not None:
                if self._controller is not None:
                    self._controller.leave()
                return self._retelling
        return self._shared(options)

    def _shared(self, options: GenerateOptions) -> Runner:
        assert self._link is not None
        self._link.welcome()
        if options.mode == "auto" and self._controller is not None:
            return self._controller.begin(options, len(self._notes.stats.tokens))
        mode = "stream" if options.mode == "auto" else options.mode
        return self._modes.shared(replace(options, mode=mode), self._link)

    def finish(self, runner: Runner | None, stats: Stats, guessed: int) -> None:
        """An answer has ended, with so many guesses that nobody confirmed at its end: its costs are known."""
        if runner is not None:
            with suppress(LinkError):  # the answer is complete, or its reader has gone: a lost cancel costs nothing
                runner.stop()
            self._left(runner)
        if guessed and runner is not None and self._link is not None:
            self._gone(LinkError(f"{self._link.session.where} fell silent"), guessed)
        elif stats.tokens and runner is not None and runner.source != "device":
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
            runner.drafted = runner.accepted = 0
        if isinstance(runner, VerifyRunner):
            self._notes.stats.drafts += runner.drafts
            self._notes.stats.drafting_ms += runner.drafting_s * 1e3
            runner.drafts, runner.drafting_s = 0, 0.0
        if isinstance(runner, ExitRunner):
            self._notes.stats.filled += runner.filled
            runner.filled = 0

    def _link_up(self) -> bool:
        if self._link is None or not self._rest.over(self._clock()):
            return False
        try:
            if self._cloud_error is None:
                self._link.welcome()
            elif self._link.glance(SEEK_S):
                self._cloud_error = None
        except IsthmusError as error:
            if not may_go_on(error, "auto", self._served):
                raise
            self._cloud_error = error
        self._served = self._served or self._cloud_error is None
        return self._cloud_error is None
