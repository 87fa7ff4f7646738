"""How long steps of a device will wait for experts, foretold from what they waited and from what is in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from isthmus.edge.experts.facts import read_facts, used_planes
from isthmus.edge.experts.foretold import foretell
from isthmus.edge.experts.settings import ExpertSettings
from isthmus.edge.experts.store import ExpertStore
from isthmus.edge.local import CHUNK
from isthmus.protocol.errors import IsthmusError
from isthmus.split.bundle import Bundle

USUAL_MB_S = 1000.0  # of a flash of which nothing is known
SEEN_BYTES = 1 << 20  # reads of fewer say nothing of it
TRUST, HALF_LIFE = 4.0, 16.0  # tokens that the forecast counts like, and after which a token that waited counts half
HALF_S = 30.0  # after which it counts half where no token is computed here
LEAST_MS, BOUND = 1.0, 8.0  # a single wait counts for no more than so many times the forecast, or this
SPREAD = 64  # tokens that share the reads which fill the memory
HOPED, FULL = 0.5, 0.9  # of what is guessed, until tokens have waited with such a share of the memory filled
LACKED = 0.05  # of what a token takes that is lacking at least where what was recorded is held against it
WEIGHT = 0.3  # of a prompt's step in how far off those were foretold
EXPOSED = 0.1  # of a prompt's reads that are waited for, at least, however much is computed meanwhile
LENGTHS = (1, 2, 4, 8, 16, 32, 64, CHUNK)  # of prompts; what is longer goes in chunks


class Mixture(NamedTuple):
    """The experts of a model.

    Attributes:
        sizes: bytes of an expert, of each layer with experts that is here.
        layers: with experts, of the whole model.
        n_experts, top_k: of a layer.
    """

    sizes: Sequence[int]
    layers: int
    n_experts: int
    top_k: int

    @property
    def layer_bytes(self) -> float:
        """Of a layer's experts, in the mean."""
        return self.n_experts * sum(self.sizes) / max(1, len(self.sizes))


