"""The table of tables: any scikit-learn estimator with a memory, beside the memory alone, Cubist and kriging.

    python -m experiments tabular

Five folds, each an 80/20 split, whose test rows are pooled: every row of a data set is tested once. Bases, memories and
peers see the same training rows, and nothing is chosen on test rows.
"""

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64
from numpy import ndarray
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor, make_column_selector, make_column_transformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

from experiments.results_file import RESULTS, ResultFile, Row
from residual_memory.demo.cifar100 import user_cache
from residual_memory.errors import DataNotFound
from residual_memory.evaluation import summarize
from residual_memory.metrics import correctness, log_losses, squared_errors
from residual_memory.models.sklearn import ResMemClassifier, ResMemRegressor
from residual_memory.models.table_tuning import valid_probabilities

N_FOLDS = 5
KRIGING_ROWS = 4_000  # PyKrige fits its variogram to all pairs of rows
WHERE = {"california": ["longitude", "latitude"]}  # columns that are places


@dataclass(frozen=True)
class Table:
    """A data set.

    Attributes
    ----------
    levels : columns of numbers that linear models and networks take as categories.
    """

    name: str
    X: pd.DataFrame
    y: ndarray
    classes: bool = False
    levels: tuple[str, ...] = ()

    def some(self, n_rows: int) -> "Table":
        rows = np.sort(np.random.default_rng(0).permutation(len(self.y))[:n_rows])
        return Table(self.name, self.X.iloc[rows].reset_index(drop=True), self.y[rows], self.classes, self.levels)


def where_tables_lie() -> Path:
    """Where the tables lie: $RESMEM_DATA, or the user cache."""
    return Path(os.environ.get("RESMEM_DATA", user_cache())) / "tabular"


def _read(name: str) -> pd.DataFrame:
    path = where_tables_lie() / name
    if not path.exists():
        raise DataNotFound(f"{path} is not there; run `make data`, or put it there and name the folder in RESMEM_DATA")
    return pd.read_csv(path)


def california() -> Table:
    """Median house value of 20,640 blocks, in units of 100,000 dollars."""
    data = _read("california_housing.csv")
    return Table("california", data, data.pop("median_house_value").to_numpy() / 1e5)


def bike() -> Table:
    """Rented bikes of 17,379 hours, from the hour, the day's kind and the weather; not the date, nor the parts."""
    data = _read("bike_sharing_hour.csv")
    y = data["count"].to_numpy(float)
    data = data.drop(columns=["count", "casual", "registered", "instant", "dateday"])
    return Table("bike", data, y, levels=("season", "month", "hour", "weekday", "weathersit"))


def diamonds() -> Table:
    """The logarithm of the price of 20,000 diamonds, drawn from 53,940 for the time that forests take."""
    data = _read("diamonds.csv")
    return Table("diamonds", data, np.log(data.pop("price").to_numpy(float))).some(20_000)


def _shipped(name: str, load: Callable[..., Any], classes: bool) -> Table:
    X, y = load(return_X_y=True, as_frame=True)
    return Table(name, X, y.to_numpy(), classes)


TABLES: dict[str, Callable[[], Table]] = {
    "california": california,
    "bike": bike,
    "diamonds": diamonds,
    "diabetes": lambda: _shipped("diabetes", load_diabetes, False),
    "digits": lambda: _shipped("digits", load_digits, True),
    "wine": lambda: _shipped("wine", load_wine, True),
    "breast cancer": lambda: _shipped("breast cancer", load_breast_cancer, True),
}


def bases(table: Table) -> dict[str, Any]:
    """A linear model, a network, a forest and boosted trees, with what each needs of preparation."""
    named = make_column_selector(dtype_exclude="number")(table.X)
    levels = [*named, *table.levels]
    numbers = [name for name in table.X.columns if name not in levels]
    wide = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), levels),
        (make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numbers),
    )
    codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    narrow = make_column_transformer((codes, named), remainder=SimpleImputer(strategy="median"))
    network: dict[str, Any] = {
        "hidden_layer_sizes": (256, 128),
        "alpha": 1e-3,
        "early_stopping": len(table.y) > 2_000,
        "max_iter": 200,
        "random_state": 0,
    }
    if table.classes:
        return {
            "linear": make_pipeline(clone(wide), LogisticRegression(max_iter=2_000)),
            "mlp": make_pipeline(clone(wide), MLPClassifier(**network)),
            "forest": make_pipeline(clone(narrow), RandomForestClassifier(300, random_state=0, n_jobs=2)),
            "boosting": make_pipeline(clone(narrow), HistGradientBoostingClassifier(random_state=0)),
        }
    boosting = HistGradientBoostingRegressor(
        max_iter=500, learning_rate=0.06, early_stopping=len(table.y) < 1_000, random_state=0
    )
    forest = RandomForestRegressor(200, min_samples_leaf=2, n_jobs=2, random_state=0)
    scaled = make_pipeline(clone(wide), MLPRegressor(**network))
    return {
        "linear": make_pipeline(clone(wide), RidgeCV()),
        "mlp": TransformedTargetRegressor(scaled, transformer=StandardScaler()),
        "forest": make_pipeline(clone(narrow), forest),
        "boosting": make_pipeline(clone(narrow), boosting),
    }


