"""A converted model in PyTorch: the dense model's attention, its neurons by expert, and a router in every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from isthmus.split.exit_states import Sample
from isthmus.split.moefy_decoder import Decoder, Feed
from isthmus.split.moefy_experts import log_energies, recall

MIN_TOKENS = 8  # shorter samples teach nothing
_ROWS = 1024  # of logits at a time


class Batch(NamedTuple):
    """Samples side by side.

    Attributes:
        tokens: [batch, n] i64, padded.
        there: whether a token stands at each place [batch, n].
    """

    tokens: Tensor
    there: Tensor

    @property
    def size(self) -> int:
        """Tokens."""
        return int(self.there.sum())


def batches(samples: Sequence[Sample], batch_tokens: int, rng: np.random.Generator | None = None) -> list[Batch]:
    """Samples of about the same length together, in random order if there is a generator.

    Args:
        batch_tokens: at most so many places in one, padding included, unless a sample alone has more.
    """
    lengths = [len(sample.tokens) for sample in samples]
    order = [i for i in range(len(samples)) if lengths[i] >= MIN_TOKENS]
    order.sort(key=lambda i: (lengths[i] // 24, rng.random()) if rng else (lengths[i], 0.0))
    groups: list[list[int]] = []
    for i in order:
        longest = max([lengths[i], *(lengths[j] for j in groups[-1])]) if groups else 0
        if not groups or longest * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(i)
    found = [_batch([samples[i].tokens for i in group]) for group in groups]
    return [found[i] for i in rng.permutation(len(found))] if rng else found


def _batch(rows: list[list[int]]) -> Batch:
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    there = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], there[i, : len(row)] = torch.tensor(row), True
    return Batch(tokens, there)


@dataclass(slots=True)
class Watch:
    """What routers did in one pass, a number for each layer.

    Attributes:
        every: the first of so many tokens is looked at.
        errors: mean squares between logits and logarithms of energies; they teach routers, and nothing else.
        recall: share of the experts with most energy that were chosen.
    """

    every: int = 1
    errors: list[Tensor] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)


class Mixture:
    """See the module.

    Args:
        decoder: the dense model.
        feeds: of each layer, neurons by expert.
        routers: of each layer [n_experts, d_model] f32.
        pre_gate: whether routers read what the feed-forward network of the layer before reads.
    """

    def __init__(self, decoder: Decoder, feeds: list[Feed], routers: list[Tensor], pre_gate: bool) -> None:
        self.decoder, self.feeds, self.routers, self.pre_gate = decoder, feeds, routers, pre_gate
        self.experts = len(routers[0])

    def last(self, batch: Batch, active: int, watch: Watch | None = None) -> Tensor:
        """States after the last layer of all tokens that are there, [count, d_model] f32.

        Args:
            active: experts that a token is sent to; with all of them it does not matter what routers say.
        """
        x, before = self.decoder.embedded(batch.tokens), None
        for index, layer in enumerate(self.decoder.layers):
            x = layer.attended(x)
            normed = layer.normed(x[batch.there])
            read = before if self.pre_gate and before is not None else normed
            added = torch.zeros_like(x)
            added[batch.there] = self._fed(index, normed, read, active, watch)
            x, before = x + added, normed
        return x[batch.there]

    def _fed(self, index: int, normed: Tensor, read: Tensor, active: int, watch: Watch | None) -> Tensor:
        logits = read.detach() @ self.routers[index].T
        if watch is not None and active < self.experts:
            feed, some = self.feeds[index], slice(None, None, watch.every)
            with torch.no_grad():
                truth = log_energies(feed.hidden(normed[some], self.decoder.dtype), feed.down, self.experts)
            watch.errors.append(functional.mse_loss(logits[some], truth))
            watch.recall.append(recall(logits.detach()[some], truth, active))
        best = logits.detach().topk(active, -1)
        return self._sent(index, normed, best.indices, best.values)

    def _sent(self, index: int, normed: Tensor, chosen: Tensor, logits: Tensor) -> Tensor:
        """What a layer's chosen experts add [n, d_model] f32.

        Args:
            chosen: experts of each token, the foremost first [n, active].
            logits: theirs [n, active] f32.
        """
        feed, dtype = self.feeds[index], self.decoder.dtype
        if chosen.shape[1] == self.experts:
            return feed.added(normed, dtype)
        return sent(normed, chosen, feed.parts(self.experts).__getitem__, dtype)


def sent(normed: Tensor, named: Tensor, network: Callable[[int], Feed], dtype: torch.dtype) -> Tensor:
    """What networks add to the tokens that are sent to them [n, d_model] f32.

    Args:
        normed: what they read [n, d_model].
        named: networks of each token [n, k] i64, below 0 for none.
        network: gives one by its name; it is asked once for each that a token is sent to.
    """
    flat = named.flatten()
    order = flat.argsort(stable=True)
    order = order[int((flat < 0).sum()) :]
    names, counts = torch.unique_consecutive(flat[order], return_counts=True)
    rows = order.div(named.shape[1], rounding_mode="floor")
    total = torch.zeros(normed.shape)
    if not len(rows):
        return total
    each = torch.split(normed.to(dtype)[rows], counts.tolist())
    added = [network(name).added(x, dtype) for name, x in zip(names.tolist(), each, strict=True)]
    return total.index_add(0, rows, torch.cat(added))


def perplexity(
    decoder: Decoder, last: Callable[[Batch], Tensor], held: Sequence[Batch], progress: Callable[[], None] | None = None
) -> float:
    """Of held-out samples.

    Args:
        last: gives the states after the last layer.
        progress: called after each batch.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in held:
            told = batch.there[:, 1:]  # whether the token after a place is there
            states = torch.zeros(*batch.there.shape, decoder.config.d_model)
            states[batch.there] = last(batch)
            states, tokens = states[:, :-1][told], batch.tokens[:, 1:][told]
            for some, truth in zip(torch.split(states, _ROWS), torch.split(tokens, _ROWS), strict=True):
                total += float(functional.cross_entropy(decoder.logits(some).float(), truth, reduction="sum"))
            count += len(tokens)
            if progress:
                progress()
    return math.exp(total / count)
