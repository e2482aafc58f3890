"""Corrections over a large vocabulary, which never write it out, against the rows written out in full."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from residual_memory.correction import ResidualKNN
from residual_memory.errors import InvalidInput
from residual_memory.residuals import classification_residuals, top_m
from residual_memory.sparse import SMALLEST_TAIL, Recalled, merged, residual_at, sparse_residual, whole
from tests import reference
from tests.problems import Problem, classification, knn_of, memory_of, softmax

ROUNDING: dict[str, Any] = {"rtol": 0, "atol": 2e-6}  # sums of float32
SEEDS = st.integers(0, 2**16)


def recalled_of(q: int, k: int, m: int, c: int, seed: int = 0, sharpness: float = 2.0) -> tuple[Recalled, ndarray]:
    """What k neighbours of q queries hold, and what the base says of the queries [q c]."""
    random = np.random.default_rng(seed)
    rows = top_m(softmax(sharpness * random.normal(size=(q * k, c))), m)
    found = Recalled(
        np.arange(q * k).reshape(q, k),
        np.sort(random.random((q, k)), axis=1),
        random.integers(0, c, (q, k)),
        rows.indices.reshape(q, k, m),
        rows.probabilities.reshape(q, k, m).astype(np.float32),
        rows.rest.reshape(q, k).astype(np.float32),
    )
    return found, softmax(sharpness * random.normal(size=(q, c))).astype(np.float32)


def weights_of(recalled: Recalled) -> ndarray:
    return reference.weights(recalled.distances, 0.3)


def listed(recalled: Recalled, said: ndarray) -> ndarray:
    """What the base gives each class that a neighbour lists [q k m]."""
    q = len(said)
    return np.take_along_axis(said, recalled.indices.reshape(q, -1), axis=1).reshape(recalled.indices.shape)


def in_full(recalled: Recalled, weights: ndarray, said: ndarray) -> ndarray:
    """Σ w (onehot(label) − prediction) with every prediction completed."""
    total = np.zeros(said.shape)
    for q, k in np.ndindex(recalled.labels.shape):
        row = recalled.indices[q, k], recalled.probabilities[q, k], float(recalled.rest[q, k])
        total[q] += weights[q, k] * (np.eye(said.shape[1])[recalled.labels[q, k]] - reference.completed(*row, said[q]))
    return total


def residual(recalled: Recalled, weights: ndarray, said: ndarray) -> ndarray:
    return sparse_residual(recalled, weights, listed(recalled, said)).dense(said)


@given(SEEDS, st.integers(1, 6), st.integers(1, 8), st.floats(0.1, 1))
def test_it_is_the_residual_of_the_completed_rows(seed: int, k: int, m: int, sharpness: float) -> None:
    recalled, said = recalled_of(4, k, m, 9, seed, sharpness)
    weights = weights_of(recalled)
    np.testing.assert_allclose(residual(recalled, weights, said), in_full(recalled, weights, said), **ROUNDING)


@given(SEEDS, st.integers(1, 6), st.integers(1, 9), st.floats(0.1, 30))
def test_rows_sum_to_zero(seed: int, k: int, m: int, sharpness: float) -> None:
    """In double precision: of a tail of 1e-6, single precision knows the first digit alone."""
    recalled, single = recalled_of(4, k, m, 9, seed, sharpness)
    said = reference.tempered(single, 1.0)
    np.testing.assert_allclose(residual(recalled, weights_of(recalled), said).sum(axis=1), 0, **ROUNDING)


@given(SEEDS, st.integers(1, 6), st.integers(1, 8), st.floats(0.1, 1))
def test_a_correction_in_full_leaves_a_distribution(seed: int, k: int, m: int, sharpness: float) -> None:
    """Rows that list the query's own prediction take away just what the base says, so nothing falls below 0."""
    recalled, said = recalled_of(4, k, m, 9, seed, sharpness)
    like = top_m(np.repeat(said.astype(np.float64), k, axis=0), m)
    same = Recalled(
        recalled.ids,
        recalled.distances,
        recalled.labels,
        like.indices.reshape(4, k, m),
        like.probabilities.reshape(4, k, m).astype(np.float32),
        like.rest.reshape(4, k).astype(np.float32),
    )
    assert (said + residual(same, weights_of(same), said)).min() > -1e-5


def test_all_classes_listed_is_the_dense_residual() -> None:
    recalled, said = recalled_of(5, 4, 7, 7)
    weights = weights_of(recalled)
    full = np.zeros((5, 4, 7))
    np.put_along_axis(full, recalled.indices.astype(np.int64), recalled.probabilities, axis=2)
    rows = classification_residuals(recalled.labels.ravel(), full.reshape(20, 7)).reshape(5, 4, 7)
    np.testing.assert_allclose(residual(recalled, weights, said), np.einsum("qk,qkc->qc", weights, rows), **ROUNDING)


