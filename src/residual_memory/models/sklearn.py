"""Any scikit-learn estimator with a memory of what it could not learn, as a scikit-learn estimator."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64, Integer, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.correction import ResidualKNN, correct
from residual_memory.errors import DuplicateId, InvalidInput, MissingExtra, UncalibratedScores
from residual_memory.evaluation import Evaluation, Setting
from residual_memory.explanation import Explanation, explain
from residual_memory.indexes.registry import parse_spec
from residual_memory.kernels import check_kernel
from residual_memory.memory import Memory, require_empty
from residual_memory.models.table_fitting import FEWEST_ROWS, Fitting, Remembered, Rows
from residual_memory.models.table_keys import Embedding, Keys, embedding_named, natural_channels
from residual_memory.models.table_tuning import PROBABILITY_FLOOR, Chosen, Grid, error_scale, valid_probabilities
from residual_memory.types import Task
from residual_memory.validation import as_count, as_fraction, as_ids, as_non_negative, as_positive

try:
    from scipy.sparse import issparse
    from sklearn import get_config
    from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, RegressorMixin
    from sklearn.exceptions import DataConversionWarning
    from sklearn.model_selection import check_cv
    from sklearn.utils import Bunch, assert_all_finite, check_random_state, get_tags
    from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
    from sklearn.utils.multiclass import check_classification_targets, type_of_target
    from sklearn.utils.validation import (
        check_array,
        check_consistent_length,
        check_is_fitted,
        column_or_1d,
        validate_data,
    )
except ImportError as error:
    raise MissingExtra("scikit-learn estimators", "sklearn") from error

RESIDUALS = ("out_of_fold", "in_sample", "held_out")
METRICS = ("auto", None, "diagonal", "full")


class _ResMem(MetaEstimatorMixin, BaseEstimator):
    """What the classifier and the regressor share."""

    _task: Task

    def __init__(
        self,
        estimator: Any,
        *,
        embed: Any = None,
        metric: Any = "auto",
        n_neighbors: Any = "auto",
        bandwidth: Any = "auto",
        kernel: Any = "auto",
        temperature: Any = "auto",
        shrinkage: Any = "auto",
        residual_share: Any = "auto",
        max_distance: Any = "auto",
        residuals: Any = "out_of_fold",
        cv: Any = 5,
        index: str = "auto",
        memory: str | os.PathLike[str] | None = None,
        n_jobs: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.embed = embed
        self.metric = metric
        self.n_neighbors = n_neighbors
        self.bandwidth = bandwidth
        self.kernel = kernel
        self.temperature = temperature
        self.shrinkage = shrinkage
        self.residual_share = residual_share
        self.max_distance = max_distance
        self.residuals = residuals
        self.cv = cv
        self.index = index
        self.memory = memory
        self.n_jobs = n_jobs
        self.random_state = random_state

    # ------------------------------------------------------------------ fitting

    def fit(
        self, X: Any, y: Any, ids: ArrayLike | None = None, groups: ArrayLike | None = None, **fit_params: Any
    ) -> "_ResMem":
        """Fit the base, memorize what it could not learn, and choose how far to trust the memory.

        Parameters
        ----------
        X : array, sparse matrix or data frame [n d]; whatever the base takes.
        y : labels [n], or values [n] or [n c].
        ids : int64 ≥ 0 or strings [n], names by which rows are forgotten and explained; None takes their numbers.
        groups : [n]; rows of one group (a patient, a day) are never in different folds.
        fit_params : for the base's `fit`, such as `sample_weight`; others need scikit-learn's metadata routing. Weights
            count in the base. A row of weight 0 does not enter the memory, the others count alike in it.

        Raises
        ------
        InvalidInput : if an option or the data cannot be used. Other ValueErrors come from scikit-learn.
        """
        with _as_it_was_on_error(self):
            self._fit(X, y, ids, groups, fit_params)
        return self

    def _fit(self, X: Any, y: Any, ids: Any, groups: Any, fit_params: dict[str, Any]) -> None:
        grid = self._checked_options()
        X = self._as_rows(X)
        validate_data(self, X, y, skip_check_array=True)
        y = self._checked_labels(y)
        check_consistent_length(X, y, ids, groups)
        n_rows = X.shape[0]
        if n_rows < 2:
            raise InvalidInput(
                f"there is 1 sample (n_samples = {n_rows}), expected at least 2: one to learn, one to keep"
            )
        owners = None if groups is None else as_ids(groups, n_rows, name="groups")
        names = np.arange(n_rows) if ids is None else as_ids(ids, n_rows)
        if len(np.unique(names)) < n_rows:
            raise DuplicateId(
                f"there are {len(np.unique(names)):,} different ids for {n_rows:,} rows, expected as many"
            )
        rows = Rows(X, y, self._targets_of(y), names, owners)
        params = self._routed(fit_params, owners)
        fitting = Fitting(
            self.estimator,
            self._task,
            self._said,
            self.residuals,
            self.cv,
            self.metric,
            grid,
            self.index,
            self.n_jobs,
            self._seed(),
        )
        seen = fitting.observe(rows, params.estimator.fit, params.splitter.split)
        weightless = _weightless(fit_params, n_rows)
        seen = seen if weightless is None else seen.without(weightless)
        rows = rows.some(seen.rows)
        fitting.warn_without_energy(rows.targets, seen.predictions)
        self.estimator_ = seen.estimator
        self._remember(rows, seen.predictions, fitting.remember(rows, seen, self._kinds(rows.X)), grid)

    def _remember(self, rows: Rows, said: Float[ndarray, "m c"], found: Remembered, grid: Grid) -> None:
        """Put the rows into the memory, and turn what was chosen by folds into a setting for it."""
        self.keys_, self._embedding, self._metric = found.name, found.embedding, found.metric
        self.memory_ = Memory.create(
            self.memory,
            dim=found.keys.shape[1],
            n_outputs=said.shape[1],
            task=self._task,
            class_names=self._class_names(),
            key_dtype="float64",
            prediction_dtype="float64",
        )
        self.memory_.append(found.keys, rows.targets, said, rows.ids, rows.groups)
        self.evaluation_: Evaluation | None = found.chosen.evaluation if found.chosen else None
        self._helps = found.chosen is not None and found.chosen.helps
        setting = self._trusted(found.chosen, grid, len(rows))
        # Folds have fewer rows than the memory: what was given may fit now where it did not there.
        k = min(setting.n_neighbors if self.n_neighbors == "auto" else int(self.n_neighbors), len(rows))
        unit = ResidualKNN(self.memory_, n_neighbors=k, index=self.index).bandwidth
        assert not isinstance(setting.bandwidth, str)
        bandwidth = setting.bandwidth * (1.0 if grid.absolute or setting.local else unit)
        reach = max((fold.reach(setting.n_neighbors) for fold in found.folds), default=np.inf)
        limit = self.max_distance if self.max_distance != "auto" else unit * reach if 0 < reach < np.inf else None
        self._error_scale = error_scale(found.folds, setting) if self._task == "regression" and found.folds else None
        self.setting_ = replace(setting, n_neighbors=k, bandwidth=bandwidth, max_distance=limit)
        self.memory_.save_setting(self.setting_.to_dict())
        self._knn = self.setting_.knn(self.memory_, index=self.index)

    def _trusted(self, chosen: Chosen | None, grid: Grid, n_rows: int) -> Setting:
        """What was chosen, without the memory where that does not help, unless it was asked for."""
        given = self.shrinkage != "auto"
        if chosen is not None:
            return chosen.setting if chosen.helps or given else chosen.setting.without_memory()
        share, amount = grid.amounts[0]
        shape = replace(grid.shapes(n_rows)[0], temperature=1.0 if self.temperature == "auto" else self.temperature)
        return replace(shape, residual_share=share, shrinkage=amount) if given else shape.without_memory()

    @property
    def verdict_(self) -> str:
        """One line: what the memory gains on held-out rows, or that it does not help."""
        check_is_fitted(self)
        if self.evaluation_ is None:
            return f"no gain: too few rows to tell ({len(self.memory_)}, expected at least {FEWEST_ROWS})"
        if self._helps or not self.evaluation_.helps:
            return self.evaluation_.verdict
        return f"no gain: do not deploy (fewer rows are right, though log-loss says: {self.evaluation_.verdict})"

    def _kinds(self, X: Any) -> dict[str, Embedding]:
        """The kinds of keys to choose from, by name."""
        classes = self._task == "classification"
        if self.embed is None or (isinstance(self.embed, str) and self.embed == "auto"):
            names = natural_channels(self.estimator_, X)
            return {name: embedding_named(name, classifier=classes) for name in names}
        name = self.embed if isinstance(self.embed, str) else type(self.embed).__name__
        return {name: embedding_named(self.embed, classifier=classes)}

    # ------------------------------------------------------------------ changing the memory

    def partial_fit(
        self,
        X: Any,
        y: Any,
        ids: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        classes: ArrayLike | None = None,
        **fit_params: Any,
    ) -> "_ResMem":
        """Add rows to the memory; the base stays as it is. The first call is `fit`.

        Parameters
        ----------
        X, y, ids, groups : as in `fit`.
        classes : of a classification, all labels that will ever come. Others may come later too, where the memory is
            in RAM: it is then made anew with room for them.

        Raises
        ------
        InvalidInput, DuplicateId : if the rows do not fit; nothing is added.
        """
        if not hasattr(self, "memory_"):
            self._expected = None if classes is None else np.unique(np.asarray(classes))
            try:
                return self.fit(X, y, ids=ids, groups=groups, **fit_params)
            finally:
                del self._expected
        validate_data(self, X, y, reset=False, skip_check_array=True)
        X = self._as_rows(X)
        check_consistent_length(X, y, ids, groups)
        with _as_it_was_on_error(self):  # room may be made for classes that then do not come
            targets = self._further_targets(y)
            said = self._said(self.estimator_, X)
            self.memory_.append(self._keys(X, said), targets, said, ids, groups)
        return self

    def forget(self, ids: ArrayLike) -> "_ResMem":
        """Take rows out of the memory at once; the base still remembers what it learned of them.

        Raises
        ------
        UnknownId : if the memory does not hold one of the ids; nothing is forgotten.
        """
        check_is_fitted(self)
        self.memory_.forget(ids)
        return self

    # ------------------------------------------------------------------ asking

    def kneighbors(
        self, X: Any = None, n_neighbors: int | None = None, return_distance: bool = True
    ) -> tuple[Float[ndarray, "q k"], Shaped[ndarray, "q k"]] | Shaped[ndarray, "q k"]:
        """The ids of the nearest memories, and their distances.

        Parameters
        ----------
        X : queries; None asks for the neighbours of the memory's own rows, themselves left out.
        n_neighbors : by default that of the setting.
        """
        check_is_fitted(self)
        own = self.memory_.snapshot
        k = self.setting_.n_neighbors if n_neighbors is None else as_count("n_neighbors", n_neighbors)
        alive = np.flatnonzero(own.alive)
        keys = own.keys.take(alive) if X is None else self.observe(X)[0]
        snapshot, found = self._knn.search(keys, k, own.ids if X is None else None)
        missing: Any = "" if own.all_ids.dtype.kind == "U" else -1
        ids = np.where(found.rows >= 0, snapshot.all_ids[np.maximum(found.rows, 0)], missing)
        return (found.distances, ids) if return_distance else ids

    def explain(self, X: Any) -> Explanation:
        """Which memories corrected each prediction, and by how much; of classes in the order of `classes_`."""
        keys, said = self.observe(X)
        base = self.setting_.tempered(said, self._task)
        shares = {"shrinkage": self.setting_.shrinkage, "residual_share": self.setting_.residual_share}
        found = explain(self._knn, keys, base, **shares)
        return replace(
            found, contributions=self._in_order(found.contributions), corrected=self._in_order(found.corrected)
        )

    def label_issues(self) -> Any:
        """The memory's rows, those first whose label the base and their neighbours contradict.

        Returns
        -------
        A pandas data frame: `id`, `label`, `suggestion` (what they say instead), `score` (higher is worse; of classes
        from 0 to 1, of values in deviations of such errors) and `agreement` (the part of the neighbours with this
        label; of values, of those whose residual has the same sign).

        References
        ----------
        Northcutt et al., "Confident learning: estimating uncertainty in dataset labels", JAIR 2021, whose
        self-confidence the score takes the mean of with the neighbours'.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtra("label_issues", "sklearn") from error
        check_is_fitted(self)
        snapshot = self.memory_.snapshot
        rows = np.flatnonzero(snapshot.alive)
        keys, said, targets = snapshot.keys.take(rows), snapshot.predictions(rows), snapshot.targets(rows)
        issues = self._issues(keys, said, targets, snapshot.ids)
        return pd.DataFrame({"id": snapshot.ids, **issues}).sort_values("score", ascending=False, ignore_index=True)

    def observe(self, X: Any) -> tuple[Keys, Float[ndarray, "q c"]]:
        """Keys of rows, and what the base says of them, in the order of the memory's classes."""
        check_is_fitted(self)
        X = self._as_rows(X)
        validate_data(self, X, reset=False, skip_check_array=True)
        said = self._said(self.estimator_, X)
        return self._keys(X, said), said

    def _keys(self, X: Any, said: Float[ndarray, "q c"]) -> Keys:
        keys = self._embedding.keys(X, self.estimator_, said)
        return keys if self._metric is None else keys @ self._metric

    # ------------------------------------------------------------------ what scikit-learn asks for

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_knn", None)  # made again from the memory
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "memory_" in state:
            self._knn = self.setting_.knn(self.memory_, index=self.index)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "memory_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator)
        tags.input_tags = copy.copy(inner.input_tags)
        tags.target_tags.required = True
        tags.non_deterministic = inner.non_deterministic
        tags.array_api_support = False
        return tags

    def get_metadata_routing(self) -> MetadataRouter:
        """What goes where: `fit` parameters to the base, groups to the splitter."""
        to_fit = MethodMapping().add(caller="fit", callee="fit").add(caller="partial_fit", callee="fit")
        to_split = MethodMapping().add(caller="fit", callee="split").add(caller="partial_fit", callee="split")
        router = MetadataRouter(owner=self).add_self_request(self).add(estimator=self.estimator, method_mapping=to_fit)
        splitter = check_cv(self.cv, classifier=self._task == "classification")
        return router.add(splitter=splitter, method_mapping=to_split)

    def _routed(self, fit_params: dict[str, Any], groups: Any) -> Bunch:
        """What of it goes to the base, and what to the splitter."""
        split = {} if groups is None else {"groups": groups}
        if get_config()["enable_metadata_routing"]:
            return process_routing(self, "fit", **fit_params, **split)
        if others := sorted(set(fit_params) - {"sample_weight"}):
            raise InvalidInput(
                f"fit was given {', '.join(others)}, which is only supported if enable_metadata_routing=True; "
                "use sklearn.set_config, and the base's set_fit_request"
            )
        return Bunch(estimator=Bunch(fit=fit_params), splitter=Bunch(split=split))

    # ------------------------------------------------------------------ inside

    def _checked_options(self) -> Grid:
        """Refuse options that cannot be used, and narrow the grid to those that are given."""
        if self.residuals not in RESIDUALS:
            raise InvalidInput(f"residuals is {self.residuals!r}, expected one of {', '.join(map(repr, RESIDUALS))}")
        if self.metric not in METRICS:
            raise InvalidInput(f"metric is {self.metric!r}, expected 'auto', None, 'diagonal' or 'full'")
        embedding_named("input" if self.embed in (None, "auto") else self.embed, classifier=True)
        given: dict[str, Any] = {}
        if (k := _given(as_count, "n_neighbors", self.n_neighbors)) is not None:
            given |= {"n_neighbors": (k,), "kriging_neighbors": (k,)}
        if (bandwidth := _given(as_positive, "bandwidth", self.bandwidth)) is not None:
            given |= {"bandwidths": (bandwidth,), "ranges": (bandwidth,), "absolute": True, "kernels": ("exponential",)}
        if (temperature := _given(as_positive, "temperature", self.temperature)) is not None:
            given["temperatures"] = (temperature,)
        if (amount := _given(as_non_negative, "shrinkage", self.shrinkage)) is not None:
            given |= {"shrinkages": (amount,), "residual_shares": (1.0,)}
        if (share := _given(as_fraction, "residual_share", self.residual_share)) is not None:
            given["residual_shares"] = (share,)
        if self.kernel != "auto":
            check_kernel(self.kernel)
            given["kernels"] = (self.kernel,)
        if self.max_distance is not None:
            _given(as_positive, "max_distance", self.max_distance)
        parse_spec(self.index)
        if self.memory is not None:
            require_empty(self.memory)  # better now than after the base was fitted six times
        return Grid(**given)

    def _seed(self) -> int:
        """One number from `random_state`, which stays as it is."""
        if self.random_state is None:
            return 0
        return int(check_random_state(copy.deepcopy(self.random_state)).randint(2**31 - 1))

    @staticmethod
    def _as_rows(X: Any) -> Any:
        """Tables that have rows as they are, everything else as an array."""
        if issparse(X):
            return X.tocsr()
        rows = X if isinstance(X, ndarray) or hasattr(X, "columns") else np.asarray(X)
        if len(rows.shape) != 2:
            raise InvalidInput(
                f"X has shape {rows.shape}, expected two axes: rows and columns. Reshape your data by "
                "X.reshape(-1, 1) if it has one column, or X.reshape(1, -1) if it is one row"
            )
        return rows


