"""Estimators with a memory: the paper's formula, honest residuals, no leaks, and what scikit-learn's users expect."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn
from numpy import ndarray
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import load_digits, load_iris
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, TimeSeriesSplit, cross_val_predict, cross_val_score
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, PolynomialFeatures, StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeRegressor

import residual_memory as rm
from residual_memory.errors import (
    DuplicateId,
    InSampleResiduals,
    InvalidInput,
    UncalibratedScores,
    UnknownId,
)
from tests import reference
from tests.models.tables import Counting, Rote, Split, Told, board, frame, places
from tests.problems import same_bits

FIXED: dict[str, Any] = {"n_neighbors": 7, "bandwidth": 0.4, "shrinkage": 1.0, "max_distance": None}


def identity(X: Any) -> ndarray:
    return np.asarray(X)


def rmse(said: ndarray, wanted: ndarray) -> float:
    return float(np.sqrt(((said - wanted) ** 2).mean()))


# ---------------------------------------------------------------------- the paper's formula


def test_with_given_numbers_a_regressor_is_the_base_plus_the_neighbors_out_of_fold_residuals() -> None:
    data = places()
    cv = KFold(4, shuffle=True, random_state=1)
    model = rm.ResMemRegressor(LinearRegression(), embed=identity, cv=cv, **FIXED).fit(data.X, data.y)
    honest = cross_val_predict(LinearRegression(), data.X, data.y, cv=cv)
    residuals = (data.y - honest)[:, None]
    added = reference.correction(data.X, residuals, data.X_test, 7, 0.4, "exponential")[:, 0]
    base = LinearRegression().fit(data.X, data.y).predict(data.X_test)
    np.testing.assert_allclose(model.predict(data.X_test), base + added, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_with_given_numbers_raw_scores_are_the_papers(temperature: float) -> None:
    X, y = load_iris(return_X_y=True)
    model = rm.ResMemClassifier(
        LogisticRegression(max_iter=500), embed=identity, residuals="in_sample", temperature=temperature, **FIXED
    ).fit(X, y)
    said = model.estimator_.predict_proba(X)
    residuals = reference.residuals(y, said, temperature)
    queries = X[::5] + 0.05
    wanted = reference.tempered(model.estimator_.predict_proba(queries), temperature)
    wanted += reference.correction(X, residuals, queries, 7, 0.4, "exponential")
    np.testing.assert_allclose(model.decision_function(queries), wanted, rtol=0, atol=1e-12)


def test_oracle_a_scikit_learns_neighbors_of_the_residuals_give_the_same(  # the letters are tests/test_oracles.py's
) -> None:
    from sklearn.neighbors import KNeighborsRegressor

    data = places()
    base = LinearRegression().fit(data.X, data.y)
    oracle = KNeighborsRegressor(7, weights=lambda d: np.exp(-d / 0.4), algorithm="kd_tree")
    oracle.fit(data.X, data.y - base.predict(data.X))
    model = rm.ResMemRegressor(FrozenEstimator(base), embed=identity, **FIXED).fit(data.X, data.y)
    wanted = base.predict(data.X_test) + oracle.predict(data.X_test)
    np.testing.assert_allclose(model.predict(data.X_test), wanted, rtol=0, atol=1e-12)


def test_of_two_classes_the_raw_score_is_the_difference() -> None:
    data = board()
    model = rm.ResMemClassifier(LogisticRegression(), **FIXED).fit(data.X, data.y)
    probabilities, raw = model.predict_proba(data.X_test), model.decision_function(data.X_test)
    assert raw.shape == (200,)
    assert (np.diff(probabilities[np.argsort(raw), 1]) >= 0).all()
    np.testing.assert_array_equal(model.predict(data.X_test), (raw > 0).astype(int))


# ---------------------------------------------------------------------- laws


def test_a_shrinkage_of_zero_is_the_base_bit_for_bit() -> None:
    data, squares = places(), board()
    regressor = rm.ResMemRegressor(RandomForestRegressor(5, random_state=0), shrinkage=0.0).fit(data.X, data.y)
    assert same_bits(regressor.predict(data.X_test), regressor.estimator_.predict(data.X_test))
    classifier = rm.ResMemClassifier(RandomForestClassifier(5, random_state=0), shrinkage=0.0).fit(squares.X, squares.y)
    assert same_bits(classifier.predict_proba(squares.X), classifier.estimator_.predict_proba(squares.X))


def test_a_memory_whose_rows_are_all_forgotten_is_the_base_bit_for_bit() -> None:
    data, squares = places(), board()
    regressor = rm.ResMemRegressor(LinearRegression()).fit(data.X, data.y)
    assert regressor.setting_.shrinkage > 0
    regressor.forget(regressor.memory_.ids)
    assert same_bits(regressor.predict(data.X_test), regressor.estimator_.predict(data.X_test))
    classifier = rm.ResMemClassifier(LogisticRegression()).fit(squares.X, squares.y)
    assert classifier.setting_.shrinkage > 0
    classifier.forget(classifier.memory_.ids)
    assert same_bits(classifier.predict_proba(squares.X_test), classifier.estimator_.predict_proba(squares.X_test))


def test_beyond_all_that_was_seen_the_base_stands_alone() -> None:
    data = places()
    model = rm.ResMemRegressor(LinearRegression()).fit(data.X, data.y)
    far = data.X_test + 1e4
    assert same_bits(model.predict(far), model.estimator_.predict(far))
    assert rmse(model.predict(data.X_test), model.estimator_.predict(data.X_test)) > 0.05
    near = rm.ResMemRegressor(LinearRegression(), kernel="exponential").fit(data.X, data.y)
    assert same_bits(near.predict(far), near.estimator_.predict(far))
    unlimited = rm.ResMemRegressor(LinearRegression(), kernel="exponential", max_distance=None).fit(data.X, data.y)
    assert not same_bits(unlimited.predict(far), unlimited.estimator_.predict(far))


def test_corrections_are_split_among_the_memories_that_made_them() -> None:
    squares = board()
    model = rm.ResMemClassifier(LogisticRegression()).fit(squares.X, squares.y)
    found = model.explain(squares.X_test[:9])
    raw = found.corrected[:, 1] - found.corrected[:, 0]
    np.testing.assert_allclose(raw, model.decision_function(squares.X_test[:9]), atol=1e-12)
    base = model.setting_.tempered(model.estimator_.predict_proba(squares.X_test[:9]), "classification")
    np.testing.assert_allclose(base + found.contributions.sum(axis=1), found.corrected, atol=1e-12)


# ---------------------------------------------------------------------- what it gains, and when it does not


@pytest.mark.parametrize(
    "base", [LinearRegression(), RandomForestRegressor(20, random_state=0)], ids=["line", "forest"]
)
def test_what_the_base_cannot_learn_is_remembered(base: Any) -> None:
    data = places()
    model = rm.ResMemRegressor(base).fit(data.X, data.y)
    assert model.verdict_.startswith("gain +")
    better, plain = (
        rmse(model.predict(data.X_test), data.y_test),
        rmse(model.estimator_.predict(data.X_test), data.y_test),
    )
    assert better < 0.9 * plain
    assert model.evaluation_ is not None
    assert model.evaluation_.corrected.value == pytest.approx(better, rel=0.35)


def test_a_board_is_remembered() -> None:
    data = board()
    model = rm.ResMemClassifier(LogisticRegression()).fit(data.X, data.y)
    assert model.estimator_.score(data.X_test, data.y_test) < 0.7
    assert model.score(data.X_test, data.y_test) > 0.85
    assert model.verdict_.startswith("gain +")


SEEING: list[tuple[Any, Any]] = [
    (LogisticRegression(), "input"),
    (RandomForestClassifier(15, random_state=0), "leaves"),
    (MLPClassifier((16,), max_iter=40, random_state=0), "hidden"),
    (RandomForestClassifier(15, random_state=0), "predict_proba"),
    (Rote(), "predict_proba"),
    (RandomForestClassifier(15, random_state=0), None),
]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("base", "embed"), SEEING, ids=lambda value: str(value).partition("(")[0])
def test_shuffled_labels_are_not_worth_remembering_whatever_the_keys(base: Any, embed: Any) -> None:
    """Keys that saw a row's own label would make its neighbours agree with it: the verdict must not fall for that."""
    random = np.random.default_rng(3)
    X, y = random.normal(size=(300, 4)), random.integers(0, 2, 300)
    model = rm.ResMemClassifier(base, embed=embed).fit(X, y)
    assert model.verdict_.startswith("no gain")
    assert same_bits(model.predict_proba(X[:5]), model.estimator_.predict_proba(X[:5]))