def test_a_dense_memory_recalled_gives_what_its_regressor_gives(problem: Problem) -> None:
    knn = knn_of(memory_of(problem))
    recalled = knn.recall(problem.queries)
    weights = knn.weights(recalled.distances)
    np.testing.assert_allclose(residual(recalled, weights, problem.said), knn(problem.queries), **ROUNDING)


def test_rows_whole_are_lists_of_all_classes(problem: Problem) -> None:
    rows = whole(problem.predictions.reshape(12, 5, -1))
    assert rows.indices.shape == (12, 5, 4)
    assert (rows.rest == 0).all()


@given(SEEDS, st.integers(1, 6), st.integers(1, 9), st.floats(0.1, 30))
def test_at_one_class_it_is_the_whole_residual_there(seed: int, k: int, m: int, sharpness: float) -> None:
    recalled, said = recalled_of(6, k, m, 9, seed, sharpness)
    weights = weights_of(recalled)
    targets = np.random.default_rng(seed).integers(0, 9, 6)
    hit, parts = residual_at(recalled, listed(recalled, said), targets, said[np.arange(6), targets])
    everything = residual(recalled, weights, said)
    np.testing.assert_allclose((weights * parts).sum(axis=1), everything[np.arange(6), targets], **ROUNDING)
    np.testing.assert_array_equal(hit, recalled.labels == targets[:, None])


@pytest.mark.parametrize("outside", [0.0, 1e-9, SMALLEST_TAIL / 2])
def test_a_query_sure_of_the_listed_classes_scales_the_listed_part_up(outside: float) -> None:
    """Its own prediction has no tail to spread the rest by, so the row's listed part counts for all of it."""
    said = np.array([[1 - outside, outside, 0]], np.float32)
    one = Recalled(
        np.array([[3]]),
        np.array([[0.1]]),
        np.array([[2]]),
        np.array([[[0]]], np.int32),
        np.array([[[0.25]]], np.float32),
        np.array([[0.75]], np.float32),
    )
    np.testing.assert_allclose(residual(one, np.ones((1, 1)), said), [[-1, 0, 1]], atol=1e-6)


def test_a_small_tail_of_the_query_still_gets_the_rest() -> None:
    said = np.array([[1 - 4 * SMALLEST_TAIL, 3 * SMALLEST_TAIL, SMALLEST_TAIL]])
    one = Recalled(
        np.array([[3]]),
        np.array([[0.1]]),
        np.array([[2]]),
        np.array([[[0]]], np.int32),
        np.array([[[0.2]]]),
        np.array([[0.8]]),
    )
    np.testing.assert_allclose(residual(one, np.ones((1, 1)), said), [[-0.2, -0.6, 0.8]], atol=1e-6)


def test_missing_neighbours_count_for_nothing() -> None:
    recalled, said = recalled_of(3, 4, 2, 6)
    weights = weights_of(recalled)
    weights[:, 2:] = 0
    first = Recalled(**{name: getattr(recalled, name)[:, :2] for name in Recalled.__dataclass_fields__})
    np.testing.assert_array_equal(residual(recalled, weights, said), residual(first, weights[:, :2], said))


def test_some_queries_alone_get_what_they_get_among_all() -> None:
    recalled, said = recalled_of(5, 3, 2, 6)
    weights, chosen = weights_of(recalled), np.array([4, 1])
    alone = residual(recalled.of(chosen), weights[chosen], said[chosen])
    np.testing.assert_array_equal(alone, residual(recalled, weights, said)[chosen])


# ---------------------------------------------------------------------- kNN-LM


def test_with_no_mass_listed_it_is_the_neighbours_distribution_minus_the_base() -> None:
    """Oracle H: a memory that knows nothing of the base's prediction interpolates as kNN-LM does."""
    recalled, said = recalled_of(6, 5, 1, 8)
    unsaid = np.concatenate([said, np.zeros((6, 1), np.float32)], axis=1)  # class 8 alone is listed
    nothing = np.zeros((6, 5, 1), np.float32)
    plain = Recalled(
        recalled.ids, recalled.distances, recalled.labels, np.full((6, 5, 1), 8, np.int32), nothing, np.ones((6, 5))
    )
    weights = weights_of(recalled)
    p_knn = np.einsum("qk,qkc->qc", weights, np.eye(9)[recalled.labels])
    ours = residual(plain, weights, unsaid)
    np.testing.assert_allclose(ours, p_knn - unsaid, rtol=0, atol=4e-7)
    np.testing.assert_allclose(unsaid + 0.3 * ours, 0.7 * unsaid + 0.3 * p_knn, rtol=0, atol=4e-7)


