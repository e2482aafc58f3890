"""Choose k, bandwidth, temperature, shrinkage and kernel on held-out rows, from one search.

The neighbours are searched once, at the largest k; after that every setting costs one small matrix product. The figures
are cross-fitted: each fifth of the rows is measured with the setting that the other four fifths chose.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from jaxtyping import Float, Float32, Int64, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.correction import (
    Averages,
    ResidualKNN,
    label_average,
    neighbor_weights,
    residual_averages,
    to_probabilities,
)
from residual_memory.errors import InvalidInput
from residual_memory.evaluation import Evaluation, HeldOut, Metric, Setting, summarize
from residual_memory.gate import fit_gate
from residual_memory.indexes.distances import distances_among
from residual_memory.kernels import KRIGING, as_nugget, check_kernel
from residual_memory.memory import Column, Memory, Snapshot
from residual_memory.metrics import log_losses
from residual_memory.residuals import tempered
from residual_memory.types import Neighbors
from residual_memory.validation import as_count, as_fraction, as_positive

N_NEIGHBORS = (1, 2, 5, 10, 20, 50, 100, 200)
BANDWIDTHS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TEMPERATURES = (0.7, 1.0, 1.4, 2.0)
SHRINKAGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Lists of classes know no temperature but 1, and corrections above 1 take the place of a higher one in part.
LISTED_SHRINKAGES = (*SHRINKAGES, 1.25, 1.5, 2.0, 3.0)
# Kriging looks further and shrinks by itself where neighbours are far, so its range is wider and its shrinkage larger.
KRIGING_BANDWIDTHS = (0.4, 0.8, 1.6)
KRIGING_SHRINKAGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUGGETS = (0.1, 0.3)
BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class TuningResult(Evaluation):
    """What tuning chose, and what it is worth on rows that did not choose it.

    Attributes
    ----------
    best : the setting chosen on all held-out rows; its shrinkage is 0 where the memory does not help.
    best_memory_only : the best setting of the labels alone.
    """

    best: Setting = field(default_factory=Setting)
    best_memory_only: Setting = field(default_factory=Setting)


def tune(
    memory: Memory,
    keys: ArrayLike,
    labels: ArrayLike,
    predictions: ArrayLike,
    *,
    metric: Metric | None = None,
    n_neighbors: Sequence[int] = N_NEIGHBORS,
    bandwidths: Sequence[float] | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    shrinkages: Sequence[float] | None = None,
    residual_shares: Sequence[float] = (1.0,),
    nuggets: Sequence[float] = NUGGETS,
    kernel: str | Sequence[str] = "exponential",
    index: str = "auto",
    groups: ArrayLike | None = None,
    exclude: ArrayLike | None = None,
    n_folds: int = 5,
    seed: int = 0,
) -> TuningResult:
    """Choose the best setting on held-out rows and measure it by cross-fitting.

    Parameters
    ----------
    memory : rows that the held-out ones are not among (or pass `exclude`).
    keys, labels, predictions : held-out rows: keys [q d], labels, base predictions at temperature 1.
    metric : what to choose by: "accuracy" or "log_loss" for classification, "rmse" for regression. By log-loss the base
        is measured at its own best temperature, so that the memory gets no credit for calibration alone.
    n_neighbors : values of k to try; those above the number of rows are left out.
    bandwidths : values of sigma to try, as multiples of the median distance to the k-th neighbour; None tries what is
        usual for the kernel.
    temperatures : values of T; 1 alone for regression and for top-m memories.
    shrinkages : values of lambda; 0 is always tried. None tries what is usual for the kernel, and for top-m memories
        some above 1.
    residual_shares : values to try of how much the neighbours' own predictions count; 1 is the paper's, 0 kNN-LM's.
    nuggets : values to try for kriging.
    kernel : as in `ResidualKNN`, or several of them to choose from.
    index : as in `ResidualKNN`.
    groups : rows of one group (a document) are never split between choosing and measuring.
    exclude : as in `ResidualKNN.__call__`.
    n_folds : parts of the cross-fitting.
    seed : of the folds.

    Raises
    ------
    InvalidInput, DimensionMismatch : if the rows do not fit the memory, or a list is empty.
    """
    rows = HeldOut.checked(memory, keys, labels, predictions, metric, groups)
    kernels = [kernel] if isinstance(kernel, str) else list(kernel)
    tried = {
        "bandwidths": bandwidths,
        "temperatures": temperatures,
        "residual_shares": residual_shares,
        "nuggets": nuggets,
        "kernel": kernels,
    }
    for name, values in tried.items():
        if values is not None and not len(values):
            raise InvalidInput(f"{name} is empty, expected at least one value to try")
    temperatures = [as_positive("temperature", value) for value in temperatures]
    shares = [as_fraction("residual_share", value) for value in residual_shares]
    if (negative := min(() if shrinkages is None else shrinkages, default=0.0)) < 0:
        raise InvalidInput(f"shrinkage is {negative:g}, expected numbers from 0")
    if len(rows.keys) < as_count("n_folds", n_folds):
        raise InvalidInput(f"there are {len(rows.keys)} held-out rows for {n_folds} folds; give more rows")
    snapshot, found, counts = _search(memory, rows.keys, n_neighbors, kernels, index, exclude)
    if memory.layout.task == "regression" or memory.layout.residuals == "top-m":
        temperatures = [1.0]
    shapes, candidates, parts = [], [], []
    for name in kernels:
        some = _shapes(name, found, counts, bandwidths, nuggets)
        amounts = sorted({0.0, *(usual_shrinkages(name, memory) if shrinkages is None else shrinkages)})
        parts.append(_losses_of_all(rows, snapshot, found, some, temperatures, shares, amounts))
        shapes += some
        candidates += [
            replace(shape, temperature=temperature, residual_share=share, shrinkage=amount)
            for temperature, share, amount, shape in product(temperatures, shares, amounts, some)
        ]
    losses, alone = (np.concatenate(tables) for tables in zip(*parts, strict=True))
    folds = row_folds(len(rows.keys), groups, n_folds, seed)
    without = np.array([setting.shrinkage == 0 for setting in candidates])
    measured = summarize(
        rows.metric,
        base=crossfitted(losses[without], folds),
        memory_only=crossfitted(alone, folds),
        corrected=crossfitted(losses, folds),
        groups=groups,
    )
    best = candidates[int(losses.mean(axis=1).argmin())]
    return TuningResult(
        **vars(measured),
        best=best if measured.helps else best.without_memory(),
        best_memory_only=shapes[int(alone.mean(axis=1).argmin())],
    )


def usual_shrinkages(kernel: str, memory: Memory) -> Sequence[float]:
    """The values of lambda that are worth trying."""
    if kernel == KRIGING:
        return KRIGING_SHRINKAGES
    return LISTED_SHRINKAGES if memory.layout.residuals == "top-m" else SHRINKAGES


def tune_gate(
    memory: Memory,
    keys: ArrayLike,
    labels: ArrayLike,
    predictions: ArrayLike,
    setting: Setting,
    *,
    metric: Metric | None = None,
    index: str = "auto",
    groups: ArrayLike | None = None,
    exclude: ArrayLike | None = None,
    n_folds: int = 5,
    seed: int = 0,
) -> TuningResult:
    """Fit a gate to a setting on held-out rows, and measure it by cross-fitting.

    The base that it is compared with is at its own best temperature by log-loss. Where the setting was chosen on the
    same rows, the figures are a little too good by that choice; those of other rows are not.

    Parameters
    ----------
    memory, keys, labels, predictions, metric, index, groups, exclude, n_folds, seed : as in `tune`; classification.
    setting : to put the gate on.

    Returns
    -------
    `best` is the setting with the gate fitted on all rows; without the memory where that does not help.

    Raises
    ------
    InvalidInput, DimensionMismatch : if the rows do not fit the memory, or it is of a regression.
    """
    rows = HeldOut.checked(memory, keys, labels, predictions, metric, groups)
    if memory.layout.task == "regression":
        raise InvalidInput("the memory is of a regression, but a gate makes probabilities of a classification")
    knn = setting.knn(memory, index=index)
    looked_up = knn.look_up(rows.keys, exclude, labels=True)
    assert looked_up.labels is not None
    base = setting.tempered(rows.predictions, memory.layout.task)
    residual, farthest = looked_up.correction(base, setting.residual_share), looked_up.farthest
    folds = row_folds(len(rows.keys), groups, n_folds, seed)
    gated, calm = np.empty(residual.shape), np.empty(residual.shape)
    for fold in np.unique(folds):
        inside = folds == fold
        fitted = fit_gate(rows.predictions[~inside], residual[~inside], farthest[~inside], rows.labels[~inside])
        gated[inside] = fitted(rows.predictions[inside], residual[inside], farthest[inside])
        temperature = best_temperature(rows.predictions[~inside], rows.labels[~inside])
        calm[inside] = tempered(rows.predictions[inside], temperature)
    measured = summarize(
        rows.metric,
        base=rows.losses(calm, calm),
        memory_only=rows.losses_alone(looked_up.labels),
        corrected=rows.losses(gated, gated),
        groups=groups,
    )
    gate = fit_gate(rows.predictions, residual, farthest, rows.labels)
    best = replace(setting, gate=gate, shrinkage=setting.shrinkage or 1.0)  # 0 would be the base, gate or not
    return TuningResult(
        **vars(measured), best=best if measured.helps else setting.without_memory(), best_memory_only=setting
    )


def best_temperature(predictions: Float[ndarray, "q c"], labels: Shaped[ndarray, " q"]) -> float:
    """The temperature at which these predictions have the least log-loss, to 1 %.

    References
    ----------
    Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    low, high = np.log(0.2), np.log(5.0)
    ratio = (np.sqrt(5) - 1) / 2
    while high - low > 0.01:  # golden section: the log-loss has one minimum
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        said = [tempered(predictions, float(np.exp(place))) for place in (left, right)]
        losses = [log_losses(to_probabilities(some, some), labels).mean() for some in said]  # zeros have no logarithm
        low, high = (low, right) if losses[0] < losses[1] else (left, high)
    return float(np.exp((low + high) / 2))


