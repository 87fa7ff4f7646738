"""What a device believes before it has seen much: figures out of a bundle, a cloud's offer and its own stopwatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isthmus.edge import budget
from isthmus.edge.experts.settings import ExpertSettings
from isthmus.edge.experts.stalls import Stalls
from isthmus.edge.figures import CloudFigures, CodecFigures, DeviceFigures, DraftFigures, ExitFigures, Waits, round_of
from isthmus.edge.pace import ROW_SHARE
from isthmus.edge.stopwatch import Sizes, Stopwatch
from isthmus.protocol.messages import Offer
from isthmus.split.bundle import Bundle

TRIP_MS = 50.0  # of a link over which nothing was sent yet
PREFILL_SHARE = 0.15  # what one row of a prompt costs it
CODED_BYTES = 2 / 3  # of a coded hidden state, for each of its numbers, until that is measured
CODEC_MS = 0.1
LENGTHS = (1, 2, 3, 4, 6)
SMALL_ACCEPTED = 0.6  # of a small model's drafts, until some were checked
GUESSED = 0.7  # of an exit's right guesses those that are made: the others follow a wrong one, or unlikely ones
DRAFTING = 2  # exits that may draft: the deepest are the ones whose drafts are taken

# SmolLM2's own chat answers, 10,348 tokens of 100 of them: (g, tokens of a round), (g, rows that it costs the cloud).
NGRAM_ACCEPTED = 0.75
NGRAM_TOKENS = ((1, 1.23), (2, 1.33), (3, 1.38), (4, 1.42), (6, 1.45))
NGRAM_ROWS = ((1, 1.33), (2, 1.54), (3, 1.73), (4, 1.90), (6, 2.23))


def sizes(bundle: Bundle) -> Sizes:
    """What a row of this model reads."""
    files = {name: entry.bytes for name, entry in bundle.manifest.files.items()}
    parts = budget.PartSizes.from_files(bundle.config.n_layers, files)
    layer = sum(parts.layers) / len(parts.layers)
    head = parts.head if parts.head > parts.embed else parts.embed  # tied: the head is the embedding
    exits = tuple(
        (one.layer, float(bundle.manifest.exit_bytes(one.layer) - sum(parts.layers[: one.layer])))
        for one in bundle.exits
    )
    return Sizes(bundle.config.n_layers, max(1.0, layer), head, max(1.0, layer), exits)


def watch(
    bundle: Bundle, experts: ExpertSettings | None, threads: int, clock: Callable[[], float], cloud: bool
) -> Stopwatch:
    """For the steps of a device.

    Args:
        experts: how they are held; None for all in memory.
        threads: of the engine, 0 for one a core.
        cloud: whether there is one: nobody else asks what steps will wait for experts.
    """
    stalls = Stalls.of(bundle, experts, threads, clock) if experts is not None and cloud else None
    return Stopwatch(sizes(bundle), clock, stalls)


def device(watched: Stopwatch, held: int, layers: Sequence[int]) -> DeviceFigures:
    """This device's times.

    Args:
        held: leading layers that it can run.
        layers: cuts that are of interest.
    """
    known = watched.sizes
    ms = watched.ms_per_mb / 1e6 if watched.knows else 0.0
    depths = sorted({1, known.n_layers, *layers})
    times = tuple((depth, ms * known.of(depth, False)) for depth in depths)
    row_ms = watched.row_ms if watched.knows else 0.0
    exits_ms = tuple((layer, ms * size) for layer, size in known.exits)
    waits = Waits(watched.stalls.token_ms(), watched.stalls.prompt_ms(row_ms)) if watched.stalls else Waits()
    head_ms, exit_ms = ms * known.head, ms * known.exit
    return DeviceFigures(held, known.n_layers, times, head_ms, exit_ms, row_ms, CODEC_MS, exits_ms, waits)


def cloud(offer: Offer, step_ms: float, known: Sizes, same_model: bool) -> CloudFigures:
    """A cloud's times, as it declares them, or out of one step of one row."""
    rows = tuple((count, us * 1e-3) for count, us in offer.steps)
    head = known.head / known.of(known.n_layers, True)
    if not rows or rows[0][0] != 1 or rows[0][1] <= 0:
        rows = tuple((n, step_ms * (1 + ROW_SHARE * (n - 1))) for n in (1, 2, 4, 8))
    prefill = offer.row_us * 1e-3 or PREFILL_SHARE * rows[0][1]
    return CloudFigures(known.n_layers, rows, rows[0][1] * head, prefill, 0.0, same_model)


def drafts(
    bundle: Bundle, layers: Sequence[int], times: DeviceFigures, small_ms: tuple[float, float] | None = None
) -> tuple[DraftFigures, ...]:
    """What can be drafted with: n-grams, the exits before those layers, a small model.

    Args:
        small_ms: what the small model takes for a token, and for a row of a prompt; None without one.
    """
    found = [DraftFigures("ngram", 0, 0.0, NGRAM_ACCEPTED, NGRAM_TOKENS, NGRAM_ROWS)]
    for one in [one for one in bundle.exits if one.layer in layers][-DRAFTING:]:
        share = one.agreement.answers
        rounds = tuple((g, round_of(share, g)) for g in LENGTHS)
        rows = tuple((g, g + 1.0) for g in LENGTHS)
        found.append(DraftFigures("exit", one.layer, times.drafted(one.layer), share, rounds, rows))
    if small_ms is not None:
        rounds = tuple((g, round_of(SMALL_ACCEPTED, g)) for g in LENGTHS)
        rows = tuple((g, g + 1.0) for g in LENGTHS)
        found.append(DraftFigures("model", 0, small_ms[0], SMALL_ACCEPTED, rounds, rows, small_ms[1]))
    return tuple(found)


def exits(bundle: Bundle, layers: Sequence[int]) -> tuple[ExitFigures, ...]:
    """Of the exits before those layers the ones that may emit, as their certificates say.

    With agreement a, emitted share c and risk r the exit is right, and not sure of it, about a - (c - r) of the tokens.
    """
    found = []
    for one in bundle.exits:
        certificate = one.certificate
        if one.layer in layers and certificate is not None:
            right = one.agreement.answers - (certificate.emitted - certificate.risk)
            unsure, guessed = 1.0 - certificate.emitted, GUESSED * max(0.0, right)
            threshold = min(1.0, certificate.threshold)
            row_bytes = one.codec.row_bytes if one.codec is not None else CODED_BYTES * bundle.config.d_model
            may = certificate.disagreement
            found.append(ExitFigures(one.layer, threshold, unsure, min(unsure, guessed), may, row_bytes))
    return tuple(found)


def codecs(bundle: Bundle, taken: Sequence[str]) -> tuple[CodecFigures, ...]:
    """How hidden states may travel in split mode without a promise being broken: as they are.

    Args:
        taken: codecs that the cloud takes.
    """
    return (CodecFigures("f32", 4.0 * bundle.config.d_model, 0.0),) if "f32" in taken else ()
