"""Choose keys and a setting for the rows of a table by folds: the rows of a fold are corrected by those of the others.

Losses are reckoned at one number an output: the value of a regression, the probability of the row's own class. So a
setting costs a product of two numbers a row, however many classes there are, and thousands can be tried. The figures of
the verdict are measured on whole predictions, each fifth of the rows with what the other four fifths chose.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from numpy import ndarray

from residual_memory.correction import Averages, neighbor_weights, to_probabilities
from residual_memory.evaluation import Evaluation, Setting, summarize
from residual_memory.indexes.base import nearest
from residual_memory.indexes.distances import distances_among
from residual_memory.indexes.registry import IndexSpec, build_index
from residual_memory.kernels import KRIGING
from residual_memory.memory import Column
from residual_memory.metric_learning import Lesson
from residual_memory.metrics import Z95, log_losses, squared_errors
from residual_memory.tuning import row_folds
from residual_memory.types import Neighbors, Task

PROBABILITY_FLOOR = 0.01  # of 1 / classes: no corrected probability falls below it, so that log-loss stays finite
BLOCK_BYTES = 64 << 20
SMALLEST_SPREAD = 0.05  # of the mean: neighbours that the base predicts perfectly by chance do not make it certain
N_FOLDS = 5  # of the cross-fitting


@dataclass(frozen=True)
class Grid:
    """What is tried; bandwidths are multiples of the typical, or of the own, distance to the k-th neighbour.

    Attributes
    ----------
    kriging_neighbors : k of kriging, which weighs down what says nothing new by itself.
    absolute : bandwidths and ranges are distances, and no multiples.
    """

    n_neighbors: tuple[int, ...] = (5, 10, 20, 50, 100)
    bandwidths: tuple[float, ...] = (0.1, 0.2, 0.35, 0.5, 1.0)
    kernels: tuple[str, ...] = ("exponential", KRIGING)
    kriging_neighbors: tuple[int, ...] = (50,)
    ranges: tuple[float, ...] = (0.8, 1.6, 3.2, 6.4)
    nuggets: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    temperatures: tuple[float, ...] = (0.7, 1.0, 1.4, 2.0)
    shrinkages: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
    residual_shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    absolute: bool = False

    def most_neighbors(self, n_rows: int) -> int:
        """The largest k that there are rows for."""
        return min(max(*self.n_neighbors, *self.kriging_neighbors), n_rows)

    def shapes(self, n_rows: int) -> list[Setting]:
        """Every kernel with its k, bandwidth and nugget, of those that there are rows for."""
        found: list[Setting] = []
        for kernel in self.kernels:
            if kernel == KRIGING:
                tried = product(_at_most(self.kriging_neighbors, n_rows), self.ranges, self.nuggets)
                found += [Setting(k, range_, kernel=kernel, nugget=nugget) for k, range_, nugget in tried]
                continue
            units = (False,) if self.absolute else (False, True)
            for k, bandwidth, local in product(_at_most(self.n_neighbors, n_rows), self.bandwidths, units):
                found.append(Setting(k, bandwidth, kernel=kernel, local=local))
        return found


def _at_most(counts: Sequence[int], n_rows: int) -> list[int]:
    return sorted({min(k, n_rows) for k in counts})


@dataclass(frozen=True)
class Fold:
    """Held-out rows and their neighbours among the rows of the other folds.

    Attributes
    ----------
    queries : rows of the data.
    found : their neighbours, rows of the data too.
    keys : of all rows of the data.
    rows : labels and base predictions of all rows of the data.
    absolute : bandwidths are distances, and no multiples of the typical one.
    """

    queries: Int64[ndarray, " q"]
    found: Neighbors
    keys: Column
    rows: Lesson
    absolute: bool = False

    @staticmethod
    def of(
        keys: Float[ndarray, "n d"],
        rows: Lesson,
        queries: Int64[ndarray, " q"],
        usable: Bool[ndarray, " n"],
        k: int,
        index: str,
        absolute: bool = False,
    ) -> "Fold":
        """Search for neighbours among the usable rows."""
        near = np.flatnonzero(usable)
        column = Column([keys[near]], keys[:0])
        engine = build_index(IndexSpec.parse(index), column, 0, len(near))
        found = nearest([engine], column, keys[queries], min(k, len(near)))
        places = np.where(found.rows >= 0, near[np.maximum(found.rows, 0)], -1)
        return Fold(queries, Neighbors(found.distances, places), Column([keys], keys[:0]), rows, absolute)

    def typical(self, k: int) -> float:
        """Median distance to the k-th neighbour; 1 where all distances are 0."""
        distances = self.found.distances[:, k - 1]
        present = distances[np.isfinite(distances)]
        return (float(np.median(present)) or float(present.mean()) or 1.0) if len(present) else 1.0

    def placed(self, shape: Setting) -> Setting:
        """A setting with its bandwidth in the unit of this fold's distances."""
        assert not isinstance(shape.bandwidth, str)
        if shape.local or self.absolute:
            return shape
        return replace(shape, bandwidth=shape.bandwidth * self.typical(shape.n_neighbors))

    @cached_property
    def usual(self) -> Float[ndarray, " c"]:
        """What the rows' labels are on average: what a memory alone says where it knows nothing."""
        if self.rows.task == "regression":
            return np.asarray(self.rows.targets).mean(axis=0)
        return np.bincount(self.rows.targets, minlength=self.rows.predictions.shape[1]) / len(self.rows.targets)

    def at_label(
        self, shapes: Sequence[Setting], temperature: float
    ) -> tuple[Float[ndarray, "q o"], Float[ndarray, "q s o"], Float[ndarray, "q s o"], Float[ndarray, "q s"]]:
        """The base, Σ w label and Σ w prediction less the base, and Σ w, at what is to be predicted."""
        rows, placed = self.rows.at_temperature(temperature), [self.placed(shape) for shape in shapes]
        n, k = self.found.rows.shape
        parts = []
        for here in _pieces(n, 8 * k * (len(shapes) + k)):
            near = Neighbors(self.found.distances[here], self.found.rows[here])
            weights = _weights(self.keys, near, placed)
            said, labels, drift = rows.at_label(self.queries[here], np.maximum(near.rows, 0))
            parts.append((said, weights @ labels, weights @ drift, weights.sum(axis=2)))
        said, labels, drift, mass = (np.concatenate(column) for column in zip(*parts, strict=True))
        return said, labels, drift, mass

    def corrected(self, setting: Setting, chosen: Bool[ndarray, " q"]) -> Float[ndarray, "r c"]:
        """Whole corrected scores of some of the queries."""
        base, averages = self._averages(setting, chosen)
        return base + setting.shrinkage * averages.correction(base, setting.residual_share)

    def memory_only(self, setting: Setting, chosen: Bool[ndarray, " q"]) -> Float[ndarray, "r c"]:
        """What the labels of the neighbours say; the usual where kriging weights do not sum to 1."""
        averages = self._averages(setting, chosen)[1]
        assert averages.labels is not None
        assert averages.mass is not None
        return averages.labels + (1 - averages.mass)[:, None] * self.usual

    def _averages(self, setting: Setting, chosen: Bool[ndarray, " q"]) -> tuple[Float[ndarray, "r c"], Averages]:
        rows, placed = self.rows.at_temperature(setting.temperature), self.placed(setting)
        places, n_outputs = np.flatnonzero(chosen), rows.predictions.shape[1]
        labels, said = np.zeros((len(places), n_outputs)), np.zeros((len(places), n_outputs))
        mass = np.zeros(len(places))
        for here in _pieces(len(places), 8 * self.found.rows.shape[1] * (n_outputs + self.found.rows.shape[1])):
            near = Neighbors(self.found.distances[places[here]], self.found.rows[places[here]])
            weights = _weights(self.keys, near, [placed])
            known = np.maximum(near.rows, 0)
            targets: Any = rows.targets[known]
            if rows.task == "classification":
                targets = (targets[..., None] == np.arange(n_outputs)).astype(float)
            labels[here] = (weights @ targets)[:, 0]
            said[here] = (weights @ rows.predictions[known])[:, 0]
            mass[here] = weights.sum(axis=(1, 2))
        base = rows.predictions[self.queries[places]]
        return base, Averages(labels - said, np.zeros(len(places)), labels, mass)