class Stalls:
    """See the module.

    A token waits for the experts that are not in memory, where a share s of memory holds the cube root of s of what is
    taken: so many times as long as `isthmus bench experts` recorded, and as tokens have waited with what was in memory
    then. Where nothing was recorded, half of that is hoped for until some have waited with a full memory, since only a
    device that is used shows what it can. What fills the memory is read once, which the tokens that follow share. The
    rows of a prompt take experts as if each chose for itself, and each is read once for a chunk.

    Args:
        budget: bytes that experts may take in memory.
        clock: seconds.
        mb_s: what flash is known to read, in 10^6 bytes a second; 0 where that is not known.
        limit_mb_s: of a slower flash that is emulated; 0 for none.
        token_ms: what a token was foretold to wait, None where nothing was recorded.

    Attributes:
        store: that steps read from, once it is open and holds what it begins with.
    """

    def __init__(
        self,
        mixture: Mixture,
        budget: int,
        clock: Callable[[], float],
        *,
        mb_s: float = 0.0,
        limit_mb_s: float = 0.0,
        token_ms: float | None = None,
    ) -> None:
        self._mixture, self._clock, self._limit_mb_s = mixture, clock, limit_mb_s
        self._whole = max(1.0, mixture.layer_bytes * len(mixture.sizes))
        self._share = min(1.0, max(1, budget) / self._whole)
        self._mb_s, self._recorded_ms = mb_s, token_ms
        self._waited, self._foreseen, self._seen_s = 0.0, 0.0, clock()  # ms of tokens, as they were and as foretold
        self._told = 0.0  # tokens that waited with a full memory
        self._off = 1.0  # how many times as long prompts waited as was foretold
        self._before = 0.0  # share of the experts that was in memory when the last step ended
        self._store: ExpertStore | None = None

    @classmethod
    def of(cls, bundle: Bundle, settings: ExpertSettings, threads: int, clock: Callable[[], float]) -> Stalls | None:
        """Of a mixture's layers that are here; None where there are no experts, or they cannot be read.

        Args:
            threads: of the engine, 0 for one a core.
        """
        config, experts = bundle.config, bundle.config.experts
        if experts is None:
            return None
        with suppress(IsthmusError):  # whoever opens the experts says what is wrong with them
            here = [bundle.records(layer) for layer in range(bundle.held_layers) if config.experts_of(layer)]
            layers = sum(config.experts_of(layer) is not None for layer in range(config.n_layers))
            sizes = [sum(used_planes(one, settings.planes)) for one in here]
            known = read_facts(bundle, settings.planes, threads, settings.flash_mb_s)
            recorded = foretell(bundle, settings, threads) if known and bundle.held_layers == config.n_layers else None
            return cls(
                Mixture(sizes, layers, experts.n_experts, experts.top_k),
                settings.budget,
                clock,
                mb_s=known.flash_mb_s if known else 0.0,
                limit_mb_s=settings.flash_mb_s,
                token_ms=max(0.0, recorded.mean_ms - recorded.compute_ms) if recorded else None,
            )
        return None

    @property
    def store(self) -> ExpertStore | None:
        """See the attributes."""
        return self._store

    @store.setter
    def store(self, store: ExpertStore | None) -> None:
        self._store = store
        self._before = self._held()

    @property
    def mb_s(self) -> float:
        """What flash reads, in 10^6 bytes a second; 0 while that is not known."""
        if self.store is not None:
            seen = self.store.reader.report()
            if seen.bytes >= SEEN_BYTES and seen.busy > 0:
                return seen.bytes / seen.busy / 1e6
        return min(self._mb_s, self._limit_mb_s or self._mb_s) if self._mb_s else self._limit_mb_s

    def remember(self, mb_s: float) -> None:
        """What flash read another time."""
        self._mb_s = self._mb_s or mb_s

    def token_ms(self) -> float:
        """What a token will wait, in the whole model, in the mean of those that come next."""
        held = self._held()
        steady, now = self._lacks_ms(self._share), self._lacks_ms(held)
        filling = self._read_ms(max(0.0, self._share - held) * self._mixture.layers * self._mixture.layer_bytes)
        hoped = HOPED + (1.0 - HOPED) * min(1.0, self._fade() * self._told / TRUST)
        return self._times() * min(now, steady + filling / SPREAD) * (hoped if self._recorded_ms is None else 1.0)

    def prompt_ms(self, row_ms: float) -> tuple[tuple[int, float], ...]:
        """(rows, ms) that prompts of so many rows will wait, in the whole model.

        Args:
            row_ms: of one of many rows, which are computed meanwhile.
        """
        lacks, byte_ms = 1.0 - self._held(), self._read_ms(1.0)
        return tuple((rows, self._off * self._chunk_ms(rows, row_ms, lacks, byte_ms)) for rows in LENGTHS)

    def saw(self, rows: int, share: float, waited_ms: float, row_ms: float) -> None:
        """A step of so many rows through a share of the model's layers has waited.

        Args:
            row_ms: see `prompt_ms`.
        """
        waited_ms /= max(share, 1e-6)
        before, self._before = self._before, self._held()
        if rows == 1:
            foreseen = self._lacks_ms(before)
            waited_ms = min(waited_ms, BOUND * max(LEAST_MS, self._times() * foreseen))
            fade, self._seen_s = self._fade() * 0.5 ** (1.0 / HALF_LIFE), self._clock()
            self._waited, self._foreseen = self._waited * fade + waited_ms, self._foreseen * fade + foreseen
            self._told = self._told * fade + (before >= FULL * self._share)
        elif (foreseen := self._chunk_ms(rows, row_ms, 1.0 - before, self._read_ms(1.0))) > 0:
            off = min(BOUND, max(1 / BOUND, waited_ms / foreseen))
            self._off = float(self._off ** (1 - WEIGHT) * off**WEIGHT)

    def _lacks_ms(self, held: float) -> float:
        """A token's reads where such a share of the experts is in memory: only a full one holds what is wanted most."""
        mixture = self._mixture
        taken = mixture.top_k / mixture.n_experts * mixture.layers * mixture.layer_bytes
        return self._read_ms(taken * (1.0 - min(1.0, held / self._share) * float(self._share ** (1 / 3))))

    def _times(self) -> float:
        """How many times as long as its reads a token waits: as recorded, and as it was seen since."""
        usual, fade = max(self._lacks_ms(self._share), LACKED * self._lacks_ms(0.0), 1e-9), self._fade()
        prior = 1.0 if self._recorded_ms is None else self._recorded_ms / usual
        return (TRUST * usual * prior + fade * self._waited) / (TRUST * usual + fade * self._foreseen)

    def _fade(self) -> float:
        """What the tokens that waited count, after the time in which none was computed here."""
        return float(0.5 ** (max(0.0, self._clock() - self._seen_s) / HALF_S))

    def _held(self) -> float:
        """The share of experts that are in memory now."""
        return 0.0 if self.store is None else min(1.0, self.store.report().resident / self._whole)

    def _chunk_ms(self, rows: int, row_ms: float, lacks: float, byte_ms: float) -> float:
        mixture = self._mixture
        taken = 1.0 - (1.0 - mixture.top_k / mixture.n_experts) ** rows
        read_ms = byte_ms * taken * mixture.layers * mixture.layer_bytes * lacks
        return max(EXPOSED * read_ms, read_ms - rows * row_ms)

    def _read_ms(self, size: float) -> float:
        return size / (self.mb_s or USUAL_MB_S) / 1e3
