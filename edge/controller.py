"""Decides while an answer is made: the policy is asked at token boundaries, and when the cloud is late."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from isthmus.edge.costs import CODED, Candidate
from isthmus.edge.exit import ExitRunner
from isthmus.edge.fallback import Rest
from isthmus.edge.figures import Wish
from isthmus.edge.knowledge import Knowledge
from isthmus.edge.link import Link
from isthmus.edge.modes import Modes
from isthmus.edge.options import GenerateOptions
from isthmus.edge.policy import Plan, decide, explain, unseen, worth_probing
from isthmus.edge.rhythm import (
    FIRST_BYTES,
    MOST_REST_S,
    PING_S,
    REST_S,
    Pulse,
    Rhythm,
    expected,
    next_look_s,
    probe_s,
    usual_ms,
)
from isthmus.edge.runners import Runner
from isthmus.edge.watch import Watch
from isthmus.protocol.errors import BundleError, DeviceError, EngineError, IsthmusError, ServiceError

OWN = ("local", "split")  # ways that need this device's layers, and nothing else of it
FAILURES = (BundleError, EngineError, DeviceError)  # of those layers
TRY_AFTER = 8  # tokens of the cloud's after which a device that was never timed is


class GaveUp(Exception):
    """What is awaited is late, and another way of working is better than to wait on."""


class Controller:
    """See the module.

    Args:
        clock: the link's seconds.
        tell: called with why, when an answer begins and when its way of working changes.

    Attributes:
        decisions: made so far.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        modes: Modes,
        link: Link,
        wish: Wish,
        clock: Callable[[], float],
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._knowledge, self._modes, self._link, self._wish = knowledge, modes, link, wish
        self._clock, self._tell = clock, tell
        self.decisions = 0
        self._rest = Rest(REST_S, MOST_REST_S)  # of a cloud that was given up
        self._active = False
        self._asked: tuple[Runner | None, int] = (None, 0)  # who asks the cloud in exit mode, and how often it did
        self._better: Plan | None = None  # than what is awaited in vain
        self._rhythm, self._pulse = Rhythm(), Pulse()
        self._made = self._wanted = self._tokens = 0  # tokens of the answer, still asked for, of this round
        self._listened = float("-inf")
        self._curious = False  # whether the uplink's rate might change the way
        self._began = self._look = self._took = 0.0  # of this round
        self._waits = self._fresh = self._tried = False
        self._greedy = True
        self._pong = self._probe = -1  # the last ping that was answered, and the last that measured the uplink
        self._asked_bytes = FIRST_BYTES  # of that one
        link.watch = Watch(knowledge, self.late, link.session.enters)

    @property
    def informed(self) -> bool:
        """Whether enough is known to choose."""
        return self._knowledge.enough

    def begin(self, options: GenerateOptions, made: int = 0) -> Runner:
        """Who makes the next token of an answer, of which so many were made before; the cloud is there, or enough is
        known to go on without it.
        """
        self._active, self._fresh, self._wanted = True, True, max(1, options.max_tokens - made)
        self._greedy = not options.sampling.temperature
        self._made, self._tokens = made, 0
        self._tried = self._waits = False
        self._knowledge.choice = None
        why = "too little is known yet to choose"
        if self._knowledge.enough:
            choice: Candidate | None = None
            try:
                if self._wish.own:
                    self._see_trip()
                plan = self._decide(0.0)
                if self._curious and self._measured():
                    plan = self._decide(0.0)
                choice = plan.choice
                runner = self._runner(options, choice)
                self._take(plan)
                return runner
            except (DeviceError, BundleError, EngineError, ServiceError) as error:
                why = self._failed(choice, error)
        if self._tell is not None:
            self._tell(f"stream: {why}")
        return self._modes.shared(replace(options, mode="stream"), self._link)

    def turn(self, options: GenerateOptions, runner: Runner, wanted: int) -> Runner:
        """Who makes the next token.

        Args:
            runner: who made the last one, or was chosen to make the first.
            wanted: tokens that are still asked for at most.
        """
        if not self._active or runner.ready():
            return runner
        known, now = self._knowledge, self._clock()
        if self._tokens and not self._fresh:
            known.paced(self._tokens, self._took)
        self._fresh = self._fresh and not self._tokens
        self._wanted, self._tokens, self._waits = wanted, 0, True
        if self._made and self._rhythm.due(now):
            if known.enough:
                known.follow(self._made)
                self._listen(runner, now)
                runner = self._reconsider(options, runner)
            elif self._made < TRY_AFTER:
                known.expect()
            elif not self._tried:
                self._tried = True
                self._try_out()
        elif runner.source == "device" and self._pulse.awaits(known.seen_s):
            self._hear(runner, now)  # at once, as who looks seldom takes the trip for longer than it is
        self._began = self._look = self._clock()
        return runner

    def came(self, runner: Runner) -> None:
        """A token has come."""
        if not self._active:
            return
        self._made += 1
        self._tokens += 1
        if self._waits:
            self._waits, self._took = False, self._clock() - self._began
        choice = self._knowledge.choice
        if runner.source != "device":
            self._rest.end()
        if choice is not None and choice.mode == "exit" and isinstance(runner, ExitRunner):
            before, self._asked = self._asked, (runner, runner.asks)
            self._knowledge.said(runner.asks - (before[1] if before[0] is runner else 0))

    def late(self, now: float) -> None:
        """The device waits for the cloud.

        Raises:
            GaveUp: it should not.
        """
        choice = self._knowledge.choice
        if not (self._active and self._waits) or choice is None or choice.mode == "local" or now < self._look:
            return
        waited_ms = (now - self._began) * 1e3
        patience_ms = usual_ms(choice, self._knowledge.figures(now), self._fresh)
        if waited_ms < patience_ms:
            self._look = self._began + patience_ms * 1e-3
            return
        self._look = next_look_s(now, waited_ms)
        with suppress(DeviceError):
            plan = self._decide(waited_ms - patience_ms)
            if plan.choice.key != choice.key:
                self._better = plan
                raise GaveUp

    def given_up(self, options: GenerateOptions, runner: Runner) -> Runner:
        """Who goes on after `GaveUp`."""
        assert self._better is not None
        self._rest.begin(self._clock())
        with suppress(IsthmusError):
            runner.stop()
        self._link.session.abandon()
        plan, self._better = self._better, None
        return self._switch(options, runner, plan)

    def refused(self, options: GenerateOptions, runner: Runner, error: IsthmusError) -> Runner | None:
        """Who goes on when the cloud refused what was chosen here, or this device's own layers failed; None when it was
        none of these choices, or nobody can.
        """
        choice = self._knowledge.choice
        if not self._active or choice is None or choice.mode == "stream":
            return None
        if isinstance(error, FAILURES):
            if not self._link.up:
                return None
            if choice.source != "model":  # its own layers, and not those of a small one
                self._knowledge.fail(error)
            self._modes.say(f"{choice.name} failed after {self._made} tokens ({error.problem}): the cloud went on")
        elif choice.mode == "local" or not isinstance(error, ServiceError):
            return None
        following = self._modes.shared(replace(options, mode="stream"), self._link)
        self.leave()
        with suppress(IsthmusError):
            runner.stop()
        if self._tell is not None:
            what = "failed" if isinstance(error, FAILURES) else "was refused"
            self._tell(f"after {self._made} tokens: stream: {choice.name} {what} ({error.problem})")
        return following

    def ended(self) -> None:
        """The answer is complete, or nobody wants more of it."""
        if self._active and self._tried:
            self._try_out()  # again, now that nothing else runs
        self.leave()
        self._knowledge.keep()

    def leave(self) -> None:
        """The answer goes on as somebody else decided."""
        self._active = self._waits = False
        self._knowledge.choice = None
        if self._link.watch is not None:
            self._link.watch.forget()

    def _reconsider(self, options: GenerateOptions, runner: Runner) -> Runner:
        with suppress(DeviceError):
            plan, choice = self._decide(self._silence()), self._knowledge.choice
            resting = choice is not None and choice.mode == "local" and not self._rest.over(self._clock())
            if choice is not None and (resting or plan.choice.key == choice.key):
                plan = plan if plan.choice.key == choice.key else replace(plan, choice=choice)
                self._knowledge.choice = plan.choice
                self._rhythm.stayed()
            elif choice is None and plan.choice.mode == "stream":
                self._take(plan)  # as it was begun, now with reasons
            else:
                return self._switch(options, runner, plan)
        return runner

    def _switch(self, options: GenerateOptions, runner: Runner, plan: Plan) -> Runner:
        try:
            following = self._runner(options, plan.choice)
        except IsthmusError as error:
            self._active = False  # what cannot be had after all is not asked for again in this answer
            why = self._failed(plan.choice, error)
            if self._tell is not None:
                self._tell(f"after {self._made} tokens: it goes on as it was: {why}")
            return runner
        with suppress(IsthmusError):
            runner.stop()
        self._take(plan)
        return following

    def _try_out(self) -> None:
        """Times this device, and notes what is damaged."""
        before = self._knowledge.failed
        self._knowledge.try_out()
        if self._knowledge.failed and not before:
            self._modes.say(f"this device cannot compute by itself ({self._knowledge.failed})")

    def _failed(self, choice: Candidate | None, error: IsthmusError) -> str:
        """A way that was chosen cannot be had: why, for people. What is damaged on this device is noted."""
        why = f"{choice.name if choice is not None else 'what was chosen'} cannot be had ({error.problem})"
        if isinstance(error, BundleError | EngineError):
            self._modes.say(why)
            if choice is not None and choice.mode in OWN:
                self._knowledge.fail(error)
        return why

    def _take(self, plan: Plan) -> None:
        self._knowledge.choice, self._fresh = plan.choice, True
        self._rhythm.changed()
        if self._tell is not None:
            after = f"after {self._made} tokens: " if self._made else ""
            known = self._knowledge.figures(self._clock()).link
            guessed = "\n(the uplink was not measured yet: 1 Mbit/s is assumed)" if unseen(known) else ""
            self._tell(after + explain(plan) + guessed)

    def _runner(self, options: GenerateOptions, choice: Candidate) -> Runner:
        if choice.mode == "local":
            return self._modes.local(options)
        codec, draft = choice.codec if choice.codec != CODED else "", (choice.source, choice.cut, choice.depth)
        chosen = replace(options, mode=choice.mode, cut=choice.cut or None, codec=codec, threshold=None, guesses=None)
        return self._modes.shared(chosen, self._link, draft if choice.mode == "verify" else None)

    def _decide(self, silent_ms: float) -> Plan:
        now, known = self._clock(), self._knowledge
        self._rhythm.decided(now)
        self.decisions += 1
        standing = replace(known.standing(expected(self._made, self._wanted)), greedy=self._greedy)
        figures = known.figures(now, silent_ms)
        plan = decide(figures, self._wish, standing)
        if self._pulse.probes(now):
            begun = standing if standing.current is None else replace(standing, current=plan.choice)
            blind = bool(plan.choice.codec) and unseen(figures.link)
            self._curious = blind or (not plan.choice.codec and worth_probing(figures, self._wish, begun))
        return plan

    def _listen(self, runner: Runner, now: float) -> None:
        """Hears what has come, and asks for a sign of life of a link that shows none otherwise."""
        link, known = self._link, self._knowledge
        self._hear(runner, now)
        with suppress(IsthmusError):
            asks = self._pulse.asks(now, known.seen_s, self._curious)
            if asks is not None:
                sent = link.ping(asks)
                if asks:
                    self._probe, self._asked_bytes = sent, asks

    def _hear(self, runner: Runner, now: float) -> None:
        """Takes in what has come, and what it says of the link."""
        link, known = self._link, self._knowledge
        before, self._listened = self._listened, now
        with suppress(IsthmusError):
            alone = runner.source == "device"
            if alone:
                link.look()
            if link.rtt is not None and link.rtt[0] != self._pong:
                self._pong, rtt_ms = link.rtt
                unheard_ms = min(rtt_ms, (now - before) * 1e3) if alone else 0.0
                if self._pong == self._probe:
                    known.moved(now, self._asked_bytes, rtt_ms - unheard_ms / 2)
                else:
                    known.trip(now, rtt_ms - unheard_ms / 2, idle_s=PING_S)

    def _measured(self) -> bool:
        """Whether the uplink, of which nothing was known, was measured now: it is waited for once in a connection."""
        link, known, now = self._link, self._knowledge, self._clock()
        figures = known.figures(now)
        if not unseen(figures.link) or not self._pulse.asks(now, known.seen_s, True):
            return False
        with suppress(IsthmusError):
            self._probe = link.echo(FIRST_BYTES, probe_s(figures))
            answered = link.rtt is not None and link.rtt[0] == self._probe
            if answered:
                self._pong = self._probe
            took_ms = link.rtt[1] if answered and link.rtt else (self._clock() - now) * 1e3  # or longer
            known.moved(self._clock(), FIRST_BYTES, took_ms)
            return True
        return False

    def _see_trip(self) -> None:
        """Sees the link's trip, if nothing was seen of it yet: it decides whether this device's own experts answer."""
        link, known, now = self._link, self._knowledge, self._clock()
        if known.link_seen:
            return
        with suppress(IsthmusError):
            name = link.echo(0, probe_s(known.figures(now)))
            answered = link.rtt is not None and link.rtt[0] == name
            known.trip(self._clock(), link.rtt[1] if answered and link.rtt else (self._clock() - now) * 1e3)

    def _silence(self) -> float:
        """For how many ms more than is usual a ping has not been answered."""
        now, known = self._clock(), self._knowledge
        link = known.figures(now).link
        return self._pulse.silent_ms(now, known.seen_s, link.trip_high_ms if link is not None else 0.0)
