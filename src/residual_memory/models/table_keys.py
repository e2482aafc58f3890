"""Keys for the rows of a table: scaled columns, or what a fitted estimator makes of a row."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray

from residual_memory.errors import InvalidInput, MissingExtra

try:
    from scipy.sparse import csr_matrix, issparse
    from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin, clone
    from sklearn.compose import ColumnTransformer
    from sklearn.decomposition import TruncatedSVD
    from sklearn.exceptions import NotFittedError
    from sklearn.frozen import FrozenEstimator
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import Pipeline, make_pipeline
    from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise MissingExtra("scikit-learn estimators", "sklearn") from error

MAX_COLUMNS = 256  # of a key made of columns; wider tables are projected
MAX_LEVELS = 64  # categories of one column that get a number each; rarer ones share one
FEW_LEVELS = 32  # whole numbers with no more values than this may be categories as well
MAX_SPLIT = 128  # columns, with those of such categories, up to which they are taken for both
LIKE_SIZE = 10.0  # largest deviation over the median one, up to which columns may have one unit
SKEWED = 2.0  # skewness above which a column is compressed
LEAF_COLUMNS = 4096
LEAF_COMPONENTS = 128
CHANNELS = ("input", "unscaled", "leaves", "hidden", "predict_proba", "predict")

Keys = Float[ndarray, "n d"]


class ColumnScaler(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Columns of any kind as numbers of like size: what "input" keys are.

    Numbers are filled up with the median where they are missing, compressed where they are very skewed, and scaled to
    deviation 1. Text and categories become one column a level (a whole number with few values both). Sparse and very
    wide tables are projected to their main components.

    Parameters
    ----------
    scale : False leaves numbers as they are, for columns of one unit, such as pixels.
    """

    def __init__(self, scale: bool = True) -> None:
        self.scale = scale

    def fit(self, X: Any, y: Any = None) -> "ColumnScaler":
        """Learn medians, deviations and levels."""
        if issparse(X):
            width = min(MAX_COLUMNS, X.shape[1] - 1)
            self.steps_ = TruncatedSVD(width, random_state=0) if width > 0 else StandardScaler(with_mean=False)
            self.steps_.fit(X)
            return self
        columns = _columns(X)
        kinds = [_kind(column) for column in columns]
        numbers = [place for place, kind in enumerate(kinds) if kind == "number"]
        named = [place for place, kind in enumerate(kinds) if kind == "category"]
        few = [place for place in numbers if _few_levels(columns[place])]
        total = len(columns) + sum(_n_levels(columns[place]) for place in few)
        few = few if total <= MAX_SPLIT and self.scale else []
        levels = OneHotEncoder(
            handle_unknown="infrequent_if_exist", max_categories=MAX_LEVELS, sparse_output=False, dtype=np.float64
        )
        medians = SimpleImputer(strategy="median", keep_empty_features=True)
        filled = make_pipeline(FunctionTransformer(_as_floats), medians)
        if self.scale:
            filled = make_pipeline(filled, _Compressor(), StandardScaler())
        parts: list[Any] = [("numbers", filled, numbers)]
        parts += [("levels", levels, named)] if named else []
        parts += [("few", make_pipeline(FunctionTransformer(_as_text), clone(levels)), few)] if few else []
        self.named_ = named
        self.steps_ = ColumnTransformer(parts, sparse_threshold=0)
        made = self.steps_.fit_transform(self._prepared(columns))
        if made.shape[1] > MAX_COLUMNS:
            self.steps_ = Pipeline([("columns", self.steps_), ("main", TruncatedSVD(MAX_COLUMNS, random_state=0))])
            self.steps_.fit(self._prepared(columns))
        return self

    def transform(self, X: Any) -> Keys:
        """Keys of rows with the same columns."""
        check_is_fitted(self)
        prepared = X if issparse(X) else self._prepared(_columns(X))
        made = self.steps_.transform(prepared)
        return np.asarray(made.toarray() if issparse(made) else made, np.float64)

    def _prepared(self, columns: list[ndarray]) -> ndarray:
        """Numbers as they are, levels as text, in one array."""
        if not self.named_:
            return np.column_stack([np.asarray(column, np.float64) for column in columns])
        prepared = np.empty((len(columns[0]), len(columns)), object)
        for place, column in enumerate(columns):
            prepared[:, place] = _as_text(column) if place in self.named_ else np.asarray(column, np.float64)
        return prepared