def run(
    *, quick: bool = False, fresh: bool = False, tables: Sequence[str] = tuple(TABLES), folder: Path = RESULTS
) -> None:
    """Measure every pair of table and base, and write the result file row by row."""
    results = ResultFile(
        "tabular",
        "python -m experiments tabular" + (" --quick" if quick else ""),
        "5-fold cross-validation, test rows pooled: California housing (100,000 dollars), bike sharing (bikes an "
        "hour), 20,000 diamonds (log price), and diabetes, digits, wine, breast cancer of scikit-learn",
        folder=Path(tempfile.mkdtemp()) if quick else folder,
        fresh=fresh,
    )
    for key in ("diabetes", "wine") if quick else tables:
        table = TABLES[key]().some(100) if quick else TABLES[key]()
        trial = Trial(table, list(_splits(table)))
        for base_name, base in bases(table).items():
            if quick and base_name != "linear":
                continue
            results.row(f"{key} {base_name}", 0, partial(trial.measured, base))
            if base_name in ("linear", "boosting"):
                results.row(f"{key} {base_name}, paper", 0, partial(trial.measured, base, **PAPER))
        if not table.classes:
            results.row(f"{key} cubist", 0, partial(trial.peer, "cubist", _cubist))
        if key in WHERE:
            for base_name in ("linear", "boosting"):
                peer = _regression_kriging(bases(table)[base_name], WHERE[key])
                row = f"{key} {base_name}, regression kriging"
                results.row(row, 0, partial(trial.peer, "regression-kriging", peer))
    print(shown(results.rows))


PAPER: dict[str, Any] = {
    "embed": "input",
    "metric": None,
    "kernel": "exponential",
    "residual_share": 1.0,
    "method": "resmem-paper",
}


def _splits(table: Table) -> Any:
    if table.classes:
        return StratifiedKFold(N_FOLDS, shuffle=True, random_state=0).split(table.X, table.y)
    return KFold(N_FOLDS, shuffle=True, random_state=0).split(table.X)


@dataclass(frozen=True)
class Trial:
    """A data set and its folds.

    Attributes
    ----------
    splits : training and test rows of each fold.
    """

    table: Table
    splits: list[tuple[Int64[ndarray, " m"], Int64[ndarray, " t"]]]

    def measured(self, base: Any, *, method: str = "resmem", **options: Any) -> Row:
        """Base, memory-only and corrected on the pooled test rows."""
        table = self.table
        said, corrected = np.zeros_like(self.alone), np.zeros_like(self.alone)
        folds = []
        for train, test in self.splits:
            fitted = _memory_of(table, base, train, **options)
            said[test] = _predictions(table, fitted.estimator_, test)
            corrected[test] = _predictions(table, fitted, test)
            setting = fitted.setting_
            folds.append(
                {
                    "base": _figure(table, said, test),
                    "corrected": _figure(table, corrected, test),
                    "keys": fitted.keys_,
                    "shrinkage": setting.shrinkage,
                    "residual_share": setting.residual_share,
                    "kernel": setting.kernel,
                    "verdict": fitted.verdict_,
                    **_coverage(table, fitted, test),
                }
            )
        row: Row = {"method": method, **self._evaluated(said, corrected), "folds": folds}
        if table.classes:
            labels = np.searchsorted(np.unique(table.y), table.y)
            for name, scores in (("base", said), ("corrected", corrected)):
                row[f"log_loss_{name}"] = float(log_losses(valid_probabilities(scores), labels).mean())
        return row

    def peer(self, method: str, predict: "Peer") -> Row:
        """A peer with and without its neighbours."""
        said, corrected = np.zeros_like(self.alone), np.zeros_like(self.alone)
        for train, test in self.splits:
            said[test, 0], corrected[test, 0] = predict(self.table, train, test)
        return {"method": method, **self._evaluated(said, corrected)}

    @cached_property
    def alone(self) -> Float[ndarray, "n c"]:
        """A memory of labels with the best keys for them: the same machinery on a base that knows the mean alone."""
        table = self.table
        base = DummyClassifier(strategy="prior") if table.classes else DummyRegressor()
        said = np.zeros((len(table.y), len(np.unique(table.y)) if table.classes else 1))
        for train, test in self.splits:
            said[test] = _predictions(table, _memory_of(table, base, train), test)
        return said

    def _evaluated(self, said: Float[ndarray, "n c"], corrected: Float[ndarray, "n c"]) -> Row:
        table, rows = self.table, slice(None)
        return summarize(
            "accuracy" if table.classes else "rmse",
            base=_losses(table, said, rows),
            memory_only=_losses(table, self.alone, rows),
            corrected=_losses(table, corrected, rows),
        ).to_dict()