def test_shuffled_values_are_not_worth_remembering_under_a_learned_metric() -> None:
    random = np.random.default_rng(4)
    X, y = random.normal(size=(300, 6)), random.normal(size=300)
    model = rm.ResMemRegressor(LinearRegression()).fit(X, y)
    assert model.verdict_.startswith("no gain")
    assert model.setting_.shrinkage == 0


def test_of_many_columns_the_metric_finds_those_that_matter() -> None:
    data = places()
    noise = np.random.default_rng(1).normal(size=(800, 8))
    X, X_test = np.hstack([data.X, noise[:600]]), np.hstack([data.X_test, noise[600:]])
    plain = rm.ResMemRegressor(LinearRegression(), metric=None).fit(X, data.y)
    learned = rm.ResMemRegressor(LinearRegression()).fit(X, data.y)
    assert "metric" in learned.keys_
    assert rmse(learned.predict(X_test), data.y_test) < 0.8 * rmse(plain.predict(X_test), data.y_test)


def test_too_few_rows_leave_the_base_as_it_is() -> None:
    data = places()
    model = rm.ResMemRegressor(LinearRegression()).fit(data.X[:12], data.y[:12])
    assert "too few rows to tell (12, expected at least 20)" in model.verdict_
    assert same_bits(model.predict(data.X_test), model.estimator_.predict(data.X_test))
    with pytest.raises(InvalidInput, match="too few to tell its errors"):
        model.predict(data.X_test, return_std=True)