def _given(check: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """An option as it was given, checked; None where it is to be chosen."""
    if isinstance(value, str) and value == "auto":
        return None
    try:
        return check(name, value)
    except InvalidInput as error:
        raise InvalidInput(f"{error}, or 'auto'") from None


@contextmanager
def _as_it_was_on_error(estimator: BaseEstimator) -> Iterator[None]:
    """Whatever interrupts what is done inside leaves the estimator with the attributes that it had."""
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise


def _weightless(fit_params: Mapping[str, Any], n_rows: int) -> Bool[ndarray, " n"] | None:
    weights = fit_params.get("sample_weight")
    if weights is None or np.shape(weights) != (n_rows,):
        return None
    none = np.asarray(weights) == 0
    return none if none.any() and not none.all() else None


class ResMemRegressor(RegressorMixin, _ResMem):
    """A regressor with a memory of what it could not learn: prediction + weighted residuals of the nearest rows.

    Parameters
    ----------
    estimator : any regressor, of one output or several; a `FrozenEstimator` is used as it is, and the rows given to
        `fit` are then only remembered: give it rows that it was not fitted on.
    embed : what keys are made of: "input" (columns of any kind, scaled), "unscaled" (numbers as they are), "hidden"
        (last hidden layer of an MLP), "leaves" (of forests and boosted trees), "predict", a transformer, or a function
        of the rows. None and "auto" choose by held-out loss among the columns and what the base has.
    metric : on keys that did not see labels: None is Euclidean, "diagonal" weighs their numbers by learning, "full"
        mixes them too, "auto" chooses. Where the bandwidth is a number, distances are left as they are.
    n_neighbors, bandwidth, kernel, temperature, shrinkage, residual_share, max_distance : as in `ResidualKNN`,
        `correct` and `Setting`; "auto" chooses by held-out loss, and takes a shrinkage of 0 where the memory does not
        help. Where shrinkage is a number, the residual share is 1, the paper's, unless it is given; where the
        bandwidth is a number, the kernel is "exponential", likewise. A `max_distance` of "auto" lets the base stand
        alone beyond all that was seen in `fit`; None sets no limit.
    residuals : "out_of_fold" takes the predictions of the folds' models; "in_sample" those of the base on its own
        training rows, as the paper does, right for a base that does not know them by heart; "held_out" fits the base
        without the first fold and remembers that one alone.
    cv : number of folds, a splitter, or splits. Folds of a number are shuffled.
    index : as in `ResidualKNN`.
    memory : directory for the memory, new or empty; None keeps it in RAM.
    n_jobs : folds fitted at a time.
    random_state : of folds and samples; None is the same every time.

    Attributes
    ----------
    estimator_ : the fitted base.
    memory_ : the `Memory`.
    setting_ : the `Setting`, with bandwidths as distances.
    keys_ : which keys were chosen.
    evaluation_ : base, memory-only and corrected on held-out rows, cross-fitted; None with too few rows.
    verdict_ : what that comes to, in one line.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from sklearn.linear_model import Ridge
    >>> X, y = load_diabetes(return_X_y=True)
    >>> ResMemRegressor(Ridge()).fit(X, y).predict(X[:2]).shape
    (2,)

    References
    ----------
    Yang et al., "ResMem: Learn what you can and memorize the rest", NeurIPS 2023. Quinlan, "Combining instance-based
    and model-based learning", ICML 1993.
    """

    _task = "regression"

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Corrected values, shaped as `y` was.

        Parameters
        ----------
        return_std : give also an estimate of each error: what the correction leaves of the neighbours' residuals,
            scaled so that 95 % of the held-out rows of `fit` lie within 1.96 of it.

        Raises
        ------
        InvalidInput : if an error estimate is asked for that was fitted on too few rows.
        """
        keys, said = self.observe(X)
        found = self._knn.look_up(keys, labels=self.setting_.residual_share != 1)
        corrected = self.setting_.corrected(said, found, "regression")[1]
        values = self._shaped(corrected)
        if not return_std:
            return values
        if self._error_scale is None:
            raise InvalidInput(
                f"the memory was fitted on {len(self.memory_)} rows, too few to tell its errors; "
                f"fit at least {FEWEST_ROWS}"
            )
        factor, offset = self._error_scale
        spread = np.nan_to_num(self._knn.spread(keys, around=corrected - said), nan=np.inf)
        return values, self._shaped(factor * (spread + offset))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags = copy.copy(get_tags(self.estimator).target_tags)
        tags.target_tags.required = True
        tags.regressor_tags = copy.copy(get_tags(self.estimator).regressor_tags)
        return tags

    def _checked_labels(self, y: Any) -> Any:
        values = check_array(y, ensure_2d=False, dtype="numeric", input_name="y", estimator=self)
        if values.dtype.kind not in "iufb":
            raise InvalidInput(f"y holds {values.dtype}, expected numbers")
        if values.ndim == 2 and values.shape[1] == 1 and not get_tags(self.estimator).target_tags.multi_output:
            values = column_or_1d(values, warn=True)
        if values.ndim > 2:
            raise InvalidInput(f"y has shape {values.shape}, expected one value a row, or one row of values")
        self._flat = values.ndim == 1
        self._n_outputs = 1 if self._flat else values.shape[1]
        return values

    def _targets_of(self, y: Any) -> Float[ndarray, "n c"]:
        return np.asarray(y, np.float64).reshape(-1, self._n_outputs)

    def _further_targets(self, y: Any) -> Float[ndarray, "n c"]:
        values = np.asarray(check_array(y, ensure_2d=False, dtype="numeric", input_name="y", estimator=self))
        if values.ndim > 2 or values.size != len(values) * self._n_outputs:
            raise InvalidInput(f"y has shape {values.shape}, expected {self._n_outputs} values a row")
        return np.asarray(values, np.float64).reshape(-1, self._n_outputs)

    def _said(self, model: Any, X: Any) -> Float[ndarray, "n c"]:
        return np.asarray(model.predict(X), np.float64).reshape(-1, self._n_outputs)

    def _class_names(self) -> None:
        return None

    def _shaped(self, values: Float[ndarray, "q c"]) -> Float[ndarray, "q ..."]:
        return values[:, 0] if self._flat else values

    def _in_order(self, values: Float[ndarray, "... c"]) -> Float[ndarray, "... c"]:
        return values

    def _issues(
        self,
        keys: Keys,
        said: Float[ndarray, "n c"],
        targets: Float[ndarray, "n c"],
        ids: Shaped[ndarray, " n"],
    ) -> dict[str, Any]:
        found = self._knn.look_up(keys, ids, labels=True)
        amount = self.setting_.shrinkage or 1.0
        suggestion = correct(said, found.correction(said, self.setting_.residual_share), amount)
        error = targets - suggestion
        left = self._knn.spread(keys, ids, around=suggestion - said)
        spread = np.maximum(left, np.finfo(float).tiny)
        scale = np.median(np.abs(error) / spread, axis=0) / 0.6745
        score = (np.abs(error) / (spread * np.where(scale > 0, scale, 1.0))).max(axis=1)
        _, parts = self._knn.contributions(keys, ids)
        same = (np.sign(parts) == np.sign(targets - said)[:, None]).mean(axis=(1, 2))
        return {
            "label": self._listed(targets),
            "suggestion": self._listed(suggestion),
            "score": score,
            "agreement": same,
        }

    def _listed(self, values: Float[ndarray, "n c"]) -> Any:
        return values[:, 0] if self._n_outputs == 1 else list(values)


class ResMemClassifier(ClassifierMixin, _ResMem):
    """A classifier with a memory of what it could not learn: probabilities + weighted residuals of the nearest rows.

    Parameters
    ----------
    estimator : any classifier with `predict_proba`; with `decision_function` alone, its scores go through a softmax,
        and a warning says so. A `FrozenEstimator` is used as it is, and the rows given to `fit` are then only
        remembered: give it rows that it was not fitted on.
    embed : as in `ResMemRegressor`, and "predict_proba".
    metric, n_neighbors, bandwidth, kernel, temperature, shrinkage, residual_share, max_distance, residuals, cv, index,
        memory, n_jobs, random_state : as in `ResMemRegressor`. Settings are chosen by log-loss.

    Attributes
    ----------
    classes_ : the labels, in the order of all columns.
    estimator_, memory_, setting_, keys_, evaluation_, verdict_ : as in `ResMemRegressor`; in the evaluation the base is
        at its own best temperature, so that the memory gets no credit for calibration alone.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> from sklearn.naive_bayes import GaussianNB
    >>> X, y = load_wine(return_X_y=True)
    >>> ResMemClassifier(GaussianNB()).fit(X, y).predict_proba(X[:2]).shape
    (2, 3)

    References
    ----------
    Yang et al., "ResMem: Learn what you can and memorize the rest", NeurIPS 2023.
    """

    _task = "classification"

    def predict(self, X: Any) -> Shaped[ndarray, " q"]:
        """The labels of the largest corrected score."""
        _, scores = self._scores(X)
        return self.classes_[self._in_order(scores).argmax(axis=1)]

    def predict_proba(self, X: Any) -> Float[ndarray, "q c"]:
        """Valid corrected probabilities, columns as in `classes_`, none below a hundredth of 1 / classes.

        They grow with the scores of `decision_function`. A memory that does not help, or is empty, leaves the base's
        own, to the last bit.
        """
        said, scores = self._scores(X)
        if not self.setting_.shrinkage or not len(self.memory_):
            return self._in_order(said)
        untouched = (scores == said).all(axis=1)
        kept = untouched & (said.min(axis=1) >= PROBABILITY_FLOOR / said.shape[1])
        return self._in_order(np.where(kept[:, None], said, valid_probabilities(scores)))

    def predict_log_proba(self, X: Any) -> Float[ndarray, "q c"]:
        """Logarithms of `predict_proba`; −inf where the base gives 0 and the memory adds nothing."""
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

    def decision_function(self, X: Any) -> Float[ndarray, "q ..."]:
        """Corrected scores as they are: base probabilities + correction, which sum to 1 but may be negative.

        Of two classes the difference of the second and the first.
        """
        _, scores = self._scores(X)
        ordered = self._in_order(scores)
        return ordered[:, 1] - ordered[:, 0] if ordered.shape[1] == 2 else ordered

    def _scores(self, X: Any) -> tuple[Float[ndarray, "q c"], Float[ndarray, "q c"]]:
        """The base's probabilities and the corrected scores, in the memory's order of classes."""
        keys, said = self.observe(X)
        if not self.setting_.shrinkage:
            return said, said
        found = self._knn.look_up(keys, labels=self.setting_.residual_share != 1)
        base, scores = self.setting_.corrected(said, found, "classification")
        return said, np.where((scores == base).all(axis=1)[:, None], said, scores)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags = copy.copy(get_tags(self.estimator).classifier_tags)
        if tags.classifier_tags is not None:
            tags.classifier_tags.multi_label = False
        tags.target_tags.multi_output = False
        return tags

    def _checked_labels(self, y: Any) -> Any:
        y = np.asarray(y)
        assert_all_finite(y, input_name="y")
        kind = type_of_target(y, input_name="y")
        if kind in ("multilabel-indicator", "multiclass-multioutput"):
            raise InvalidInput(
                f"y is {kind}, but a memory of classes holds one label a row; fit one ResMemClassifier a column, "
                "for example by sklearn.multioutput.MultiOutputClassifier"
            )
        check_classification_targets(y)
        if np.ndim(y) == 2:
            warnings.warn(
                "A column-vector y was passed when a 1d array was expected. Please change the shape of y to "
                "(n_samples,), for example using ravel().",
                DataConversionWarning,
                stacklevel=3,
            )
        labels = column_or_1d(y)
        self.classes_ = np.unique(labels)
        expected = getattr(self, "_expected", None)
        if expected is not None:
            if len(missing := np.setdiff1d(self.classes_, expected)):
                raise InvalidInput(f"y holds {missing.tolist()[0]!r}, which is not among the classes that were given")
            self.classes_ = expected
        self._order = np.arange(len(self.classes_))  # of the memory's columns
        self._n_outputs = len(self.classes_)
        return labels

    def _targets_of(self, y: Any) -> Int64[ndarray, " n"]:
        """Columns of the memory."""
        return self._order[np.searchsorted(self.classes_, y)]

    def _further_targets(self, y: Any) -> Int64[ndarray, " n"]:
        check_classification_targets(y)
        labels = column_or_1d(y)
        fresh = np.setdiff1d(labels, self.classes_)
        if len(fresh):
            self._make_room(fresh)
        return self._targets_of(labels)

    def _make_room(self, fresh: Shaped[ndarray, " f"]) -> None:
        """Columns for labels that never came before: the memory in RAM is made anew, wider."""
        if self.memory_.path is not None:
            raise InvalidInput(
                f"y holds {fresh.tolist()[0]!r}, for which the memory at {self.memory_.path} has no room; name all "
                "labels in `classes` of the first partial_fit, or keep the memory in RAM"
            )
        columns = np.concatenate([self._order, np.arange(self._n_outputs, self._n_outputs + len(fresh))])
        classes = np.concatenate([self.classes_, fresh])
        order = np.argsort(classes)
        wider = _widened(self.memory_, [str(name) for name in self._by_column(classes, columns)])
        self.classes_, self._order = classes[order], columns[order]
        self._n_outputs = len(classes)
        self.memory_ = wider
        self._knn = self.setting_.knn(wider, index=self.index)

    @staticmethod
    def _by_column(classes: Shaped[ndarray, " c"], columns: Int64[ndarray, " c"]) -> Shaped[ndarray, " c"]:
        return classes[np.argsort(columns)]

    def _said(self, model: Any, X: Any) -> Float[ndarray, "n c"]:
        """Probabilities, a column for each of the memory's classes."""
        given = np.asarray(_probabilities(model, X), np.float64)
        said = np.zeros((len(given), self._n_outputs))
        places = np.searchsorted(self.classes_, model.classes_)
        known = np.isin(model.classes_, self.classes_)
        if not known.all():
            raise InvalidInput(
                f"the base predicts {np.asarray(model.classes_)[~known].tolist()[0]!r}, which is no label of y; "
                "give rows of all its classes, or name them in `classes` of partial_fit"
            )
        said[:, self._order[places]] = given
        return said

    def _class_names(self) -> list[str]:
        return [str(name) for name in self.classes_]

    def _in_order(self, values: Float[ndarray, "... c"]) -> Float[ndarray, "... c"]:
        return values[..., self._order]

    def _issues(
        self, keys: Keys, said: Float[ndarray, "n c"], targets: Integer[ndarray, " n"], ids: Shaped[ndarray, " n"]
    ) -> dict[str, Any]:
        near = np.clip(self._knn.memory_only(keys, ids), 0, 1)
        both = (said + near) / 2
        rows, labels = np.arange(len(targets)), self._by_column(self.classes_, self._order)
        return {
            "label": labels[targets],
            "suggestion": labels[both.argmax(axis=1)],
            "score": 1 - both[rows, targets],
            "agreement": near[rows, targets],
        }


def _probabilities(model: Any, X: Any) -> Float[ndarray, "n c"]:
    if hasattr(model, "predict_proba"):
        return model.predict_proba(X)
    if not hasattr(model, "decision_function"):
        raise InvalidInput(
            f"{type(model).__name__} has neither predict_proba nor decision_function, so it leaves no residuals; "
            "wrap it in sklearn.calibration.CalibratedClassifierCV"
        )
    warnings.warn(
        f"{type(model).__name__} gives no probabilities, so its scores went through a softmax; "
        "sklearn.calibration.CalibratedClassifierCV gives better ones",
        UncalibratedScores,
        stacklevel=4,
    )
    scores = np.asarray(model.decision_function(X), np.float64)
    scores = np.column_stack([-scores / 2, scores / 2]) if scores.ndim == 1 else scores
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _widened(memory: Memory, names: list[str]) -> Memory:
    """The same rows with room for more classes."""
    snapshot, layout = memory.snapshot, memory.layout
    wider = Memory.create(
        dim=layout.dim,
        n_outputs=len(names),
        class_names=names,
        key_dtype=layout.key_dtype,
        prediction_dtype=layout.prediction_dtype,
    )
    rows = np.flatnonzero(snapshot.alive)
    groups = snapshot.all_groups
    wider.append(
        snapshot.keys.take(rows),
        snapshot.targets(rows),
        snapshot.predictions(rows),
        snapshot.ids,
        None if groups is None else groups[rows],
    )
    if memory.setting is not None:
        wider.save_setting(memory.setting)
    return wider