def _memory_of(table: Table, base: Any, train: Int64[ndarray, " m"], **options: Any) -> Any:
    """The fitted base and its memory of these rows."""
    kind = ResMemClassifier if table.classes else ResMemRegressor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return kind(base, **options).fit(table.X.iloc[train], table.y[train])


def _predictions(table: Table, fitted: Any, rows: Int64[ndarray, " t"]) -> Float[ndarray, "t c"]:
    X = table.X.iloc[rows]
    return fitted.predict_proba(X) if table.classes else np.asarray(fitted.predict(X)).reshape(len(X), -1)


def _coverage(table: Table, fitted: Any, rows: Int64[ndarray, " t"]) -> Row:
    """How many of the test rows lie within 1.96 deviations of their prediction."""
    if table.classes:
        return {}
    value, deviation = fitted.predict(table.X.iloc[rows], return_std=True)
    return {"coverage": float((np.abs(table.y[rows] - value) <= 1.96 * deviation).mean())}


def _losses(table: Table, said: Float[ndarray, "t c"], rows: Any) -> Float[ndarray, " t"]:
    if table.classes:
        return 1 - correctness(said, np.searchsorted(np.unique(table.y), table.y)[rows])
    return squared_errors(said, table.y[rows])


def _figure(table: Table, said: Float[ndarray, "n c"], rows: Int64[ndarray, " t"]) -> float:
    mean = float(_losses(table, said[rows], rows).mean())
    return 1 - mean if table.classes else float(np.sqrt(mean))


Peer = Callable[[Table, Any, Any], tuple[Float[ndarray, " t"], Float[ndarray, " t"]]]


def _cubist(table: Table, train: Any, test: Any) -> tuple[Float[ndarray, " t"], Float[ndarray, " t"]]:
    """Cubist's rules of twenty committees, without and with its own nine neighbours."""
    from cubist import Cubist

    named = table.X.rename(columns=lambda name: f"column {name}")  # it adds a column "y" of its own
    train_rows, test_rows = named.iloc[train], named.iloc[test]
    found = [
        Cubist(n_committees=20, neighbors=neighbors, random_state=0).fit(train_rows, table.y[train]).predict(test_rows)
        for neighbors in (None, 9)
    ]
    return found[0], found[1]


def _regression_kriging(base: Any, where: list[str]) -> Peer:
    """PyKrige's kriging of a base's residuals over places, from a sample of the rows."""

    def predict(table: Table, train: Any, test: Any) -> tuple[Float[ndarray, " t"], Float[ndarray, " t"]]:
        from pykrige.ok import OrdinaryKriging

        fitted = clone(base).fit(table.X.iloc[train], table.y[train])
        some = np.random.default_rng(0).choice(train, min(len(train), KRIGING_ROWS), replace=False)
        left = table.y[some] - fitted.predict(table.X.iloc[some])
        places, wanted = table.X.iloc[some][where].to_numpy(), table.X.iloc[test][where].to_numpy()
        places = places + np.random.default_rng(1).normal(0, 1e-6, places.shape)  # twins make its equations singular
        field = OrdinaryKriging(places[:, 0], places[:, 1], left, variogram_model="exponential")
        added, _ = field.execute("points", wanted[:, 0], wanted[:, 1], backend="loop", n_closest_points=30)
        said = fitted.predict(table.X.iloc[test])
        return said, said + np.asarray(added)

    return predict


def shown(rows: list[Row]) -> str:
    """The table for a terminal: accuracy in per cent, errors in the unit of the target."""
    lines = [f"{'table, base':<44}{'method':<20}{'base':>9}{'memory':>9}{'corrected':>10}{'gain (95 %)':>26}"]
    for row in rows:
        factor, digits = (100, 2) if row["metric"] == "accuracy" else (1, 4)
        base, memory, corrected, gain, low, high = (
            f"{factor * row[name]:.{digits}f}"
            for name in ("base", "memory_only", "corrected", "gain", "gain_low", "gain_high")
        )
        interval = f"{gain} [{low}, {high}]"
        lines.append(f"{row['setting']:<44}{row['method']:<20}{base:>9}{memory:>9}{corrected:>10}{interval:>26}")
    return "\n".join(lines)