# ---------------------------------------------------------------------- residuals


def test_out_of_fold_residuals_come_from_models_that_did_not_see_the_row() -> None:
    data = board()
    model = rm.ResMemClassifier(Rote()).fit(data.X, data.y)
    np.testing.assert_array_equal(model.memory_.snapshot.predictions(np.arange(600)), 0.5)


def test_in_sample_residuals_of_a_base_that_knows_its_rows_by_heart_raise_a_warning() -> None:
    data = board()
    with pytest.warns(InSampleResiduals, match="the base knows these rows by heart.*use residuals='out_of_fold'"):
        model = rm.ResMemClassifier(Rote(), residuals="in_sample").fit(data.X, data.y)
    np.testing.assert_array_equal(model.memory_.snapshot.predictions(np.arange(600)), np.eye(2)[data.y])
    with pytest.warns(InSampleResiduals):
        rm.ResMemRegressor(FrozenEstimator(DecisionTreeRegressor().fit(data.X, data.y))).fit(data.X, data.y)


def test_held_out_residuals_are_those_of_rows_that_the_base_never_sees() -> None:
    data = board()
    model = rm.ResMemClassifier(Rote(), residuals="held_out", cv=4).fit(data.X, data.y)
    assert len(model.memory_) == 150
    np.testing.assert_array_equal(model.memory_.snapshot.predictions(np.arange(150)), 0.5)
    assert (model.estimator_.predict_proba(data.X).max(axis=1) == 1).sum() == 450


def test_a_frozen_estimator_is_not_fitted_again() -> None:
    data = places()
    base = LinearRegression().fit(data.X[:100], data.y[:100])
    model = rm.ResMemRegressor(FrozenEstimator(base)).fit(data.X[100:], data.y[100:])
    assert model.estimator_.estimator is base
    np.testing.assert_array_equal(model.memory_.snapshot.predictions(np.arange(500))[:, 0], base.predict(data.X[100:]))
    assert rmse(model.predict(data.X_test), data.y_test) < 0.5 * rmse(base.predict(data.X_test), data.y_test)


def test_rows_that_a_splitter_never_holds_out_are_not_remembered() -> None:
    data = places()
    model = rm.ResMemRegressor(LinearRegression(), cv=TimeSeriesSplit(5)).fit(data.X, data.y)
    np.testing.assert_array_equal(model.memory_.ids, np.arange(100, 600))


