"""Exit heads in PyTorch: what an exit is while it is trained, and its training on collected states.

An exit foresees the model's own choice from the states before some layer. It begins with a linear map, which starts as
the least-squares answer to "what will the last state be?" (the tuned lens of Belrose et al., 2303.08112), and goes on
with one small decoder layer of its own: attention over the exit's states, then a gated feed-forward network. Its norm
and the model's own output head follow. It is distilled on the model's choices and their probabilities.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from isthmus.engine.config import DecoderConfig
from isthmus.engine.part import WeightSource
from isthmus.protocol.channels import ChannelStats
from isthmus.protocol.errors import BundleError
from isthmus.quant.groups import dequantize, quantize
from isthmus.split.exit_states import States
from isthmus.split.exits import check_head_fits
from isthmus.split.files import PARTIAL
from isthmus.split.roles import Weights

MIN_TOKENS = 8  # shorter samples teach nothing
CHANNEL_ROWS = 65_536
KEPT_STEPS = 50  # between two savings of a training
_RIDGE = 1e-2
_LEVEL = 10.0  # at which all last states count the same


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a head is trained.

    Attributes:
        d_ff: width of its feed-forward network.
        epochs: passes over the samples.
        batch_tokens: tokens of one optimizer step, padding included.
        learning_rate: at its highest; it rises over `warmup` steps and falls as a cosine.
        distillation: weight of the model's probabilities beside its choices, 0 to 1.
        frequent: tokens among which the choice is made in training, beside those that a batch needs.
        seed: of samples' order and initial weights.
    """

    d_ff: int = 1024
    epochs: int = 3
    batch_tokens: int = 1024
    learning_rate: float = 1.5e-3
    warmup: int = 30
    distillation: float = 0.5
    frequent: int = 8192
    seed: int = 0


