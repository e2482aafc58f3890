"""How far memories count and how much, and what their labels and their errors say beside the residual."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from residual_memory import correction
from residual_memory.correction import Averages, correct
from residual_memory.errors import InvalidInput
from residual_memory.kernels import KERNELS, WEIGHTINGS
from residual_memory.memory import Memory
from tests import reference
from tests.problems import Problem, classification, empty_memory, knn_of, memory_of, on_grid, regression, same_bits

K, SIGMA, NUGGET = 7, 0.6, 0.1
LIMIT = 1.7  # between the nearest and the seventh neighbour of most queries of the problems below
every_task = pytest.mark.parametrize("task", [classification, regression])
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_weighting = pytest.mark.parametrize("kernel", WEIGHTINGS)


def weighted(memory: Memory, **options: Any) -> Any:
    return knn_of(memory, **{"n_neighbors": K, "bandwidth": SIGMA, "nugget": NUGGET, **options})


def targets_of(problem: Problem) -> ndarray:
    return problem.labels if problem.task == "regression" else np.eye(problem.said.shape[1])[problem.labels]


def found_in(problem: Problem, k: int = K) -> tuple[ndarray, ndarray]:
    return reference.neighbors(problem.keys, problem.queries, k)


def kriged(problem: Problem, rows: ndarray, units: ndarray) -> ndarray:
    """Kriging weights [q k], each query's world shrunk by its own unit."""
    lines = zip(problem.queries, rows, units, strict=True)
    return np.array([reference.kriging(q / u, problem.keys[some] / u, SIGMA, NUGGET) for q, some, u in lines])


# ---------------------------------------------------------------------------------------------- a bandwidth of its own


