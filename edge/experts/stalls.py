"""How long steps of a device will wait for experts, foretold from what they waited and from what is in memory."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.edge.experts.facts import read_facts, used_planes
from isthmus.edge.experts.foretold import foretell
from isthmus.edge.experts.report import ExpertReport
from isthmus.edge.experts.settings import ExpertSettings
from isthmus.edge.experts.store import ExpertStore
from isthmus.edge.local import CHUNK
from isthmus.split.bundle import Bundle

USUAL_MB_S = 1000.0  # of a flash of which nothing is known
SEEN_BYTES = 1 << 20  # reads of fewer say nothing of it
TRUST, HALF_LIFE = 4.0, 16.0  # tokens that the forecast counts like, and after which a token that waited counts half
WEIGHT, BOUND = 0.3, 8.0  # of a prompt's step in how far off those were foretold, and how far that may be
LENGTHS = (1, 2, 4, 8, 16, 32, 64, CHUNK)  # of prompts; what is longer goes in chunks


class Stalls:
    """See the module.

    A token waits as those before it did. Until some have waited it waits as `isthmus bench experts` recorded, or else
    for the experts that are not in memory, where a share s of memory holds the square root of s of what is taken. The
    rows of a prompt take experts as if each chose for itself, and each is read once for a chunk.

    Args:
        sizes: bytes of an expert of each layer that is here.
        layers: with experts, of the whole model.
        n_experts, top_k: of a layer.
        budget: bytes that experts may take in memory.
        mb_s: what flash is known to read, in 10^6 bytes a second.
        limit_mb_s: of a slower flash that is emulated; 0 for none.
        token_ms: what a token was foretold to wait, None where nothing was recorded.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        layers: int,
        n_experts: int,
        top_k: int,
        budget: int,
        *,
        mb_s: float = USUAL_MB_S,
        limit_mb_s: float = 0.0,
        token_ms: float | None = None,
    ) -> None:
        each = sum(sizes) / max(1, len(sizes))
        self._layer_bytes, self._layers, self._top_k, self._n = each * n_experts, layers, top_k, n_experts
        self._whole = max(1.0, each * n_experts * len(sizes))
        self._share = min(1.0, budget / self._whole)
        self._mb_s = min(mb_s, limit_mb_s or mb_s)
        self._token_ms, self._waited, self._tokens, self._off = token_ms, 0.0, 0.0, 1.0
        self._before = 0.0  # the share of experts in memory before the step under way
        self.store: ExpertStore | None = None

    @classmethod
    def of(cls, bundle: Bundle, settings: ExpertSettings, threads: int) -> Stalls:
        """Of a mixture's layers that are here.

        Args:
            threads: of the engine, 0 for one a core.
        """
        config, experts = bundle.config, bundle.config.experts
        assert experts is not None
        here = [bundle.records(layer) for layer in range(bundle.held_layers) if config.experts_of(layer)]
        known = read_facts(bundle, settings.planes, threads, settings.flash_mb_s)
        recorded = foretell(bundle, settings, threads) if known and bundle.held_layers == config.n_layers else None
        return cls(
            [sum(used_planes(one, settings.planes)) for one in here],
            sum(config.experts_of(layer) is not None for layer in range(config.n_layers)),
            experts.n_experts,
            experts.top_k,
            settings.budget,
            mb_s=known.flash_mb_s if known else USUAL_MB_S,
            limit_mb_s=settings.flash_mb_s,
            token_ms=max(0.0, recorded.mean_ms - recorded.compute_ms) if recorded else None,
        )

    def token_ms(self) -> float:
        """What a token will wait, in the whole model."""
        prior = self._token_ms
        if prior is None:
            share = self._top_k / self._n * (1.0 - float(self._share**0.5))
            prior = self._read_ms(share * self._layers * self._layer_bytes)
        return (prior * TRUST + self._waited) / (TRUST + self._tokens)

    def prompt_ms(self, row_ms: float) -> tuple[tuple[int, float], ...]:
        """(rows, ms) that prompts of so many rows will wait, in the whole model.

        Args:
            row_ms: of one of many rows, which are computed meanwhile.
        """
        return tuple((rows, self._off * self._chunk_ms(rows, row_ms, self._held())) for rows in LENGTHS)

    def saw(self, rows: int, share: float, waited_ms: float, row_ms: float) -> None:
        """A step of so many rows through a share of the model's layers has waited.

        Args:
            row_ms: see `prompt_ms`.
        """
        waited_ms /= max(share, 1e-6)
        if rows == 1:
            fade = 0.5 ** (1.0 / HALF_LIFE)
            self._waited, self._tokens = self._waited * fade + waited_ms, self._tokens * fade + 1.0
            return
        foreseen, self._before = self._chunk_ms(rows, row_ms, self._before), self._held()
        if foreseen > 0:
            off = min(BOUND, max(1 / BOUND, waited_ms / foreseen))
            self._off = float(self._off ** (1 - WEIGHT) * off**WEIGHT)

    def _held(self) -> float:
        """The share of experts that are in memory now."""
        return 0.0 if self.store is None else min(1.0, self.store.report().resident / self._whole)

    def _chunk_ms(self, rows: int, row_ms: float, held: float) -> float:
        taken = 1.0 - (1.0 - self._top_k / self._n) ** rows
        return max(0.0, self._read_ms(taken * self._layers * self._layer_bytes * (1.0 - held)) - rows * row_ms)

    def _read_ms(self, size: float) -> float:
        mb_s = self._mb_s
        if self.store is not None:
            seen = ExpertReport.of(self.store)
            if seen.read_bytes >= SEEN_BYTES and seen.reading_seconds > 0:
                mb_s = seen.read_bytes / seen.reading_seconds / 1e6
        return size / mb_s / 1e3
