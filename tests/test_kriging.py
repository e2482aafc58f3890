"""Kriging weights are those of a Gaussian process, whatever the rows, their order and their storage."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern

from residual_memory.correction import correct
from residual_memory.errors import FewerNeighbors, InvalidInput
from residual_memory.evaluation import Metric, Setting, evaluate
from residual_memory.explanation import explain
from residual_memory.indexes.distances import distances_among
from residual_memory.kernels import KRIGING, SMALLEST_NUGGET, kernel_named, kriging_weights
from residual_memory.memory import Memory
from residual_memory.testing.problems import column
from residual_memory.tuning import KRIGING_BANDWIDTHS, NUGGETS, TuningResult, tune
from tests import reference
from tests.problems import Problem, classification, empty_memory, knn_of, memory_of, on_grid, regression, same_bits
from tests.test_tuning import clustered, noise, smooth_values

BANDWIDTH, NUGGET = 1.3, 0.2
seeds = st.integers(0, 10**6)
every_task = pytest.mark.parametrize("task", [classification, regression])
GRID: dict[str, Any] = {
    "n_neighbors": (3, 10),
    "bandwidths": (0.5, 1.0),
    "temperatures": (1.0, 1.7),
    "shrinkages": (0.0, 0.5, 1.0, 2.0),
    "nuggets": (0.1, 0.5),
}


def kriging_of(memory: Memory, **options: Any) -> Any:
    return knn_of(memory, **{"kernel": "kriging", "bandwidth": BANDWIDTH, "nugget": NUGGET, **options})


def rest_of(problem: Problem) -> ndarray:
    return reference.residuals(problem.labels, problem.predictions)


def process_mean(
    problem: Problem, chosen: ndarray, queries: ndarray, bandwidth: float = BANDWIDTH, nugget: float = NUGGET
) -> ndarray:
    """What a Gaussian process that saw the residuals of these rows expects at the queries."""
    kernel = Matern(length_scale=bandwidth, nu=0.5)
    process = GaussianProcessRegressor(kernel, alpha=nugget, optimizer=None)
    return process.fit(problem.keys[chosen], rest_of(problem)[chosen]).predict(queries)


def process_means(problem: Problem, k: int, **options: float) -> ndarray:
    """The same, a process for the k rows nearest to each query."""
    _, rows = reference.neighbors(problem.keys, problem.queries, k)
    pairs = zip(rows, problem.queries, strict=True)
    return np.array([process_mean(problem, chosen, query[None], **options)[0] for chosen, query in pairs])


def among(keys: ndarray, rows: ndarray) -> ndarray:
    return distances_among(column(keys), rows)


# ---------------------------------------------------------------------------------------------- a Gaussian process


@every_task
@pytest.mark.parametrize("k", [1, 2, 7])
def test_the_correction_is_the_mean_of_a_gaussian_process_of_the_neighbours(task: Any, k: int) -> None:
    problem = task()
    found = kriging_of(memory_of(problem), n_neighbors=k)(problem.queries)
    np.testing.assert_allclose(found, process_means(problem, k), atol=1e-12)


@every_task
@pytest.mark.parametrize(("bandwidth", "nugget"), [(0.2, 0.01), (1.0, 1e-4), (5.0, 0.1), (50.0, 3.0)])
def test_with_all_rows_it_is_the_process_of_all_rows(task: Any, bandwidth: float, nugget: float) -> None:
    problem = task()
    knn = kriging_of(memory_of(problem), n_neighbors=60, bandwidth=bandwidth, nugget=nugget)
    wanted = process_mean(problem, np.arange(60), problem.queries, bandwidth, nugget)
    np.testing.assert_allclose(knn(problem.queries), wanted, atol=1e-10)


def test_keys_in_single_precision_agree_to_single_precision() -> None:
    problem = classification(d=40)
    memory = memory_of(problem, key_dtype="float32", prediction_dtype="float32")
    found = kriging_of(memory, bandwidth=6.0)(problem.queries.astype(np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, process_means(problem, 7, bandwidth=6.0), atol=1e-5)


def test_twins_in_memory_agree_with_the_process_and_share_their_weight() -> None:
    problem = classification(n=20)
    thrice = problem.rows(np.repeat(np.arange(20), 3))
    knn = kriging_of(memory_of(thrice), n_neighbors=60)
    # Twins are apart by the root of the rounding.
    np.testing.assert_allclose(knn(problem.queries), process_mean(thrice, np.arange(60), problem.queries), atol=1e-7)
    found = knn.neighbors(problem.queries)
    by_row = np.take_along_axis(found.weights, found.ids.argsort(axis=1), axis=1)
    np.testing.assert_allclose(by_row, np.repeat(by_row[:, ::3], 3, axis=1), atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_twins_keep_the_weights_small_in_any_precision_and_place(dtype: str, offset: float) -> None:
    """What two twins are apart by rounding must not be taken for a difference to extrapolate from."""
    problem = classification(n=20, d=50)
    thrice = problem.rows(np.repeat(np.arange(20), 3))
    moved = replace(thrice, keys=thrice.keys + offset)
    knn = kriging_of(memory_of(moved, key_dtype=dtype), n_neighbors=60, nugget=SMALLEST_NUGGET)
    weights = knn.neighbors((moved.keys[::3] + 0.01).astype(dtype)).weights
    assert np.abs(weights).max() < 1.1


def test_close_neighbours_share_what_one_alone_would_weigh() -> None:
    query, keys = np.zeros((1, 1)), np.array([[1.0], [-1.0], [-1.001], [-1.002]])
    rows = np.arange(4)[None]
    weights = kriging_weights(np.abs(query - keys.T), among(keys, rows), 1.0, 0.01)[0]
    assert weights[1:].sum() == pytest.approx(weights[0], rel=0.05)


def test_hardly_any_nugget_gives_the_label_of_a_stored_example() -> None:
    problem = classification()
    knn = kriging_of(memory_of(problem), nugget=1e-6)
    scores = correct(problem.predictions, knn(problem.keys))
    np.testing.assert_allclose(scores, np.eye(4)[problem.labels], atol=1e-5)


def test_a_large_nugget_gives_the_kernel_average_before_it_is_normalised() -> None:
    problem, nugget = classification(), 1e7
    distances, rows = reference.neighbors(problem.keys, problem.queries, 7)
    wanted = np.einsum("qk,qkc->qc", np.exp(-distances / BANDWIDTH), rest_of(problem)[rows])
    knn = kriging_of(memory_of(problem), nugget=nugget)
    np.testing.assert_allclose(nugget * knn(problem.queries), wanted, atol=1e-5)
    scores = correct(problem.said, knn(problem.queries), shrinkage=nugget)
    np.testing.assert_allclose(scores, problem.said + wanted, atol=1e-5)


def test_far_from_all_rows_there_is_no_correction() -> None:
    problem = classification()
    knn = kriging_of(memory_of(problem))
    size = [np.abs(knn(problem.queries + shift)).max() for shift in (0.0, 10.0, 30.0)]
    assert size[0] > size[1] > size[2] > 0
    assert not knn(problem.queries + 1e5).any()
    assert same_bits(correct(problem.said, knn(problem.queries + 1e5)), problem.said)


@given(seed=seeds, bandwidth=st.floats(0.05, 20), nugget=st.floats(1e-3, 10))
def test_weights_are_the_solution_by_hand(seed: int, bandwidth: float, nugget: float) -> None:
    random = np.random.default_rng(seed)
    keys, queries = random.normal(size=(12, 3)), random.normal(size=(4, 3))
    distances, rows = reference.neighbors(keys, queries, 5)
    found = kriging_weights(distances, among(keys, rows), bandwidth, nugget)
    for place, query in enumerate(queries):
        wanted = reference.kriging(query, keys[rows[place]], bandwidth, nugget)
        np.testing.assert_allclose(found[place], wanted, atol=1e-9)


def test_one_neighbour_alone_weighs_its_covariance() -> None:
    weights = kriging_weights(np.array([[0.7]]), np.zeros((1, 1, 1)), 2.0, 0.5)
    assert weights[0, 0] == pytest.approx(np.exp(-0.35) / 1.5)


# ---------------------------------------------------------------------------------------------- distances among rows


@given(seed=seeds, dtype=st.sampled_from([np.float32, np.float64]), scratch=st.sampled_from([64, 1 << 20]))
def test_distances_among_rows_are_those_of_the_definition(seed: int, dtype: type, scratch: int) -> None:
    random = np.random.default_rng(seed)
    keys: ndarray = random.normal(size=(20, 4)).astype(dtype)
    rows = random.integers(0, 20, (6, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("residual_memory.indexes.distances.SCRATCH_BYTES", scratch)
        found = among(keys, rows)
    wide = keys[rows].astype(np.float64)
    wanted = np.sqrt(((wide[:, :, None] - wide[:, None]) ** 2).sum(axis=3))
    # A distance of 0 between two places that hold one row is good to the root of the rounding.
    np.testing.assert_allclose(found, wanted, atol=5e-3 if dtype == np.float32 else 1e-7)
    assert not found[:, np.arange(5), np.arange(5)].any()
    np.testing.assert_array_equal(found, found.transpose(0, 2, 1))


def test_a_missing_row_is_infinitely_far_from_all() -> None:
    found = among(np.random.default_rng(0).normal(size=(4, 2)), np.array([[2, 0, -1], [-1, -1, -1]]))
    assert np.isfinite(found[0, :2, :2]).all()
    assert np.isinf(found[0, 2, :2]).all()
    assert np.isinf(found[1]).all()


def test_without_rows_all_distances_are_infinite() -> None:
    assert np.isinf(among(np.zeros((0, 3)), np.full((2, 4), -1))).all()


def test_where_the_keys_lie_does_not_matter() -> None:
    random = np.random.default_rng(0)
    keys, rows = random.normal(size=(20, 8)), random.integers(0, 20, (4, 5))
    np.testing.assert_allclose(among(keys + 1000, rows), among(keys, rows), atol=1e-5)


# ---------------------------------------------------------------------------------------------- missing neighbours


def test_missing_neighbours_leave_the_weights_of_the_others_as_they_were() -> None:
    keys = np.random.default_rng(0).normal(size=(10, 3))
    distances, rows = reference.neighbors(keys, np.zeros((1, 3)), 4)
    wider = np.pad(distances, ((0, 0), (0, 3)), constant_values=np.inf)
    padded = np.pad(rows, ((0, 0), (0, 3)), constant_values=-1)
    found = kriging_weights(wider, among(keys, padded), BANDWIDTH, NUGGET)
    np.testing.assert_allclose(found[:, :4], kriging_weights(distances, among(keys, rows), BANDWIDTH, NUGGET))
    assert not found[:, 4:].any()


def test_no_neighbour_at_all_gives_zeros_and_no_nan() -> None:
    missing = np.full((2, 3), np.inf)
    assert not kriging_weights(missing, np.full((2, 3, 3), np.inf), BANDWIDTH, NUGGET).any()


@every_task
def test_fewer_rows_than_neighbours_are_all_used(task: Any) -> None:
    problem = task(n=5)
    with pytest.warns(FewerNeighbors):
        knn = kriging_of(memory_of(problem), n_neighbors=9)
    wanted = process_mean(problem, np.arange(5), problem.queries)
    np.testing.assert_allclose(knn(problem.queries), wanted, atol=1e-12)
    found = knn.neighbors(problem.queries)
    assert (found.ids[:, 5:] == -1).all()
    assert not found.weights[:, 5:].any()


def test_an_empty_memory_and_one_whose_rows_are_forgotten_are_the_base_bit_for_bit() -> None:
    problem = classification()
    forgotten = memory_of(problem)
    knn = kriging_of(forgotten)
    forgotten.forget(forgotten.ids)
    for each in (kriging_of(empty_memory(problem)), knn):
        assert same_bits(correct(problem.said, each(problem.queries)), problem.said)


@pytest.mark.parametrize("compacted", [False, True])
def test_forgotten_rows_are_as_if_they_had_never_been_there(compacted: bool) -> None:
    problem = classification()
    memory = memory_of(problem)
    knn = kriging_of(memory)
    memory.forget(np.arange(0, 60, 2))
    if compacted:
        memory.compact()
    wanted = kriging_of(memory_of(problem.rows(slice(1, None, 2))))(problem.queries)
    np.testing.assert_allclose(knn(problem.queries), wanted, atol=1e-12)


def test_leaving_a_row_out_is_a_memory_without_it() -> None:
    problem = classification(n=20)
    found = kriging_of(memory_of(problem))(problem.keys, exclude=np.arange(20))
    for row in range(20):
        others = kriging_of(memory_of(problem.rows(np.arange(20) != row)))
        np.testing.assert_allclose(found[row], others(problem.keys[[row]])[0], atol=1e-12)


def test_leaving_nearly_all_rows_out_leaves_the_rest() -> None:
    problem = classification(n=20)
    groups = np.array([0] * 17 + [1] * 3)
    memory = memory_of(problem, groups=groups)
    found = kriging_of(memory)(problem.queries, exclude=np.zeros(12, int))
    np.testing.assert_allclose(found, process_mean(problem, np.arange(17, 20), problem.queries), atol=1e-12)


# ---------------------------------------------------------------------------------------------- laws


@settings(max_examples=10)
@given(seed=seeds, grid=st.booleans())
def test_the_order_of_the_rows_does_not_matter(seed: int, grid: bool) -> None:
    problem = on_grid(classification(n=40, seed=seed), 3) if grid else classification(n=40, seed=seed)
    order = np.random.default_rng(seed).permutation(40)
    permuted = kriging_of(memory_of(problem.rows(order), ids=order))
    np.testing.assert_allclose(permuted(problem.queries), kriging_of(memory_of(problem))(problem.queries), atol=1e-10)


@settings(max_examples=10)
@given(seed=seeds, cuts=st.lists(st.integers(0, 40), max_size=5))
def test_how_many_segments_hold_the_rows_does_not_matter(seed: int, cuts: list[int]) -> None:
    problem = classification(n=40, seed=seed)
    memory = empty_memory(problem)
    knn = kriging_of(memory)
    for chosen in np.split(np.arange(40), sorted(cuts)):
        part = problem.rows(chosen)
        memory.append(part.keys, part.labels, part.predictions)
    wanted = kriging_of(memory_of(problem))(problem.queries)
    np.testing.assert_allclose(knn(problem.queries), wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_how_the_queries_are_blocked_does_not_matter(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = classification(q=40)
    knn = kriging_of(memory_of(problem, key_dtype=dtype))
    whole = knn(problem.queries)
    alone = np.concatenate([knn(query[None]) for query in problem.queries])
    np.testing.assert_allclose(alone, whole, atol=1e-12)
    monkeypatch.setattr("residual_memory.correction.GATHER_BYTES", 3 * 8 * 7**2)  # three queries at a time
    np.testing.assert_allclose(knn(problem.queries), whole, atol=1e-12)


@settings(max_examples=10)
@given(seed=seeds)
def test_contributions_sum_to_the_correction(seed: int) -> None:
    problem = classification(seed=seed)
    knn = kriging_of(memory_of(problem))
    found, parts = knn.contributions(problem.queries)
    np.testing.assert_allclose(parts.sum(axis=1), knn(problem.queries), atol=1e-12)
    np.testing.assert_array_equal(found.weights, knn.neighbors(problem.queries).weights)


def test_an_explanation_sums_to_the_correction_too() -> None:
    problem = classification()
    knn = kriging_of(memory_of(problem))
    report = explain(knn, problem.queries, problem.said, shrinkage=0.5)
    np.testing.assert_allclose(report.contributions.sum(axis=1), 0.5 * knn(problem.queries), atol=1e-12)


def test_corrected_rows_still_sum_to_one() -> None:
    problem = classification()
    scores = correct(problem.said, kriging_of(memory_of(problem))(problem.queries), 1.5)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-12)


def test_labels_alone_are_weighed_alike() -> None:
    problem = classification()
    knn = kriging_of(memory_of(problem))
    found = knn.neighbors(problem.queries)
    wanted = np.einsum("qk,qkc->qc", found.weights, np.eye(4)[problem.labels[found.ids]])
    np.testing.assert_allclose(knn.memory_only(problem.queries), wanted, atol=1e-12)


def test_a_cap_cuts_negative_weights_as_it_cuts_positive_ones() -> None:
    """A neighbour among nearer ones counts less than nothing."""
    keys = np.array([[0.5, 0.4], [0.7, 0.3], [0.5, 0.8], [0.8, 0.6], [1.2, 0.0]])
    problem = replace(classification(n=5, d=2), keys=keys, queries=np.zeros((1, 2)))
    memory = memory_of(problem)
    options = {"n_neighbors": 5, "bandwidth": 50.0, "nugget": 1e-4}
    free = kriging_of(memory, **options).neighbors(problem.queries).weights[0]
    np.testing.assert_allclose(free, reference.kriging(np.zeros(2), keys, 50.0, 1e-4), atol=1e-9)
    assert (free.max(), free.min()) == pytest.approx((0.697, -0.281), abs=1e-3)
    capped = kriging_of(memory, **options, max_weight=0.25)
    cut = capped.neighbors(problem.queries).weights[0]
    np.testing.assert_array_equal(cut, [0.25, free[1], free[2], -0.25, free[4]])
    _, parts = capped.contributions(problem.queries)
    np.testing.assert_allclose(parts.sum(axis=1), capped(problem.queries), atol=1e-15)
    loose = kriging_of(memory, **options, max_weight=0.999)
    np.testing.assert_array_equal(loose.neighbors(problem.queries).weights[0], free)


def test_the_automatic_bandwidth_is_the_distance_to_the_kth_neighbour() -> None:
    memory = memory_of(classification())
    assert kriging_of(memory, bandwidth="auto").bandwidth == knn_of(memory, bandwidth="auto").bandwidth


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("nugget", [0.0, -1.0, np.nan, np.inf, 1e-20])
def test_a_nugget_must_be_a_number_that_keeps_the_equations_apart(nugget: float) -> None:
    with pytest.raises(InvalidInput, match="nugget is"):
        kriging_of(memory_of(classification()), nugget=nugget)


def test_a_misspelt_kernel_is_told_of_kriging_too() -> None:
    with pytest.raises(InvalidInput, match=r"kernel is 'krigging', expected .*'kriging'"):
        kriging_of(memory_of(classification()), kernel="krigging")


def test_kriging_is_no_function_of_distances_alone() -> None:
    with pytest.raises(InvalidInput, match="kernel is 'kriging'"):
        kernel_named(KRIGING)


# ---------------------------------------------------------------------------------------------- tuning


def tuned(given: tuple[Problem, ndarray], **options: Any) -> TuningResult:
    problem, labels = given
    return tune(memory_of(problem), problem.queries, labels, problem.said, **{**GRID, **options})


def half_cosine(n: int = 150, q: int = 120, seed: int = 0) -> tuple[Problem, ndarray]:
    """A smooth curve seen without noise, of which the base knows nothing: kriging interpolates it."""
    random = np.random.default_rng(seed)
    keys = random.uniform(-3, 3, (n + q, 2))
    values = np.sin(keys[:, :1] + 0.5 * keys[:, 1:])
    zero = np.zeros_like(values)
    return Problem(keys[:n], values[:n], zero[:n], keys[n:], zero[n:]), values[n:]


def test_of_several_kernels_the_better_is_chosen() -> None:
    given = half_cosine()
    each = {kernel: tuned(given, kernel=kernel) for kernel in ("exponential", "kriging")}
    assert each["kriging"].corrected.value < 0.7 * each["exponential"].corrected.value
    both = tuned(given, kernel=("exponential", "kriging"))
    assert both.best == each["kriging"].best
    assert both.corrected.value == pytest.approx(each["kriging"].corrected.value)
    assert tuned(given, kernel=("kriging", "exponential")).best == both.best


def test_several_kernels_have_the_best_memory_alone_of_them_all() -> None:
    given = half_cosine()
    both = tuned(given, kernel=("exponential", "kriging"))
    each = [tuned(given, kernel=kernel) for kernel in ("exponential", "kriging")]
    assert both.best_memory_only in [found.best_memory_only for found in each]


def test_a_memory_that_does_not_help_is_not_helped_by_kriging() -> None:
    found = tuned(noise(), kernel=("exponential", "kriging"))
    assert found.best.shrinkage == 0
    assert found.verdict.startswith("no gain")


@pytest.mark.parametrize(
    ("make", "metric"), [(clustered, "accuracy"), (clustered, "log_loss"), (smooth_values, "rmse")]
)
def test_the_losses_of_tuning_are_those_of_evaluating_each_setting_by_hand(make: Any, metric: Metric) -> None:
    """With one value of each there is nothing to choose, and cross-fitting changes nothing."""
    problem, labels = make()
    memory = memory_of(problem)
    for k, shrinkage, nugget in ((3, 1.0, 0.1), (10, 2.0, 0.5), (10, 0.5, 1e-3)):
        options: dict[str, Any] = {"n_neighbors": (k,), "bandwidths": (0.8,), "nuggets": (nugget,)}
        found = tune(
            memory, problem.queries, labels, problem.said, metric=metric, temperatures=(1.0,),
            shrinkages=(shrinkage,), kernel="kriging", **options,
        )  # fmt: skip
        if not found.helps:
            continue
        assert (found.best.n_neighbors, found.best.shrinkage, found.best.nugget) == (k, shrinkage, nugget)
        again = evaluate(memory, problem.queries, labels, problem.said, found.best, metric=metric)
        assert again.corrected.value == pytest.approx(found.corrected.value, rel=1e-4)
        assert again.memory_only.value == pytest.approx(found.memory_only.value, rel=1e-4)
        assert again.base.value == pytest.approx(found.base.value, rel=1e-6)


def test_evaluating_is_predicting() -> None:
    problem, labels = smooth_values()
    memory, setting = memory_of(problem), Setting(8, 1.0, kernel="kriging", nugget=0.3, shrinkage=1.2)
    said = setting.predict(setting.knn(memory), problem.queries, problem.said)
    measured = evaluate(memory, problem.queries, labels, problem.said, setting)
    assert measured.corrected.value == pytest.approx(np.sqrt(((said - labels) ** 2).mean()))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = smooth_values()
    whole = tuned(given, kernel=("exponential", "kriging"))
    monkeypatch.setattr("residual_memory.tuning.BLOCK_BYTES", 1 << 13)
    in_blocks = tuned(given, kernel=("exponential", "kriging"))
    assert in_blocks.best == whole.best
    assert in_blocks.corrected.value == pytest.approx(whole.corrected.value, abs=1e-6)


def test_what_is_tried_by_default_is_what_is_usual_for_kriging() -> None:
    problem, labels = half_cosine()
    found = tune(memory_of(problem), problem.queries, labels, problem.said, n_neighbors=(10,), kernel="kriging")
    assert found.helps
    assert found.best.nugget in NUGGETS
    typical = np.median(reference.neighbors(problem.keys, problem.queries, 10)[0][:, -1])
    assert min(abs(float(found.best.bandwidth) / typical - scale) for scale in KRIGING_BANDWIDTHS) < 1e-9


def test_fewer_rows_than_neighbours_are_tuned_too() -> None:
    problem, labels = half_cosine()
    found = tuned((problem.rows(slice(6)), labels), kernel="kriging", n_neighbors=(4, 50))
    assert found.best.n_neighbors == 4
    assert tuned((problem.rows(slice(0)), labels), kernel="kriging").verdict.startswith("no gain")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kernel": ()}, "kernel is empty"),
        ({"kernel": "krigging"}, "kernel is 'krigging', expected .*'kriging'"),
        ({"kernel": ("kriging", "square")}, "kernel is 'square'"),
        ({"kernel": ("exponential", "")}, "kernel is ''"),
        ({"nuggets": ()}, "nuggets is empty"),
        ({"nuggets": (0.1, 0.0)}, "nugget is 0"),
        ({"nuggets": (1e-9,)}, "nugget is 1e-09"),
        ({"shrinkages": (0.5, -2.0)}, "shrinkage is -2"),
    ],
)
def test_options_that_cannot_be_used_are_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        tuned(smooth_values(), **{"kernel": "kriging", **change})


# ---------------------------------------------------------------------------------------------- settings


KRIGED = Setting(7, 0.5, 1.5, 2.0, "kriging", 0.3)


def test_a_setting_survives_plain_values_and_a_memory_on_disk(tmp_path: Path) -> None:
    assert Setting.from_dict(KRIGED.to_dict()) == KRIGED
    problem = classification()
    with memory_of(problem, tmp_path / "memory") as memory:
        memory.save_setting(KRIGED.to_dict())
    opened = Memory.open(tmp_path / "memory")
    assert opened.setting is not None
    assert Setting.from_dict(opened.setting) == KRIGED
    knn = Setting.from_dict(opened.setting).knn(opened)
    assert (knn.kernel, knn.nugget, knn.bandwidth, knn.temperature) == ("kriging", 0.3, 0.5, 1.5)


def test_a_setting_saved_before_there_were_nuggets_and_gates_still_loads(tmp_path: Path) -> None:
    old = {"n_neighbors": 7, "bandwidth": 0.5, "temperature": 1.5, "shrinkage": 0.6, "kernel": "exponential"}
    with memory_of(classification(), tmp_path / "memory") as memory:
        memory.save_setting(old)
    saved = Memory.open(tmp_path / "memory").setting
    assert saved is not None
    assert Setting.from_dict(saved) == Setting(7, 0.5, 1.5, 0.6, "exponential", gate=None)


@pytest.mark.parametrize("values", [{"nuggett": 0.1}, {"n_neighbors": 3, "gates": None}])
def test_a_name_that_no_setting_has_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"a setting has n_neighbors, .*nugget, gate, .*max_distance: "):
        Setting.from_dict(values)


@pytest.mark.parametrize("index", ["exact:numpy", "faiss:IVF4,Flat?nprobe=4"])
def test_any_engine_gives_the_same_answer(index: str) -> None:
    problem = classification(n=200)
    memory = memory_of(problem, key_dtype="float32")
    wanted: Callable[..., ndarray] = kriging_of(memory)
    queries = problem.queries.astype(np.float32)
    np.testing.assert_allclose(kriging_of(memory, index=index)(queries), wanted(queries), atol=1e-5)