def _search(
    memory: Memory,
    keys: ndarray,
    n_neighbors: Sequence[int],
    kernels: Sequence[str],
    index: str,
    exclude: ArrayLike | None,
) -> tuple[Snapshot, Neighbors, list[int]]:
    """The neighbours at the largest k that the memory has rows for, and the values of k that are left."""
    wanted = sorted({as_count("n_neighbors", k) for k in n_neighbors})
    if not wanted:
        raise InvalidInput("n_neighbors is empty, expected at least one value to try")
    counts = [k for k in wanted if k <= len(memory)] or [max(len(memory), 1)]
    for kernel in kernels:
        check_kernel(kernel)
    knn = ResidualKNN(memory, n_neighbors=1, bandwidth=1.0, index=index)
    snapshot, found = knn.search(keys, counts[-1], exclude)
    return snapshot, found, counts


def _shapes(
    kernel: str, found: Neighbors, counts: Sequence[int], bandwidths: Sequence[float] | None, nuggets: Sequence[float]
) -> list[Setting]:
    """Every k, bandwidth and (for kriging) nugget."""
    if bandwidths is None:
        bandwidths = KRIGING_BANDWIDTHS if kernel == KRIGING else BANDWIDTHS
    scales = [as_positive("bandwidth", value) for value in bandwidths]
    if kernel != KRIGING:
        return [Setting(k, scale * typical_distance(found, k), kernel=kernel) for k, scale in product(counts, scales)]
    return [
        Setting(k, scale * typical_distance(found, k), kernel=kernel, nugget=as_nugget(nugget))
        for k, scale, nugget in product(counts, scales, nuggets)
    ]


