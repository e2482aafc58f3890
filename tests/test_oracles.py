"""Other people's code that computes the same numbers; the letters are those of the project's list of oracles."""

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import pytest
from faiss.contrib.datasets import SyntheticDataset
from numpy import ndarray
from sklearn.neighbors import KNeighborsRegressor

from residual_memory.correction import correct
from residual_memory.indexes.base import Index, nearest
from residual_memory.indexes.exact import ExactNumpy
from residual_memory.indexes.faiss import FaissEngine
from residual_memory.indexes.registry import parse_spec
from residual_memory.memory import Column
from residual_memory.metrics import recall
from residual_memory.testing.problems import column
from tests import reference
from tests.problems import Problem, classification, knn_of, memory_of, regression, softmax

K, BANDWIDTH = 7, 0.8
every_task = pytest.mark.parametrize("task", [classification, regression])

SKLEARN_WEIGHTS: dict[str, Callable[[ndarray], ndarray] | str] = {
    "exponential": lambda distances: np.exp(-distances / BANDWIDTH),
    "gaussian": lambda distances: np.exp(-(distances**2) / (2 * BANDWIDTH**2)),
    "inverse": lambda distances: 1 / np.maximum(distances, BANDWIDTH),
    "uniform": "uniform",
}


def sklearn_knn(problem: Problem, weights: Any, k: int = K) -> KNeighborsRegressor:
    """scikit-learn's regressor of the residuals."""
    rest = reference.residuals(problem.labels, problem.predictions)
    return KNeighborsRegressor(k, weights=weights, algorithm="kd_tree").fit(problem.keys, rest)


@every_task
@pytest.mark.parametrize("kernel", SKLEARN_WEIGHTS)
def test_a_the_corrected_scores_are_the_base_plus_scikit_learns_prediction(task: Any, kernel: str) -> None:
    problem = task(n=300, q=50)
    wanted = problem.said + sklearn_knn(problem, SKLEARN_WEIGHTS[kernel]).predict(problem.queries)
    knn = knn_of(memory_of(problem), n_neighbors=K, bandwidth=BANDWIDTH, kernel=kernel)
    np.testing.assert_allclose(correct(problem.said, knn(problem.queries)), wanted, atol=1e-14)


def test_b_a_stored_key_and_its_twin_get_all_inverse_weight_as_in_scikit_learn() -> None:
    problem = classification(n=40)
    problem.keys[17] = problem.keys[3]
    queries = problem.keys[[3, 5, 17]]
    knn = knn_of(memory_of(problem), n_neighbors=K, bandwidth=1e-40, kernel="inverse")
    np.testing.assert_allclose(knn(queries), sklearn_knn(problem, "distance").predict(queries), atol=1e-14)


@every_task
@pytest.mark.parametrize("kernel", ["exponential", "uniform"])
def test_c_leaving_a_row_out_by_id_is_scikit_learns_leave_one_out(task: Any, kernel: str) -> None:
    problem = task(n=200)
    ids = np.random.default_rng(5).permutation(1000)[:200]
    knn = knn_of(memory_of(problem, ids=ids), n_neighbors=K, bandwidth=BANDWIDTH, kernel=kernel)
    wanted = sklearn_knn(problem, SKLEARN_WEIGHTS[kernel]).predict(None)
    np.testing.assert_allclose(knn(problem.keys, exclude=ids), wanted, atol=1e-14)


def test_h_the_labels_alone_are_the_knn_lm() -> None:
    """Khandelwal et al. 2020: p_kNN(y) ∝ Σ 1[y = v] exp(−d/T), then (1 − λ) p + λ p_kNN; theirs takes squared d."""
    problem = classification(n=100, c=9)
    knn = knn_of(memory_of(problem), n_neighbors=K, bandwidth=BANDWIDTH)
    distances, rows = reference.neighbors(problem.keys, problem.queries, K)
    wanted = np.zeros_like(problem.said)
    for query in range(len(wanted)):
        powers = np.exp(-distances[query] / BANDWIDTH)
        for weight, row in zip(powers / powers.sum(), rows[query], strict=True):
            wanted[query, problem.labels[row]] += weight
    alone = knn.memory_only(problem.queries)
    np.testing.assert_allclose(alone, wanted, atol=1e-14)
    np.testing.assert_allclose(alone.sum(axis=1), 1)


