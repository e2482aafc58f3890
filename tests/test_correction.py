from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from residual_memory import correction
from residual_memory.correction import ResidualKNN, correct, to_probabilities
from residual_memory.errors import DimensionMismatch, FewerNeighbors, InvalidInput
from residual_memory.kernels import KERNELS
from residual_memory.memory import Memory
from residual_memory.residuals import temper, top_m
from tests import reference
from tests.problems import Problem, classification, empty_memory, knn_of, memory_of, regression, same_bits, softmax


def expected(
    problem: Problem, k: int = 7, bandwidth: float = 0.5, kernel: str = "exponential", temperature: float = 1.0
) -> ndarray:
    rest = reference.residuals(problem.labels, problem.predictions, temperature)
    return reference.correction(problem.keys, rest, problem.queries, k, bandwidth, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("task", [classification, regression])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_the_residual_equals_brute_force(kernel: str, task: Any, k: int, place: Path | None) -> None:
    problem = task()
    knn = knn_of(memory_of(problem, place), n_neighbors=k, kernel=kernel)
    np.testing.assert_allclose(knn(problem.queries), expected(problem, k, kernel=kernel), atol=1e-13)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_the_temperature_is_that_of_the_stored_predictions(problem: Problem, temperature: float) -> None:
    knn = knn_of(memory_of(problem), temperature=temperature)
    np.testing.assert_allclose(knn(problem.queries), expected(problem, temperature=temperature), atol=1e-13)


@pytest.mark.parametrize("key_dtype", ["float16", "float32"])
def test_keys_are_searched_as_they_are_stored(problem: Problem, key_dtype: str) -> None:
    knn = knn_of(memory_of(problem, key_dtype=key_dtype))
    stored = replace(problem, keys=problem.keys.astype(key_dtype))
    np.testing.assert_allclose(knn(problem.queries), expected(stored), atol=1e-6)


@pytest.mark.parametrize(("prediction_dtype", "atol"), [("float16", 1e-3), ("float32", 1e-6)])
def test_half_and_single_precision_predictions_are_as_near_as_their_rounding(
    problem: Problem, prediction_dtype: str, atol: float
) -> None:
    knn = knn_of(memory_of(problem, prediction_dtype=prediction_dtype))
    found = knn(problem.queries)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(problem), atol=atol)


@pytest.mark.parametrize("limit", ["TABLE_BYTES", "GATHER_BYTES"])
def test_residuals_made_on_the_way_or_in_small_pieces_are_the_same(
    problem: Problem, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correction, limit, 1)
    np.testing.assert_allclose(knn_of(memory_of(problem))(problem.queries), expected(problem), atol=1e-13)


def test_neighbors_are_the_nearest_ids_with_their_distances_and_weights(problem: Problem) -> None:
    ids = np.random.default_rng(3).permutation(1000)[: len(problem)]
    found = knn_of(memory_of(problem, ids=ids)).neighbors(problem.queries)
    distances, rows = reference.neighbors(problem.keys, problem.queries, 7)
    np.testing.assert_array_equal(found.ids, ids[rows])
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)
    np.testing.assert_allclose(found.weights, reference.weights(distances, 0.5), rtol=1e-12)


def test_contributions_sum_to_the_residual(problem: Problem) -> None:
    knn = knn_of(memory_of(problem))
    found, parts = knn.contributions(problem.queries)
    np.testing.assert_allclose(parts.sum(axis=1), knn(problem.queries), atol=1e-14)
    np.testing.assert_array_equal(found.ids, knn.neighbors(problem.queries).ids)


@pytest.mark.parametrize("task", [classification, regression])
def test_memory_only_is_the_weighted_mean_of_the_labels(task: Any) -> None:
    problem = task()
    distances, rows = reference.neighbors(problem.keys, problem.queries, 7)
    targets = problem.labels if task is regression else np.eye(4)[problem.labels]
    wanted = np.einsum("qk,qkc->qc", reference.weights(distances, 0.5), targets[rows])
    np.testing.assert_allclose(knn_of(memory_of(problem)).memory_only(problem.queries), wanted, atol=1e-13)


