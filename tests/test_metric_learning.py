"""A metric is learned by its own slope, finds what the residuals depend on, and sees no row that it must not see."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy import ndarray

from residual_memory import metric_learning
from residual_memory.errors import InvalidInput
from residual_memory.metric_learning import Lesson, Shape, learn_metric
from tests import reference
from tests.problems import Problem, classification, knn_of, memory_of, regression, same_bits

every_shape = pytest.mark.parametrize("shape", ["diagonal", "full"])
every_task = pytest.mark.parametrize("task", [classification, regression])


def lesson_of(problem: Problem) -> Lesson:
    return Lesson.of("classification" if problem.task == "classification" else "regression",
                     problem.labels, problem.predictions)  # fmt: skip


def waves(n: int = 200, along: Any = (0.0, 1.0, 0.0, 0.0), classes: bool = False, seed: int = 0) -> Problem:
    """Residuals that change along one direction of the keys and no other; the base knows nothing."""
    random = np.random.default_rng(seed)
    keys, queries = random.normal(size=(n, 4)), random.normal(size=(50, 4))
    values = np.sin(2 * keys @ np.asarray(along))[:, None]
    if classes:
        return Problem(keys, (values[:, 0] > 0).astype(int), np.full((n, 2), 0.5), queries, np.full((50, 2), 0.5))
    return Problem(keys, values, np.zeros((n, 1)), queries, np.zeros((50, 1)))


def weights_of(metric: ndarray) -> ndarray:
    """How much a step along each column of the keys counts."""
    return np.sqrt((metric**2).sum(axis=1))


# ---------------------------------------------------------------------------------------------- the slope


Loss = Callable[[ndarray], tuple[float, ndarray]]


class Stopped:
    """A minimiser that goes nowhere, and keeps what it was asked to minimise."""

    def __init__(self) -> None:
        self.asked: list[tuple[Loss, ndarray]] = []

    def __call__(self, fun: Loss, x0: ndarray, **_: Any) -> Any:
        self.asked.append((fun, x0.copy()))
        self.x = x0
        return self


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Stopped:
    minimiser = Stopped()
    monkeypatch.setattr("scipy.optimize.minimize", minimiser)
    return minimiser


def mixing(d: int, shape: str) -> ndarray:
    """A metric of the shape that is not the identity."""
    random = np.random.default_rng(7)
    weights = np.diag(random.uniform(0.3, 2.0, d))
    return weights if shape == "diagonal" else weights + 0.4 * random.normal(size=(d, d))


@every_shape
@every_task
@pytest.mark.parametrize("alone", [False, True], ids=["all neighbours", "neighbours missing"])
def test_the_slope_is_that_of_finite_differences(shape: Shape, task: Any, alone: bool, stopped: Stopped) -> None:
    problem = task(n=50)
    groups = np.arange(50) % 2 if alone else None  # 24 rows of the other group, 32 neighbours asked for
    learn_metric(problem.keys, lesson_of(problem), shape, start=mixing(5, shape), n_rounds=1, groups=groups)
    loss, start = stopped.asked[-1]
    assert len(start) == 2 + (5 if shape == "diagonal" else 25)
    place = start + 0.2 * np.random.default_rng(3).normal(size=len(start))
    slope = loss(place)[1]
    step = 1e-3
    wanted = np.array([(loss(place + off)[0] - loss(place - off)[0]) / (2 * step) for off in step * np.eye(len(place))])
    assert (slope[2:] != 0).all()
    assert (slope[0] != 0, slope[1] != 0) == (True, task is regression)  # classes have no residual share
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=2e-3 * np.abs(wanted).max())


@every_shape
@every_task
def test_the_loss_is_that_of_rows_corrected_by_their_neighbours(shape: Shape, task: Any, stopped: Stopped) -> None:
    """At the start: an exponential kernel of bandwidth 1, shrinkage 1 / (1 + e⁻¹), and half of the residuals."""
    problem, k = task(n=50), 32
    lesson, metric = lesson_of(problem), mixing(5, shape)
    learn_metric(problem.keys, lesson, shape, start=metric, n_rounds=1)
    loss, start = stopped.asked[-1]
    placed = problem.keys @ metric
    distances, rows = (found[:, 1:] for found in reference.neighbors(placed, placed, k + 1))
    weights, amount = reference.weights(distances, 1.0), 1 / (1 + np.exp(-1))
    said = lesson.predictions
    if task is regression:
        each = lesson.targets[rows] - 0.5 * said[rows] - 0.5 * said[:, None]
        corrected = said + amount * np.einsum("qk,qkc->qc", weights, each)
        wanted = np.square(lesson.targets - corrected).mean() / np.square(lesson.targets - said).mean()
    else:
        pulled = np.einsum("qk,qkc->qc", weights, np.eye(4)[problem.labels[rows]]) - said
        right = (said + amount * pulled)[np.arange(50), problem.labels]
        wanted = -np.log(np.maximum(right, 1e-3)).mean()
    assert loss(start)[0] == pytest.approx(wanted, rel=1e-5)


@every_shape
def test_what_the_minimiser_leaves_is_what_the_metric_started_from(shape: Shape, stopped: Stopped) -> None:
    problem, start = waves(), mixing(4, shape)
    found = learn_metric(problem.keys, lesson_of(problem), shape, start=start)
    np.testing.assert_allclose(found, start, rtol=1e-14)
    assert len(stopped.asked) == metric_learning.ROUNDS[shape]


# ---------------------------------------------------------------------------------------------- what it finds


@every_shape
@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_column_that_the_residuals_depend_on_outweighs_the_others(shape: Shape, classes: bool, seed: int) -> None:
    problem = waves(classes=classes, seed=seed)
    weights = weights_of(learn_metric(problem.keys, lesson_of(problem), shape, seed=seed))
    assert weights[1] > 10 * np.delete(weights, 1).max()


def test_a_diagonal_metric_is_diagonal_and_positive() -> None:
    problem = waves()
    metric = learn_metric(problem.keys, lesson_of(problem), "diagonal")
    np.testing.assert_array_equal(metric, np.diag(np.diag(metric)))
    assert np.diag(metric).min() > 0


@pytest.mark.parametrize("classes", [False, True])
def test_a_full_metric_finds_a_direction_that_no_column_has(classes: bool) -> None:
    along = np.array([0.6, -0.8, 0.0, 0.0])
    problem = waves(n=400, along=along, classes=classes)
    full = learn_metric(problem.keys, lesson_of(problem), "full")
    directions, sizes, _ = np.linalg.svd(full)
    assert abs(directions[:, 0] @ along) > 0.99
    assert sizes[0] > 10 * sizes[1]
    across = np.array([0.8, 0.6, 0.0, 0.0])
    diagonal = learn_metric(problem.keys, lesson_of(problem), "diagonal")
    assert np.linalg.norm(along @ diagonal) < 2 * np.linalg.norm(across @ diagonal)


@every_shape
@pytest.mark.parametrize("classes", [False, True])
def test_a_memory_of_learned_keys_corrects_rows_that_it_did_not_learn_from(shape: Shape, classes: bool) -> None:
    problem = waves(along=[0.6, 0.8, 0.0, 0.0], n=500, classes=classes)
    fit, test = problem.rows(slice(400)), problem.rows(slice(400, None))
    errors = []
    for metric in (np.eye(4), learn_metric(fit.keys, lesson_of(fit), shape)):
        placed = Problem(fit.keys @ metric, fit.labels, fit.predictions, test.keys @ metric, test.predictions)
        residual = knn_of(memory_of(placed), n_neighbors=20, bandwidth="auto")(placed.queries)
        errors.append(np.square(reference.residuals(test.labels, test.predictions) - residual).mean())
    assert errors[1] < (0.1 if shape == "full" else 0.7) * errors[0]


def test_every_output_counts_alike() -> None:
    """One depends on the first column, one a thousand times as large on the second."""
    random = np.random.default_rng(0)
    keys = random.normal(size=(300, 4))
    values = np.sin(2 * keys[:, :2]) * [1, 1000]
    metric = learn_metric(keys, Lesson.of("regression", values, np.zeros((300, 2))), "diagonal")
    first, second, *others = weights_of(metric)
    assert 0.5 < first / second < 2
    assert min(first, second) > 3 * max(others)


def test_it_is_the_residuals_that_decide_and_not_the_targets() -> None:
    """The base knows what depends on the first column."""
    random = np.random.default_rng(0)
    keys = random.normal(size=(300, 4))
    known = 10 * np.sin(2 * keys[:, :1])
    lesson = Lesson.of("regression", known + np.sin(2 * keys[:, 1:2]), known)
    weights = weights_of(learn_metric(keys, lesson, "diagonal"))
    assert weights[1] > 3 * np.delete(weights, 1).max()


# ---------------------------------------------------------------------------------------------- rows of one group


def twins(n: int = 200) -> tuple[Problem, ndarray]:
    """Every row twice: the first column tells the two apart from all others, the second what all have in common."""
    random = np.random.default_rng(0)
    keys = np.repeat(random.normal(size=(n, 2)), 2, axis=0)
    keys[:, 1] += 0.3 * random.normal(size=2 * n)
    values = np.sin(2 * keys[:, 1:]) + np.repeat(0.7 * random.normal(size=(n, 1)), 2, axis=0)
    said = np.zeros_like(values)
    return Problem(keys, values, said, keys[:1], said[:1]), np.repeat(np.arange(n), 2)


@pytest.mark.parametrize("named", [False, True])
def test_rows_of_one_group_are_not_used_for_each_other(named: bool) -> None:
    problem, groups = twins()
    names = np.array([f"document {group}" for group in groups]) if named else groups
    weights = weights_of(learn_metric(problem.keys, lesson_of(problem), "diagonal", groups=names))
    alone = weights_of(learn_metric(problem.keys, lesson_of(problem), "diagonal"))
    assert weights[1] > 2 * weights[0]
    assert alone[0] > weights[0] * 5


@every_shape
@pytest.mark.parametrize("most", [50_000, 60])
def test_neighbours_are_other_rows_of_other_groups_whether_all_rows_are_taken_or_some_drawn(
    shape: Shape, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, groups = twins(40)
    seen: list[tuple[bool, bool]] = []
    improved = metric_learning._improved

    def watched(metric: ndarray, kind: Any, keys: ndarray, lesson: Lesson, queries: ndarray, found: Any) -> ndarray:
        assert len(keys) == min(most, 80)
        names = keys[:, 0]  # twins share it
        seen.append(((found.rows == queries[:, None]).any(), (names[found.rows] == names[queries][:, None]).any()))
        return improved(metric, kind, keys, lesson, queries, found)

    monkeypatch.setattr(metric_learning, "_improved", watched)
    monkeypatch.setattr(metric_learning, "MAX_ROWS", most)
    learn_metric(problem.keys, lesson_of(problem), shape, groups=groups)
    assert set(seen) == {(False, False)}
    seen.clear()
    learn_metric(problem.keys, lesson_of(problem), shape)
    assert set(seen) == {(False, True)}


@every_shape
@every_task
def test_rows_that_are_all_of_one_group_teach_nothing(shape: Shape, task: Any) -> None:
    problem = task(n=20)
    metric = learn_metric(problem.keys, lesson_of(problem), shape, groups=np.zeros(20, int))
    np.testing.assert_array_equal(metric, np.eye(5))


# ---------------------------------------------------------------------------------------------- start and rounds


@every_shape
def test_no_rounds_give_the_start_back(shape: Shape) -> None:
    problem, start = waves(), mixing(4, shape)
    found = learn_metric(problem.keys, lesson_of(problem), shape, start=start, n_rounds=0)
    np.testing.assert_array_equal(found, start)


def test_equal_weights_to_begin_with_put_the_median_farthest_neighbour_at_one_and_a_half() -> None:
    problem = waves()
    found = learn_metric(problem.keys, lesson_of(problem), "diagonal", n_rounds=0)
    farthest = reference.neighbors(problem.keys, problem.keys, 33)[0][:, -1]
    np.testing.assert_allclose(found, 1.5 / np.median(farthest) * np.eye(4), rtol=1e-6)


@every_shape
def test_one_round_after_another_is_two_rounds(shape: Shape) -> None:
    problem = waves(n=100)
    keys, lesson = problem.keys, lesson_of(problem)
    two = learn_metric(keys, lesson, shape, n_rounds=2)
    one = learn_metric(keys, lesson, shape, n_rounds=1)
    assert not np.allclose(one, two)
    assert same_bits(learn_metric(keys, lesson, shape, start=one, n_rounds=1), two)


def test_a_full_metric_goes_on_from_the_diagonal_one() -> None:
    problem = waves(n=100)
    keys, lesson = problem.keys, lesson_of(problem)
    diagonal = learn_metric(keys, lesson, "diagonal")
    assert same_bits(learn_metric(keys, lesson, "full"), learn_metric(keys, lesson, "full", start=diagonal))
    assert same_bits(learn_metric(keys, lesson, "full", n_rounds=0), diagonal)


@every_shape
def test_the_start_is_not_written_to(shape: Shape) -> None:
    problem, start = waves(n=60), mixing(4, shape)
    learn_metric(problem.keys, lesson_of(problem), shape, start=start, n_rounds=1)
    np.testing.assert_array_equal(start, mixing(4, shape))


# ---------------------------------------------------------------------------------------------- little to learn from


@every_shape
@every_task
@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_rows_teach_nothing(shape: Shape, task: Any, n: int) -> None:
    problem = task().rows(slice(n))
    keys, lesson = problem.keys, Lesson(problem.task, problem.labels, problem.predictions)
    np.testing.assert_array_equal(learn_metric(keys, lesson, shape), np.eye(5))
    start = mixing(5, shape)
    np.testing.assert_array_equal(learn_metric(keys, lesson, shape, start=start), start)


@every_shape
@every_task
@pytest.mark.parametrize("n", [3, 4])
def test_a_few_rows_give_a_metric_of_plain_numbers(shape: Shape, task: Any, n: int) -> None:
    problem = task(n=n)
    metric = learn_metric(problem.keys, lesson_of(problem), shape)
    assert metric.shape == (5, 5)
    assert np.isfinite(metric).all()


@every_shape
@every_task
def test_keys_that_are_all_the_same_give_equal_weights(shape: Shape, task: Any) -> None:
    problem = task()
    metric = learn_metric(np.ones((60, 5)), lesson_of(problem), shape)
    np.testing.assert_array_equal(metric, np.eye(5))


@every_shape
@every_task
def test_a_constant_column_beside_others_gives_plain_numbers(shape: Shape, task: Any) -> None:
    problem = task()
    keys = problem.keys.copy()
    keys[:, 2] = 3.0
    metric = learn_metric(keys, lesson_of(problem), shape)
    assert np.isfinite(metric).all()
    assert np.abs(metric).max() > 0


@every_shape
@every_task
def test_a_base_that_is_always_right_gives_plain_numbers(shape: Shape, task: Any) -> None:
    problem = task()
    right = problem.labels if task is regression else np.eye(4)[problem.labels]
    metric = learn_metric(problem.keys, Lesson.of(lesson_of(problem).task, problem.labels, right), shape)
    assert np.isfinite(metric).all()
    assert np.abs(metric).max() > 0


@pytest.mark.usefixtures("unchecked")
def test_a_shape_that_is_none_is_refused_and_both_are_named() -> None:
    problem: Any = waves(n=10)
    with pytest.raises(InvalidInput, match="shape of the metric is 'round', expected 'diagonal' or 'full'"):
        learn_metric(problem.keys, lesson_of(problem), "round")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- the same again


@every_shape
def test_the_same_seed_gives_the_same_metric_bit_for_bit(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_learning, "MAX_QUERIES", {"diagonal": 30, "full": 40})
    monkeypatch.setattr(metric_learning, "MAX_ROWS", 80)
    problem = waves()
    groups = np.arange(200) // 2
    first, again, other = (
        learn_metric(problem.keys, lesson_of(problem), shape, seed=seed, groups=groups) for seed in (1, 1, 2)
    )
    assert same_bits(first, again)
    assert not np.array_equal(first, other)
    for metric in (first, other):
        weights = weights_of(metric)
        assert weights[1] > 5 * np.delete(weights, 1).max()


def test_where_all_rows_are_taken_the_seed_has_no_effect() -> None:
    problem = waves()
    first, other = (learn_metric(problem.keys, lesson_of(problem), "diagonal", seed=seed) for seed in (1, 2))
    assert same_bits(first, other)


@every_shape
def test_no_more_rows_are_looked_at_than_the_limits_say(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    improved = metric_learning._improved

    def watched(metric: ndarray, kind: Any, keys: ndarray, lesson: Lesson, queries: ndarray, found: Any) -> ndarray:
        asked.append((len(keys), len(queries)))
        assert len(lesson.targets) == len(lesson.predictions) == len(keys)
        return improved(metric, kind, keys, lesson, queries, found)

    monkeypatch.setattr(metric_learning, "_improved", watched)
    monkeypatch.setattr(metric_learning, "MAX_ROWS", 80)
    monkeypatch.setattr(metric_learning, "DIFFERENCE_BYTES", 10 * 4 * 32 * 4)  # ten queries of 32 neighbours in 4-d
    problem = waves()
    learn_metric(problem.keys, lesson_of(problem), shape)
    assert set(asked) == {(80, 10)}


@every_shape
def test_targets_in_another_unit_give_the_same_metric(shape: Shape) -> None:
    problem = waves(n=120)
    plain = learn_metric(problem.keys, lesson_of(problem), shape)
    # The first is exact in binary; of the others the minimiser makes a little more than the rounding.
    for unit, zero, tolerance in ((1024.0, 0.0, 0.0), (0.01, 0.0, 1e-6), (1e6, 0.0, 1e-6), (1.8, 32.0, 1e-6)):
        moved = Lesson.of("regression", unit * problem.labels + zero, unit * problem.predictions + zero)
        found = learn_metric(problem.keys, moved, shape)
        np.testing.assert_allclose(found, plain, rtol=0, atol=tolerance * np.abs(plain).max())


@every_shape
def test_the_order_of_the_columns_does_not_matter(shape: Shape) -> None:
    problem, order = waves(n=120), np.array([3, 0, 1, 2])
    mixed = problem.keys[:, order]
    placed = [keys @ learn_metric(keys, lesson_of(problem), shape) for keys in (problem.keys, mixed)]
    first, second = (np.linalg.norm(keys[:1] - keys, axis=1) for keys in placed)
    np.testing.assert_allclose(second, first, rtol=1e-3)


# ---------------------------------------------------------------------------------------------- lessons


def test_a_lesson_of_values_is_in_units_of_what_the_base_leaves() -> None:
    problem = regression(n=200)
    scale = np.array([5.0, 0.01])
    lesson = Lesson.of("regression", problem.labels * scale, problem.predictions * scale)
    left = lesson.targets - lesson.predictions
    np.testing.assert_allclose(left.std(axis=0), 1, rtol=1e-12)
    ratio = (problem.labels - problem.predictions) / left
    np.testing.assert_allclose(ratio, np.tile(ratio[:1], (200, 1)), rtol=1e-9)


def test_a_lesson_of_a_base_that_leaves_nothing_stays_as_it_is() -> None:
    values = np.arange(6.0)
    lesson = Lesson.of("regression", values, values[:, None])
    np.testing.assert_array_equal(lesson.targets, values[:, None])
    np.testing.assert_array_equal(lesson.predictions, values[:, None])


def test_a_lesson_of_classes_tempers_its_probabilities_alone() -> None:
    problem = classification()
    lesson = Lesson.of("classification", problem.labels, problem.predictions)
    warm = lesson.at_temperature(1.7)
    np.testing.assert_allclose(warm.predictions, reference.tempered(problem.predictions, 1.7), rtol=1e-12)
    np.testing.assert_array_equal(warm.targets, problem.labels)
    assert lesson.at_temperature(1.0) is lesson


@every_task
def test_a_lesson_knows_what_is_to_be_predicted(task: Any) -> None:
    problem = task()
    lesson = lesson_of(problem)
    queries, rows = np.array([5, 0, 9]), np.array([[1, 2], [3, 4], [0, 5]])
    said, labels, drift = lesson.at_label(queries, rows)
    if task is regression:
        f, y, near = lesson.predictions[queries], lesson.targets[rows], lesson.predictions[rows]
    else:
        own = problem.labels[queries]
        f = problem.predictions[queries, own][:, None]
        y = (problem.labels[rows] == own[:, None]).astype(float)[..., None]
        near = np.array([problem.predictions[some, label] for some, label in zip(rows, own, strict=True)])[..., None]
    np.testing.assert_array_equal(said, f)
    np.testing.assert_allclose(labels, y - f[:, None], atol=1e-15)
    np.testing.assert_allclose(drift, near - f[:, None], atol=1e-15)


@every_task
def test_some_rows_of_a_lesson_are_the_lesson_of_these(task: Any) -> None:
    lesson, rows = lesson_of(task()), np.array([7, 3])
    some = lesson.some(rows)
    assert (some.task, len(some.targets)) == (lesson.task, 2)
    np.testing.assert_array_equal(some.targets, lesson.targets[rows])
    np.testing.assert_array_equal(some.predictions, lesson.predictions[rows])