@every_task
@every_kernel
def test_local_weights_are_those_of_distances_over_the_querys_own_to_its_kth_neighbour(task: Any, kernel: str) -> None:
    problem = task()
    distances, rows = found_in(problem)
    knn = weighted(memory_of(problem), kernel=kernel, local=True)
    found = knn.neighbors(problem.queries)
    np.testing.assert_array_equal(found.ids, rows)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)  # these stay as they are
    wanted = reference.weights(distances / distances[:, -1:], SIGMA, kernel)
    np.testing.assert_allclose(found.weights, wanted, rtol=1e-12)
    rest = reference.residuals(problem.labels, problem.predictions)
    np.testing.assert_allclose(knn(problem.queries), np.einsum("qk,qkc->qc", wanted, rest[rows]), atol=1e-13)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_local_kriging_divides_the_distances_among_the_neighbours_too(
    problem: Problem, in_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_pieces:
        monkeypatch.setattr(correction, "GATHER_BYTES", 5 * 8 * K**2)  # five queries at a time
    distances, rows = found_in(problem)
    found = weighted(memory_of(problem), kernel="kriging", local=True).neighbors(problem.queries)
    np.testing.assert_allclose(found.weights, kriged(problem, rows, distances[:, -1]), atol=1e-10)


@every_kernel
def test_weights_of_distances_alone_are_local_too(problem: Problem, kernel: str) -> None:
    knn = weighted(memory_of(problem), kernel=kernel, local=True, max_weight=0.2)
    found = knn.neighbors(problem.queries)
    assert found.weights.max() <= 0.2
    np.testing.assert_array_equal(knn.weights(found.distances), found.weights)


@every_weighting
def test_the_local_bandwidth_is_one_where_it_is_automatic(problem: Problem, kernel: str) -> None:
    memory = memory_of(problem)
    automatic, one = (weighted(memory, kernel=kernel, local=True, bandwidth=each) for each in ("auto", 1.0))
    assert automatic.bandwidth == 1
    assert same_bits(automatic(problem.queries), one(problem.queries))
    assert automatic.bandwidth == 1
    if kernel != "uniform":
        assert not np.allclose(automatic(problem.queries), weighted(memory, kernel=kernel, local=True)(problem.queries))


@every_weighting
def test_the_unit_of_the_keys_changes_no_local_answer(problem: Problem, kernel: str) -> None:
    large = replace(problem, keys=10 * problem.keys, queries=10 * problem.queries)
    here, there = (weighted(memory_of(some), kernel=kernel, local=True) for some in (problem, large))
    np.testing.assert_allclose(there(large.queries), here(problem.queries), rtol=1e-9, atol=1e-12)
    if kernel not in ("uniform", "inverse"):  # which know no unit but that of a floor
        fixed, moved = (weighted(memory_of(some), kernel=kernel) for some in (problem, large))
        assert not np.allclose(moved(large.queries), fixed(problem.queries), atol=1e-3)


@pytest.mark.parametrize("key_dtype", ["float32", "float64"])
@every_weighting
def test_local_neighbours_that_are_all_at_the_query_share_alike(problem: Problem, kernel: str, key_dtype: str) -> None:
    same = replace(problem, keys=np.ones_like(problem.keys), queries=np.ones_like(problem.queries))
    found = weighted(memory_of(same, key_dtype=key_dtype), kernel=kernel, local=True).neighbors(same.queries)
    each = 1 / (K + NUGGET) if kernel == "kriging" else 1 / K
    assert not found.distances.any()
    np.testing.assert_allclose(found.weights, np.full((12, K), each), rtol=1e-6)


@every_weighting
def test_where_there_are_fewer_than_k_the_last_that_is_there_is_the_local_unit(problem: Problem, kernel: str) -> None:
    memory = memory_of(problem)
    knn = weighted(memory, kernel=kernel, local=True)
    memory.forget(np.arange(3, 60))
    three = problem.rows(slice(3))
    distances, rows = found_in(three, 3)
    if kernel == "kriging":
        wanted = kriged(three, rows, distances[:, -1])
    else:
        wanted = reference.weights(distances / distances[:, -1:], SIGMA, kernel)
    found = knn.neighbors(problem.queries)
    np.testing.assert_allclose(found.weights[:, :3], wanted, atol=1e-12)
    assert not found.weights[:, 3:].any()


@every_weighting
def test_a_local_regressor_of_an_empty_memory_says_nothing(problem: Problem, kernel: str) -> None:
    knn = weighted(empty_memory(problem), kernel=kernel, local=True)
    assert same_bits(correct(problem.said, knn(problem.queries)), problem.said)
    assert knn(np.zeros((0, 5))).shape == (0, 4)


def test_what_is_weighted_in_another_way_stays_local_and_limited(problem: Problem) -> None:
    knn = weighted(memory_of(problem), local=True, max_distance=LIMIT)
    other = knn.with_kernel(n_neighbors=5, kernel="gaussian", bandwidth=0.4)
    plain = weighted(
        memory_of(problem), n_neighbors=5, kernel="gaussian", bandwidth=0.4, local=True, max_distance=LIMIT
    )
    assert same_bits(other(problem.queries), plain(problem.queries))


# ---------------------------------------------------------------------------------------------- too far to count


def near_weights(distances: ndarray, kernel: str, unit: Any = 1.0) -> ndarray:
    """Weights that sum to 1 over the neighbours within the limit, 0 beyond it."""
    raw = np.where(distances <= LIMIT, reference.KERNELS[kernel](distances / unit, SIGMA), 0.0)
    total = raw.sum(axis=1, keepdims=True)
    return np.divide(raw, total, out=np.zeros_like(raw), where=total > 0)


@every_task
@every_kernel
def test_memories_beyond_the_limit_do_not_count(task: Any, kernel: str) -> None:
    problem = task()
    distances, rows = found_in(problem)
    counted = distances <= LIMIT
    assert counted.any()
    assert not counted.all()
    wanted = near_weights(distances, kernel)
    knn = weighted(memory_of(problem), kernel=kernel, max_distance=LIMIT)
    np.testing.assert_allclose(knn.neighbors(problem.queries).weights, wanted, atol=1e-13)
    rest = reference.residuals(problem.labels, problem.predictions)
    np.testing.assert_allclose(knn(problem.queries), np.einsum("qk,qkc->qc", wanted, rest[rows]), atol=1e-13)


@pytest.mark.parametrize("local", [False, True])
def test_kriging_beyond_the_limit_is_as_if_these_memories_were_not_there(problem: Problem, local: bool) -> None:
    distances, rows = found_in(problem)
    units = distances[:, -1] if local else np.ones(12)
    wanted = np.zeros((12, K))
    for place, near in enumerate((distances <= LIMIT).sum(axis=1)):
        one = slice(place, place + 1)
        part = replace(problem, queries=problem.queries[one])
        wanted[place, :near] = kriged(part, rows[one, :near], units[one])[0]
    knn = weighted(memory_of(problem), kernel="kriging", max_distance=LIMIT, local=local)
    np.testing.assert_allclose(knn.neighbors(problem.queries).weights, wanted, atol=1e-10)


def test_a_memory_at_the_limit_still_counts() -> None:
    problem = replace(classification(n=3, d=1, q=1), keys=np.array([[1.0], [2.0], [2.5]]), queries=np.array([[0.0]]))
    found = weighted(memory_of(problem), n_neighbors=3, kernel="uniform", max_distance=2.0).neighbors(problem.queries)
    assert found.weights.tolist() == [[0.5, 0.5, 0]]


@every_kernel
def test_a_limit_does_not_move_the_local_unit(problem: Problem, kernel: str) -> None:
    """It is the distance to the k-th neighbour, whether that counts or not."""
    distances, _ = found_in(problem)
    wanted = near_weights(distances, kernel, distances[:, -1:])
    knn = weighted(memory_of(problem), kernel=kernel, max_distance=LIMIT, local=True)
    np.testing.assert_allclose(knn.neighbors(problem.queries).weights, wanted, atol=1e-13)


@every_task
@every_weighting
@pytest.mark.parametrize("local", [False, True])
def test_where_no_memory_is_near_enough_the_base_stands_alone_bit_for_bit(task: Any, kernel: str, local: bool) -> None:
    problem = task()
    nearest = found_in(problem)[0][:, 0]
    alone = nearest > 1.0
    assert alone.any()
    assert not alone.all()
    knn = weighted(memory_of(problem), kernel=kernel, max_distance=1.0, local=local)
    found = knn.look_up(problem.queries, labels=True)
    assert not found.residual[alone].any()
    assert found.residual[~alone].any(axis=1).all()
    assert not found.mass[alone].any()
    assert not found.labels[alone].any()
    for share in (0.0, 0.5, 1.0):
        scores = correct(problem.said, found.correction(problem.said, share))
        assert same_bits(scores[alone], problem.said[alone])
        assert (scores[~alone] != problem.said[~alone]).any(axis=1).all()


@every_weighting
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_limit_beyond_all_memories_changes_nothing_bit_for_bit(kernel: str, local: bool, dtype: str) -> None:
    problem = classification()
    memory = memory_of(problem, key_dtype=dtype, prediction_dtype=dtype)
    queries = problem.queries.astype(dtype)
    limited = weighted(memory, kernel=kernel, local=local, max_distance=1e6)
    assert same_bits(limited(queries), weighted(memory, kernel=kernel, local=local)(queries))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("limit", "said"),
    [(0, "max_distance is 0"), (-1, "max_distance is -1"), (float("nan"), "max_distance is nan"),
     (float("inf"), "max_distance is inf"), ("x", "max_distance is 'x'")],
)  # fmt: skip
def test_a_limit_that_is_no_distance_is_refused_by_name(problem: Problem, limit: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        weighted(memory_of(problem), max_distance=limit)


# ---------------------------------------------------------------------------------------------- what the labels say

WAYS: dict[str, dict[str, Any]] = {
    "exponential": {},
    "local": {"kernel": "gaussian", "local": True},
    "capped": {"max_weight": 0.2},
    "limited": {"kernel": "inverse", "max_distance": LIMIT},
    "kriging": {"kernel": "kriging"},
}
every_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


@every_task
@every_way
def test_labels_come_on_demand_with_the_weights_that_they_are_made_of(task: Any, options: dict[str, Any]) -> None:
    problem = task()
    knn = weighted(memory_of(problem), **options)
    found = knn.look_up(problem.queries, labels=True)
    distances, rows = found_in(problem)
    weights = knn.neighbors(problem.queries).weights
    assert same_bits(found.residual, knn(problem.queries))
    assert same_bits(found.labels, knn.memory_only(problem.queries))
    np.testing.assert_allclose(found.labels, np.einsum("qk,qkc->qc", weights, targets_of(problem)[rows]), atol=1e-13)
    np.testing.assert_allclose(found.mass, weights.sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.farthest, distances[:, -1], rtol=1e-12)


def test_labels_that_nobody_asked_for_are_not_looked_at(problem: Problem) -> None:
    found = weighted(memory_of(problem)).look_up(problem.queries)
    assert (found.labels, found.mass) == (None, None)


def test_a_row_that_is_left_out_says_nothing_by_its_label_either(problem: Problem) -> None:
    knn = weighted(memory_of(problem), n_neighbors=1)
    itself = knn.look_up(problem.keys, labels=True).labels
    without = knn.look_up(problem.keys, np.arange(60), labels=True).labels
    second = found_in(replace(problem, queries=problem.keys), 2)[1][:, 1]
    np.testing.assert_array_equal(itself, targets_of(problem))
    np.testing.assert_array_equal(without, targets_of(problem)[second])


def test_the_weights_of_a_kernel_have_mass_one_and_those_of_kriging_any(problem: Problem) -> None:
    memory = memory_of(problem)
    mass = {name: weighted(memory, **way).look_up(problem.queries, labels=True).mass for name, way in WAYS.items()}
    np.testing.assert_allclose(mass["exponential"], 1, rtol=1e-12)
    np.testing.assert_allclose(mass["local"], 1, rtol=1e-12)
    assert mass["capped"].min() < 0.999
    assert not np.allclose(mass["kriging"], 1, atol=0.1)


# ---------------------------------------------------------------------------------------------- a share of residuals


def shared_by_hand(problem: Problem, weights: ndarray, share: float, temperature: float = 1.0) -> ndarray:
    """Σ w (y − β f(neighbour) − (1 − β) f(query))."""
    _, rows = found_in(problem)
    near, own = problem.predictions[rows], problem.said[:, None]
    if problem.task == "classification":
        near = reference.tempered(problem.predictions, temperature)[rows]
        own = reference.tempered(problem.said, temperature)[:, None]
    each = targets_of(problem)[rows] - share * near - (1 - share) * own
    return np.einsum("qk,qkc->qc", weights, each)


@every_task
@every_way
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_residuals_is_the_plain_formula(task: Any, options: dict[str, Any], share: float) -> None:
    problem = task()
    knn = weighted(memory_of(problem), **options)
    found = knn.look_up(problem.queries, labels=True).correction(problem.said, share)
    weights = knn.neighbors(problem.queries).weights
    np.testing.assert_allclose(found, shared_by_hand(problem, weights, share), atol=1e-13)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_neighbours_predictions_that_count_are_those_at_the_temperature(problem: Problem, share: float) -> None:
    knn = weighted(memory_of(problem), temperature=1.7)
    base = reference.tempered(problem.said, 1.7)
    found = knn.look_up(problem.queries, labels=True).correction(base, share)
    weights = reference.weights(found_in(problem)[0], SIGMA)
    np.testing.assert_allclose(found, shared_by_hand(problem, weights, share, 1.7), atol=1e-13)


@every_task
def test_the_whole_share_is_the_residual_itself(task: Any) -> None:
    problem = task()
    knn = weighted(memory_of(problem))
    found = knn.look_up(problem.queries, labels=True)
    assert same_bits(found.correction(problem.said, 1.0), knn(problem.queries))
    assert same_bits(knn.look_up(problem.queries).correction(problem.said, 1.0), knn(problem.queries))


@every_task
@every_kernel
@pytest.mark.parametrize("amount", [0.2, 1.0])
def test_no_share_at_all_is_the_interpolation_of_knn_lm(task: Any, kernel: str, amount: float) -> None:
    problem = task()
    knn = weighted(memory_of(problem), kernel=kernel)
    found, alone = knn.look_up(problem.queries, labels=True), knn.memory_only(problem.queries)
    pulled = found.correction(problem.said, 0.0)
    np.testing.assert_allclose(pulled, alone - problem.said, atol=1e-14)
    corrected = correct(problem.said, pulled, amount)
    np.testing.assert_allclose(corrected, (1 - amount) * problem.said + amount * alone, atol=1e-14)


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), kernel=st.sampled_from(WEIGHTINGS), grid=st.booleans())
def test_in_between_the_correction_is_linear_in_the_share(seed: int, share: float, kernel: str, grid: bool) -> None:
    problem = classification(n=30, q=5, seed=seed)
    problem = on_grid(problem, 3) if grid else problem
    found = weighted(memory_of(problem), kernel=kernel).look_up(problem.queries, labels=True)
    none, some, whole = (found.correction(problem.said, part) for part in (0.0, share, 1.0))
    np.testing.assert_allclose(some, share * whole + (1 - share) * none, atol=1e-13)
    np.testing.assert_allclose(correct(problem.said, some).sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_correction_has_the_precision_of_the_residual(problem: Problem, share: float) -> None:
    found = weighted(memory_of(problem, prediction_dtype="float32")).look_up(problem.queries, labels=True)
    assert found.correction(problem.said, share).dtype == np.float32


def test_averages_made_by_hand_are_shared_by_hand() -> None:
    made = Averages(np.array([[0.2]]), np.array([1.0]), np.array([[3.0]]), np.array([0.5]))
    assert made.correction(np.array([[4.0]]), 0.25).tolist() == [[pytest.approx(0.25 * 0.2 + 0.75 * (3 - 0.5 * 4))]]


# ---------------------------------------------------------------------------------------------- how far off


@every_task
@pytest.mark.parametrize("in_pieces", [False, True])
def test_the_spread_is_the_mean_size_of_the_residuals_of_the_k_nearest(
    task: Any, in_pieces: bool, place: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_pieces:
        monkeypatch.setattr(correction, "GATHER_BYTES", 1)
        monkeypatch.setattr(correction, "TABLE_BYTES", 1)
    problem = task()
    rest = reference.residuals(problem.labels, problem.predictions)
    found = weighted(memory_of(problem, place)).spread(problem.queries)
    np.testing.assert_allclose(found, np.abs(rest)[found_in(problem)[1]].mean(axis=1), atol=1e-14)


def test_the_spread_is_that_of_the_tempered_base(problem: Problem) -> None:
    rest = reference.residuals(problem.labels, problem.predictions, 1.7)
    found = weighted(memory_of(problem), temperature=1.7).spread(problem.queries)
    np.testing.assert_allclose(found, np.abs(rest)[found_in(problem)[1]].mean(axis=1), atol=1e-13)


def test_a_spread_does_not_ask_how_neighbours_are_weighted(problem: Problem) -> None:
    memory = memory_of(problem)
    plain = weighted(memory).spread(problem.queries)
    for options in WAYS.values():
        assert same_bits(weighted(memory, **options).spread(problem.queries), plain)


@every_task
def test_without_a_neighbour_there_is_no_spread(task: Any) -> None:
    problem = task()
    memory = memory_of(problem)
    knn = weighted(memory)
    memory.forget(memory.ids)
    for each in (weighted(empty_memory(problem)), knn):
        found = each.spread(problem.queries)
        assert found.shape == problem.said.shape
        assert np.isnan(found).all()
    assert weighted(memory_of(problem)).spread(np.zeros((0, 5))).shape == (0, problem.said.shape[1])


def test_forgotten_rows_have_no_part_in_the_spread(problem: Problem) -> None:
    memory = memory_of(problem)
    knn = weighted(memory)
    before = knn.spread(problem.queries)
    memory.forget(np.arange(0, 60, 2))
    never = weighted(memory_of(problem.rows(slice(1, None, 2))))
    np.testing.assert_allclose(knn.spread(problem.queries), never.spread(problem.queries), atol=1e-14)
    assert not np.allclose(knn.spread(problem.queries), before)


def test_fewer_than_k_neighbours_share_the_spread_among_them(problem: Problem) -> None:
    memory = memory_of(problem)
    knn = weighted(memory)
    memory.forget(np.arange(3, 60))
    rest = reference.residuals(problem.labels, problem.predictions)[:3]
    found = knn.spread(problem.queries)
    np.testing.assert_allclose(found, np.tile(np.abs(rest).mean(axis=0), (12, 1)), atol=1e-14)


def test_a_row_that_is_left_out_has_no_part_in_its_own_spread(problem: Problem) -> None:
    knn = weighted(memory_of(problem), n_neighbors=1)
    second = found_in(replace(problem, queries=problem.keys), 2)[1][:, 1]
    sizes = np.abs(reference.residuals(problem.labels, problem.predictions))
    np.testing.assert_allclose(knn.spread(problem.keys, np.arange(60)), sizes[second], atol=1e-15)
    np.testing.assert_allclose(knn.spread(problem.keys), sizes, atol=1e-15)