class Norm(nn.Module):
    """Root-mean-square normalization."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.clone()), eps

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class ExitHead(nn.Module):
    """See the module; states [batch, positions, d_model] to normalized states that the output head takes.

    Args:
        config: of the model, whose attention shape and rotary positions the head's layer shares.
        norm: the model's last norm, with which the head's begins.
        start: the linear map to begin with [d_model, d_model], None for none.
    """

    def __init__(self, config: DecoderConfig, d_ff: int, norm: NDArray[np.float32], start: Tensor | None) -> None:
        super().__init__()
        d, heads, kv, width = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
        self.config, self.d_ff = config, d_ff
        self.map = nn.Linear(d, d, bias=False)
        self.attn_norm = Norm(torch.ones(d), config.norm_eps)
        self.q, self.k = nn.Linear(d, heads * width, bias=False), nn.Linear(d, kv * width, bias=False)
        self.v, self.o = nn.Linear(d, kv * width, bias=False), nn.Linear(heads * width, d, bias=False)
        self.ffn_norm = Norm(torch.ones(d), config.norm_eps)
        self.gate, self.up = nn.Linear(d, d_ff, bias=False), nn.Linear(d, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d, bias=False)
        self.final_norm = Norm(torch.from_numpy(np.array(norm, np.float32)), config.norm_eps)
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.down.weight)
        with torch.no_grad():
            self.map.weight.copy_(torch.eye(d) if start is None else start)

    def forward(self, states: Tensor) -> Tensor:
        """See the class."""
        x = self.map(states)
        x = x + self._attention(self.attn_norm(x))
        y = self.ffn_norm(x)
        normed: Tensor = self.final_norm(x + self.down(functional.silu(self.gate(y)) * self.up(y)))
        return normed

    def weights(self, format: str, input_format: str | None = None) -> Weights:
        """As the engine takes them (see `exits.ExitSource`), matrices in one of `quant.groups.QUANTIZABLE`.

        Args:
            input_format: of the linear map, whose few large weights 4 bits blur; `format` by default.
        """
        names = {"input": self.map, "q": self.q, "k": self.k, "v": self.v, "o": self.o}
        names |= {"gate": self.gate, "up": self.up, "down": self.down}
        norms = {"attn_norm": self.attn_norm, "ffn_norm": self.ffn_norm, "final_norm": self.final_norm}
        formats = {"input": input_format or format}
        matrices = {
            name: quantize(layer.weight.detach().numpy(), formats.get(name, format)) for name, layer in names.items()
        }
        return {**matrices, **{name: norm.weight.detach().numpy().copy() for name, norm in norms.items()}}

    def _attention(self, x: Tensor) -> Tensor:
        config, (batch, length, _) = self.config, x.shape
        frequencies = torch.tensor(config.rope_inv_freq)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        cos, sin = angles.cos() * config.rope_scale, angles.sin() * config.rope_scale

        def heads(projected: Tensor, rotated: bool) -> Tensor:
            y = projected.view(batch, length, -1, config.head_dim).transpose(1, 2)
            if not rotated:
                return y
            a, b = y.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        q, k, v = heads(self.q(x), True), heads(self.k(x), True), heads(self.v(x), False)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        mixed: Tensor = self.o(out.transpose(1, 2).reshape(batch, length, -1))
        return mixed


class Teacher:
    """What the model makes of its last states: its output head and norm in float32."""

    def __init__(self, source: WeightSource) -> None:
        check_head_fits(source.config, BundleError)
        self.config = source.config
        self.norm = np.array(source.final_norm(), np.float32)
        self.head = torch.from_numpy(np.asarray(dequantize(source.head()), np.float32))
        self._norm = Norm(torch.from_numpy(self.norm), self.config.norm_eps).requires_grad_(False)

    def probabilities(self, last: Tensor, head: Tensor) -> Tensor:
        """Over the rows of `head`, from states after the last layer."""
        normed: Tensor = self._norm(last)
        return (normed @ head.T).softmax(-1)


def train(
    states: States,
    indices: list[int],
    layer: int,
    teacher: Teacher,
    recipe: Recipe,
    progress: Callable[[int, int, float], None] | None = None,
    kept: Path | None = None,
) -> ExitHead:
    """A head for the exit before a layer.

    Args:
        indices: the samples to train on.
        progress: called with steps done, steps in all, and the last one's loss.
        kept: a file in which training is kept, to go on from where it was stopped, or to be done at once when it was
            finished. What it holds of other samples or another recipe is trained anew.
    """
    torch.manual_seed(recipe.seed)
    indices = [i for i in indices if len(states.samples[i].tokens) >= MIN_TOKENS]
    keeper = _Keeper(kept, json.dumps([states.key, layer, indices, asdict(recipe)]))
    saved = keeper.load()
    start = torch.eye(teacher.config.d_model) if saved else least_squares(states, indices, layer)
    head = ExitHead(teacher.config, recipe.d_ff, teacher.norm, start)
    frequent = torch.from_numpy(frequent_tokens(states, indices, recipe.frequent))
    plain = [p for p in head.parameters() if p.ndim == 1]
    matrices = [p for p in head.parameters() if p.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    rng = np.random.default_rng(recipe.seed)
    plan = [batch for _ in range(recipe.epochs) for batch in _batches(states, indices, recipe.batch_tokens, rng)]
    begun = 0
    if saved:
        begun = saved["step"]
        head.load_state_dict(saved["head"])
        if begun < len(plan):
            optimizer.load_state_dict(saved["optimizer"])
    for step, batch in enumerate(plan[begun:], begun):
        rising = min(1.0, (step + 1) / recipe.warmup)
        falling = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / len(plan)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rising * falling
        loss = _loss(head, teacher, _collate(states, batch, layer), frequent, recipe.distillation)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if step + 1 == len(plan):
            keeper.save(step + 1, head, None)
        elif (step + 1) % KEPT_STEPS == 0:
            keeper.save(step + 1, head, optimizer)
        if progress:
            progress(step + 1, len(plan), loss.item())
    return head.requires_grad_(False)


class _Keeper:
    """The file in which one training is kept."""

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, hashlib.sha256(key.encode()).hexdigest()

    def load(self) -> dict[str, Any] | None:
        """What was saved of the same training; None if nothing was."""
        if self._path is None or not self._path.is_file():
            return None
        try:
            saved: dict[str, Any] = torch.load(self._path, weights_only=True)
            return saved if saved["key"] == self._key else None
        except Exception:  # damage raises whatever the unpickler that reads only weights comes upon
            return None

    def save(self, step: int, head: ExitHead, optimizer: torch.optim.Optimizer | None) -> None:
        """Keeps a training after so many steps; without an optimizer it is finished."""
        if self._path is None:
            return
        found = {"key": self._key, "step": step, "head": head.state_dict()}
        if optimizer is not None:
            found["optimizer"] = optimizer.state_dict()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(self._path.name + PARTIAL)
        data = io.BytesIO()  # of a full disk torch speaks in its own way
        torch.save(found, data)
        partial.write_bytes(data.getbuffer())
        partial.replace(self._path)


def channels(states: States, indices: list[int], layer: int) -> ChannelStats:
    """What is known of the channels before a layer by at most `CHANNEL_ROWS` of the states, positions from 1 on."""
    count = sum(max(0, len(states.samples[index].tokens) - 1) for index in indices)
    every = -(-count // CHANNEL_ROWS)
    return ChannelStats.of(np.concatenate([states.before(layer, index)[1::every] for index in indices]))


def least_squares(states: States, indices: list[int], layer: int) -> Tensor:
    """The linear map from states before a layer to the last ones, all of the same size: [d_model, d_model]."""
    width = states.last(indices[0]).shape[1]
    gram, cross = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for index in indices:
        # The first position's state is many times larger than all others and says nothing.
        x, y = _tensor(states.before(layer, index)[1:]).double(), _tensor(states.last(index)[1:]).double()
        scale = _LEVEL * y.pow(2).mean(-1, keepdim=True).rsqrt()
        gram += (x * scale).T @ (x * scale)
        cross += (x * scale).T @ (y * scale)
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    found: Tensor = torch.linalg.solve(gram, cross)
    return found.T.float()


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What a head said along one sample, from the first position that counts on.

    Attributes:
        tokens: its most likely tokens [n].
        confidence: their probabilities [n].
        right: whether they are the model's choices [n].
    """

    tokens: NDArray[np.int64]
    confidence: NDArray[np.float32]
    right: NDArray[np.bool_]