def _weights(keys: Column, found: Neighbors, placed: Sequence[Setting]) -> Float[ndarray, "q s k"]:
    """Of the neighbours under each setting."""
    kriging = [setting.n_neighbors for setting in placed if setting.kernel == KRIGING]
    among = distances_among(keys, found.rows[:, : max(kriging)]) if kriging else None
    weights = np.zeros((len(found.rows), len(placed), found.rows.shape[1]))
    for place, setting in enumerate(placed):
        k = setting.n_neighbors
        near = None if among is None else among[:, :k, :k]
        weights[:, place, :k] = neighbor_weights(keys, found.first(k), setting.weighting(), near)
    return weights


def _pieces(n: int, row_bytes: int) -> list[slice]:
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


@dataclass(frozen=True)
class Chosen:
    """What the folds chose.

    Attributes
    ----------
    candidate : the kind of keys.
    setting : with the bandwidth as a multiple of a distance to the k-th neighbour; without the memory where it does
        not help.
    memory_only : of the labels alone, for the same keys.
    evaluation : base, memory-only and corrected, cross-fitted.
    """

    candidate: str
    setting: Setting
    memory_only: Setting
    evaluation: Evaluation


class _Candidate:
    """One kind of keys: the losses of its settings on all queries, in the order of the folds."""

    def __init__(self, name: str, folds: Sequence[Fold], grid: Grid) -> None:
        self.name, self.folds, self._grid = name, folds, grid
        self._shapes = grid.shapes(min(fold.found.rows.shape[1] for fold in folds))
        values = [fold.at_label(self._shapes, 1.0) for fold in folds]
        self.losses = np.concatenate(
            [self._table(fold, some, self._amounts()) for fold, some in zip(folds, values, strict=True)], axis=1
        )
        self.losses_alone = np.concatenate(
            [self._alone(fold, some) for fold, some in zip(folds, values, strict=True)], axis=1
        )
        self._warm: dict[Setting, Float32[ndarray, "s q"]] = {}

    def _amounts(self) -> list[tuple[float, float]]:
        return list(product(self._grid.residual_shares, self._grid.shrinkages))

    def setting(self, place: int) -> Setting:
        """The setting of a row of `losses`."""
        amounts = self._amounts()
        share, amount = amounts[place // len(self._shapes)]
        return replace(self._shapes[place % len(self._shapes)], residual_share=share, shrinkage=amount)

    def alone(self, place: int) -> Setting:
        """The setting of a row of `losses_alone`."""
        return self._shapes[place]

    def tempered(self, shape: Setting) -> tuple[list[Setting], Float32[ndarray, "s q"]]:
        """The losses of one shape at every temperature, residual share and shrinkage."""
        temperatures = self._grid.temperatures if self.folds[0].rows.task == "classification" else (1.0,)
        settings = [
            replace(shape, temperature=temperature, residual_share=share, shrinkage=amount)
            for temperature in temperatures
            for share, amount in self._amounts()
        ]
        plain = replace(shape, temperature=1.0, residual_share=1.0, shrinkage=1.0)
        if plain not in self._warm:
            tables = [
                np.concatenate(
                    [self._table(fold, fold.at_label([plain], t), self._amounts()) for fold in self.folds], 1
                )
                for t in temperatures
            ]
            self._warm[plain] = np.concatenate(tables)
        return settings, self._warm[plain]

    @staticmethod
    def _table(
        fold: Fold, values: tuple[ndarray, ndarray, ndarray, ndarray], amounts: Sequence[tuple[float, float]]
    ) -> Float32[ndarray, "s q"]:
        """Losses by residual share and shrinkage, then shape."""
        said, labels, drift, _ = values
        n, n_shapes = labels.shape[:2]
        table = np.empty((len(amounts), n_shapes, n), np.float32)
        wanted = _wanted(fold)
        for place, (share, amount) in enumerate(amounts):
            table[place] = _losses(fold.rows.task, said[:, None] + amount * (labels - share * drift), wanted).T
        return table.reshape(len(amounts) * n_shapes, n)

    @staticmethod
    def _alone(fold: Fold, values: tuple[ndarray, ndarray, ndarray, ndarray]) -> Float32[ndarray, "s q"]:
        said, labels, _, mass = values
        usual = fold.usual if fold.rows.task == "regression" else fold.usual[fold.rows.targets[fold.queries], None]
        scores = labels + mass[:, :, None] * said[:, None] + (1 - mass)[:, :, None] * np.expand_dims(usual, -2)
        return _losses(fold.rows.task, scores, _wanted(fold)).T.astype(np.float32)


def _wanted(fold: Fold) -> Float[ndarray, "q 1 o"] | None:
    return fold.rows.targets[fold.queries][:, None] if fold.rows.task == "regression" else None


def _losses(
    task: Task, scores: Float[ndarray, "q s o"], wanted: Float[ndarray, "q 1 o"] | None
) -> Float[ndarray, "q s"]:
    """Squared errors, or −log of the label's score, no smaller than what predictions are kept above."""
    if task == "regression":
        return np.square(wanted - scores).mean(axis=2)
    return -np.log(np.maximum(scores[..., 0], PROBABILITY_FLOOR / 10))


def choose(
    candidates: dict[str, list[Fold]],
    grid: Grid,
    *,
    groups: Shaped[ndarray, " n"] | None = None,
    seed: int = 0,
) -> Chosen:
    """The keys and the setting with the least loss, and what they are worth on rows that did not choose them.

    Parameters
    ----------
    candidates : for each kind of keys the folds, with the same queries for all.
    groups : of all rows of the data; rows of one group are not split between choosing and measuring.
    """
    tried = [_Candidate(name, folds, grid) for name, folds in candidates.items()]
    folds = tried[0].folds
    queries = np.concatenate([fold.queries for fold in folds])
    parts = row_folds(len(queries), None if groups is None else groups[queries], N_FOLDS, seed)
    task = folds[0].rows.task
    base, alone, corrected = (np.empty(len(queries)) for _ in range(3))
    for part in np.unique(parts):
        inside = parts == part
        candidate, setting, without = _best(tried, ~inside)
        base[inside] = _measured(folds, inside, without, "corrected")
        corrected[inside] = _measured(candidate.folds, inside, setting, "corrected")
        labelled, by_labels = _best_alone(tried, ~inside)
        alone[inside] = _measured(labelled.folds, inside, by_labels, "memory_only")
    metric: Any = "log_loss" if task == "classification" else "rmse"
    owners = None if groups is None else groups[queries]
    evaluation = summarize(metric, base=base, memory_only=alone, corrected=corrected, groups=owners)
    everything = np.ones(len(queries), bool)
    candidate, setting, _ = _best(tried, everything)
    alone_place = int(candidate.losses_alone.mean(axis=1).argmin())
    return Chosen(
        candidate.name,
        setting if evaluation.helps else setting.without_memory(),
        candidate.alone(alone_place),
        evaluation,
    )


def _best(tried: Sequence[_Candidate], rows: Bool[ndarray, " q"]) -> tuple[_Candidate, Setting, Setting]:
    """The candidate and setting with the least loss on these rows, and the best without a memory."""
    means = [candidate.losses[:, rows].mean(axis=1) for candidate in tried]
    number = int(np.argmin([mean.min() for mean in means]))
    candidate = tried[number]
    settings, losses = candidate.tempered(candidate.setting(int(means[number].argmin())))
    mean = losses[:, rows].mean(axis=1)
    without = np.array([setting.shrinkage == 0 for setting in settings])
    best_without = settings[int(np.where(without, mean, np.inf).argmin())]
    return candidate, settings[int(mean.argmin())], best_without


def _best_alone(tried: Sequence[_Candidate], rows: Bool[ndarray, " q"]) -> tuple[_Candidate, Setting]:
    means = [candidate.losses_alone[:, rows].mean(axis=1) for candidate in tried]
    number = int(np.argmin([mean.min() for mean in means]))
    return tried[number], tried[number].alone(int(means[number].argmin()))


def _measured(folds: Sequence[Fold], rows: Bool[ndarray, " q"], setting: Setting, method: str) -> Float[ndarray, " r"]:
    """Losses of whole predictions on these of all queries."""
    losses, start = [], 0
    for fold in folds:
        chosen = rows[start : start + len(fold.queries)]
        start += len(fold.queries)
        scores = getattr(fold, method)(setting, chosen)
        targets = fold.rows.targets[fold.queries[chosen]]
        if fold.rows.task == "regression":
            losses.append(squared_errors(scores, targets) if len(targets) else np.zeros(0))
        elif len(targets):
            losses.append(log_losses(valid_probabilities(scores), targets))
    return np.concatenate(losses) if losses else np.zeros(0)


def valid_probabilities(scores: Float[ndarray, "q c"]) -> Float[ndarray, "q c"]:
    """Distributions from corrected scores: raised to a small floor and renormalised, so that their order stays."""
    return to_probabilities(scores, np.full_like(scores, 1 / scores.shape[1]), floor=PROBABILITY_FLOOR)


def error_scale(folds: Sequence[Fold], setting: Setting) -> tuple[Float[ndarray, " c"], Float[ndarray, " c"]]:
    """From the neighbours' mean absolute residual s to a deviation: factor · (s + offset), one of each an output.

    The factor is such that 95 % of the held-out rows lie within 1.96 deviations of their corrected prediction.

    References
    ----------
    Papadopoulos et al., "Regression conformal prediction with nearest neighbours", 2011.
    """
    spreads, errors = [], []
    for fold in folds:
        near = np.maximum(fold.found.rows[:, : setting.n_neighbors], 0)
        spreads.append(np.abs(fold.rows.targets[near] - fold.rows.predictions[near]).mean(axis=1))
        everything = np.ones(len(fold.queries), bool)
        errors.append(np.abs(fold.rows.targets[fold.queries] - fold.corrected(setting, everything)))
    spread, error = np.concatenate(spreads), np.concatenate(errors)
    offset = SMALLEST_SPREAD * spread.mean(axis=0)
    scaled = error / np.maximum(spread + offset, np.finfo(float).tiny)
    return np.quantile(scaled, 0.95, axis=0) / Z95, offset
