"""Neurons of a dense feed-forward network made into experts: which go together, and what each adds to the output.

Neurons are put together that are needed for the same tokens. For every token those experts are chosen whose neurons
carry most of the output's energy, and every neuron then goes to the expert that is chosen when the neuron matters;
both in turn, until experts of one size hold as much energy as they can. It begins with balanced k-means over what
neurons carry, as in CMoE (Pei et al., 2502.04416).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from isthmus.split.moefy_decoder import Feed

GROUPINGS, TURNS = 5, 5  # of k-means, and of experts and tokens
_FLOOR = 1e-6  # of the mean energy: less says nothing
_ROWS = 4096


class Grouping(NamedTuple):
    """Neurons in experts.

    Attributes:
        order: neurons by expert [d_ff].
        held: share of the energy that lies in the chosen experts, mean over tokens.
    """

    order: Tensor
    held: float


def grouped(feed: Feed, normed: Tensor, experts: int, active: int, seed: int = 0) -> Grouping:
    """Experts of equal size.

    Args:
        normed: what the network reads [n, d_model] f32.
        active: experts that a token is sent to.
        seed: of what k-means begins with.
    """
    width = len(feed.gate) // experts
    carried = (feed.hidden(normed, torch.float32) * feed.down.norm(dim=0)).square()  # [n, d_ff]
    carried /= carried.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # all tokens count the same
    owners = _alike(carried.sqrt(), experts, width, seed)
    best = Grouping(torch.arange(len(feed.gate)), -1.0)
    for _ in range(TURNS):
        by_expert = carried @ owners
        chosen = most(by_expert, active)
        held = float((by_expert * chosen).sum(1).mean())
        if held > best.held:
            best = Grouping(torch.argsort(owners.argmax(1), stable=True), held)
        owners = _assigned(carried.T @ chosen, width)
    return best


def energies(hidden: Tensor, down: Tensor, experts: int) -> Tensor:
    """The squared length of what each expert adds to the output, [n, experts] f32.

    Args:
        hidden: neurons by expert [n, d_ff].
        down: [d_model, d_ff].
    """
    rows = down.T.reshape(experts, -1, len(down))
    gram = (rows @ rows.transpose(1, 2)).to(hidden.dtype)  # saves making the outputs themselves
    split = hidden.view(len(hidden), experts, -1).transpose(0, 1)
    return ((split @ gram) * split).float().sum(-1).T


def log_energies(hidden: Tensor, down: Tensor, experts: int) -> Tensor:
    """Natural logarithms of `energies`, none far below their mean: what a router's logits predict."""
    found = energies(hidden, down, experts)
    return found.clamp_min(max(_FLOOR * float(found.mean()), torch.finfo(torch.float32).tiny)).log()


def most(scores: Tensor, active: int) -> Tensor:
    """1 for the `active` highest of each row, else 0."""
    return torch.zeros_like(scores).scatter_(-1, scores.topk(active, -1).indices, 1.0)


def recall(scores: Tensor, truth: Tensor, active: int) -> float:
    """The share of the truly highest `active` of each row that are among the highest by score."""
    return float((most(scores, active) * most(truth, active)).sum() / (active * len(scores)))


class Routing:
    """The linear router that predicts the logarithms of experts' energies best (least squares).

    Args:
        width: of what it reads.
    """

    def __init__(self, width: int, experts: int) -> None:
        self._gram = torch.zeros(width, width, dtype=torch.float64)
        self._cross = torch.zeros(width, experts, dtype=torch.float64)

    def add(self, read: Tensor, target: Tensor) -> None:
        """More tokens: what the router reads [n, width] and what it shall say [n, experts]."""
        for x, y in zip(torch.split(read, _ROWS), torch.split(target, _ROWS), strict=True):
            self._gram += (x.T @ x).double()
            self._cross += (x.T @ y).double()

    def router(self) -> Tensor:
        """[experts, width] f32"""
        ridge = 1e-3 * self._gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(self._gram), dtype=torch.float64)
        found: Tensor = torch.linalg.solve(self._gram + ridge, self._cross)
        return found.T.float().contiguous()


def _alike(carried: Tensor, experts: int, width: int, seed: int) -> Tensor:
    """Neurons that carry the same tokens' outputs together, [d_ff, experts] of 0 and 1."""
    centred = functional.normalize(carried, dim=0)
    centred = functional.normalize(centred - centred.mean(1, keepdim=True), dim=0)
    first = np.random.default_rng(seed).permutation(carried.shape[1])[:experts].copy()
    centres = centred[:, torch.from_numpy(first)]
    for _ in range(GROUPINGS):
        owners = _assigned(centred.T @ centres, width)
        centres = functional.normalize(centred @ owners, dim=0)
    return owners


def _assigned(gain: Tensor, width: int) -> Tensor:
    """Each neuron to one expert, `width` to each, so that the gains [d_ff, experts] add up to most: 0 and 1."""
    from scipy.optimize import linear_sum_assignment

    costs: NDArray[np.float64] = np.repeat(-gain.double().numpy(), width, axis=1)
    _, places = linear_sum_assignment(costs)
    return functional.one_hot(torch.from_numpy(places // width), gain.shape[1]).float()