def test_search_gives_rows_of_the_snapshot_it_returns(problem: Problem) -> None:
    snapshot, found = knn_of(memory_of(problem)).search(problem.queries, 20)
    distances, rows = reference.neighbors(problem.keys, problem.queries, 20)
    assert len(snapshot) == len(problem)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)


def test_a_top_m_memory_corrects_with_the_rest_spread_evenly(problem: Problem) -> None:
    memory = empty_memory(problem, residuals="top-m")
    memory.append(problem.keys, problem.labels, top_m(problem.predictions, 2))
    order = np.sort(problem.predictions, axis=1)
    rest = order[:, :2].sum(axis=1, keepdims=True) / 2
    spread = np.where(problem.predictions >= order[:, 2:3], problem.predictions, rest)
    found = knn_of(memory)(problem.queries)
    np.testing.assert_allclose(found, expected(replace(problem, predictions=spread)), atol=1e-13)


def test_cosine_distances_are_those_of_the_unit_vectors(problem: Problem) -> None:
    def unit(keys: ndarray) -> ndarray:
        return keys / np.linalg.norm(keys, axis=1, keepdims=True)

    scaled = replace(problem, keys=unit(problem.keys), queries=unit(problem.queries))
    found = knn_of(memory_of(problem, metric="cosine"))(100 * problem.queries)
    np.testing.assert_allclose(found, expected(scaled), atol=1e-12)


def test_the_auto_bandwidth_is_the_median_distance_to_the_kth_other_row(problem: Problem) -> None:
    distances, _ = reference.neighbors(problem.keys, problem.keys, 8)
    knn = knn_of(memory_of(problem), bandwidth="auto")
    assert knn.bandwidth == pytest.approx(np.median(distances[:, 7]), rel=1e-12)


def test_the_auto_floor_of_the_inverse_kernel_is_the_median_nearest_distance(problem: Problem) -> None:
    distances, _ = reference.neighbors(problem.keys, problem.keys, 2)
    knn = knn_of(memory_of(problem), bandwidth="auto", kernel="inverse")
    assert knn.bandwidth == pytest.approx(np.median(distances[:, 1]), rel=1e-12)


def test_the_auto_bandwidth_ignores_forgotten_rows(problem: Problem) -> None:
    memory = memory_of(problem)
    memory.forget(np.arange(20))
    without = knn_of(memory_of(problem.rows(slice(20, None))), bandwidth="auto")
    assert knn_of(memory, bandwidth="auto").bandwidth == pytest.approx(without.bandwidth, rel=1e-12)


def test_the_auto_bandwidth_waits_for_rows_and_then_stays(problem: Problem) -> None:
    memory = empty_memory(problem)
    knn = knn_of(memory, bandwidth="auto")
    assert knn.bandwidth == 1.0
    memory.append(problem.keys, problem.labels, problem.predictions)
    measured = knn.bandwidth
    assert measured != 1.0
    memory.append(problem.keys * 10, problem.labels, problem.predictions)
    assert knn.bandwidth == measured


def test_the_auto_bandwidth_of_duplicates_alone_is_positive(problem: Problem) -> None:
    same = replace(problem, keys=np.zeros_like(problem.keys))
    assert knn_of(memory_of(same), bandwidth="auto").bandwidth > 0


def test_the_auto_bandwidth_is_finite_where_an_index_finds_fewer_than_k() -> None:
    random = np.random.default_rng(0)
    centres = 100 * np.repeat(np.eye(16), 45, axis=0)
    problem = replace(classification(n=720, d=16), keys=centres + random.normal(size=centres.shape))
    knn = knn_of(memory_of(problem), n_neighbors=60, bandwidth="auto", index="faiss:IVF16,Flat?nprobe=1")
    assert np.isfinite(knn.bandwidth)


