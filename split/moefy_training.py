"""Tuning of a converted model: experts and routers, with few experts active, learn to say what the dense model says.

The dense model's probabilities of the next token are the target (distillation), over a vocabulary of frequent tokens;
routers go on learning the logarithms of experts' energies. Attention, norms, embedding and head stay as they are.

With nested bits experts learn to be read with few of them (quantization-aware training): of four steps three read as
many planes as shares ask for when so many bits are read in the mean, and the fourth all of them, or all but the last.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.protocol.errors import ModelError
from isthmus.quant.nested import WIDTHS
from isthmus.quant.planes import MATRICES
from isthmus.split.exit_states import Sample
from isthmus.split.files import write_whole
from isthmus.split.moefy_decoder import Decoder, Feed
from isthmus.split.moefy_mixture import Batch, Mixture, Watch, batches
from isthmus.split.moefy_nested import NestedMixture
from isthmus.split.tolerance import NEVER

KEPT_STEPS, ROUNDED_STEPS = 50, 5  # between two savings of a training, and two roundings
_WATCHED = 4  # routers learn from one of so many tokens
_ROWS = 1024  # of logits at a time
_TURN = 4  # steps, of which the last reads all planes, or all but one


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a converted model is tuned.

    Attributes:
        epochs: passes over the samples; 0 tunes nothing.
        batch_tokens: tokens of one optimizer step, padding included.
        learning_rate: of experts at its highest; it rises over `warmup` steps and falls as a cosine.
        router_rate: of routers, as a multiple of it.
        frequent: tokens whose probabilities are compared.
        seed: of samples' order.
        format: nested bits in which experts are read; None for floats.
        bits: of an expert that a token is sent to, in the mean, where fewer than all are read.

    Raises:
        ModelError: fewer than none of something, or a format without nested bits.
    """

    epochs: float = 2.0
    batch_tokens: int = 1024
    learning_rate: float = 7e-4
    router_rate: float = 3.0
    warmup: int = 20
    frequent: int = 12288
    seed: int = 0
    format: str | None = None
    bits: float = 3.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_tokens", "learning_rate", "router_rate", "bits"):
            if not (value := getattr(self, name)) >= 0:
                raise ModelError(f"{name} is {value}", "choose 0 or more")
        if self.format is not None and self.format not in WIDTHS:
            known = f"{', '.join(WIDTHS[:-1])} or {WIDTHS[-1]}"
            problem = f"experts are not tuned in {self.format}: it is not nested"
            raise ModelError(problem, f"choose {known}, or tune in floats")


def in_nested_bits(format: str, epochs: float = 2.0, seed: int = 0) -> Recipe:
    """How a converted model is tuned on, once it was tuned in floats: larger batches, as roundings are slow.

    Raises:
        ModelError: the format has no nested bits.
    """
    return Recipe(epochs=epochs, batch_tokens=2048, seed=seed, format=format)