def test_groups_are_not_split_among_folds() -> None:
    data = board()
    groups = np.repeat(np.arange(60), 10)
    twins = np.repeat(data.X[::10], 10, axis=0) + 1e-9 * np.arange(600)[:, None]
    labels = np.repeat(np.random.default_rng(0).integers(0, 2, 60), 10)
    apart = rm.ResMemClassifier(DummyClassifier(strategy="prior")).fit(twins, labels, groups=groups)
    together = rm.ResMemClassifier(DummyClassifier(strategy="prior")).fit(twins, labels)
    assert apart.verdict_.startswith("no gain")
    assert together.verdict_.startswith("gain")  # the twins of a row tell its label


# ---------------------------------------------------------------------- changing the memory


def test_added_rows_count_at_once_and_forgotten_ones_no_more() -> None:
    data = places()
    model = rm.ResMemRegressor(LinearRegression(), **FIXED).fit(data.X, data.y)
    before = model.predict(data.X_test[:1])
    near = data.X_test[:1] + 1e-3 * np.arange(1, 8)[:, None]
    model.partial_fit(near, model.estimator_.predict(near) + 100)
    assert model.predict(data.X_test[:1]) - model.estimator_.predict(data.X_test[:1]) == pytest.approx(100, abs=0.1)
    model.forget(np.arange(600, 607))
    assert same_bits(model.predict(data.X_test[:1]), before)
    with pytest.raises(UnknownId):
        model.forget([600])


def test_a_class_that_comes_later_is_learned_by_the_memory() -> None:
    data = board()
    model = rm.ResMemClassifier(LogisticRegression()).fit(data.X, np.where(data.y, "white", "black"))
    before = model.predict(data.X_test)
    spot = np.random.default_rng(0).normal(8, 0.1, size=(40, 2))
    model.partial_fit(spot, np.full(40, "red"))
    np.testing.assert_array_equal(model.classes_, ["black", "red", "white"])
    assert model.predict_proba(data.X_test).shape == (200, 3)
    np.testing.assert_array_equal(model.predict(data.X_test), before)
    assert (model.predict(spot + 0.01) == "red").mean() > 0.9
    np.testing.assert_allclose(model.predict_proba(spot).sum(axis=1), 1)


def test_the_first_partial_fit_fits_and_may_name_classes_to_come() -> None:
    data = board()
    model = rm.ResMemClassifier(LogisticRegression()).partial_fit(data.X, data.y, classes=[0, 1, 2])
    np.testing.assert_array_equal(model.classes_, [0, 1, 2])
    assert model.memory_.layout.n_outputs == 3
    with pytest.raises(InvalidInput, match="y holds 1, which is not among the classes"):
        rm.ResMemClassifier(LogisticRegression()).partial_fit(data.X, data.y, classes=[0, 2])


def test_rows_go_by_the_names_that_they_were_given() -> None:
    data = places()
    names = np.array([f"house-{number}" for number in range(600)])
    model = rm.ResMemRegressor(LinearRegression()).fit(data.X, data.y, ids=names)
    distances, ids = model.kneighbors(data.X[:3], n_neighbors=1)
    np.testing.assert_array_equal(ids[:, 0], names[:3])
    np.testing.assert_allclose(distances, 0, atol=1e-6)
    model.forget(["house-0"])
    assert model.kneighbors(data.X[:1], n_neighbors=1)[1][0, 0] != "house-0"
    assert np.shape(model.kneighbors(data.X[:2], 3, return_distance=False)) == (2, 3)
    with pytest.raises(DuplicateId):
        model.partial_fit(data.X[:1], data.y[:1], ids=["house-1"])


def test_without_queries_the_neighbors_of_the_rows_themselves_are_given() -> None:
    data = places()
    model = rm.ResMemRegressor(LinearRegression()).fit(data.X, data.y)
    distances, ids = model.kneighbors(n_neighbors=4)
    assert ids.shape == (600, 4)
    assert not (ids == np.arange(600)[:, None]).any()
    assert (np.diff(distances, axis=1) >= 0).all()


def test_a_memory_on_disk_is_a_memory_like_any_other(tmp_path: Path) -> None:
    data = places()
    model = rm.ResMemRegressor(LinearRegression(), memory=tmp_path / "memory").fit(data.X, data.y)
    model.memory_.close()
    again = rm.Memory.open(tmp_path / "memory", verify=True)
    setting = type(model.setting_).from_dict(again.setting or {})
    assert setting == model.setting_
    copy = pickle.loads(pickle.dumps(model))
    assert same_bits(copy.predict(data.X_test), model.predict(data.X_test))
    with pytest.raises(InvalidInput, match="already exists and is not empty"):
        model.fit(data.X, data.y)


