from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from numpy import ndarray

from residual_memory import metrics
from residual_memory.errors import DimensionMismatch, InvalidInput
from tests.problems import softmax


def scored(n: int = 400, c: int = 5, seed: int = 0) -> tuple[ndarray, ndarray]:
    random = np.random.default_rng(seed)
    return softmax(random.normal(size=(n, c))), random.integers(0, c, n)


def test_accuracy_counts_the_rows_whose_largest_score_is_the_labels() -> None:
    assert metrics.accuracy([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [-1.0, -2.0]], [0, 1, 1, 0]) == 0.75


def test_a_tie_goes_to_the_first_class() -> None:
    assert metrics.correctness([[0.5, 0.5], [0.5, 0.5]], [0, 1]).tolist() == [1, 0]


def test_log_loss_and_perplexity_equal_scikit_learns() -> None:
    probabilities, labels = scored()
    wanted = sklearn.metrics.log_loss(labels, probabilities, labels=np.arange(5))
    assert metrics.log_loss(probabilities, labels) == pytest.approx(wanted, rel=1e-12)
    assert metrics.perplexity(probabilities, labels) == pytest.approx(np.exp(wanted), rel=1e-12)
    assert metrics.log_losses(probabilities, labels).mean() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("lowest", [0.0, -0.2])
@pytest.mark.parametrize("measure", [metrics.log_loss, metrics.log_losses, metrics.perplexity])
def test_the_logarithm_of_no_probability_is_refused_with_the_remedy(
    measure: Callable[[Any, Any], Any], lowest: float
) -> None:
    with pytest.raises(InvalidInput, match="to_probabilities"):
        measure([[1 - lowest, lowest]], [0])


def test_calibration_error_equals_a_count_by_hand() -> None:
    probabilities = np.array([[0.62, 0.38], [0.64, 0.36], [0.05, 0.95], [1.0, 0.0]])
    labels = np.array([0, 1, 1, 0])
    wanted = (2 * abs(0.63 - 0.5) + abs(0.95 - 1) + abs(1 - 1)) / 4
    assert metrics.calibration_error(probabilities, labels, n_bins=5) == pytest.approx(
        (2 * abs(0.63 - 0.5) + 2 * abs(0.975 - 1)) / 4
    )
    assert metrics.calibration_error(probabilities, labels, n_bins=20) == pytest.approx(wanted)


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not() -> None:
    sure = np.eye(3)[[0, 1, 2]]
    assert metrics.calibration_error(sure, [0, 1, 2]) == 0
    assert metrics.calibration_error(sure, [1, 2, 0]) == 1


def test_every_row_is_in_one_calibration_bin() -> None:
    probabilities, labels = scored()
    bins = metrics.calibration_bins(probabilities, labels)
    assert sum(entry["n"] for entry in bins) == 400
    assert all(entry["low"] <= entry["confidence"] <= entry["high"] for entry in bins)
    overall = sum(entry["n"] * entry["accuracy"] for entry in bins) / 400
    assert overall == pytest.approx(metrics.accuracy(probabilities, labels))


def test_rmse_is_the_root_of_the_mean_squared_error() -> None:
    random = np.random.default_rng(0)
    values, targets = random.normal(size=(50, 3)), random.normal(size=(50, 3))
    assert metrics.rmse(values, targets) == pytest.approx(np.sqrt(((values - targets) ** 2).mean()), rel=1e-12)


def test_a_column_of_values_does_not_broadcast_against_a_row_of_targets() -> None:
    assert metrics.squared_errors(np.array([[1.0], [2.0]]), np.array([1.0, 4.0])).tolist() == [0, 4]


def test_recall_counts_distances_so_that_a_tie_at_place_k_does_no_harm() -> None:
    true = np.array([[0.1, 0.5, 0.5]])
    assert metrics.recall(np.array([[0.1, 0.5, 0.5]]), true) == 1
    assert metrics.recall(np.array([[0.5, 0.5, 0.5]]), true) == 1
    assert metrics.recall(np.array([[0.1, 0.6, np.inf]]), true) == pytest.approx(1 / 3)