@given(SEEDS, st.integers(1, 6), st.integers(1, 9), st.floats(0, 1))
def test_a_share_of_the_residual_leaves_the_rest_to_knn_lm(seed: int, k: int, m: int, share: float) -> None:
    recalled, said = recalled_of(4, k, m, 9, seed)
    weights, at = weights_of(recalled), listed(recalled, said)
    mixture = np.einsum("qk,qkc->qc", weights, np.eye(9)[recalled.labels]) - weights.sum(axis=1)[:, None] * said
    shared = sparse_residual(recalled, weights, at, share=share).dense(said)
    expected = share * residual(recalled, weights, said) + (1 - share) * mixture
    np.testing.assert_allclose(shared, expected, **ROUNDING)
    np.testing.assert_allclose(sparse_residual(recalled, weights, at, share=0.0).dense(said), mixture, **ROUNDING)


@pytest.mark.parametrize("m", [1, 3, 8])
def test_memories_that_said_what_the_base_says_interpolate_as_knn_lm(m: int) -> None:
    """Oracle I, with the predictions cut to the top m."""
    recalled, said = recalled_of(6, 5, m, 8)
    rows = top_m(np.repeat(said.astype(np.float64), 5, axis=0), m)
    same = Recalled(
        recalled.ids,
        recalled.distances,
        recalled.labels,
        rows.indices.reshape(6, 5, m),
        rows.probabilities.reshape(6, 5, m).astype(np.float32),
        rows.rest.reshape(6, 5).astype(np.float32),
    )
    weights = weights_of(recalled)
    p_knn = np.einsum("qk,qkc->qc", weights, np.eye(8)[recalled.labels])
    np.testing.assert_allclose(said + 0.3 * residual(same, weights, said), 0.7 * said + 0.3 * p_knn, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------- several memories


def halves(problem: Problem, **options: Any) -> tuple[ResidualKNN, ResidualKNN, ResidualKNN]:
    """Regressors over the first rows, the others, and all of them."""
    n = len(problem) // 3
    ids = np.arange(len(problem))
    parts = (slice(0, n), slice(n, None), slice(None))
    first, second, both = (knn_of(memory_of(problem.rows(part), ids=ids[part], **options)) for part in parts)
    return first, second, both


def assert_same_recall(one: Recalled, other: Recalled) -> None:
    for name in Recalled.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("options", [{}, {"residuals": "top-m", "prediction_dtype": "float32"}], ids=["dense", "top-m"])
def test_two_memories_are_searched_as_one_that_holds_both(options: dict[str, Any]) -> None:
    problem = classification(c=6)
    first, second, both = halves(problem, **options)
    found = [knn.recall(problem.queries) for knn in (first, second)]
    assert_same_recall(merged(found, 7), both.recall(problem.queries))
    assert_same_recall(merged(found[::-1], 7), both.recall(problem.queries))


def test_equally_near_rows_come_in_the_order_of_the_memories() -> None:
    problem = classification(d=2)
    queries = np.zeros((1, 2))
    tied = Problem(
        np.tile([[1.0, 0.0], [0.0, 1.0]], (30, 1)), problem.labels, problem.predictions, queries, problem.said
    )
    first, second, both = halves(tied)
    found = [knn.recall(queries) for knn in (first, second)]
    assert_same_recall(merged(found, 7), both.recall(queries))
    np.testing.assert_array_equal(merged(found[::-1], 7).ids, [np.arange(20, 27)])


def test_a_memory_of_fewer_rows_leaves_the_places_to_the_other() -> None:
    problem = classification()
    few, many = memory_of(problem.rows(slice(0, 2))), memory_of(problem.rows(slice(2, None)), ids=np.arange(2, 60))
    found = [
        ResidualKNN(few, n_neighbors=2, bandwidth=1.0).recall(problem.queries, 7),
        knn_of(many).recall(problem.queries),
    ]
    assert_same_recall(merged(found, 7), knn_of(memory_of(problem)).recall(problem.queries))


@pytest.mark.parametrize("order", [1, -1])
def test_a_memory_without_rows_changes_nothing(order: int) -> None:
    """It never had a row, so it has no m of its own either."""
    problem = classification(c=6)
    options: dict[str, Any] = {"residuals": "top-m", "prediction_dtype": "float32"}
    full, empty = memory_of(problem, **options), memory_of(problem.rows(slice(0, 0)), **options)
    found = [knn_of(memory).recall(problem.queries) for memory in (full, empty)]
    assert_same_recall(merged(found[::order], 7), found[0])


def test_memories_that_keep_different_numbers_of_classes_are_refused() -> None:
    problem = classification(c=6)
    top = knn_of(memory_of(problem, residuals="top-m", prediction_dtype="float32")).recall(problem.queries)
    dense = knn_of(memory_of(problem)).recall(problem.queries)
    with pytest.raises(InvalidInput, match=r"the memories keep the top 2 and 6, expected the same m in all; "):
        merged([top, dense], 7)
