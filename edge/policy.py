"""Who makes the tokens of an answer in "auto": weighs what is known, decides and says why. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from isthmus.edge.costs import Candidate, Standing, candidates
from isthmus.edge.figures import Figures, LinkFigures, Wish
from isthmus.edge.options import alone_refused
from isthmus.edge.token import Mode
from isthmus.protocol.errors import DeviceError

STEADY = ("local", "stream")  # ways that a bad link delays once, not for every token
RISK = 0.08  # share of what remains that any other way must save over these
VARIES = 0.03  # how much more of it on a link whose trips are twice as long at times
MARGIN = 0.05  # share of what remains that another mode must save before it takes over
HOPE, UNSEEN_HOPE, UNSEEN_S = 4.0, 50.0, 1e5  # times the known uplink that the real one may be; of one never seen
TOLD_MS = 0.05  # shorter waits for experts are not spoken of
PATIENCE = 1.25  # times the fastest that a user who saves the cloud's time will wait


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do until the next decision.

    Attributes:
        choice: the way of working; its settings and its price stand there.
        candidates: all ways that were weighed, the forbidden ones included.
        reason: why, in a sentence.
    """

    choice: Candidate
    candidates: tuple[Candidate, ...]
    reason: str


def decide(figures: Figures, wish: Wish, standing: Standing) -> Plan:
    """The way of working that ends the answer first among those that the wish and the device allow.

    With `prefer="cloud-cost"` it is the one that takes the fewest seconds of the cloud's engine among those that end
    at most `PATIENCE` times as late as the first; with "privacy" the device alone. What is in use stays until another
    saves `MARGIN` of what remains. A device that holds the whole model goes on by itself when the cloud is gone, even
    if the two models differ. Where the wish is for this device's own experts, it goes on by itself as well while a
    token waits for them for less than a round trip, and is weighed as otherwise where it waits longer.

    Raises:
        DeviceError: no way is allowed; the message names the nearest one's obstacle.
    """
    weighed = tuple(candidates(figures, wish, standing))
    allowed = [one for one in weighed if not one.why_not]
    if not allowed:
        raise _nothing(figures, wish, weighed)
    current = standing.current
    if current is not None and current.mode != "local" and figures.link is not None and figures.link.silent_ms > 0:
        # A link that is late is late for every way that needs it: to begin another is to ask again.
        allowed = [one for one in allowed if one.mode == "local" or one.key == current.key] or allowed
    beside = ""
    if wish.own and figures.link is not None and (alone := _alone(weighed)) is not None:
        may, beside = _own(alone, figures.link, standing)
        if may:
            return Plan(alone, weighed, f"{alone.name}: {beside}")
    first = min(allowed, key=lambda one: one.total_ms)
    if wish.prefer == "cloud-cost":
        bearable = [one for one in allowed if one.total_ms <= PATIENCE * first.total_ms]
        best = min(bearable, key=lambda one: (one.cloud_ms, one.total_ms))
        rivals = bearable
    else:
        best, rivals = first, allowed
    # What pays no trip for each token is in use until another has proved itself.
    same = [one for one in rivals if (one.key == current.key if current else one.mode in STEADY)]
    held = min(same, key=lambda one: one.total_ms, default=None)
    if held is not None and held.key != best.key and not _worth(held, best, wish, figures.link):
        return Plan(held, weighed, f"{held.name} goes on: {best.name} would not save enough to be worth it")
    reason = _reason(best, first, allowed, wish)
    return Plan(best, weighed, f"{reason}; {beside}" if beside else reason)


def choose(has_cloud: bool, link_up: bool, whole_model: bool) -> Mode:
    """Where nothing was measured: the cloud while it answers, this device otherwise.

    Args:
        has_cloud: whether a cloud was named.
        link_up: whether it answers.
        whole_model: whether this device can run every layer.

    Raises:
        DeviceError: neither can answer.
    """
    if has_cloud and link_up:
        return "stream"
    if whole_model:
        return "local"
    raise _unable(has_cloud)


def unseen(link: LinkFigures | None) -> bool:
    """Whether nothing is known of an uplink's rate."""
    return link is not None and link.up_age_s >= UNSEEN_S


def worth_probing(figures: Figures, wish: Wish, standing: Standing) -> bool:
    """Whether it pays to measure the uplink: hidden states would travel if it were so much faster than is known."""
    link, current = figures.link, standing.current
    if link is None or not link.up or wish.prefer == "privacy" or (current is not None and current.codec):
        return False
    hope = UNSEEN_HOPE if unseen(link) else HOPE
    hoped = replace(link, up_bps=hope * link.up_bps, up_low_bps=hope * link.up_low_bps, up_age_s=0.0)
    fast = replace(figures, link=hoped)
    try:
        return bool(decide(fast, wish, standing).choice.codec)
    except DeviceError:
        return False