def test_a_class_with_no_room_on_disk_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    data = board()
    model = rm.ResMemClassifier(LogisticRegression(), memory=tmp_path / "memory").fit(data.X, data.y)
    with pytest.raises(InvalidInput, match="has no room; name all labels in `classes`"):
        model.partial_fit(data.X[:1], [2])
    assert len(model.memory_) == 600
    np.testing.assert_array_equal(model.classes_, [0, 1])


# ---------------------------------------------------------------------- tables of all kinds


def mixed_base(regressor: Any) -> Any:
    named = make_column_selector(dtype_exclude="number")
    levels = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    return make_pipeline(make_column_transformer((levels, named), remainder="passthrough"), regressor)


def test_text_categories_and_gaps_make_keys_where_the_base_takes_them() -> None:
    X, y = frame()
    model = rm.ResMemRegressor(mixed_base(HistGradientBoostingRegressor(max_iter=2))).fit(X[:90], y[:90])
    assert rmse(model.predict(X[90:]), y[90:]) < 0.5 * rmse(model.estimator_.predict(X[90:]), y[90:])
    strange = X[90:].assign(town="Zug")
    assert np.isfinite(model.predict(strange)).all()
    with pytest.raises(ValueError, match="The feature names should match"):
        model.predict(X[["rooms", "town", "size", "kind"]])


def test_polars_frames_give_what_pandas_frames_give() -> None:
    polars = pytest.importorskip("polars", reason="needs polars")
    X, y = frame()
    X = X.astype({"kind": str})
    base = DummyRegressor()
    one = rm.ResMemRegressor(base).fit(X[:90], y[:90])
    other = rm.ResMemRegressor(base).fit(polars.from_pandas(X[:90]), y[:90])
    np.testing.assert_allclose(one.predict(X[90:]), other.predict(polars.from_pandas(X[90:])), rtol=1e-12)


def test_sparse_rows_are_projected_and_corrected() -> None:
    X, y = load_digits(return_X_y=True)
    X, y = X[:400], y[:400] % 2
    dense = rm.ResMemClassifier(LogisticRegression(max_iter=2000), embed="input").fit(X, y)
    sparse = rm.ResMemClassifier(LogisticRegression(max_iter=2000), embed="input").fit(csr_matrix(X), y)
    assert sparse.memory_.layout.dim == dense.memory_.layout.dim - 1
    assert sparse.score(csr_matrix(X), y) > 0.9


def test_several_outputs_are_corrected_together() -> None:
    data = places()
    Y = np.column_stack([data.y, -3 * data.y])
    model = rm.ResMemRegressor(LinearRegression()).fit(data.X, Y)
    said, deviation = model.predict(data.X_test, return_std=True)
    assert said.shape == deviation.shape == (200, 2)
    np.testing.assert_allclose(said[:, 1], -3 * said[:, 0], atol=1e-8)
    np.testing.assert_allclose(deviation[:, 1], 3 * deviation[:, 0], rtol=1e-8)


def test_several_labels_a_row_are_refused_with_a_word() -> None:
    X, Y = np.zeros((6, 2)), np.array([[0, 1], [1, 0], [1, 1], [0, 0], [1, 0], [0, 1]])
    with pytest.raises(InvalidInput, match=r"multilabel-indicator.*MultiOutputClassifier"):
        rm.ResMemClassifier(LogisticRegression()).fit(X, Y)


def test_scores_that_are_no_probabilities_are_used_with_a_warning() -> None:
    data = board()
    with pytest.warns(UncalibratedScores, match="LinearSVC gives no probabilities.*CalibratedClassifierCV"):
        model = rm.ResMemClassifier(LinearSVC()).fit(data.X, data.y)
    with pytest.warns(UncalibratedScores):
        assert model.score(data.X_test, data.y_test) > 0.85


# ---------------------------------------------------------------------- keys


