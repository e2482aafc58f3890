"""The correction over a large vocabulary: what neighbours add at a few classes, and how much of the base they take.

A top-m row lists m classes; its left-over mass is spread over all the others in the proportions of the query's own
prediction p. So the mean residual of the neighbours is a few numbers minus a multiple of p, and nothing as wide as the
vocabulary is made on the way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Int64, Shaped
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.types import TopM

SMALLEST_TAIL = 1e-6  # of the query's prediction outside a row's listed classes; below it float32 sums mean nothing


@dataclass(frozen=True)
class Recalled:
    """What the nearest memories of each query hold.

    Attributes
    ----------
    ids : of the rows; −1 (or "") where there are fewer than k.
    distances : Euclidean, ascending; +inf where missing.
    labels : class indices.
    indices, probabilities, rest : the base's prediction for each, as in `TopM`.
    """

    ids: Shaped[ndarray, "q k"]
    distances: Float[ndarray, "q k"]
    labels: Int[ndarray, "q k"]
    indices: Int[ndarray, "q k m"]
    probabilities: Float[ndarray, "q k m"]
    rest: Float[ndarray, "q k"]

    def of(self, queries: Int64[ndarray, " r"]) -> "Recalled":
        """Some of the queries alone."""
        return Recalled(**{name: getattr(self, name)[queries] for name in COLUMNS})


COLUMNS = tuple(Recalled.__dataclass_fields__)


@dataclass(frozen=True)
class SparseResidual:
    """Σ w r of each query: the values summed at their classes, minus `scale` times the query's own prediction.

    Attributes
    ----------
    classes : a class may stand more than once.
    values : to be added there.
    scale : how much of the prediction is taken away everywhere.
    """

    classes: Int64[ndarray, "q s"]
    values: Float[ndarray, "q s"]
    scale: Float[ndarray, " q"]

    def dense(self, predictions: Float[ndarray, "q c"]) -> Float[ndarray, "q c"]:
        """The whole residual, for few classes."""
        n, c = predictions.shape
        places = (self.classes + np.arange(n)[:, None] * c).ravel()
        added = np.bincount(places, self.values.ravel(), minlength=n * c).reshape(n, c)
        return (added - self.scale[:, None] * predictions).astype(predictions.dtype)


def whole(predictions: Float[ndarray, "q k c"]) -> TopM:
    """Whole predictions as lists of all their classes."""
    classes = np.arange(predictions.shape[2], dtype=np.int32)
    return TopM(
        np.broadcast_to(classes, predictions.shape), predictions, np.zeros(predictions.shape[:2], predictions.dtype)
    )


def merged(found: Sequence[Recalled], k: int) -> Recalled:
    """The k nearest over several memories; equally near ones in the order of the memories.

    Raises
    ------
    InvalidInput : if the memories list different numbers of classes a row.
    """
    found = [one for one in found if np.isfinite(one.distances).any()] or found[:1]  # one without rows has no m yet
    listed = sorted({one.indices.shape[2] for one in found})
    if len(listed) > 1:
        raise InvalidInput(
            f"the memories keep the top {' and '.join(map(str, listed))}, expected the same m in all; "
            "build them with the same top_m"
        )
    together = {name: np.concatenate([getattr(one, name) for one in found], axis=1) for name in COLUMNS}
    order = np.argsort(together["distances"], axis=1, kind="stable")[:, :k]
    rows = np.arange(len(order))[:, None]
    return Recalled(**{name: column[rows, order] for name, column in together.items()})


def tail_shares(
    recalled: Recalled, base: Float[ndarray, "q k m"]
) -> tuple[Float[ndarray, "q k"], Float[ndarray, "q k"]]:
    """How a row's prediction is completed: by this multiple of the query's own, and its listed part by that factor.

    The factor is 1 unless the query's prediction has hardly any mass outside the listed classes.

    Parameters
    ----------
    base : the query's probability of each listed class.
    """
    outside = 1 - base.sum(axis=2, dtype=np.float64)
    shares = np.where(outside > SMALLEST_TAIL, recalled.rest / np.maximum(outside, SMALLEST_TAIL), 0.0)
    listed = recalled.probabilities.sum(axis=2, dtype=np.float64)
    factors = np.where(outside > SMALLEST_TAIL, 1.0, 1 / np.maximum(listed, SMALLEST_TAIL))
    return shares, factors


def sparse_residual(
    recalled: Recalled, weights: Float[ndarray, "q k"], base: Float[ndarray, "q k m"], *, share: float = 1.0
) -> SparseResidual:
    """Σ w (onehot(label) − prediction) over the neighbours.

    With a share β below 1 the query's own prediction stands in for the rest of each neighbour's:
    Σ w (onehot(label) − β neighbour's − (1 − β) query's); at 0 that is the correction of kNN-LM.

    In double precision: where the query's own prediction leaves little to the classes that are not listed, what is
    taken away everywhere and given back at the listed ones are many times the result.

    Parameters
    ----------
    recalled : the neighbours.
    weights : of the neighbours; 0 where missing.
    base : the query's own probability of each class that they list.
    share : β, how much of the neighbours' own predictions counts.
    """
    q, k, m = recalled.indices.shape
    shares, factors = tail_shares(recalled, base)
    weights = weights.astype(np.float64)
    taken = base * shares[:, :, None]
    taken -= recalled.probabilities * factors[:, :, None]
    taken *= share * weights[:, :, None]
    return SparseResidual(
        np.concatenate([recalled.labels, recalled.indices.reshape(q, k * m)], axis=1, dtype=np.int64),
        np.concatenate([weights, taken.reshape(q, k * m)], axis=1),
        (weights * (share * shares + 1 - share)).sum(axis=1),
    )


def residual_at(
    recalled: Recalled, base: Float[ndarray, "q k m"], targets: Int64[ndarray, " q"], base_at: Float[ndarray, " q"]
) -> tuple[Float[ndarray, "q k"], Float[ndarray, "q k"]]:
    """Each neighbour's label and residual at one class of each query: for choosing settings without whole vocabularies.

    Parameters
    ----------
    targets : the class.
    base_at : the query's probability of it.

    Returns
    -------
    1 where a neighbour's label is the class; that minus what the neighbour's prediction gave it. Weighted and summed
    over the neighbours they are the memory's and the residual's value at the class.
    """
    shares, factors = tail_shares(recalled, base)
    hit = (recalled.labels == targets[:, None]).astype(np.float32)
    listed = recalled.indices == targets[:, None, None]
    said = np.where(
        listed.any(axis=2), (recalled.probabilities * listed).sum(axis=2) * factors, shares * base_at[:, None]
    )
    return hit, (hit - said).astype(np.float32)
