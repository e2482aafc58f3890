"""Predictions over a large vocabulary, on their device: reduced, searched and corrected a stretch of rows at a time.

What is as wide as the vocabulary is read many times over; in stretches it comes from a processor's cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from numpy import ndarray
from torch import Tensor
from torch.nn import functional

from residual_memory.language import FLOOR
from residual_memory.sparse import Recalled, SparseResidual, sparse_residual
from residual_memory.types import TopM

CACHE_BYTES = 4 << 20  # of a stretch in float32; on a GPU many times as much
GPU_STRETCH = 32
GROUP = 64  # classes whose largest is looked at first when the largest are sought
LEAST_LOG = -1e4  # of a probability where its logarithm is multiplied; −inf would make 0 · log 0 no number
SMALLEST_BASE = torch.finfo(torch.float32).tiny ** 0.5
MANY_TIMES = 1000.0  # the base that is taken away from a row and given back; beyond it single precision is too coarse


def rows_in_cache(logits: Float[Tensor, "n v"]) -> int:
    """How many rows to work on together."""
    room = CACHE_BYTES if logits.device.type == "cpu" else GPU_STRETCH * CACHE_BYTES
    return max(1, room // (4 * logits.shape[1]))


@dataclass(frozen=True)
class Said:
    """What a base says at each place, in a few numbers.

    Attributes
    ----------
    log_normaliser : log-sum-exp of the logits.
    confidence : the largest probability.
    entropy : in nats.
    best : the likeliest class.
    """

    log_normaliser: Float[Tensor, "n 1"]
    confidence: Float[Tensor, " n"]
    entropy: Float[Tensor, " n"]
    best: Int64[Tensor, " n"]

    @staticmethod
    def of(logits: Float[Tensor, "n v"]) -> "Said":
        """Of logits of any floating type."""
        step = rows_in_cache(logits)
        starts = range(0, max(1, len(logits)), step)
        parts = [Said._of_stretch(logits[start : start + step].float()) for start in starts]
        return Said(*(torch.cat([getattr(part, name) for part in parts]) for name in Said.__dataclass_fields__))

    @staticmethod
    def _of_stretch(logits: Float[Tensor, "n v"]) -> "Said":
        said = logits.log_softmax(1)
        best = likeliest(said)
        largest = said.gather(1, best[:, None])
        entropy = -(said.exp() * said.clamp_min_(LEAST_LOG)).sum(1)
        return Said(logits.gather(1, best[:, None]) - largest, largest[:, 0].exp(), entropy, best)

    def rows(self, chosen: Int64[Tensor, " r"]) -> "Said":
        """Some of the places alone."""
        return Said(*(getattr(self, name)[chosen] for name in Said.__dataclass_fields__))

    def probabilities_at(self, logits: Float[Tensor, "n v"], classes: Int[ndarray, "n *s"]) -> Float[ndarray, "n *s"]:
        """The base's probability of some classes of each row; 0 for those beyond its vocabulary."""
        return _at(classes, logits, lambda found: (found.float() - self.log_normaliser).exp())


def likeliest(values: Float[Tensor, "n v"]) -> Int64[Tensor, " n"]:
    """The class with the largest value, the first of equals: argmax, by way of groups of classes."""
    n, width = values.shape
    if width % GROUP or not n:
        return values.argmax(1)
    groups = values.view(n, -1, GROUP)
    first = groups.amax(2).argmax(1)
    return first * GROUP + groups[torch.arange(n, device=values.device), first].argmax(1)


def top_m_of(log_probabilities: Float[Tensor, "b v"], m: int) -> TopM:
    """The m largest probabilities of each row, found on the device; nothing as wide as the vocabulary leaves it.

    Parameters
    ----------
    log_probabilities : [b v].
    m : how many.
    """
    width = log_probabilities.shape[1]
    if width % GROUP == 0 and width > GROUP * m:
        # The m largest lie in the m groups whose own largest are the largest.
        largest = log_probabilities.view(len(log_probabilities), -1, GROUP).amax(2)
        groups = largest.topk(m, dim=1, sorted=False).indices
        places = (groups[:, :, None] * GROUP + torch.arange(GROUP, device=groups.device)).flatten(1)
        values, among = log_probabilities.gather(1, places).topk(m, dim=1, sorted=False)
        indices = places.gather(1, among)
    else:
        values, indices = log_probabilities.topk(m, dim=1, sorted=False)
    probabilities = values.exp().cpu().numpy()
    rest = np.maximum(1 - probabilities.sum(axis=1, dtype=np.float64), 0).astype(np.float32)
    return TopM(indices.cpu().numpy().astype(np.int32), probabilities, rest)