class _Compressor(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Very skewed columns through asinh, in units of their quartiles: like a logarithm far out, as they are near."""

    def fit(self, X: Any, y: Any = None) -> "_Compressor":
        values = np.asarray(X, np.float64)
        centred = values - values.mean(axis=0)
        deviation = np.sqrt(np.square(centred).mean(axis=0))
        ratio = centred / np.where(deviation > 0, deviation, 1.0)
        self.skewed_ = np.abs((ratio**3).mean(axis=0)) > SKEWED
        low, self.middle_, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
        self.unit_ = np.where(high > low, (high - low) / 1.35, np.where(deviation > 0, deviation, 1.0))
        return self

    def transform(self, X: Any) -> Keys:
        values = np.asarray(X, np.float64)
        return np.where(self.skewed_, np.arcsinh((values - self.middle_) / self.unit_), values)


def _columns(X: Any) -> list[ndarray]:
    """The columns of a data frame (of any library) or an array: numbers, or objects."""
    if hasattr(X, "columns") and not isinstance(X, ndarray):
        return [_values(X[name]) for name in X.columns]
    values = np.asarray(X)
    return [_values(values[:, place]) for place in range(values.shape[1])]


def _values(column: Any) -> ndarray:
    """A column as it is to be counted with: times as seconds, what is missing as NaN."""
    values = np.asarray(column)
    if values.dtype.kind in "mM":
        unit = "datetime64[us]" if values.dtype.kind == "M" else "timedelta64[us]"
        return np.where(np.isnat(values), np.nan, values.astype(unit).astype(np.int64) / 1e6)
    if values.dtype == object and hasattr(column, "isna"):
        return np.where(column.isna(), np.nan, values)
    return values


def _kind(column: ndarray) -> str:
    if column.dtype.kind in "iufb":
        return "number"
    try:
        column.astype(np.float64)
    except (TypeError, ValueError):
        return "category"
    return "number"


def _few_levels(column: ndarray) -> bool:
    """Whether a number may be a category: whole, with few values, more than two."""
    values = np.asarray(column, np.float64)
    if not np.isfinite(values).all() or (values != np.round(values)).any():
        return False
    return 2 < len(np.unique(values)) <= FEW_LEVELS


def _n_levels(column: ndarray) -> int:
    return len(np.unique(np.asarray(column, np.float64)))


def _as_floats(values: Any) -> Float[ndarray, "..."]:
    return np.asarray(values, np.float64)


def _as_text(values: Any) -> Shaped[ndarray, "..."]:
    array = np.asarray(values)
    return np.array([str(value) for value in array.ravel()], object).reshape(array.shape)


# ---------------------------------------------------------------------- what keys are made of


class Embedding(ABC):
    """How keys are made of rows.

    `saw_labels` says that keys of rows which an estimator was fitted on are not like keys of other rows: they are
    tuned fold by fold, by the estimators of the folds.
    """

    saw_labels: bool

    @abstractmethod
    def fit(self, X: Any, y: Any, estimator: Any) -> "Embedding":
        """Learn what keys need from rows that the estimator was fitted on."""

    @abstractmethod
    def keys(self, X: Any, estimator: Any, predictions: Float[ndarray, "n c"]) -> Keys:
        """Keys of rows, of which the base says `predictions`."""


class InputKeys(Embedding):
    """Columns as numbers."""

    saw_labels = False

    def __init__(self, scale: bool = True) -> None:
        self._scale = scale

    def fit(self, X: Any, y: Any, estimator: Any) -> "InputKeys":
        self._scaler = ColumnScaler(self._scale).fit(X)
        return self

    def keys(self, X: Any, estimator: Any, predictions: Float[ndarray, "n c"]) -> Keys:
        return self._scaler.transform(X)


class PredictionKeys(Embedding):
    """What the base says: rows are near that it takes for alike. Of probabilities the roots (Hellinger distance)."""

    saw_labels = False  # rows of the memory have their out-of-fold predictions

    def __init__(self, probabilities: bool) -> None:
        self._probabilities = probabilities

    def fit(self, X: Any, y: Any, estimator: Any) -> "PredictionKeys":
        return self

    def keys(self, X: Any, estimator: Any, predictions: Float[ndarray, "n c"]) -> Keys:
        return np.sqrt(np.maximum(predictions, 0)) if self._probabilities else np.asarray(predictions, np.float64)


class TransformerKeys(Embedding):
    """What a transformer gives: a fitted one as it is, another one fitted to the same rows as the base."""

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer
        self.saw_labels = not _is_fitted(transformer)

    def fit(self, X: Any, y: Any, estimator: Any) -> "TransformerKeys":
        if self.saw_labels:
            self._transformer = clone(self._transformer).fit(X, y)
        return self

    def keys(self, X: Any, estimator: Any, predictions: Float[ndarray, "n c"]) -> Keys:
        return _dense(self._transformer.transform(X), "the transformer of embed")


class FunctionKeys(Embedding):
    """What a function of the rows gives."""

    saw_labels = False

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def fit(self, X: Any, y: Any, estimator: Any) -> "FunctionKeys":
        return self

    def keys(self, X: Any, estimator: Any, predictions: Float[ndarray, "n c"]) -> Keys:
        return _dense(self._function(X), "the function of embed")


class LeafKeys(Embedding):
    """Leaves of a forest or of boosted trees: squared distance is the share of trees in which two rows part.

    One column a leaf would be thousands: many leaves share columns, each with a sign of its own, so that they disturb
    each other little; and of those the main components keep most of the distances.

    References
    ----------
    Weinberger et al., "Feature hashing for large scale multitask learning", ICML 2009.
    """

    saw_labels = True

    def fit(self, X: Any, y: Any, estimator: Any) -> "LeafKeys":
        leaves = leaves_of(estimator, X)
        self._n_trees = leaves.shape[1]
        self._first = np.concatenate([[0], np.cumsum(leaves.max(axis=0) + 1)])  # code of each tree's first leaf
        n_codes, random = int(self._first[-1]), np.random.default_rng(0)
        shared = n_codes > LEAF_COLUMNS
        self._columns = random.integers(0, LEAF_COLUMNS, n_codes) if shared else np.arange(n_codes)
        self._signs = random.choice([-1.0, 1.0], n_codes) if shared else np.ones(n_codes)
        marked = self._marked(leaves)
        width = min(LEAF_COMPONENTS, min(marked.shape) - 1)
        self._main = TruncatedSVD(width, n_iter=2, random_state=0).fit(marked) if width > 1 else None
        return self

    def keys(self, X: Any, estimator: Any, predictions: Float[ndarray, "n c"]) -> Keys:
        marked = self._marked(leaves_of(estimator, X))
        dense = marked.toarray() if self._main is None else self._main.transform(marked)
        return dense / np.sqrt(2 * self._n_trees)

    def _marked(self, leaves: Shaped[ndarray, "n t"]) -> csr_matrix:
        """A sparse row for each row, with a sign in the column of each of its leaves; none for leaves never seen."""
        codes = np.asarray(leaves, np.int64) + self._first[:-1]
        known = codes < self._first[1:]
        codes = np.where(known, codes, 0)
        ends = np.arange(0, codes.size + 1, self._n_trees)
        values = (self._signs[codes] * known).ravel()
        width = min(len(self._columns), LEAF_COLUMNS)
        return csr_matrix((values, self._columns[codes].ravel(), ends), shape=(len(codes), width))


class HiddenKeys(Embedding):
    """The last hidden layer of a multi-layer perceptron."""

    saw_labels = True

    def fit(self, X: Any, y: Any, estimator: Any) -> "HiddenKeys":
        self._scaler = StandardScaler().fit(hidden_of(estimator, X))
        return self

    def keys(self, X: Any, estimator: Any, predictions: Float[ndarray, "n c"]) -> Keys:
        return self._scaler.transform(hidden_of(estimator, X))


def embedding_named(embed: Any, *, classifier: bool) -> Embedding:
    """From what a user passes as `embed` to how keys are made.

    Raises
    ------
    InvalidInput : if it is nothing that makes keys.
    """
    match embed:
        case "input":
            return InputKeys()
        case "unscaled":
            return InputKeys(scale=False)
        case "leaves":
            return LeafKeys()
        case "hidden":
            return HiddenKeys()
        case "predict_proba" | "predict":
            return PredictionKeys(classifier)
    if isinstance(embed, Embedding):
        return embed
    if hasattr(embed, "transform"):
        return TransformerKeys(embed)
    if callable(embed):
        return FunctionKeys(embed)
    known = ", ".join(map(repr, ("auto", *CHANNELS)))
    raise InvalidInput(f"embed is {embed!r}, expected one of {known}, a transformer, or a function of the rows")


def natural_channels(estimator: Any, X: Any) -> list[str]:
    """Kinds of keys that are worth trying for a fitted estimator and its rows."""
    core = core_of(estimator)[0]
    names = ["input", "unscaled"] if _one_unit(X) else ["input"]
    if hasattr(core, "coefs_") and hasattr(core, "intercepts_"):
        return [*names, "hidden"]
    return [*names, "leaves"] if hasattr(core, "apply") and hasattr(core, "n_estimators") else names


def _one_unit(X: Any) -> bool:
    """Whether all columns are numbers of like size, so that their unit may mean something."""
    if issparse(X):
        return False
    columns = _columns(X)
    if len(columns) < 2 or any(_kind(column) != "number" for column in columns):
        return False
    deviations = np.array([np.nanstd(_as_floats(column)) for column in columns])
    deviations = deviations[deviations > 0]
    return len(deviations) > 1 and bool(deviations.max() <= LIKE_SIZE * np.median(deviations))


def core_of(estimator: Any, X: Any = None) -> tuple[Any, Any]:
    """The estimator that predicts, inside pipelines, searches and wrappers, and the rows as it sees them."""
    while True:
        if isinstance(estimator, Pipeline):
            X = X if X is None or len(estimator) < 2 else estimator[:-1].transform(X)
            estimator = estimator[-1]
            continue
        inner = next((name for name in ("regressor_", "best_estimator_") if hasattr(estimator, name)), None)
        if inner is not None:
            estimator = getattr(estimator, inner)
        elif isinstance(estimator, FrozenEstimator):
            estimator = estimator.estimator
        else:
            return estimator, X


def leaves_of(estimator: Any, X: Any) -> Shaped[ndarray, "n t"]:
    """The leaf of each row in each tree.

    Raises
    ------
    InvalidInput : if the estimator has no trees that tell their leaves.
    """
    core, rows = core_of(estimator, X)
    if hasattr(core, "apply"):
        leaves = np.asarray(core.apply(rows))
    elif type(core).__module__.startswith("lightgbm"):
        leaves = np.asarray(core.predict(rows, pred_leaf=True))
    else:
        raise InvalidInput(
            f"{type(core).__name__} does not tell the leaves of its trees, so embed='leaves' has no keys; "
            "use embed='input', or a forest"
        )
    return leaves.reshape(len(leaves), -1)


def hidden_of(estimator: Any, X: Any) -> Keys:
    """The activations of the last hidden layer of scikit-learn's MLPClassifier or MLPRegressor.

    Raises
    ------
    InvalidInput : if the estimator is none.
    """
    core, rows = core_of(estimator, X)
    if not hasattr(core, "coefs_") or not hasattr(core, "activation"):
        raise InvalidInput(
            f"{type(core).__name__} has no hidden layer that can be read, so embed='hidden' has no keys; "
            "use embed='input', or a function"
        )
    functions: dict[str, Callable[[ndarray], ndarray]] = {
        "relu": lambda values: np.maximum(values, 0),
        "tanh": np.tanh,
        "logistic": lambda values: 1 / (1 + np.exp(-np.clip(values, -500, 500))),
        "identity": lambda values: values,
    }
    activate = functions[core.activation]
    values = np.asarray(rows.toarray() if issparse(rows) else rows, np.float64)
    for weights, intercepts in list(zip(core.coefs_, core.intercepts_, strict=True))[:-1]:
        values = activate(values @ weights + intercepts)
    return values


def _is_fitted(transformer: Any) -> bool:
    try:
        check_is_fitted(transformer)
    except (NotFittedError, TypeError):
        return False
    return True


def _dense(made: Any, name: str) -> Keys:
    if hasattr(made, "to_numpy"):
        made = made.to_numpy()
    keys = np.asarray(made.toarray() if issparse(made) else made, np.float64)
    keys = keys[:, None] if keys.ndim == 1 else keys
    if keys.ndim != 2 or not np.isfinite(keys).all():
        raise InvalidInput(f"{name} gave shape {keys.shape}, expected finite numbers, one row an example")
    return keys