EMBEDS: list[tuple[str, Any, Any, int]] = [
    ("hidden", MLPRegressor(hidden_layer_sizes=(12, 9), max_iter=30, random_state=0), "hidden", 9),
    (
        "hidden in a pipeline",
        make_pipeline(StandardScaler(), MLPRegressor(hidden_layer_sizes=5, max_iter=30, random_state=0)),
        "hidden",
        5,
    ),
    ("predict", LinearRegression(), "predict", 1),
    ("unscaled", LinearRegression(), "unscaled", 2),
    ("transformer", LinearRegression(), PolynomialFeatures(2, include_bias=False), 5),
    ("pipeline", LinearRegression(), make_pipeline(StandardScaler(), PolynomialFeatures(2, include_bias=False)), 5),
    ("function", LinearRegression(), identity, 2),
]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("base", "embed", "width"), [case[1:] for case in EMBEDS], ids=[case[0] for case in EMBEDS])
def test_keys_are_made_of_what_embed_says(base: Any, embed: Any, width: int) -> None:
    data = places(200)
    model = rm.ResMemRegressor(base, embed=embed).fit(data.X, data.y)
    assert model.memory_.layout.dim == width
    assert model.predict(data.X_test).shape == (200,)


def test_a_fitted_transformer_is_used_as_it_is() -> None:
    data = places(200)
    scaler = StandardScaler().fit(data.X + 5)
    model = rm.ResMemRegressor(LinearRegression(), embed=scaler, metric=None).fit(data.X, data.y)
    np.testing.assert_allclose(model.memory_.snapshot.keys.take(np.arange(200)), scaler.transform(data.X))