def test_recall_forgives_rounding_only() -> None:
    true = np.array([[1.0]])
    assert metrics.recall([[1.0009]], true) == 1
    assert metrics.recall([[1.002]], true) == 0
    assert metrics.recall([[1.0009]], true, tolerance=0.0) == 0


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(size=200)
    margin = 1.959963984540054 * values.std(ddof=1) / np.sqrt(200)
    found = metrics.mean_interval(values)
    assert (found.value, found.low, found.high) == pytest.approx(
        (values.mean(), values.mean() - margin, values.mean() + margin), rel=1e-12
    )
    assert found.margin == pytest.approx(margin, rel=1e-12)
    assert float(found) == found.value


def test_groups_of_one_row_change_nothing() -> None:
    values = np.random.default_rng(0).normal(size=50)
    alone, grouped = metrics.mean_interval(values), metrics.mean_interval(values, groups=np.arange(50)[::-1])
    assert grouped.margin == pytest.approx(alone.margin, rel=1e-12)


def test_rows_copied_within_their_group_are_no_new_evidence() -> None:
    values = np.random.default_rng(0).normal(size=50)
    once = metrics.mean_interval(values)
    copied = metrics.mean_interval(np.repeat(values, 4), groups=np.repeat(np.arange(50), 4))
    assert copied.margin == pytest.approx(once.margin, rel=1e-12)
    assert metrics.mean_interval(np.repeat(values, 4)).margin < 0.6 * once.margin


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        found = metrics.mean_interval(random.normal(size=100))
        held += found.low <= 0 <= found.high
    assert 925 <= held <= 970


@pytest.mark.parametrize("groups", [None, "of one row"])
def test_a_bootstrap_interval_of_a_mean_agrees_with_the_normal_one(groups: str | None) -> None:
    values = np.random.default_rng(0).normal(size=300)
    normal = metrics.mean_interval(values)
    found = metrics.bootstrap_interval(
        lambda rows: float(values[rows].mean()), 300, groups=np.arange(300) if groups else None, n_resamples=2000
    )
    assert found.value == pytest.approx(normal.value, rel=1e-12)
    assert found.margin == pytest.approx(normal.margin, rel=0.1)


def test_the_bootstrap_draws_whole_groups() -> None:
    groups = np.array(["b", "a", "b", "c", "a", "b"])
    drawn: list[ndarray] = []

    def remember(rows: ndarray) -> float:
        drawn.append(rows)
        return 0.0

    metrics.bootstrap_interval(remember, 6, groups=groups, n_resamples=50)
    for rows in drawn:
        for name in "abc":
            counts = np.bincount(rows, minlength=6)[groups == name]
            assert len(set(counts.tolist())) == 1
    assert len({len(rows) for rows in drawn}) > 1


def test_the_bootstrap_is_the_same_for_the_same_seed() -> None:
    values = np.random.default_rng(0).normal(size=40)

    def interval(seed: int) -> metrics.Estimate:
        return metrics.bootstrap_interval(lambda rows: float(values[rows].mean()), 40, seed=seed)

    assert interval(1) == interval(1)
    assert interval(1) != interval(2)


@pytest.mark.parametrize(
    ("scores", "labels", "error"),
    [
        ([[0.5, 0.5]], [0, 1], DimensionMismatch),
        ([0.5, 0.5], [0, 1], DimensionMismatch),
        (np.zeros((0, 2)), np.zeros(0, int), DimensionMismatch),
        ([[0.5, 0.5]], [[0]], DimensionMismatch),
        ([[0.5, 0.5]], [2], InvalidInput),
        ([[0.5, 0.5]], [-1], InvalidInput),
        ([[0.5, 0.5]], [0.0], InvalidInput),
        ([[0.5, np.nan]], [0], InvalidInput),
        ([[np.inf, 0.5]], [0], InvalidInput),
    ],
)
@pytest.mark.parametrize("measure", [metrics.correctness, metrics.log_losses, metrics.calibration_error])
def test_scores_and_labels_that_do_not_fit_are_refused(
    measure: Callable[[Any, Any], Any], scores: Any, labels: Any, error: type[InvalidInput]
) -> None:
    with pytest.raises(error):
        measure(np.asarray(scores), np.asarray(labels))


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((2, 2))])
def test_an_interval_needs_numbers_by_row(values: ndarray) -> None:
    with pytest.raises(InvalidInput):
        metrics.mean_interval(values)


def test_errors_of_values_and_targets_of_other_shapes_are_refused() -> None:
    with pytest.raises(DimensionMismatch):
        metrics.squared_errors(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(DimensionMismatch):
        metrics.recall(np.zeros((2, 3)), np.zeros((2, 2)))