def tune(
    mixture: Mixture,
    samples: Sequence[Sample],
    active: int,
    recipe: Recipe,
    progress: Callable[[int, int, float], None] | None = None,
    kept: Path | None = None,
    key: str = "",
) -> None:
    """Changes a mixture's experts and routers in place.

    Args:
        active: experts that a token is sent to.
        progress: called with steps done, steps in all, and the last one's divergence from the dense model.
        kept: a file in which the training is kept, to go on from where it was stopped.
        key: of what the mixture was made from; what the file holds of another one is trained anew.
    """
    rng = np.random.default_rng(recipe.seed)
    plan = _plan(samples, recipe, rng)
    if not plan:
        return
    keeper = _Keeper(kept, json.dumps([key, active, asdict(recipe), [list(sample.tokens) for sample in samples]]))
    weights = [getattr(feed, name) for feed in mixture.feeds for name in MATRICES]
    for tensor in (*weights, *mixture.routers):
        tensor.requires_grad_(True)
    groups = [{"params": weights, "times": 1.0}, {"params": mixture.routers, "times": recipe.router_rate}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    judge = Judge(mixture.decoder, samples, recipe.frequent)
    schedule = _BitSchedule(mixture, recipe, active) if recipe.format else None
    begun = keeper.load(mixture, optimizer, len(plan))
    for step, batch in enumerate(plan[begun:], begun):
        rising = min(1.0, (step + 1) / recipe.warmup)
        falling = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / len(plan)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rising * falling * group["times"]
        watch = Watch(_WATCHED)
        last = (schedule.for_step(step, batch) if schedule else mixture).last(batch, active, watch)
        apart, pull = judge.compare(last.detach(), batch)
        optimizer.zero_grad()
        if watch.errors:  # none where all experts are active
            torch.autograd.backward([last, 0.1 * torch.stack(watch.errors).sum()], [pull, torch.tensor(1.0)])
        else:
            torch.autograd.backward([last], [pull])
        optimizer.step()
        if step + 1 == len(plan):
            keeper.save(step + 1, mixture, None)
        elif (step + 1) % KEPT_STEPS == 0:
            keeper.save(step + 1, mixture, optimizer)
        if progress:
            progress(step + 1, len(plan), apart)
    for tensor in (*weights, *mixture.routers):
        tensor.requires_grad_(False)


class _BitSchedule:
    """A mixture read with more and with fewer bits, in turn."""

    def __init__(self, mixture: Mixture, recipe: Recipe, active: int) -> None:
        assert recipe.format is not None
        self._nested, self._bits, self._active = NestedMixture(mixture, recipe.format), recipe.bits, active
        self._few = self._nested.shares

    def for_step(self, step: int, batch: Batch) -> NestedMixture:
        """As the step reads it. It depends on nothing but the step, its batch and the weights of a kept step."""
        nested, turn = self._nested, step % (2 * _TURN)
        if step % ROUNDED_STEPS == 0:
            nested.round()
            self._few = nested.within(batch, self._active, self._bits)
        nested.shares = self._few
        if turn % _TURN == _TURN - 1:
            nested.shares = torch.zeros_like(self._few)
            if turn != step % _TURN and nested.planes > 1:
                nested.shares[:, -1] = NEVER
        return nested


class Judge:
    """Compares what is said with what the dense model says, over the samples' most frequent tokens."""

    def __init__(self, decoder: Decoder, samples: Sequence[Sample], frequent: int) -> None:
        counts = np.bincount(np.concatenate([sample.tokens for sample in samples]), minlength=decoder.config.vocab_size)
        chosen = np.sort(np.argsort(-counts, kind="stable")[:frequent]).copy()
        self._decoder, self._head = decoder, decoder.head[torch.from_numpy(chosen)].contiguous()
        self._truth: dict[int, tuple[Tensor, Tensor]] = {}  # tokens and states, by the former's id while they live

    def compare(self, last: Tensor, batch: Batch) -> tuple[float, Tensor]:
        """The mean Kullback-Leibler divergence from the dense model, and its gradient.

        Args:
            last: states after the last layer of the batch's tokens [count, d_model] f32.
        """
        key = id(batch.tokens)
        if key not in self._truth:  # the dense model's states, in half of their bits
            with torch.no_grad():
                states = self._decoder.last(batch.tokens)[batch.there].to(torch.bfloat16)
                self._truth[key] = batch.tokens, states
        total, pulls = 0.0, []
        for states, truth in zip(torch.split(last, _ROWS), torch.split(self._truth[key][1], _ROWS), strict=True):
            leaf = states.clone().requires_grad_(True)
            normed = self._decoder.normed(leaf)
            with torch.no_grad():  # written out: autograd would hold several copies of the logits
                right = (self._decoder.normed(truth.float()) @ self._head.T).float().log_softmax(-1)
                said = (normed @ self._head.T).float().log_softmax(-1)
                likely = right.exp()
                total += float((likely * (right - said)).sum())
                pull = ((said.exp_() - likely) / len(last)).to(normed.dtype) @ self._head
            normed.backward(pull)  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            pulls.append(leaf.grad)
        return total / len(last), torch.cat(pulls)


def _plan(samples: Sequence[Sample], recipe: Recipe, rng: np.random.Generator) -> list[Batch]:
    """The batches of all steps; every epoch has the same batches, of which the target is computed once."""
    each = batches(samples, recipe.batch_tokens, rng)
    steps = round(recipe.epochs * len(each))
    found: list[Batch] = []
    while each and len(found) < steps:
        found += [each[i] for i in rng.permutation(len(each))]
    return found[:steps]


class _Keeper:
    """The file in which one training is kept."""

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, hashlib.sha256(key.encode()).hexdigest()

    def load(self, mixture: Mixture, optimizer: torch.optim.Optimizer, steps: int) -> int:
        """Puts what was saved of the same training in its place; gives the steps that were done."""
        if self._path is None or not self._path.is_file():
            return 0
        try:
            saved: dict[str, Any] = torch.load(self._path, weights_only=True)
            done = int(saved["step"])
            if saved["key"] != self._key or not (done == steps or "optimizer" in saved):
                return 0
        except Exception:  # damage raises whatever the unpickler that reads only weights comes upon
            return 0
        with torch.no_grad():
            for tensor, value in zip(_tensors(mixture), saved["tensors"], strict=True):
                tensor.copy_(value)
        if done < steps:
            optimizer.load_state_dict(saved["optimizer"])
        return done

    def save(self, step: int, mixture: Mixture, optimizer: torch.optim.Optimizer | None) -> None:
        """Keeps a training after so many steps; without an optimizer it is finished."""
        if self._path is None:
            return
        found = {"key": self._key, "step": step, "tensors": [tensor.detach() for tensor in _tensors(mixture)]}
        if optimizer is not None:
            found["optimizer"] = optimizer.state_dict()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()  # of a full disk torch speaks in its own way
        torch.save(found, data)
        write_whole(self._path, data.getvalue())


def _tensors(mixture: Mixture) -> list[Tensor]:
    return [getattr(feed, name) for feed in mixture.feeds for name in MATRICES] + mixture.routers


def trainable(feed: Feed) -> Feed:
    """A copy that tuning may change."""
    return Feed(feed.gate.clone(), feed.up.clone(), feed.down.clone())
