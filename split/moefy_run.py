"""A dense model's way to a mixture of experts: grouping, routers, tuning, figures; all of it kept in a work folder.

What was done stays done, and is found again by what it was made from.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from isthmus.engine import KvConfig, open_part
from isthmus.engine.experts import Expert
from isthmus.engine.part import Part, WeightSource
from isthmus.protocol.errors import ModelError
from isthmus.quant.fitted import Aim
from isthmus.quant.groups import QUANTIZABLE
from isthmus.quant.nested import WIDTHS
from isthmus.quant.packed import PackedMatrix
from isthmus.split.exit_samples import ANSWER_TOKENS, kept_answers
from isthmus.split.exit_states import BATCH, Progress, Sample
from isthmus.split.fetch import cache_folder
from isthmus.split.files import write_whole
from isthmus.split.moefy_decoder import Decoder, Feed, fast_dtype
from isthmus.split.moefy_experts import Routing, grouped, log_energies
from isthmus.split.moefy_fit import fitted, rounded
from isthmus.split.moefy_mixture import Batch, Mixture, Watch, batches, perplexity
from isthmus.split.moefy_source import Shape
from isthmus.split.moefy_training import Recipe, trainable, tune

if TYPE_CHECKING:
    from isthmus.split.tokenizer import Tokenizer

GROUPED_TOKENS, ROUTED_TOKENS = 12_000, 32_000  # that experts and routers are made from, at most
LEAST_TOKENS = 256
_BATCH_TOKENS = 4096
Say = Callable[[str], Progress]  # begins a step of that name


@dataclass(frozen=True, slots=True)
class Figure:
    """What a converted model does with so many experts.

    Attributes:
        active: experts a token.
        share: of all experts.
        perplexity: of held-out documents.
        recall: share of the experts with most energy that routers choose; 1 where all are active.
    """

    active: int
    share: float
    perplexity: float
    recall: float


def work_folder(identity: str) -> Path:
    """Where what is made from a model is kept unless a folder is named."""
    return cache_folder().parent / "moefy" / identity[:16]


def identity(source: WeightSource) -> str:
    """Of a model, by its configuration and weights: in hex."""
    digest = hashlib.sha256(json.dumps(source.config.to_dict(), sort_keys=True).encode())

    def add(weight: object) -> None:
        arrays = weight.arrays.values() if isinstance(weight, PackedMatrix) else [weight]
        for array in arrays:
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)

    for weight in (source.embedding(), source.final_norm(), *(() if source.config.tied else (source.head(),))):
        add(weight)
    for index in range(source.config.n_layers):
        for _, weight in sorted(source.layer(index).items()):
            add(weight)
    return digest.hexdigest()


class MoefyRun:
    """A dense model that becomes a mixture of experts.

    Args:
        source: the dense model.
        name: its `identity`.
        work: a folder that is this process's alone.
        say: begins a step of the given name and gives what is told of its progress.

    Raises:
        ModelError: the model cannot be of that shape.
    """

    def __init__(self, source: WeightSource, name: str, shape: Shape, work: Path, say: Say) -> None:
        shape.of(source.config)
        self.source, self.shape, self._name, self._work, self._say = source, shape, name, work, say
        self.decoder = Decoder(source, fast_dtype())

    def answered(self, tokenizer: Tokenizer, prompts: list[str], threads: int) -> list[Sample]:
        """The model's own greedy answers; none if it has no chat template."""
        if not prompts or not tokenizer.entry.chat_template:
            return []
        lengths = [len(tokenizer.chat([{"role": "user", "content": prompt}])) for prompt in prompts]
        room = self.source.config.context_length - ANSWER_TOKENS
        prompts = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= room]
        kv = KvConfig("f16", BATCH * (min(max(lengths), room) + ANSWER_TOKENS + 32))

        def opened() -> closing[Part]:
            return closing(open_part(self.source, 0, self.source.config.n_layers, threads=threads, kv=kv))

        tell = self._say(f"{len(prompts)} answers")
        return kept_answers(self._work, opened, tokenizer, self._name, prompts, tell) if prompts else []

    def convert(self, samples: Sequence[Sample], seed: int = 0) -> Mixture:
        """Experts of the very neurons of the dense model, and routers.

        Raises:
            ModelError: the samples are too few.
        """
        some = _some(batches(samples, _BATCH_TOKENS, np.random.default_rng(seed)))
        count = sum(batch.size for batch in some)
        if count < max(LEAST_TOKENS, self.shape.experts):
            raise ModelError(f"{count} tokens of text are too few", f"give at least {LEAST_TOKENS} (--text)")
        key = hashlib.sha256(json.dumps([self._name, asdict(self.shape), seed]).encode())
        for batch in some:
            key.update(batch.tokens.numpy().tobytes())
        tell, layers = self._say("experts"), self.decoder.layers
        feeds, routers, before = [], [], None
        with torch.no_grad():
            states = [self.decoder.embedded(batch.tokens) for batch in some]
            for index, layer in enumerate(layers):
                states = [layer.attended(x) for x in states]
                normed = torch.cat([layer.normed(x[batch.there]) for x, batch in zip(states, some, strict=True)])
                feed, router = self._layer(index, normed, normed if before is None else before, key.hexdigest(), seed)
                feeds.append(feed)
                routers.append(router)
                states = [x + layer.fed(layer.normed(x)) for x in states]
                before = normed if self.shape.pre_gate else None
                tell(index + 1, len(layers))
        return Mixture(self.decoder, feeds, routers, self.shape.pre_gate)

    def tune(self, mixture: Mixture, samples: Sequence[Sample], recipe: Recipe) -> Mixture:
        """The same experts, taught to do with few of them what the dense model does."""
        feeds, routers = [trainable(feed) for feed in mixture.feeds], [router.clone() for router in mixture.routers]
        found = Mixture(self.decoder, feeds, routers, mixture.pre_gate)
        tell, shape = self._say(f"tuning in {recipe.format}" if recipe.format else "tuning"), self.shape
        kind = f"{'-pre' if shape.pre_gate else ''}{f'-{recipe.format}' if recipe.format else ''}"
        kept = self._work / f"tuned-{shape.experts}-{shape.active}{kind}.pt"
        key = hashlib.sha256(self._name.encode())
        for tensor in (*(feed.gate for feed in feeds), *routers):
            key.update(tensor.numpy().tobytes())
        tune(found, samples, shape.active, recipe, lambda done, total, _: tell(done, total), kept, key.hexdigest())
        return found

    def experts(
        self, mixture: Mixture, samples: Sequence[Sample] | None, format: str, aim: Aim | None = None
    ) -> list[list[Expert]]:
        """The experts of all layers in a format.

        Args:
            samples: to which nested ones are fitted; None for those that were tuned so, whose weights are each rounded
                to the nearest, as they were then.
            aim: of the fit; see `quant.fitted.fit`.

        Raises:
            ModelError: a format that nothing is rounded to.
        """
        known_format(format)
        if samples is None or format not in WIDTHS:
            return [rounded(feed, self.shape.experts, format) for feed in mixture.feeds]
        some = _some(batches(samples, _BATCH_TOKENS, np.random.default_rng(0)))
        return fitted(mixture, some, self.shape.active, format, aim, self._say("rounding"))

    def measure(self, mixture: Mixture, held: Sequence[Sample], counts: Sequence[int]) -> tuple[float, list[Figure]]:
        """The dense model's perplexity on held-out samples, and figures for so many active experts."""
        found, each = [], batches(held, _BATCH_TOKENS)
        if not each:
            raise ModelError("the held-out documents are too short to measure with", "give longer ones (--text)")
        tell, done = self._say("perplexity"), 0
        total = len(each) * (1 + len(counts))

        def step() -> None:
            nonlocal done
            done += 1
            tell(done, total)

        dense = perplexity(self.decoder, lambda batch: self.decoder.last(batch.tokens)[batch.there], each, step)
        for active in counts:
            watch = Watch()

            def last(batch: Batch, active: int = active, watch: Watch = watch) -> Tensor:
                return mixture.last(batch, active, watch)

            perplexed = perplexity(self.decoder, last, each, step)
            share = active / self.shape.experts
            found.append(Figure(active, share, perplexed, float(np.mean(watch.recall)) if watch.recall else 1.0))
        return dense, found

    def _layer(self, index: int, normed: Tensor, read: Tensor, key: str, seed: int) -> tuple[Feed, Tensor]:
        dense, shape = self.decoder.layers[index].feed, self.shape
        kept = self._work / "experts" / f"layer-{index:03d}.pt"
        saved = _loaded(kept, key)
        if saved is not None:
            return dense.ordered(saved["order"]), saved["router"]
        order = grouped(dense, normed[:GROUPED_TOKENS], shape.experts, shape.active, seed).order
        feed, routing = dense.ordered(order), Routing(normed.shape[1], shape.experts)
        energies = [
            log_energies(feed.hidden(some, self.decoder.dtype), feed.down, shape.experts)
            for some in torch.split(normed, 4096)
        ]
        routing.add(read, torch.cat(energies))
        router = routing.router()
        kept.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        torch.save({"key": key, "order": order, "router": router}, data)
        write_whole(kept, data.getvalue())
        return feed, router


def known_format(format: str) -> None:
    """Checks a format of experts.

    Raises:
        ModelError: nothing is rounded to it.
    """
    if format not in QUANTIZABLE:
        raise ModelError(f"weight format {format!r} is unknown", f"choose one of {', '.join(QUANTIZABLE)}")


def usual_counts(shape: Shape) -> list[int]:
    """Active experts that figures are given for: around the chosen count, and all."""
    n, k = shape.experts, shape.active
    return sorted({max(1, k // 2), k, min(n, 2 * k), max(1, 3 * n // 4), n})


def _some(each: list[Batch]) -> list[Batch]:
    found: list[Batch] = []
    for batch in each:
        if sum(one.size for one in found) < ROUTED_TOKENS:
            found.append(batch)
    return found


def _loaded(path: Path, key: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        return saved if saved["key"] == key else None
    except Exception:  # damage raises whatever the unpickler that reads only weights comes upon
        return None
