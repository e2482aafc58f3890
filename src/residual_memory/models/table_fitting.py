"""What `fit` of an estimator with a memory does: honest predictions of all rows, and keys chosen by held-out folds."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped
from numpy import ndarray

from residual_memory.errors import InSampleResiduals, InvalidInput, MissingExtra
from residual_memory.metric_learning import Lesson, learn_metric
from residual_memory.models.table_keys import Embedding, Keys
from residual_memory.models.table_tuning import Chosen, Fold, Grid, choose
from residual_memory.types import Task
from residual_memory.validation import as_count

try:
    from sklearn.base import clone
    from sklearn.frozen import FrozenEstimator
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold, check_cv
    from sklearn.utils import _safe_indexing as rows_of
    from sklearn.utils.parallel import Parallel, delayed
except ImportError as error:
    raise MissingExtra("scikit-learn estimators", "sklearn") from error

Residuals = Literal["out_of_fold", "in_sample", "held_out"]

TUNING_ROWS = 6_000  # held-out rows that settings are chosen by, where there are as many
FEWEST_ROWS = 20  # below this nothing can be told from held-out rows
WIDEST = 256  # numbers in a key up to which a metric is learned
ROWS_A_NUMBER = 8  # for each number of a full metric that is to be learned
NO_ENERGY = 1e-3  # part of the labels' variance below which the residuals say nothing

Splits = list[tuple[Int64[ndarray, "_"], Int64[ndarray, "_"]]]  # rows of each fold; as many as there may be


@dataclass(frozen=True)
class Rows:
    """Training rows.

    Attributes
    ----------
    X, y : as the base takes them.
    targets : class indices, or values [n c].
    """

    X: Any
    y: Any
    targets: Shaped[ndarray, "n ..."]
    ids: Shaped[ndarray, " n"]
    groups: Shaped[ndarray, " n"] | None

    def __len__(self) -> int:
        return len(self.targets)

    def some(self, rows: Int64[ndarray, " m"]) -> "Rows":
        groups = None if self.groups is None else self.groups[rows]
        return Rows(rows_of(self.X, rows), rows_of(self.y, rows), self.targets[rows], self.ids[rows], groups)


@dataclass(frozen=True)
class Observed:
    """What the base said of the rows that the memory is to hold.

    Attributes
    ----------
    estimator : the fitted base.
    rows : of the training rows, by number.
    predictions : honest ones, or those of the base that was fitted on the rows themselves.
    folds : of the tuning: the positions (among `rows`) of the queries and of the rows that may be used.
    models : the base fitted without each fold; none where keys and predictions of the one base are as of new rows.
    """

    estimator: Any
    rows: Int64[ndarray, " m"]
    predictions: Float[ndarray, "m c"]
    folds: Splits
    models: list[Any]

    def without(self, gone: Bool[ndarray, " n"]) -> "Observed":
        """The same without some of the training rows."""
        kept = ~gone[self.rows]
        place = np.where(kept, np.cumsum(kept) - 1, -1)

        def moved(rows: Int64[ndarray, " r"]) -> Int64[ndarray, " s"]:
            return place[rows][place[rows] >= 0]

        folds = [(moved(queries), moved(usable)) for queries, usable in self.folds]
        return replace(self, rows=self.rows[kept], predictions=self.predictions[kept], folds=folds)


@dataclass(frozen=True)
class Remembered:
    """Rows with their keys, and how they are best used.

    Attributes
    ----------
    name : of the keys.
    embedding, metric : that made them.
    chosen : None where there are too few rows to choose by.
    folds : that the choice was made on, under these keys.
    """

    name: str
    embedding: Embedding
    metric: Float[ndarray, "d d"] | None
    keys: Keys
    chosen: Chosen | None
    folds: list[Fold]


@dataclass(frozen=True)
class Fitting:
    """How rows are observed, and keys chosen.

    Attributes
    ----------
    estimator : the base, unfitted or frozen.
    said : what a fitted base says of rows X, a column for each of the memory's outputs.
    metric : "auto", None, "diagonal" or "full".
    """

    estimator: Any
    task: Task
    said: Callable[[Any, Any], Float[ndarray, "n c"]]
    residuals: Residuals
    cv: Any
    metric: Any
    grid: Grid
    index: str
    n_jobs: int | None
    seed: int

    # ------------------------------------------------------------------ observing

    def observe(self, rows: Rows, fit: Mapping[str, Any], split: Mapping[str, Any]) -> Observed:
        """Fit the base and let it predict the rows as `residuals` wants it.

        Parameters
        ----------
        fit, split : further parameters for the base's `fit` and the splitter's `split`.
        """
        splits, everything = self.splits(rows, split), np.arange(len(rows))
        if isinstance(self.estimator, FrozenEstimator):
            return self._observed_once(self.estimator, rows, everything, splits)
        if self.residuals == "held_out":
            train, held = splits[0]
            inner = replace(self, cv=self.cv if isinstance(self.cv, int) else 5)
            return self._observed_once(self._fitted(rows, train, fit), rows, held, inner.splits(rows.some(held), {}))
        used = splits if self.residuals == "out_of_fold" else _enough(splits)
        models = list(Parallel(n_jobs=self.n_jobs)(delayed(self._fitted)(rows, train, fit) for train, _ in used))
        base = self._fitted(rows, everything, fit)
        if self.residuals == "in_sample":
            folds = [(held, train) for train, held in used]
            return Observed(base, everything, self.said(base, rows.X), folds, models)
        # A splitter may hold some rows out never: they have no honest prediction, and are not remembered.
        honest = np.sort(np.concatenate([held for _, held in splits]))
        place = np.full(len(rows), -1)
        place[honest] = np.arange(len(honest))
        said = [self.said(model, rows_of(rows.X, held)) for model, (_, held) in zip(models, splits, strict=True)]
        predictions = np.empty((len(honest), said[0].shape[1]))
        for (_, held), some in zip(splits, said, strict=True):
            predictions[place[held]] = some
        folds = [(place[held], place[train][place[train] >= 0]) for train, held in splits]
        return Observed(base, honest, predictions, folds, models)

    def _observed_once(self, base: Any, rows: Rows, held: Int64[ndarray, " m"], splits: Splits) -> Observed:
        """Rows that the one base predicts as it predicts new ones."""
        said = self.said(base, rows_of(rows.X, held))
        return Observed(base, held, said, [(queries, train) for train, queries in splits], [])

    def _fitted(self, rows: Rows, some: Int64[ndarray, " r"], params: Mapping[str, Any]) -> Any:
        given = {
            name: rows_of(value, some) if np.shape(value)[:1] == (len(rows),) else value
            for name, value in params.items()
        }
        return clone(self.estimator).fit(rows_of(rows.X, some), rows_of(rows.y, some), **given)

    def splits(self, rows: Rows, split: Mapping[str, Any]) -> Splits:
        """Training and held-out rows of each fold."""
        if isinstance(self.cv, int):
            return self._shuffled_folds(rows)
        splitter = check_cv(self.cv, rows.targets, classifier=self.task == "classification")
        splits = [(train, held) for train, held in splitter.split(rows.X, rows.targets, **split)]
        times = np.bincount(np.concatenate([held for _, held in splits]), minlength=len(rows))
        if times.max() > 1:
            raise InvalidInput(
                f"cv holds row {int(times.argmax())} out {times.max()} times, expected each at most once; "
                "use a splitter such as KFold"
            )
        return splits

    def _shuffled_folds(self, rows: Rows) -> Splits:
        """As many folds as `cv` says, of the same classes, groups kept together."""
        owners = len(rows) if rows.groups is None else len(np.unique(rows.groups))
        wanted = as_count("cv", self.cv)
        n_folds = min(wanted, owners)
        if n_folds < 2:
            raise InvalidInput(f"cv is {wanted} for {owners} groups or rows, expected at least 2 of each")
        most = int(np.bincount(rows.targets).max()) if self.task == "classification" else 0
        splitter: Any
        if min(n_folds, most) >= 2:
            kind = StratifiedKFold if rows.groups is None else StratifiedGroupKFold
            splitter = kind(min(n_folds, most), shuffle=True, random_state=self.seed)
        elif rows.groups is not None:
            splitter = GroupKFold(n_folds)
        else:
            splitter = KFold(n_folds, shuffle=True, random_state=self.seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            return [(train, held) for train, held in splitter.split(rows.X, rows.targets, rows.groups) if len(held)]

    def warn_without_energy(self, targets: Shaped[ndarray, "m ..."], said: Float[ndarray, "m c"]) -> None:
        """Say so where the base knows the rows by heart, so that nothing is left to memorize."""
        if self.residuals == "out_of_fold" and not isinstance(self.estimator, FrozenEstimator):
            return
        wanted = np.eye(said.shape[1])[targets] if self.task == "classification" else targets
        energy, size = np.square(wanted - said).mean(), wanted.var(axis=0).mean()
        if energy <= NO_ENERGY * size:
            warnings.warn(
                f"the residuals hold {energy / size if size else 0:.2g} of the labels' variance: the base knows these "
                "rows by heart, so there is nothing to memorize; use residuals='out_of_fold', or rows that the base "
                "was not fitted on",
                InSampleResiduals,
                stacklevel=4,
            )

    # ------------------------------------------------------------------ choosing

    def remember(self, rows: Rows, seen: Observed, kinds: Mapping[str, Embedding]) -> Remembered:
        """Choose among kinds of keys, and make those of all rows.

        Parameters
        ----------
        rows : those of `seen.rows` alone.
        """
        learner = Lesson.of(self.task, rows.targets, seen.predictions)
        trials: dict[str, list[_Trial]] = {}
        for kind, embedding in kinds.items():
            for trial in self._trials(kind, embedding, rows, seen, learner):
                trials.setdefault(trial.name, []).append(trial)
        folds = {name: [trial.fold for trial in some] for name, some in trials.items()}
        chosen = choose(folds, self.grid, groups=rows.groups, seed=self.seed) if folds else None
        first = next(iter(kinds))
        best = trials[chosen.candidate][0] if chosen else _Trial(first, first, None, None, None)
        embedding = copy.copy(kinds[best.kind]).fit(rows.X, rows.y, seen.estimator)
        keys = embedding.keys(rows.X, seen.estimator, seen.predictions)
        metric = None
        if best.shape is not None:
            # What a fold learned is a good beginning; here the held-out rows teach as well.
            metric = learn_metric(
                keys, learner, best.shape, start=best.metric, n_rounds=1, groups=rows.groups, seed=self.seed
            )
            keys = keys @ metric
        return Remembered(best.name, embedding, metric, keys, chosen, folds.get(best.name, []))

    def _trials(
        self, kind: str, embedding: Embedding, rows: Rows, seen: Observed, learner: Lesson
    ) -> "Iterator[_Trial]":
        """Every fold under one kind of keys, with each metric."""
        for number, queries, usable in self._tuning_folds(seen):
            model = seen.models[number] if seen.models else seen.estimator
            train = rows.some(usable) if embedding.saw_labels and seen.models else rows
            fitted = copy.copy(embedding).fit(train.X, train.y, model)
            lesson, taught = Lesson(self.task, rows.targets, seen.predictions), learner
            if self.residuals == "in_sample" and seen.models:
                lesson = replace(lesson, predictions=self.said(model, rows.X))
                taught = Lesson.of(self.task, rows.targets, lesson.predictions)
            keys = fitted.keys(rows.X, model, lesson.predictions)
            near = None if rows.groups is None else rows.groups[usable]
            metric = None
            for shape in self._shapes(keys, embedding, len(usable)):
                if shape is not None:
                    metric = learn_metric(
                        keys[usable], taught.some(usable), shape, start=metric, groups=near, seed=self.seed
                    )
                placed = keys if metric is None else keys @ metric
                k = self.grid.most_neighbors(len(usable))
                fold = Fold.of(placed, lesson, queries, usable, k, self.index, self.grid.absolute)
                yield _Trial(kind if shape is None else f"{kind}, {shape} metric", kind, shape, metric, fold)

    def _tuning_folds(self, seen: Observed) -> Iterator[tuple[int, Int64[ndarray, " q"], Int64[ndarray, " u"]]]:
        """Number, queries and usable rows of as many folds as give enough queries."""
        random, left = np.random.default_rng(self.seed), TUNING_ROWS
        if len(seen.rows) < FEWEST_ROWS:
            return
        for number, (queries, usable) in enumerate(seen.folds):
            if left > 0 and len(queries) and len(usable) >= 2:
                some = np.sort(random.choice(queries, min(len(queries), left), replace=False))
                left -= len(some)
                yield number, some, usable

    def _shapes(self, keys: Keys, embedding: Embedding, n_rows: int) -> list[Any]:
        """Which metrics to try: learned ones for keys that did not see labels, of few enough numbers."""
        if self.metric is None or self.grid.absolute:
            return [None]
        if self.metric != "auto":
            return [self.metric]
        width = keys.shape[1]
        if embedding.saw_labels or n_rows < 2 * FEWEST_ROWS or not 1 < width <= WIDEST:
            return [None]
        return [None, "diagonal", "full"] if width**2 * ROWS_A_NUMBER <= n_rows else [None, "diagonal"]


@dataclass(frozen=True)
class _Trial:
    """One fold under one kind of keys with one metric."""

    name: str
    kind: str
    shape: Any
    metric: Float[ndarray, "d d"] | None
    fold: Any


def _enough(splits: Splits) -> Splits:
    """As many folds as give enough rows to tune on."""
    totals = np.cumsum([len(held) for _, held in splits])
    return splits[: int(np.searchsorted(totals, TUNING_ROWS)) + 1]
