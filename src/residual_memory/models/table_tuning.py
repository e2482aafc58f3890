"""Choose keys and a setting for the rows of a table by folds: the rows of a fold are corrected by those of the others.

Thousands of settings are tried for the price of a few: by squared error, which for classes is the Brier score, the loss
of a row is a quadratic form in the shrinkage and the residual share. The figures of the verdict, of classes log-losses,
are measured on whole predictions, each fifth of the rows with what the other four fifths chose.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from numpy import ndarray

from residual_memory.correction import to_probabilities
from residual_memory.evaluation import Evaluation, Setting, summarize
from residual_memory.indexes.base import nearest
from residual_memory.indexes.registry import build_index, parse_spec
from residual_memory.kernels import KRIGING
from residual_memory.memory import Column
from residual_memory.metric_learning import Lesson
from residual_memory.metrics import Z95, correctness, log_losses, mean_interval, squared_errors
from residual_memory.tuning import row_folds, typical_distance, weights_of
from residual_memory.types import Neighbors

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

    n_neighbors: tuple[int, ...] = (3, 5, 10, 20, 50, 100)
    bandwidths: tuple[float, ...] = (0.1, 0.2, 0.35, 0.5, 1.0)
    kernels: tuple[str, ...] = ("exponential", KRIGING)
    kriging_neighbors: tuple[int, ...] = (50,)
    ranges: tuple[float, ...] = (0.8, 1.6, 3.2, 6.4)
    nuggets: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    temperatures: tuple[float, ...] = (0.7, 1.0, 1.4, 2.0)
    shrinkages: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
    residual_shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    absolute: bool = False

    @property
    def amounts(self) -> list[tuple[float, float]]:
        """Every residual share and shrinkage."""
        return list(product(self.residual_shares, self.shrinkages))

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
        usable: Int64[ndarray, " u"],
        k: int,
        index: str,
        absolute: bool = False,
    ) -> "Fold":
        """Search for neighbours among the usable rows."""
        column = Column([keys[usable]], keys[:0])
        engine = build_index(parse_spec(index), column, 0, len(usable))
        found = nearest([engine], column, keys[queries], min(k, len(usable)))
        places = np.where(found.rows >= 0, usable[np.maximum(found.rows, 0)], -1)
        return Fold(queries, Neighbors(found.distances, places), Column([keys], keys[:0]), rows, absolute)

    def reach(self, k: int) -> float:
        """The largest distance to the k-th neighbour that was seen, in units of the typical one; 0 if none was."""
        distances = self.found.distances[:, min(k, self.found.distances.shape[1]) - 1] / typical_distance(self.found, k)
        return float(distances[np.isfinite(distances)].max(initial=0))

    def placed(self, shape: Setting) -> Setting:
        """A setting with its bandwidth in the unit of this fold's distances."""
        assert not isinstance(shape.bandwidth, str)
        if shape.local or self.absolute:
            return shape
        return replace(shape, bandwidth=shape.bandwidth * typical_distance(self.found, shape.n_neighbors))

    @cached_property
    def usual(self) -> Float[ndarray, " c"]:
        """What the rows' labels are on average: what a memory alone says where it knows nothing."""
        return self.targets(np.arange(len(self.rows.predictions))).mean(axis=0)

    def targets(self, rows: Int64[ndarray, "..."]) -> Float[ndarray, "... c"]:
        """Values, or onehot(label)."""
        targets = self.rows.targets[rows]
        if self.rows.task == "regression":
            return targets
        return (targets[..., None] == np.arange(self.rows.predictions.shape[1])).astype(float)

    def averages(
        self, shapes: Sequence[Setting], temperature: float = 1.0, chosen: Bool[ndarray, " q"] | None = None
    ) -> Iterator[tuple[Int64[ndarray, " r"], "Said"]]:
        """What the base, and the neighbours under each shape, say of the queries (or some of them), piece by piece."""
        rows, placed = self.rows.at_temperature(temperature), [self.placed(shape) for shape in shapes]
        places = np.arange(len(self.queries)) if chosen is None else np.flatnonzero(chosen)
        k, n_outputs = self.found.rows.shape[1], rows.predictions.shape[1]
        step = max(1, BLOCK_BYTES // (8 * (k * (len(shapes) + 2 * n_outputs) + len(shapes) * 3 * n_outputs + k * k)))
        for start in range(0, len(places), step):
            here = places[start : start + step]
            near = Neighbors(self.found.distances[here], self.found.rows[here])
            weights, known = weights_of(self.keys, near, placed), np.maximum(near.rows, 0)
            base, mass = rows.predictions[self.queries[here]], weights.sum(axis=2)
            yield here, Said(base, weights @ self.targets(known), weights @ rows.predictions[known], mass, self.usual)

    def corrected(self, setting: Setting, chosen: Bool[ndarray, " q"]) -> Float[ndarray, "r c"]:
        """Whole corrected scores of some of the queries."""
        pieces = [
            said.corrected(setting.shrinkage, setting.residual_share)[:, 0]
            for _, said in self.averages([setting], setting.temperature, chosen)
        ]
        return np.concatenate([np.zeros((0, self.rows.predictions.shape[1])), *pieces])

    def memory_only(self, setting: Setting, chosen: Bool[ndarray, " q"]) -> Float[ndarray, "r c"]:
        """What the labels of the neighbours say."""
        pieces = [said.alone[:, 0] for _, said in self.averages([setting], 1.0, chosen)]
        return np.concatenate([np.zeros((0, self.rows.predictions.shape[1])), *pieces])


@dataclass(frozen=True)
class Said:
    """What is said of queries: by the base, and by their neighbours on average under each shape of the weights.

    Attributes
    ----------
    labels, predictions : Σ w onehot(y) or Σ w y, and Σ w prediction.
    mass : Σ w.
    usual : what labels are on average.
    """

    base: Float[ndarray, "q c"]
    labels: Float[ndarray, "q s c"]
    predictions: Float[ndarray, "q s c"]
    mass: Float[ndarray, "q s"]
    usual: Float[ndarray, " c"]

    @property
    def pulls(self) -> tuple[Float[ndarray, "q s c"], Float[ndarray, "q s c"]]:
        """Σ w (label − base) and Σ w (prediction − base): the correction is the first less a share of the second."""
        own = self.mass[:, :, None] * self.base[:, None]
        return self.labels - own, self.predictions - own

    @property
    def alone(self) -> Float[ndarray, "q s c"]:
        """The labels alone; the usual where kriging weights do not sum to 1."""
        return self.labels + (1 - self.mass)[:, :, None] * self.usual

    def corrected(self, shrinkage: float, residual_share: float) -> Float[ndarray, "q s c"]:
        """Corrected scores."""
        pull, drift = self.pulls
        return self.base[:, None] + shrinkage * (pull - residual_share * drift)


@dataclass(frozen=True)
class Chosen:
    """What the folds chose.

    Attributes
    ----------
    candidate : the kind of keys.
    setting : with the bandwidth as a multiple of a distance to the k-th neighbour.
    evaluation : base, memory-only and corrected, cross-fitted.
    helps : the whole interval of the gain is above zero, and of classes no less rows are right.
    """

    candidate: str
    setting: Setting
    evaluation: Evaluation
    helps: bool


class _Candidate:
    """One kind of keys: the squared errors of its settings on all queries, in the order of the folds."""

    def __init__(self, name: str, folds: Sequence[Fold], grid: Grid) -> None:
        self.name, self.folds, self._grid = name, folds, grid
        self._shapes = grid.shapes(min(fold.found.rows.shape[1] for fold in folds))
        n_queries = sum(len(fold.queries) for fold in folds)
        self.losses = np.empty((len(grid.amounts) * len(self._shapes), n_queries), np.float32)
        self.losses_alone = np.empty((len(self._shapes), n_queries), np.float32)
        start = 0
        for fold in folds:
            for here, said in fold.averages(self._shapes):
                wanted = fold.targets(fold.queries[here])
                self.losses[:, start + here] = _squared_errors(said, wanted, grid.amounts)
                self.losses_alone[:, start + here] = np.square(wanted[:, None] - said.alone).mean(axis=2).T
            start += len(fold.queries)
        self._warm: dict[Setting, Float32[ndarray, "s q"]] = {}

    def setting(self, place: int) -> Setting:
        """The setting of a row of `losses`."""
        share, amount = self._grid.amounts[place // len(self._shapes)]
        return replace(self._shapes[place % len(self._shapes)], residual_share=share, shrinkage=amount)

    def alone(self, place: int) -> Setting:
        """The setting of a row of `losses_alone`."""
        return self._shapes[place]

    def tempered(self, setting: Setting) -> tuple[list[Setting], Float32[ndarray, "s q"]]:
        """The losses of one shape at every temperature, residual share and shrinkage."""
        shape = replace(setting, residual_share=1.0, shrinkage=1.0)
        if shape not in self._warm:
            tables = []
            for temperature in self._grid.temperatures:
                pieces = [
                    _squared_errors(said, fold.targets(fold.queries[here]), self._grid.amounts)
                    for fold in self.folds
                    for here, said in fold.averages([shape], temperature)
                ]
                tables.append(np.concatenate(pieces, axis=1))
            self._warm[shape] = np.concatenate(tables).astype(np.float32)
        settings = [
            replace(shape, temperature=temperature, residual_share=share, shrinkage=amount)
            for temperature, (share, amount) in product(self._grid.temperatures, self._grid.amounts)
        ]
        return settings, self._warm[shape]

    def base_losses(self, temperature: float) -> Float[ndarray, " q"]:
        """Log-losses of the base alone."""
        losses = []
        for fold in self.folds:
            said = fold.rows.at_temperature(temperature).predictions[fold.queries]
            losses.append(log_losses(valid_probabilities(said), fold.rows.targets[fold.queries]))
        return np.concatenate(losses)


def _squared_errors(
    said: Said, wanted: Float[ndarray, "q c"], amounts: Sequence[tuple[float, float]]
) -> Float[ndarray, "s q"]:
    """Mean squared errors by residual share and shrinkage, then shape, from six sums over the outputs."""
    pull, drift = said.pulls
    missing = (wanted - said.base)[:, None]
    alone, with_pull, with_drift = np.square(missing).mean(2), (missing * pull).mean(2), (missing * drift).mean(2)
    pulled, drifted, both = np.square(pull).mean(2), np.square(drift).mean(2), (pull * drift).mean(2)
    table = [
        alone
        - 2 * amount * (with_pull - share * with_drift)
        + amount**2 * (pulled - 2 * share * both + share**2 * drifted)
        for share, amount in amounts
    ]
    return np.concatenate([part.T for part in table])


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
    rows, queries = folds[0].rows, np.concatenate([fold.queries for fold in folds])
    owners = None if groups is None else groups[queries]
    parts = row_folds(len(queries), owners, N_FOLDS, seed)
    base, alone, corrected = (np.empty((len(queries), rows.predictions.shape[1])) for _ in range(3))
    for part in np.unique(parts):
        inside = parts == part
        candidate, setting, without = _best(tried, grid, ~inside)
        base[inside] = _said(folds, inside, partial(Fold.corrected, setting=without))
        corrected[inside] = _said(candidate.folds, inside, partial(Fold.corrected, setting=setting))
        labelled, by_labels = _best_alone(tried, ~inside)
        alone[inside] = _said(labelled.folds, inside, partial(Fold.memory_only, setting=by_labels))
    labels = rows.targets[queries]
    if rows.task == "regression":
        losses = [squared_errors(said, labels) for said in (base, alone, corrected)]
    else:
        losses = [log_losses(valid_probabilities(said), labels) for said in (base, alone, corrected)]
    evaluation = summarize(
        "log_loss" if rows.task == "classification" else "rmse",
        base=losses[0],
        memory_only=losses[1],
        corrected=losses[2],
        groups=owners,
    )
    helps = evaluation.helps
    if helps and rows.task == "classification":  # log-loss can gain where fewer rows are right
        helps = mean_interval(correctness(corrected, labels) - correctness(base, labels), owners).high >= 0
    candidate, setting, _ = _best(tried, grid, np.ones(len(queries), bool))
    return Chosen(candidate.name, setting, evaluation, helps)


def _said(
    folds: Sequence[Fold], rows: Bool[ndarray, " q"], predict: Callable[..., Float[ndarray, "r c"]]
) -> Float[ndarray, "s c"]:
    """What these of all queries are told, fold by fold."""
    starts = np.cumsum([len(fold.queries) for fold in folds])[:-1]
    return np.concatenate(
        [predict(fold, chosen=chosen) for fold, chosen in zip(folds, np.split(rows, starts), strict=True)]
    )


def _best(tried: Sequence[_Candidate], grid: Grid, rows: Bool[ndarray, " q"]) -> tuple[_Candidate, Setting, Setting]:
    """The candidate and setting with the least loss on these rows, and the best without a memory."""
    means = [candidate.losses[:, rows].mean(axis=1) for candidate in tried]
    candidate = tried[int(np.argmin([mean.min() for mean in means]))]
    best = candidate.setting(int(means[tried.index(candidate)].argmin()))
    if candidate.folds[0].rows.task == "regression":
        return candidate, best, best.without_memory()
    settings, losses = candidate.tempered(best)
    mean = losses[:, rows].mean(axis=1)
    calm = [candidate.base_losses(temperature)[rows].mean() for temperature in grid.temperatures]
    base = replace(best.without_memory(), temperature=grid.temperatures[int(np.argmin(calm))])
    return candidate, settings[int(mean.argmin())], base


def _best_alone(tried: Sequence[_Candidate], rows: Bool[ndarray, " q"]) -> tuple[_Candidate, Setting]:
    means = [candidate.losses_alone[:, rows].mean(axis=1) for candidate in tried]
    number = int(np.argmin([mean.min() for mean in means]))
    return tried[number], tried[number].alone(int(means[number].argmin()))


def valid_probabilities(scores: Float[ndarray, "q c"]) -> Float[ndarray, "q c"]:
    """Distributions from corrected scores: raised to a small floor and renormalised, so that their order stays."""
    return to_probabilities(scores, np.full_like(scores, 1 / scores.shape[1]), floor=PROBABILITY_FLOOR)


def error_scale(folds: Sequence[Fold], setting: Setting) -> tuple[Float[ndarray, " c"], Float[ndarray, " c"]]:
    """From what the correction leaves of the neighbours' residuals, s, to a deviation: factor · (s + offset).

    One of each an output; s is the mean over the neighbours of |residual − correction|.

    The factor is such that 95 % of the held-out rows lie within 1.96 deviations of their corrected prediction.

    References
    ----------
    Papadopoulos et al., "Regression conformal prediction with nearest neighbours", 2011.
    """
    spreads, errors = [], []
    for fold in folds:
        near = np.maximum(fold.found.rows[:, : setting.n_neighbors], 0)
        corrected = fold.corrected(setting, np.ones(len(fold.queries), bool))
        correction = corrected - fold.rows.predictions[fold.queries]
        left = fold.rows.targets[near] - fold.rows.predictions[near] - correction[:, None]
        spreads.append(np.abs(left).mean(axis=1))
        errors.append(np.abs(fold.rows.targets[fold.queries] - corrected))
    spread, error = np.concatenate(spreads), np.concatenate(errors)
    offset = SMALLEST_SPREAD * spread.mean(axis=0)
    scaled = error / np.maximum(spread + offset, np.finfo(float).tiny)
    return np.quantile(scaled, 0.95, axis=0) / Z95, offset