def test_the_distance_of_leaves_is_the_share_of_trees_in_which_rows_part() -> None:
    data = places(60)
    forest = RandomForestRegressor(6, max_leaf_nodes=4, random_state=0)
    model = rm.ResMemRegressor(forest, embed="leaves").fit(data.X, data.y)
    leaves = model.estimator_.apply(data.X)
    parted = (leaves[:, None] != leaves[None]).mean(axis=2)
    keys = model.memory_.snapshot.keys.take(np.arange(60))
    squared = ((keys[:, None] - keys[None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(squared, parted, atol=1e-6)


def test_boosting_that_does_not_tell_its_leaves_says_so() -> None:
    data = places(60)
    with pytest.raises(InvalidInput, match="HistGradientBoostingRegressor does not tell the leaves"):
        rm.ResMemRegressor(HistGradientBoostingRegressor(max_iter=2), embed="leaves").fit(data.X, data.y)


# ---------------------------------------------------------------------- scikit-learn's ways


def test_pipelines_searches_and_copies_work_as_with_any_estimator() -> None:
    data = places(200)
    model = rm.ResMemRegressor(LinearRegression(), metric=None)
    search = GridSearchCV(make_pipeline(StandardScaler(), model), {"resmemregressor__n_neighbors": [3, 30]}, cv=2)
    search.fit(data.X, data.y)
    assert search.best_params_["resmemregressor__n_neighbors"] in (3, 30)
    assert cross_val_score(model, data.X, data.y, cv=2).shape == (2,)
    assert clone(model).get_params()["estimator"].get_params() == LinearRegression().get_params()
    fitted = model.fit(data.X, data.y)
    copy = pickle.loads(pickle.dumps(fitted))
    assert same_bits(copy.predict(data.X_test), fitted.predict(data.X_test))
    assert "ResMemRegressor" in fitted._repr_html_()


def test_weights_reach_the_base_and_rows_of_none_are_not_remembered() -> None:
    data = places(200)
    weights = np.ones(200)
    weights[:50] = 0
    model = rm.ResMemRegressor(LinearRegression()).fit(data.X, data.y, sample_weight=weights)
    np.testing.assert_array_equal(model.memory_.ids, np.arange(50, 200))
    wanted = LinearRegression().fit(data.X, data.y, sample_weight=weights)
    np.testing.assert_array_equal(model.estimator_.coef_, wanted.coef_)


def test_metadata_is_routed_to_the_base_and_the_splitter() -> None:
    data = places(200)
    groups, weights = np.repeat(np.arange(20), 10), np.linspace(1, 2, 200)
    with sklearn.config_context(enable_metadata_routing=True):
        base = LinearRegression().set_fit_request(sample_weight=True)
        model = rm.ResMemRegressor(base, cv=GroupKFold(4)).fit(data.X, data.y, groups=groups, sample_weight=weights)
    wanted = LinearRegression().fit(data.X, data.y, sample_weight=weights)
    np.testing.assert_array_equal(model.estimator_.coef_, wanted.coef_)
    with pytest.raises(ValueError, match="only supported if enable_metadata_routing=True"):
        rm.ResMemRegressor(LinearRegression()).fit(data.X, data.y, nonsense=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residuals": "out_of_fald"}, "residuals is 'out_of_fald', expected one of 'out_of_fold'"),
        ({"metric": "diag"}, "metric is 'diag', expected 'auto', None, 'diagonal' or 'full'"),
        ({"embed": "leafs"}, "embed is 'leafs', expected one of 'auto', 'input'"),
        ({"n_neighbors": 0}, "n_neighbors is 0"),
        ({"bandwidth": -1.0}, "bandwidth is -1"),
        ({"bandwidth": "wide"}, "bandwidth is 'wide'"),
        ({"kernel": "exponentail"}, "kernel is 'exponentail'"),
        ({"shrinkage": -0.1}, "shrinkage is -0.1, expected a number from 0, or 'auto'"),
        ({"shrinkage": "none"}, "shrinkage is 'none', expected a number, or 'auto'"),
        ({"residual_share": 2.0}, "residual_share is 2"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"max_distance": 0.0}, "max_distance is 0"),
        ({"max_distance": "far"}, "max_distance is 'far'"),
        ({"index": "exakt"}, "did you mean 'exact'"),
        ({"cv": 1}, "cv is 1"),
        ({"cv": 0}, "cv is 0"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, dict) else "",
)
def test_a_typo_in_an_option_is_refused_with_what_was_expected(options: dict[str, Any], message: str) -> None:
    data = places(60)
    with pytest.raises(InvalidInput, match=re.escape(message)):
        rm.ResMemRegressor(LinearRegression(), **options).fit(data.X, data.y)


def test_no_option_is_judged_before_fit() -> None:
    assert rm.ResMemRegressor(LinearRegression(), n_neighbors=-3).n_neighbors == -3


# ---------------------------------------------------------------------- errors and issues


def test_error_estimates_cover_what_they_say_and_are_larger_where_errors_are() -> None:
    random = np.random.default_rng(2)
    X = random.uniform(-2, 2, size=(3000, 1))
    deviation = np.where(X[:, 0] > 0, 1.0, 0.1)
    y = np.sin(3 * X[:, 0]) + deviation * random.normal(size=3000)
    model = rm.ResMemRegressor(LinearRegression()).fit(X[:2000], y[:2000])
    said, found = model.predict(X[2000:], return_std=True)
    assert np.mean(np.abs(y[2000:] - said) <= 1.96 * found) == pytest.approx(0.95, abs=0.025)
    right = X[2000:, 0] > 0.3
    assert np.median(found[right]) > 2 * np.median(found[X[2000:, 0] < -0.3])


def test_labels_that_were_swapped_come_first_and_no_later_than_cleanlabs() -> None:
    rank = pytest.importorskip("cleanlab.rank", reason="needs cleanlab")
    from sklearn.metrics import roc_auc_score

    X, y = load_digits(return_X_y=True)
    X, y = X[:700], y[:700].copy()
    random = np.random.default_rng(0)
    swapped = random.choice(700, 60, replace=False)
    noisy = y.copy()
    noisy[swapped] = (y[swapped] + random.integers(1, 10, 60)) % 10
    model = rm.ResMemClassifier(make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), metric=None)
    issues = model.fit(X, noisy).label_issues()
    assert list(issues.columns) == ["id", "label", "suggestion", "score", "agreement"]
    wrong = np.isin(np.arange(700), swapped)
    ours = roc_auc_score(wrong[issues["id"]], issues["score"])
    theirs = rank.get_label_quality_scores(noisy, model.memory_.snapshot.predictions(np.arange(700)))
    assert ours >= roc_auc_score(wrong, -theirs)
    assert ours > 0.95
    top = issues.head(40)
    assert (top["suggestion"].to_numpy() == y[top["id"]]).mean() > 0.8


def test_values_that_were_spoiled_come_first() -> None:
    data = places()
    spoiled = data.y.copy()
    spoiled[[5, 50, 500]] += 4
    issues = rm.ResMemRegressor(LinearRegression()).fit(data.X, spoiled).label_issues()
    assert set(issues["id"][:3]) == {5, 50, 500}
    assert isinstance(issues, pd.DataFrame)


# ---------------------------------------------------------------------- other people's estimators


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_skorch_net_gets_a_memory() -> None:
    skorch = pytest.importorskip("skorch", reason="needs skorch")
    torch = pytest.importorskip("torch", reason="needs torch")
    torch.manual_seed(0)
    net = skorch.NeuralNetClassifier(
        torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2), torch.nn.Softmax(dim=1)),
        max_epochs=3,
        verbose=0,
        train_split=None,
    )
    data: Split = board()
    model = rm.ResMemClassifier(net).fit(data.X.astype(np.float32), data.y)
    assert model.score(data.X_test.astype(np.float32), data.y_test) > 0.85