@pytest.mark.parametrize("index", ["exact:numpy", "exact:torch", "exact:faiss"])
def test_it_follows_its_memory_through_every_change(problem: Problem, index: str, place: Path | None) -> None:
    memory = empty_memory(problem, place)
    knn = knn_of(memory, index=index)
    assert not knn(problem.queries).any()
    for start in range(0, 60, 20):
        part = problem.rows(slice(start, start + 20))
        memory.append(part.keys, part.labels, part.predictions)
        np.testing.assert_allclose(knn(problem.queries), expected(problem.rows(slice(0, start + 20))), atol=1e-13)
    memory.forget(np.arange(5, 35))
    left = problem.rows(np.r_[:5, 35:60])
    np.testing.assert_allclose(knn(problem.queries), expected(left), atol=1e-13)
    memory.compact()
    np.testing.assert_allclose(knn(problem.queries), expected(left), atol=1e-13)
    memory.append(problem.keys[5:35], problem.labels[5:35], problem.predictions[5:35])
    np.testing.assert_allclose(knn(problem.queries), expected(problem), atol=1e-13)


def test_a_thread_that_read_an_older_version_gets_rows_of_that_or_of_a_newer_one(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = memory_of(problem.rows(slice(0, 30)))
    knn = knn_of(memory)
    older = memory.snapshot
    memory.append(problem.keys[30:], problem.labels[30:], problem.predictions[30:])
    newer = memory.snapshot
    knn(problem.queries)
    seen = iter([older])
    monkeypatch.setattr(Memory, "snapshot", property(lambda _: next(seen, newer)))
    snapshot, found = knn.search(problem.queries, 60)
    assert ((found.rows >= 0).sum(axis=1) == len(snapshot)).all()


def test_max_weight_cuts_a_weight_and_gives_it_to_nobody(problem: Problem) -> None:
    memory = memory_of(problem)
    free, capped = knn_of(memory).neighbors(problem.queries), knn_of(memory, max_weight=0.2).neighbors(problem.queries)
    assert free.weights.max() > 0.2
    np.testing.assert_array_equal(capped.weights, np.minimum(free.weights, 0.2))


@pytest.mark.parametrize(
    "memory_maker",
    [
        lambda problem: empty_memory(problem),
        lambda problem: empty_memory(problem, residuals="top-m"),
    ],
)
def test_an_empty_memory_answers_with_nothing(problem: Problem, memory_maker: Any) -> None:
    knn = knn_of(memory_maker(problem))
    found = knn.neighbors(problem.queries)
    assert not knn(problem.queries).any()
    assert not knn.memory_only(problem.queries).any()
    assert (found.ids == -1).all()
    assert np.isinf(found.distances).all()
    assert not found.weights.any()


def test_no_queries_give_no_answers(problem: Problem) -> None:
    knn = knn_of(memory_of(problem))
    assert knn(np.zeros((0, 5))).shape == (0, 4)
    assert knn.neighbors(np.zeros((0, 5))).ids.shape == (0, 7)


def test_more_neighbors_than_rows_uses_all_rows_and_warns(problem: Problem) -> None:
    memory = memory_of(problem.rows(slice(0, 5)))
    with pytest.warns(FewerNeighbors, match=r"7.*5 rows"):
        knn = knn_of(memory)
    found = knn.neighbors(problem.queries)
    assert (np.sort(found.ids, axis=1) == [-1, -1, 0, 1, 2, 3, 4]).all()
    np.testing.assert_allclose(knn(problem.queries), expected(problem.rows(slice(0, 5)), 5), atol=1e-13)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_neighbors", 0),
        ("n_neighbors", -1),
        ("bandwidth", 0.0),
        ("bandwidth", -1.0),
        ("bandwidth", float("nan")),
        ("bandwidth", "wide"),
        ("kernel", "cubic"),
        ("temperature", 0.0),
        ("temperature", float("inf")),
        ("max_weight", 0.0),
        ("max_weight", 1.5),
        ("index", "exactly"),
        ("index", "exact:jax"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_by_name(problem: Problem, option: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=option if option != "index" else "expected"):
        knn_of(memory_of(problem), **{option: value})


def test_an_index_that_cannot_be_built_is_refused_before_the_memory_has_rows(problem: Problem) -> None:
    with pytest.raises(InvalidInput):
        knn_of(empty_memory(problem), index="exact:jax")


@pytest.mark.parametrize("bad", [np.full((1, 5), np.nan), np.full((1, 5), 1e30), np.full((1, 5), np.inf)])
def test_queries_that_are_no_usable_numbers_are_refused(problem: Problem, bad: ndarray) -> None:
    with pytest.raises(InvalidInput):
        knn_of(memory_of(problem))(bad)


def test_queries_of_another_width_are_refused(problem: Problem) -> None:
    with pytest.raises(DimensionMismatch, match=r"dimension 3.*dimension 5"):
        knn_of(memory_of(problem))(np.zeros((1, 3)))


def test_regression_has_no_temperature(values: Problem) -> None:
    with pytest.raises(InvalidInput, match="regression"):
        knn_of(memory_of(values), temperature=2.0)


def test_a_top_m_memory_refuses_another_temperature(problem: Problem) -> None:
    with pytest.raises(InvalidInput, match="top-m"):
        knn_of(empty_memory(problem, residuals="top-m"), temperature=2.0)


def test_exclude_takes_one_name_a_query(problem: Problem) -> None:
    with pytest.raises(DimensionMismatch, match="exclude"):
        knn_of(memory_of(problem))(problem.queries, exclude=[1, 2])


def test_exclude_of_another_type_than_the_ids_is_refused(problem: Problem) -> None:
    with pytest.raises(InvalidInput, match=r"exclude holds strings"):
        knn_of(memory_of(problem))(problem.queries, exclude=["a"] * 12)


def test_a_class_that_the_base_never_saw_is_learned_from_the_memory(problem: Problem) -> None:
    memory = empty_memory(problem, n_outputs=5)
    memory.append(problem.keys, np.full(60, 4), problem.predictions)
    knn = knn_of(memory, n_neighbors=1)
    scores = correct(problem.predictions, knn(problem.keys))
    np.testing.assert_allclose(scores, np.eye(5)[np.full(60, 4)], atol=1e-14)


@given(seed=st.integers(0, 10**6), shrinkage=st.floats(0, 2))
def test_correct_adds_the_shrunk_residual(seed: int, shrinkage: float) -> None:
    random = np.random.default_rng(seed)
    base, residual = softmax(random.normal(size=(3, 4))), random.normal(size=(3, 4))
    np.testing.assert_allclose(correct(base, residual, shrinkage), base + shrinkage * residual, atol=1e-14)


def test_correct_takes_a_shrinkage_a_query(problem: Problem) -> None:
    residual, amounts = np.ones((12, 4)), np.arange(12) / 12
    found = correct(problem.said, residual, amounts)
    np.testing.assert_allclose(found, problem.said + amounts[:, None] * residual)


def test_correct_keeps_the_shape_of_one_output_and_writes_to_nothing() -> None:
    base, residual = np.array([1.0, 2.0]), np.array([[0.5], [0.5]])
    assert correct(base, residual).tolist() == [1.5, 2.5]
    assert base.tolist() == [1, 2]
    assert residual.tolist() == [[0.5], [0.5]]


@pytest.mark.parametrize(
    ("base", "residual", "shrinkage"),
    [
        (np.full((2, 2), 0.5), np.zeros((3, 2)), 1.0),
        (np.full((2, 3), 1 / 3), np.zeros((2, 2)), 1.0),
        (np.zeros((2, 2)), np.zeros((2, 3)), 1.0),
        (np.full((2, 2), 0.5), np.zeros((2, 2)), [0.1, 0.2, 0.3]),
        (np.full((3, 3), 1 / 3), np.zeros((3, 3)), np.ones((3, 2))),
    ],
)
def test_correct_refuses_shapes_that_do_not_fit(base: ndarray, residual: ndarray, shrinkage: Any) -> None:
    with pytest.raises(DimensionMismatch):
        correct(base, residual, np.asarray(shrinkage))


@pytest.mark.parametrize("shrinkage", [-0.1, float("nan"), float("inf")])
def test_correct_refuses_a_shrinkage_that_makes_no_sense(shrinkage: float) -> None:
    with pytest.raises(InvalidInput, match="shrinkage"):
        correct(np.full((1, 2), 0.5), np.zeros((1, 2)), np.array(shrinkage))


@given(seed=st.integers(0, 10**6), floor=st.floats(0.01, 1))
def test_with_the_base_every_probability_is_positive_and_only_too_small_scores_move(seed: int, floor: float) -> None:
    random = np.random.default_rng(seed)
    base, scores = softmax(random.normal(size=(4, 5))), random.normal(size=(4, 5)) + 0.2
    raised = np.maximum(scores, floor * base)
    found = to_probabilities(scores, base, floor=floor)
    assert found.min() > 0
    np.testing.assert_allclose(found, raised / raised.sum(axis=1, keepdims=True), rtol=1e-12)


def test_scores_that_are_a_distribution_already_stay_as_they_are(problem: Problem) -> None:
    np.testing.assert_allclose(to_probabilities(problem.said, problem.said), problem.said, rtol=1e-12)
    np.testing.assert_allclose(to_probabilities(problem.said), problem.said, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_class_that_base_and_scores_give_nothing_still_gets_a_positive_probability(dtype: type) -> None:
    scores: ndarray = np.array([[1.0, 0.0, 0.0]], dtype)
    probabilities = to_probabilities(scores, scores)
    assert probabilities.min() > 0
    assert np.isfinite(np.log(probabilities)).all()


def test_the_base_of_probabilities_may_be_narrower_than_the_scores() -> None:
    found = to_probabilities(np.array([[0.2, 0.3, 0.5]]), np.array([[0.4, 0.6]]))
    np.testing.assert_allclose(found, [[0.2, 0.3, 0.5]])


@given(seed=st.integers(0, 10**6))
def test_without_the_base_the_nearest_point_of_the_simplex_is_given(seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = 2 * random.normal(size=(3, 5))
    found = to_probabilities(scores)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert found.min() >= 0
    for other in random.dirichlet(np.ones(5), 50):
        slopes = ((scores - found) * (other - found)).sum(axis=1)
        assert slopes.max() <= 1e-12, "a nearer point of the simplex lies this way"


@given(seed=st.integers(0, 10**6))
def test_the_projection_keeps_the_order_of_the_scores(seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(3, 6))
    ordered = np.take_along_axis(to_probabilities(scores), np.argsort(scores, axis=1), axis=1)
    assert np.diff(ordered, axis=1).min() >= 0


@pytest.mark.parametrize("floor", [0.0, -0.1, 1.5, float("nan")])
def test_a_floor_outside_its_range_is_refused(floor: float) -> None:
    with pytest.raises(InvalidInput, match="floor"):
        to_probabilities([[0.5, 0.5]], [[0.5, 0.5]], floor=floor)


def test_probabilities_refuse_a_base_of_another_shape() -> None:
    with pytest.raises(DimensionMismatch):
        to_probabilities([[0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]])


def test_stored_rows_and_queries_are_tempered_alike(problem: Problem) -> None:
    knn = knn_of(memory_of(problem), n_neighbors=1, temperature=1.7)
    scores = correct(temper(problem.predictions, 1.7), knn(problem.keys))
    np.testing.assert_allclose(scores, np.eye(4)[problem.labels], atol=1e-14)


def test_an_index_describes_itself(problem: Problem) -> None:
    assert knn_of(memory_of(problem), index="exact:numpy").description == "exact (numpy)"
    assert knn_of(empty_memory(problem)).description == "nothing to search"


def test_an_answer_does_not_depend_on_the_batch_that_a_query_came_in(problem: Problem) -> None:
    knn: ResidualKNN = knn_of(memory_of(problem))
    together = knn.neighbors(problem.queries)
    for row in range(len(problem.queries)):
        alone = knn.neighbors(problem.queries[row : row + 1])
        assert same_bits(alone.distances[0], together.distances[row])
        assert same_bits(alone.weights[0], together.weights[row])