@pytest.mark.parametrize("shrinkage", [0.1, 0.25, 1.0])
def test_i_where_the_neighbors_were_predicted_alike_a_corrected_prediction_is_the_knn_lms(shrinkage: float) -> None:
    problem = classification(n=100)
    said = softmax(np.array([[0.3, -1.0, 2.0, 0.5]]))
    problem.predictions[:] = said
    base = np.repeat(said, 12, axis=0)
    knn = knn_of(memory_of(problem), n_neighbors=K, bandwidth=BANDWIDTH)
    corrected = correct(base, knn(problem.queries), shrinkage)
    knn_lm = (1 - shrinkage) * base + shrinkage * knn.memory_only(problem.queries)
    np.testing.assert_allclose(corrected, knn_lm, atol=1e-15)


@pytest.fixture(scope="module")
def synthetic() -> Any:
    """The data of faiss's own tests/test_index_accuracy.py."""
    make: Any = SyntheticDataset
    return make(32, 2000, 1000, 200)


def in_common(found: ndarray, true: ndarray) -> int:
    return int((found[:, :, None] == true[:, None, :]).sum())


def counted(index: Any, data: Any) -> int:
    """How many of the 2,000 true neighbours an index lists."""
    index.train(data.get_train())
    index.add(data.get_database())
    index.nprobe = 4
    _, found = index.search(data.get_queries(), 10)
    return in_common(found, data.get_groundtruth(10))


def faiss_of(keys: Column, spec: str) -> Index:
    """Of fewer rows than `build_index` would train such an index with."""
    return FaissEngine().build(parse_spec(f"faiss:{spec}"), keys, 0, 1000)


def our_count(part: Index, data: Any) -> int:
    found = nearest([part], column(data.get_database()), data.get_queries(), 10)
    return in_common(found.rows, data.get_groundtruth(10))


@pytest.mark.parametrize(("factory", "count"), [("IVF64,SQfp16", 979), ("IVF64,SQ8", 979), ("IVF64,PQ4np", 800)])
def test_l_faiss_counts_what_its_own_tests_expect(synthetic: Any, factory: str, count: int) -> None:
    assert abs(counted(faiss.index_factory(32, factory), synthetic) - count) <= 10


@pytest.mark.parametrize(("factory", "count"), [("IVF64,SQfp16", 979), ("IVF64,SQ8", 979), ("IVF64,PQ4np", 800)])
def test_l_a_rescored_shortlist_finds_at_least_what_faiss_alone_finds(synthetic: Any, factory: str, count: int) -> None:
    keys = column(synthetic.get_database())
    part = faiss_of(keys, f"{factory}?nprobe=4")
    assert our_count(part, synthetic) >= count - 10


def test_l_the_flat_index_finds_all(synthetic: Any) -> None:
    keys = column(synthetic.get_database())
    assert our_count(faiss_of(keys, "Flat"), synthetic) == 2000
    assert our_count(ExactNumpy(keys, 0, 1000), synthetic) == 2000


@pytest.mark.parametrize("nprobe", [1, 4, 64])
def test_m_recall_by_distance_is_the_share_of_true_neighbors_where_nothing_ties(synthetic: Any, nprobe: int) -> None:
    keys = column(synthetic.get_database())
    part = faiss_of(keys, f"IVF64,Flat?nprobe={nprobe}")
    found = nearest([part], keys, synthetic.get_queries(), 10)
    true = nearest([ExactNumpy(keys, 0, 1000)], keys, synthetic.get_queries(), 10)
    listed = in_common(found.rows, true.rows)
    assert recall(found.distances, true.distances, tolerance=1e-9) == pytest.approx(listed / 2000)
    assert (listed == 2000) == (nprobe == 64)
