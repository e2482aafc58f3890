"""Graph, map, rule and conformal packages with the same numbers; the letters are those of tests/test_oracles.py."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from crepes.extras import DifficultyEstimator
from cubist import Cubist
from numpy import ndarray
from pykrige import ck, rk
from sklearn.linear_model import LinearRegression
from sklearn.naive_bayes import GaussianNB

from residual_memory.correction import ResidualKNN, correct, residual_average
from tests.problems import Problem, classification, knn_of, memory_of, regression

K, N, Q = 5, 150, 40


def propagated(problem: Problem, knn: ResidualKNN, shrinkage: float) -> ndarray:
    """What PyG's "correct" says of the queries: one step over the edges that lead to them from their neighbours.

    Weights that are given are used as they are, not normalised by degree; the arithmetic is that of `said`, float64.
    """
    from torch_geometric.nn import CorrectAndSmooth

    found = knn.neighbors(problem.queries)
    queries = np.broadcast_to(N + np.arange(Q)[:, None], found.ids.shape)
    edges = torch.from_numpy(np.stack([found.ids.ravel(), queries.ravel()]))
    said = torch.from_numpy(np.concatenate([problem.predictions, problem.said]))
    labels, weights = torch.from_numpy(problem.labels), torch.from_numpy(found.weights.ravel())
    step = CorrectAndSmooth(1, 1.0, 1, 1.0, autoscale=False, scale=shrinkage)
    return step.correct(said, labels, torch.arange(N), edges, weights)[N:].numpy()


# PyG calls torch.jit.script as it is imported, which torch 2.13 deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("task", [classification, regression])
@pytest.mark.parametrize("shrinkage", [0.3, 1.0])
def test_d_a_corrected_prediction_is_pygs_correct_and_smooth_before_it_smooths(task: Any, shrinkage: float) -> None:
    problem = task(n=N, q=Q)
    knn = knn_of(memory_of(problem))
    corrected = correct(problem.said, knn(problem.queries), shrinkage)
    np.testing.assert_allclose(corrected, propagated(problem, knn, shrinkage), rtol=0, atol=1e-14)


def kriging(kind: Any, base: Any) -> Any:
    """PyKrige with a variogram that is all nugget: it knows no distance, so the k nearest weigh the same."""
    return kind(base, variogram_model="linear", variogram_parameters={"slope": 0, "nugget": 1}, n_closest_points=K)


def uniform_knn(problem: Problem) -> ResidualKNN:
    return knn_of(memory_of(problem), n_neighbors=K, kernel="uniform")


def test_e_regression_kriging_of_a_pure_nugget_is_the_uniform_kernel() -> None:
    random = np.random.default_rng(0)
    places, features = random.normal(size=(N + Q, 2)), random.normal(size=(N + Q, 3))
    values = features @ [1.0, -2.0, 0.5] + np.sin(3 * places[:, 0]) + random.normal(size=N + Q)
    oracle = kriging(rk.RegressionKriging, LinearRegression())
    oracle.fit(features[:N], places[:N], values[:N])
    said = oracle.regression_model.predict(features)[:, None]
    problem = Problem(places[:N], values[:N, None], said[:N], places[N:], said[N:])
    corrected = correct(problem.said, uniform_knn(problem)(problem.queries))
    np.testing.assert_allclose(corrected[:, 0], oracle.predict(features[N:], places[N:]), rtol=0, atol=1e-14)


def test_f_classification_kriging_is_the_uniform_kernel_on_log_ratios() -> None:
    random = np.random.default_rng(0)
    places, features = random.normal(size=(N + Q, 2)), random.normal(size=(N + Q, 3))
    labels = (features + 2 * np.sin(3 * places[:, :1]) * [1, 0, -1] + random.normal(size=(N + Q, 3))).argmax(axis=1)
    oracle = kriging(ck.ClassificationKriging, GaussianNB())
    oracle.fit(features[:N], places[:N], labels[:N, None])
    said = ck.ilr_transformation(oracle.classification_model.predict_proba(features))
    problem = Problem(places[:N], ck.ilr_transformation(np.eye(3)[labels[:N]]), said[:N], places[N:], said[N:])
    residual = uniform_knn(problem)(problem.queries)
    probabilities = ck.inverse_ilr_transformation(correct(problem.said, residual))
    np.testing.assert_allclose(residual, oracle.krige_residual(places[N:]), rtol=0, atol=1e-13)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), oracle.predict(features[N:], places[N:]))


def cubist_weights(keys: ndarray, queries: ndarray) -> ndarray:
    """What each row counts for each query [q n] in Cubist's instance.c: L1 over 5 sd, in sixteenths, ties share."""
    apart = np.abs(queries[:, None] - keys) / (5 * keys.std(axis=0, ddof=1))
    distances = np.rint(16 * np.minimum(apart, 1).sum(axis=2)) / 16
    last = np.partition(distances, K - 1, axis=1)[:, K - 1 : K]
    nearer, tied = distances < last, distances == last
    share = (K - nearer.sum(axis=1, keepdims=True)) / tied.sum(axis=1, keepdims=True)
    weights = (nearer + share * tied) / (distances + 0.5)
    return weights / weights.sum(axis=1, keepdims=True)


# Cubist names the columns of an array itself, and then misses the names when it predicts.
@pytest.mark.filterwarnings("ignore:X does not have valid feature names:UserWarning")
def test_g_a_correction_by_cubists_weights_is_cubist_with_neighbors() -> None:
    """Agrees to the float32 that Cubist computes and answers in.

    Two limits of Cubist are kept out of reach: it clips each neighbour's estimate to the range of the labels, widened
    by `extrapolation`, and drops neighbours beyond the mean distance of random rows, so queries lie in the middle.
    """
    random = np.random.default_rng(0)
    keys, queries = random.normal(size=(N, 3)), 0.5 * random.normal(size=(Q, 3))
    values = 10 + keys @ [1.0, -2.0, 0.5] + np.sin(3 * keys[:, 0]) + 0.3 * random.normal(size=N)
    options = {"n_rules": 1, "extrapolation": 1.0, "random_state": 0}
    base, oracle = Cubist(**options).fit(keys, values), Cubist(**options, neighbors=K).fit(keys, values)
    problem = Problem(keys, values[:, None], base.predict(keys)[:, None], queries, base.predict(queries)[:, None])
    rows = np.tile(np.arange(N), (Q, 1))
    residual = residual_average(memory_of(problem).snapshot, rows, cubist_weights(keys, queries), 1.0)
    np.testing.assert_allclose(correct(problem.said, residual)[:, 0], oracle.predict(queries), rtol=2e-7)


def test_j_the_spread_of_residuals_is_crepes_difficulty_before_its_beta() -> None:
    """Which scales keys to 0 … 1, clips queries to that, and by default adds a beta of 0.01 to what it finds."""
    problem = regression(n=N, q=Q, c=1)
    keys, queries = 5 * problem.keys + 3, 8 * problem.queries
    oracle = DifficultyEstimator()
    oracle.fit(keys, residuals=(problem.labels - problem.predictions)[:, 0], k=K)
    low, high = keys.min(axis=0), keys.max(axis=0)
    scaled = replace(problem, keys=(keys - low) / (high - low), queries=np.clip((queries - low) / (high - low), 0, 1))
    found = knn_of(memory_of(scaled), n_neighbors=K).spread(scaled.queries)
    np.testing.assert_allclose(found[:, 0], oracle.apply(queries) - 0.01, rtol=0, atol=1e-14)