def explain(plan: Plan) -> str:
    """A sentence and a table of the ways that were weighed, the cheapest first, each with its best settings."""
    shown: dict[tuple[str, str, bool], Candidate] = {}
    for one in sorted(plan.candidates, key=lambda one: (one != plan.choice, bool(one.why_not), one.total_ms)):
        shown.setdefault((one.mode, one.source, one.depth > 1), one)
    order = sorted(shown.values(), key=lambda one: (bool(one.why_not), one.total_ms))
    width = max(len(one.name) for one in order)
    lines = [plan.reason, "", f"  {'mode':<{width}}  s in all  ms/token   first ms  cloud ms/token"]
    for one in order:
        mark = "*" if one == plan.choice else " "
        times = f"{one.total_ms / 1e3:8.2f}  {one.ms_per_token:8.1f}  {one.setup_ms:9.1f}  {one.cloud_ms:14.1f}"
        line = f"{mark} {one.name:<{width}}  {times}"
        why = one.why_not or _waits(one)
        lines.append(f"{line}  ({why})" if why else line)
    return "\n".join(lines)


def _alone(ways: Iterable[Candidate]) -> Candidate | None:
    return next((one for one in ways if one.mode == "local"), None)


def _own(alone: Candidate, link: LinkFigures, standing: Standing) -> tuple[bool, str]:
    """Whether this device answers alone, as it waits for its experts for less than a round trip, and why."""
    if alone.why_not:
        return False, f"this device's experts may not answer: {alone.why_not}"
    remaining, begun = max(1, standing.remaining), standing.current is None or standing.current.mode == "local"
    waits_ms = alone.waits_ms + alone.setup_waits_ms / remaining
    trip_ms = link.expected_trip_ms + link.silent_ms / remaining
    shared = ", its share of the prompt's waits included" if alone.setup_waits_ms >= TOLD_MS else ""
    why = f"a token waits {waits_ms:.1f} ms for experts here{shared}, and a round trip takes {trip_ms:.1f}"
    if begun:
        return waits_ms <= trip_ms, why
    again_ms = alone.setup_ms / remaining - alone.setup_waits_ms / remaining
    may = waits_ms + again_ms <= (1 - MARGIN) * trip_ms
    return may, why if may or waits_ms > trip_ms else f"{why}, too little for {again_ms:.1f} of computing again"


def _waits(one: Candidate) -> str:
    """What a way waits for experts, for people."""
    if max(one.waits_ms, one.setup_waits_ms) < TOLD_MS:
        return ""
    before = f", {one.setup_waits_ms:.0f} of the first" if one.setup_waits_ms >= TOLD_MS else ""
    return f"{one.waits_ms:.1f} ms of a token wait for experts{before}"


def _worth(held: Candidate, best: Candidate, wish: Wish, link: LinkFigures | None) -> bool:
    if wish.prefer == "cloud-cost":
        return best.cloud_ms < (1 - MARGIN) * held.cloud_ms
    margin = MARGIN
    if held.mode in STEADY and best.mode not in STEADY:
        margin = RISK
        if link is not None and link.trip_high_ms > link.trip_ms:
            margin += VARIES * min(1.0, link.trip_high_ms / max(link.trip_ms, 1.0) - 1.0)
    return best.total_ms < (1 - margin) * held.total_ms


def _reason(best: Candidate, first: Candidate, allowed: Iterable[Candidate], wish: Wish) -> str:
    others = [one for one in allowed if one.key != best.key]
    if not others:
        return f"{best.name}: no other way is allowed; {best.ms_per_token:.1f} ms a token"
    if wish.prefer == "cloud-cost" and best.key != first.key:
        return (
            f"{best.name}: {best.cloud_ms:.1f} ms of the cloud for each token, {first.name} {first.cloud_ms:.1f}, and "
            f"{best.total_ms / first.total_ms:.2f} times its time"
        )
    second = min(others, key=lambda one: one.total_ms)
    return (
        f"{best.name}: {best.total_ms / 1e3:.2f} s for what remains at {best.ms_per_token:.1f} ms a token, "
        f"{second.name} {second.total_ms / 1e3:.2f} s"
    )


def _nothing(figures: Figures, wish: Wish, weighed: Iterable[Candidate]) -> DeviceError:
    device = figures.device
    if wish.prefer == "privacy":
        return alone_refused(device.held, device.n_layers)
    if figures.cloud is None or figures.link is None or not figures.link.up:
        return _unable(figures.cloud is not None)
    told = "; ".join(f"{one.name}: {one.why_not}" for one in weighed)
    return DeviceError(f"no way of working is allowed ({told})", "allow more disagreement")


def _unable(has_cloud: bool) -> DeviceError:
    if has_cloud:
        return DeviceError(
            "the cloud does not answer and this device does not hold the whole model",
            "check the link, or give the device all layers of the bundle",
        )
    return DeviceError("this device does not hold the whole model", "name a cloud, or use a bundle with all its layers")
