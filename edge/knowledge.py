"""What a device knows when it decides: its own times, the cloud's and the link's, learnt as an answer is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from isthmus.edge import priors, profile
from isthmus.edge.costs import Candidate, Standing
from isthmus.edge.estimator import Estimator
from isthmus.edge.figures import DRAFT_SOURCES, DeviceFigures, Figures, Points
from isthmus.edge.holding import Holding
from isthmus.edge.link import Link
from isthmus.edge.runners import HIDDEN_LANE, TOKENS_LANE
from isthmus.edge.shadow import DRAFTED, Shadow
from isthmus.edge.small_model import SmallModel
from isthmus.edge.stopwatch import ENOUGH, Stopwatch
from isthmus.engine.part import Rows, Want
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import IsthmusError
from isthmus.protocol.messages import CAN_VERIFY, Offer
from isthmus.split.bundle import Bundle

TRIES = 2  # one while the cloud answers, one when nothing else runs
TRY_ROWS, TRY_STEPS = 32, 8  # of a prompt, and of one row
TRY_S = 0.5  # for which those of a device that waits for experts are begun


class Knowledge:
    """See the module; a `watch.Told`.

    Args:
        watch: of this device's own layers.
        small: a small model that drafts, None without one.
        slides: whether the conversation's oldest positions fall out of sight: then only whole models answer.
        settings: beside model and machine, what makes another device of this one.
        tries: whether a device that has had nothing to compute may try how fast it is.
        kept: folder of profiles, None for none.
        clock: the link's seconds.

    Attributes:
        choice: the way that is in use, for what is seen of it.
        seen_s: when the link last showed its trip.
        failed: why this device's layers can be used no more, for people; empty while they can.
    """

    def __init__(
        self,
        bundle: Bundle,
        holding: Holding,
        link: Link,
        log: Chain,
        watch: Stopwatch,
        *,
        small: SmallModel | None,
        slides: bool,
        settings: tuple[object, ...],
        tries: bool,
        kept: Path | None,
        clock: Callable[[], float],
    ) -> None:
        self._bundle, self._holding, self._link, self._log = bundle, holding, link, log
        self._watch, self._small, self._slides, self._clock = watch, small, slides, clock
        self._held, self._whole = holding.layers, holding.whole  # asking looks at every file
        self.choice: Candidate | None = None
        self.seen_s = float("-inf")
        self.failed = ""
        self._estimator: Estimator | None = None  # once enough is known
        self._early = Estimator(Figures(priors.device(watch, 0, ())), priors.TRIP_MS)
        self._offer: Offer | None = None
        self._cloud_ms = 0.0  # of one step, as it was first seen
        self._cuts: tuple[int, ...] = ()
        self._may_try, self._tries, self._expected = tries, 0 if tries else TRIES, not tries
        self._shadow = Shadow(self._foreseen)
        self.truncate = self._shadow.truncate
        self._kept = kept and kept / profile.name(bundle.model_id, self._held, *settings)
        self._known = profile.read(self._kept) if self._kept is not None else None
        if self._known is not None:
            watch.remember(self._known.ms_per_mb, self._known.row_ms)
            if watch.stalls is not None:
                watch.stalls.remember(self._known.flash_mb_s)

    @property
    def enough(self) -> bool:
        """Whether a decision can be made; brings the figures up to date."""
        welcome, watch, held = self._link.session.welcome, self._watch, self._held
        if welcome is None or (held and not (watch.knows and self._reads)):
            return False
        offer = next((one for one in welcome.offers if one.model_id == self._bundle.model_id), None)
        if offer is None or not (offer.steps or self._cloud_ms):
            return False
        if self._estimator is None or offer != self._offer:
            self._begin(offer, CAN_VERIFY in welcome.capabilities)
        else:
            small_ms = self._small.times_ms if self._small is not None else None
            self._estimator.knows(self._times(), small_ms=small_ms and small_ms[0])
        return True

    def figures(self, now_s: float, silent_ms: float = 0.0) -> Figures:
        """What to decide on; only when it is `enough`."""
        assert self._estimator is not None
        return self._estimator.figures(now_s, max(0.0, silent_ms), self._link.up)

    def follow(self, made: int) -> None:
        """Looks at what has come since, of which so many tokens at most were made in this answer."""
        tokens, drafting = self._log.tokens, self.choice is not None and self.choice.source == "ngram"
        self._shadow.learn(tokens if drafting else tokens[: len(tokens) - made])
        self._shadow.follow(tokens)

    def standing(self, remaining: int) -> Standing:
        """How far the answer is."""
        total, part, session, choice = len(self._log), self._holding.part, self._link.session, self.choice

        def held(depth: int) -> int:
            return part.held(self._log, depth) if part is not None and part.part.end >= depth else 0

        def hidden(exact: bool) -> Points:
            there = [(k, session.agreed(HIDDEN_LANE, k, exact)) for k in self._cuts]
            return tuple((k, float(total - min(rows, held(k)))) for k, rows in there)

        depths = sorted({*self._cuts, self._bundle.config.n_layers})
        whole = choice is not None and choice.mode in ("stream", "verify")  # the cloud is ahead, if anything
        return Standing(
            remaining,
            tuple((depth, float(total - held(depth))) for depth in depths),
            1 if whole else max(1, total - session.agreed(TOKENS_LANE, 0)),
            hidden(exact=True),
            choice,
            exit_missing=hidden(exact=False),
            small_missing=float(self._small.missing(self._log)) if self._small is not None else 0.0,
        )

    def expect(self) -> None:
        """Has this device's weights looked over in the background: soon they may be needed."""
        if not self._expected and self._holding.part is None:
            self._expected = True
            self._holding.prefetch()

    def try_out(self) -> None:
        """Times a few steps of this device, which has had no reason to make any."""
        stalls = self._watch.stalls
        if (self._known is not None and self._reads) or self._tries >= TRIES or not self._held or not self._log.tokens:
            return
        self._tries += 1 if stalls is None else TRIES  # a second time would find in memory what the first one read
        try:
            part = self._holding.open(self._held).part
            sequence = part.open()
            try:
                ids = (self._log.tokens * TRY_ROWS)[:TRY_ROWS]
                rows, steps = (
                    (TRY_ROWS, TRY_STEPS) if stalls is None else (0, ENOUGH)
                )  # those may have to be waited for
                if rows:
                    part.step(Rows().tokens(sequence, 0, ids, want=Want.NONE))
                want = Want.SAMPLE if self._whole else Want.HIDDEN
                began = self._clock()
                for at in range(steps):
                    part.step(Rows().tokens(sequence, rows + at, ids[at : at + 1], want=want))
                    if stalls is not None and self._clock() - began > TRY_S:
                        self._watch.remember(self._watch.ms_per_mb, 0.0)  # one such step says enough
                        break
            finally:
                sequence.close()
        except IsthmusError as error:
            self.fail(error)

    def fail(self, error: IsthmusError) -> None:
        """This device's layers cannot be used after all."""
        self.failed, self._held, self._whole = error.problem, 0, False
        self._offer = None  # the figures are made anew

    def keep(self) -> None:
        """Writes down how fast this device is, if that is news."""
        if self._kept is None or not self._watch.knows or self._holding.part is None:
            return
        row_ms = self._watch.row_ms if self._watch.knows_prompts else 0.0
        flash = self._watch.stalls.mb_s if self._watch.stalls is not None else 0.0
        found = profile.Profile(self._watch.ms_per_mb, row_ms, self._numerics(), flash)
        if self._known is None or not self._known.near(found):
            profile.write(self._kept, found)
            self._known = found

    # -- what is seen

    def trip(self, now_s: float, ms: float, *, idle_s: float = 0.0) -> None:
        """See `watch.Told` and `LinkEstimator.trip`."""
        self.seen_s = now_s
        self._to.link.trip(now_s, ms, idle_s=idle_s)

    def moved(self, now_s: float, size: float, ms: float) -> None:
        """See `watch.Told`."""
        self.seen_s = now_s
        link = self._to.link
        link.moved("up", now_s, size, max(1.0, ms - link.figures(now_s).trip_ms))

    def stepped(self, now_s: float, rows: int, prompt: int, ms: float, queue_ms: float, cut: int) -> None:
        """See `watch.Told`."""
        if self._estimator is None:
            if rows == 1 and prompt <= 0 and not cut:
                self._cloud_ms = ms
            return
        cloud = self._estimator.known.cloud
        assert cloud is not None
        self._estimator.queued(now_s, queue_ms)
        expected = cloud.rest(cut, max(1, rows)) if cut else cloud.step(max(1, rows))
        self._estimator.cloud_step(expected + cloud.prefill(max(0, prompt), cut), ms)

    def checked(self, drafted: int, taken: int) -> None:
        """See `watch.Told`."""
        choice = self.choice
        if self._estimator is not None and choice is not None and choice.mode == "verify":
            source = next(one for one in DRAFT_SOURCES if one == choice.source)
            self._estimator.block(source, choice.cut, drafted, drafted, max(0, taken))

    def said(self, asked: int) -> None:
        """A token of exit mode has come, and so many questions were asked since the one before."""
        if self._estimator is not None and self.choice is not None:
            self._estimator.exit(self.choice.cut, self.choice.threshold, asked, self.choice.asked)

    def paced(self, tokens: int, seconds: float) -> None:
        """A round of the way that is in use has given so many tokens."""
        choice = self.choice
        waits = self._watch.stalls is not None and choice is not None and choice.mode == "local"  # learns by itself
        if self._estimator is not None and choice is not None and choice.mode != "stream" and not waits:
            self._estimator.paced(choice.mode, self._clock(), tokens * choice.formula_ms, seconds * 1e3)

    @property
    def link_seen(self) -> bool:
        """Whether the link has shown its trip."""
        return self.seen_s > float("-inf")

    # -- inside

    @property
    def _reads(self) -> bool:
        """Whether it is known how fast experts are read, where they are, or cannot be known better."""
        return self._watch.stalls is None or self._watch.stalls.mb_s > 0 or self._tries >= TRIES

    def _foreseen(self, drafted: int, taken: int) -> None:
        if self._estimator is not None and any(one.source == "ngram" for one in self._estimator.known.drafts):
            self._estimator.block("ngram", 0, DRAFTED, drafted, taken)

    @property
    def _to(self) -> Estimator:
        return self._estimator or self._early

    def _begin(self, offer: Offer, can_verify: bool) -> None:
        bundle, held = self._bundle, self._held
        if self._slides and not self._whole:
            held = 0
        able = [e.layer for e in bundle.exits if e.layer <= held and bundle.holds(e.file)]
        layers = able if can_verify and not self._slides else []
        self._cuts = tuple(sorted({*layers, held} - {0, bundle.config.n_layers}))
        times = self._times()
        same = offer.exact and offer.numerics == self._numerics() and self._holding.kv.format in offer.kv_formats
        small = self._small
        if small is not None and self._may_try:
            small.try_out()
        small_ms = small.times_ms if small is not None else None
        drafts = priors.drafts(bundle, layers, times, small_ms) if can_verify and not self._slides else ()
        codecs = () if self._slides else priors.codecs(bundle, offer.codecs)
        cloud = priors.cloud(offer, self._cloud_ms, self._watch.sizes, same)
        seen, self._offer = self._to.link, offer
        self._estimator = Estimator(Figures(times, cloud, None, priors.exits(bundle, layers), drafts, codecs))
        self._estimator.link = seen

    def _times(self) -> DeviceFigures:
        return replace(priors.device(self._watch, self._held, self._cuts), failed=self.failed)

    def _numerics(self) -> str:
        part = self._holding.part
        return part.part.numerics.id if part is not None else self._known.numerics if self._known is not None else ""