def corrected_probabilities(
    base: Float[Tensor, "r v"],
    recalled: Recalled,
    weights: Float[ndarray, "r k"],
    amount: Float[ndarray, " r"],
    *,
    share: float = 1.0,
) -> Float[Tensor, "r w"]:
    """Base + shrinkage · residual as a valid distribution: no score falls below a tenth of the base's.

    Parameters
    ----------
    base : probabilities.
    recalled, weights : the neighbours of each row, and what they count.
    amount : the shrinkage of each row.
    share : how much of the neighbours' own predictions counts, as in `LanguageSetting`.
    """
    residual = sparse_residual(recalled, weights, probabilities_at(base, recalled.indices), share=share)
    width = max(base.shape[1], int(residual.classes.max(initial=0)) + 1)
    base = functional.pad(base, (0, width - base.shape[1]))
    scores = _added(base, residual, amount)
    scores = torch.maximum(scores, FLOOR * base.clamp_min(SMALLEST_BASE))
    return scores / scores.sum(1, keepdim=True)


def _added(base: Float[Tensor, "r v"], residual: SparseResidual, amount: Float[ndarray, " r"]) -> Float[Tensor, "r v"]:
    """Base + amount · residual.

    Where many times the base are taken away everywhere and given back at the listed classes, single precision would
    leave few digits of the difference: those rows are summed in double.
    """
    scale, values = amount * residual.scale, amount[:, None] * residual.values
    classes = torch.from_numpy(residual.classes).to(base.device)

    def summed(base: Tensor, rows: Any) -> Tensor:
        kept = torch.from_numpy(1 - scale[rows]).to(base)
        return (base * kept[:, None]).scatter_add_(1, classes[rows], torch.from_numpy(values[rows]).to(base))

    scores = summed(base, slice(None))
    if len(many := np.flatnonzero(scale > MANY_TIMES)):
        scores[many] = summed(base[many].double(), many).to(scores)
    return scores


def probabilities_at(base: Float[Tensor, "r v"], classes: Int[ndarray, "r *s"]) -> Float[ndarray, "r *s"]:
    """The base's probability of some classes of each row; 0 for those beyond its vocabulary."""
    return _at(classes, base, lambda found: found)


def _at(
    classes: Int[ndarray, "n *s"], values: Float[Tensor, "n v"], told: Callable[[Tensor], Tensor]
) -> Float[ndarray, "n *s"]:
    listed = torch.from_numpy(classes.astype(np.int64)).to(values.device)
    inside = listed.clamp_max(values.shape[1] - 1)
    found = told(values.gather(1, inside.flatten(1))).view(listed.shape)
    return torch.where(listed == inside, found, 0.0).cpu().numpy()


def likeliest_label(recalled: Recalled, weights: Float[ndarray, "r k"]) -> Int64[ndarray, " r"]:
    """The token that the neighbours' labels alone give the most weight."""
    order = np.argsort(recalled.labels, axis=1, kind="stable")
    labels = np.take_along_axis(recalled.labels, order, 1)
    sums = np.cumsum(np.take_along_axis(weights, order, 1), axis=1)
    last = np.concatenate([labels[:, 1:] != labels[:, :-1], np.ones((len(labels), 1), bool)], axis=1)
    ends = np.where(last, sums, -np.inf)
    before = np.maximum.accumulate(np.where(last, sums, 0.0), axis=1)
    votes = ends - np.concatenate([np.zeros((len(labels), 1)), before[:, :-1]], axis=1)
    return labels[np.arange(len(labels)), votes.argmax(axis=1)].astype(np.int64)