# ---------------------------------------------------------------------- what is refused early, and what is kept


@pytest.mark.parametrize("trouble", ["ids", "memory", "index"])
def test_what_cannot_end_well_is_refused_before_the_base_is_fitted(trouble: str, tmp_path: Path) -> None:
    data = places(60)
    (tmp_path / "notes.txt").write_text("mine")
    refused: dict[str, dict[str, Any]] = {"memory": {"memory": tmp_path}, "index": {"index": "hnsw"}}
    ids = np.zeros(60, int) if trouble == "ids" else None
    Counting.fits = 0
    with pytest.raises(InvalidInput):
        rm.ResMemRegressor(Counting(), **refused.get(trouble, {})).fit(data.X, data.y, ids=ids)
    assert Counting.fits == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_rows_that_cannot_be_added_leave_the_classes_as_they_were() -> None:
    data = board(200)
    model = rm.ResMemClassifier(LogisticRegression()).fit(data.X, data.y)
    before = model.predict_proba(data.X_test)
    with pytest.raises(DuplicateId):
        model.partial_fit(data.X[:1], [7], ids=[0])
    np.testing.assert_array_equal(model.classes_, [0, 1])
    assert same_bits(model.predict_proba(data.X_test), before)
    with pytest.raises(ValueError, match="X has 3 features"):
        model.partial_fit(np.zeros((1, 3)), [0])
    assert len(model.memory_) == 200


def test_a_fit_that_fails_leaves_the_one_before() -> None:
    data = board(200)
    model = rm.ResMemClassifier(LogisticRegression()).fit(data.X, data.y)
    before = model.predict_proba(data.X_test)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        model.fit(np.full((30, 2), np.nan), np.repeat([5, 6, 7], 10))
    np.testing.assert_array_equal(model.classes_, [0, 1])
    assert same_bits(model.predict_proba(data.X_test), before)


def test_neighbors_that_were_asked_for_are_taken_though_folds_have_fewer_rows() -> None:
    data = places(60)
    model = rm.ResMemRegressor(LinearRegression(), n_neighbors=55).fit(data.X, data.y)
    assert model.setting_.n_neighbors == 55
    assert rm.ResMemRegressor(LinearRegression(), n_neighbors=500).fit(data.X, data.y).setting_.n_neighbors == 60


def test_a_random_state_is_used_and_left_as_it_is() -> None:
    data = places(60)
    state = np.random.RandomState(3)
    one, other = (rm.ResMemRegressor(LinearRegression(), random_state=state).fit(data.X, data.y) for _ in range(2))
    assert same_bits(one.predict(data.X_test), other.predict(data.X_test))
    with pytest.raises(ValueError, match="cannot be used to seed"):
        rm.ResMemRegressor(LinearRegression(), random_state="now").fit(data.X, data.y)


def test_a_gain_in_log_loss_that_puts_fewer_rows_right_is_no_gain() -> None:
    """A base that is timid where it is right and sure where it is wrong costs more than a guess."""
    random = np.random.default_rng(0)
    y, right = random.integers(0, 2, 600), random.random(600) < 0.8
    said = np.where(right, np.where(y == 1, 0.51, 0.49), np.where(y == 1, 0.001, 0.999))
    X = np.column_stack([random.normal(size=600), said])
    base = FrozenEstimator(Told().fit(X, y))
    model = rm.ResMemClassifier(base, embed=lambda rows: rows[:, :1]).fit(X, y)
    assert model.evaluation_ is not None
    assert model.evaluation_.helps
    assert model.verdict_.startswith("no gain: do not deploy (fewer rows are right, though log-loss says: gain")
    assert same_bits(model.predict_proba(X), base.predict_proba(X))