def typical_distance(found: Neighbors, k: int) -> float:
    """Median distance to the k-th neighbour over the held-out rows; 1 where all distances are 0."""
    distances = found.distances[:, k - 1]
    present = distances[np.isfinite(distances)]
    return (float(np.median(present)) or float(present.mean()) or 1.0) if len(present) else 1.0


def _losses_of_all(
    rows: HeldOut,
    snapshot: Snapshot,
    found: Neighbors,
    shapes: Sequence[Setting],
    temperatures: Sequence[float],
    shares: Sequence[float],
    shrinkages: Sequence[float],
) -> tuple[Float32[ndarray, "s q"], Float32[ndarray, "r q"]]:
    """Per-row losses of every setting, and of the labels alone for every shape of the weights.

    Settings are ordered by temperature, then residual share, then shrinkage, then shape.
    """
    n, k, n_outputs = len(rows.keys), found.rows.shape[1], rows.predictions.shape[1]
    losses = np.empty((len(temperatures) * len(shares) * len(shrinkages) * len(shapes), n), np.float32)
    alone = np.empty((len(shapes), n), np.float32)
    step = max(1, BLOCK_BYTES // (8 * max(n_outputs * max(k, len(shapes)), k * k)))
    for start in range(0, n, step):
        here = slice(start, start + step)
        some = HeldOut(rows.metric, rows.keys[here], rows.labels[here], rows.predictions[here])
        listed = Neighbors(found.distances[here], found.rows[here])
        weights = weights_of(snapshot.keys, listed, shapes, np.float32)
        averages = label_average(snapshot, listed.rows, weights)
        for place in range(len(shapes)):
            alone[place, here] = some.losses_alone(averages[:, place])
        place = 0
        for temperature in temperatures:
            residuals = residual_averages(snapshot, listed.rows, weights, temperature)
            base = tempered(some.predictions, temperature)
            for share in shares:
                corrections = [
                    Averages(residuals[:, shape], listed.farthest, averages[:, shape], weights[:, shape].sum(axis=1))
                    .correction(base, share)
                    .astype(base.dtype)
                    for shape in range(len(shapes))
                ]
                for shrinkage in shrinkages:
                    for correction in corrections:
                        scores = base + np.asarray(shrinkage, base.dtype) * correction
                        losses[place, here] = some.losses(scores, base)
                        place += 1
    return losses, alone


def weights_of(
    keys: Column, found: Neighbors, shapes: Sequence[Setting], dtype: type[np.floating] = np.float64
) -> Float[ndarray, "q s k"]:
    """The neighbours' weights under each setting, whose bandwidths are numbers.

    Parameters
    ----------
    keys : of the rows that were found.
    found : at least as many neighbours as any setting takes.
    """
    weights = np.zeros((len(found.rows), len(shapes), found.rows.shape[1]), dtype)
    kriged = [shape.n_neighbors for shape in shapes if shape.kernel == KRIGING]
    among = distances_among(keys, found.rows[:, : max(kriged)]) if kriged else None
    for place, shape in enumerate(shapes):
        k = shape.n_neighbors
        near = among[:, :k, :k] if among is not None and shape.kernel == KRIGING else None
        weights[:, place, :k] = neighbor_weights(keys, found.first(k), shape.weighting(), near)
    return weights


def row_folds(n: int, groups: ArrayLike | None, n_folds: int, seed: int) -> Int64[ndarray, " q"]:
    """A fold for each row, of about equal sizes; rows of one group share theirs."""
    names: Shaped[ndarray, " q"] = np.arange(n) if groups is None else np.asarray(groups)
    owner = np.unique(names, return_inverse=True)[1]
    count = int(owner.max()) + 1
    if min(n_folds, count) < 2:
        raise InvalidInput(f"n_folds is {n_folds} and there are {count} groups, expected at least 2 of each")
    return np.random.default_rng(seed).permutation(np.arange(count) % n_folds)[owner]


def crossfitted(losses: Float32[ndarray, "s q"], folds: Int64[ndarray, " q"]) -> Float[ndarray, " q"]:
    """The loss of each row under the setting that the rows of the other folds choose."""
    measured = np.empty(losses.shape[1])
    for fold in np.unique(folds):
        inside = folds == fold
        chosen = losses[:, ~inside].mean(axis=1).argmin()
        measured[inside] = losses[chosen, inside]
    return measured