def foresee(head: ExitHead, states: States, index: int, layer: int, teacher: Teacher) -> Foreseen:
    """What a head says along a sample; of the model's own answers only where the answer's tokens are foreseen."""
    start = max(0, states.samples[index].answer - 1)
    with torch.no_grad():
        logits = head(_tensor(states.before(layer, index))[None])[0, start:] @ teacher.head.T
        confidence, tokens = logits.softmax(-1).max(-1)
    found = tokens.numpy()
    return Foreseen(found, confidence.numpy(), found == states.choices(index)[start:])


def agreement(head: ExitHead, states: States, indices: list[int], layer: int, teacher: Teacher) -> float:
    """The share of positions at which a head's most likely token is the model's."""
    right = [foresee(head, states, index, layer, teacher).right for index in indices]
    return float(np.concatenate(right).mean())


def frequent_tokens(states: States, indices: list[int], count: int) -> NDArray[np.int64]:
    """The model's most frequent choices along samples, most frequent first: at most `count`."""
    counts = np.bincount(np.concatenate([states.choices(index) for index in indices]))
    order = np.argsort(-counts, kind="stable")[:count]
    return order.copy()


def _batches(states: States, indices: list[int], batch_tokens: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Samples of about the same length together, in random order."""
    lengths = {i: len(states.samples[i].tokens) for i in indices}
    order = sorted(indices, key=lambda i: (lengths[i] // 48, rng.random()))
    batches: list[list[int]] = [[]]
    for i in order:
        longest = max([lengths[i], *(lengths[j] for j in batches[-1])])
        if batches[-1] and longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return iter([batches[k] for k in rng.permutation(len(batches))])


def _collate(states: States, batch: list[int], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """States before the layer and after the last one [b, n, d], and choices [b, n], -1 where a sample has ended."""
    pad = nn.utils.rnn.pad_sequence
    before = pad([_tensor(states.before(layer, i)) for i in batch], batch_first=True)
    last = pad([_tensor(states.last(i)) for i in batch], batch_first=True)
    choices = [torch.from_numpy(states.choices(i).astype(np.int64)) for i in batch]
    return before, last, pad(choices, batch_first=True, padding_value=-1)


def _loss(
    head: ExitHead, teacher: Teacher, batch: tuple[Tensor, Tensor, Tensor], frequent: Tensor, distillation: float
) -> Tensor:
    before, last, choices = batch
    real = choices >= 0
    choices = choices[real]
    candidates = torch.unique(torch.cat([frequent, choices]))
    output = teacher.head[candidates]
    normed: Tensor = head(before)
    logs = (normed[real] @ output.T).log_softmax(-1)
    wanted = functional.nll_loss(logs, torch.searchsorted(candidates, choices))
    with torch.no_grad():
        likely = teacher.probabilities(last[real], output)
    loss: Tensor = (1 - distillation) * wanted - distillation * (likely * logs).sum(-1).mean()
    return loss


def _tensor(values: NDArray[np.float16]) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))
