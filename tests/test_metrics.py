from collections.abc import Callable
from itertools import pairwise
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


# ---------------------------------------------------------------------- auc


def delong(above: ndarray, below: ndarray) -> tuple[float, float]:
    """The area and its standard error from every pair, as in the paper: one row a positive, one column a negative."""
    won = (above[:, None] > below) + 0.5 * (above[:, None] == below)
    by_positive, by_negative = won.mean(axis=1), won.mean(axis=0)
    variance = by_positive.var(ddof=1) / len(above) + by_negative.var(ddof=1) / len(below)
    return float(won.mean()), float(np.sqrt(variance))


@pytest.mark.parametrize("levels", [None, 3, 1])
@pytest.mark.parametrize("sizes", [(300, 200), (2, 5)])
def test_auc_equals_a_count_of_pairs_and_scikit_learns(sizes: tuple[int, int], levels: int | None) -> None:
    random = np.random.default_rng(0)
    above, below = random.normal(0.4, 1, sizes[0]), random.normal(0, 1, sizes[1])
    if levels:
        above, below = np.round(above * levels) / levels, np.round(below * levels) / levels
    found = metrics.auc(above, below)
    value, error = delong(above, below)
    scores, truth = np.concatenate([above, below]), np.repeat([1, 0], sizes)
    assert found.value == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores), abs=1e-12)
    assert found.value == pytest.approx(value, abs=1e-12)
    assert found.low == pytest.approx(max(value - metrics.Z95 * error, 0), abs=1e-12)
    assert found.high == pytest.approx(min(value + metrics.Z95 * error, 1), abs=1e-12)


def test_auc_of_equal_scores_is_a_half_and_of_separate_ones_the_whole() -> None:
    assert metrics.auc(np.ones(5), np.ones(7)) == metrics.Estimate(0.5, 0.5, 0.5)
    assert metrics.auc([3.0, np.inf], [-np.inf, 1.0, 2.0]) == metrics.Estimate(1.0, 1.0, 1.0)
    assert metrics.auc([1.0, 2.0], [3.0, 4.0]).value == 0


def test_auc_does_not_change_with_the_unit_and_turns_with_the_sides() -> None:
    random = np.random.default_rng(1)
    above, below = random.normal(0.5, 1, 80), random.normal(0, 1, 60)
    found, swapped = metrics.auc(above, below), metrics.auc(below, above)
    assert metrics.auc(np.exp(above), np.exp(below)) == found
    assert swapped.value == pytest.approx(1 - found.value)
    assert swapped.margin == pytest.approx(found.margin)


def test_the_interval_of_auc_covers_the_truth_as_often_as_it_says() -> None:
    """Of normal scores a unit apart the area is Φ(1/√2)."""
    random, truth = np.random.default_rng(2), 0.7602499389065233
    found = [metrics.auc(random.normal(1, 1, 60), random.normal(0, 1, 40)) for _ in range(1000)]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    assert 0.92 < covered < 0.97


def test_scores_of_one_document_are_one_draw_in_the_interval_of_auc() -> None:
    """With every score repeated eight times, groups give the interval of the scores that there really are."""
    random = np.random.default_rng(3)
    above, below = random.normal(0.5, 1, 50), random.normal(0, 1, 40)
    groups = {"positive_groups": np.repeat(np.arange(50), 8), "negative_groups": np.repeat(np.arange(40), 8)}
    repeated = np.repeat(above, 8), np.repeat(below, 8)
    alone, grouped = metrics.auc(above, below), metrics.auc(*repeated, **groups)
    assert grouped.low == pytest.approx(alone.low, abs=1e-12)
    assert grouped.high == pytest.approx(alone.high, abs=1e-12)
    assert metrics.auc(*repeated).margin < alone.margin / 2
    one = metrics.auc(above, below, positive_groups=np.zeros(50, int))
    assert (one.low, one.high) == (0, 1)  # nothing is known of other documents


@pytest.mark.parametrize(
    ("above", "below", "said"),
    [
        ([1.0], [1.0, 2.0], "positives have shape"),
        ([1.0, 2.0], [], "negatives have shape"),
        ([[1.0, 2.0]], [1.0, 2.0], "one axis"),
        ([1.0, 2.0], [0.0, np.nan], r"negatives\[1\] is NaN"),
    ],
)
def test_auc_refuses_what_has_no_ranks(above: Any, below: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        metrics.auc(above, below)


def test_auc_refuses_groups_that_are_not_one_a_score() -> None:
    with pytest.raises(DimensionMismatch, match="one a score: 3"):
        metrics.auc([1.0, 2.0], [1.0, 2.0, 3.0], negative_groups=[0, 1])


def test_risk_coverage_is_the_mean_loss_of_the_surest() -> None:
    random = np.random.default_rng(0)
    confidence, losses = random.random(1000), random.random(1000)
    points = metrics.risk_coverage(confidence, losses, n_points=10)
    assert [point["coverage"] for point in points] == pytest.approx(np.arange(1, 11) / 10)
    order = np.argsort(-confidence)
    assert [point["risk"] for point in points] == pytest.approx(
        [losses[order[:n]].mean() for n in range(100, 1001, 100)]
    )
    assert len(metrics.risk_coverage(confidence[:3], losses[:3])) == 3
    with pytest.raises(DimensionMismatch):
        metrics.risk_coverage([0.1], [0.1, 0.2])


def test_gains_by_keeps_every_row_with_a_value_and_no_value_apart_from_itself() -> None:
    random = np.random.default_rng(0)
    values, gains = np.append(random.integers(0, 5, 300), np.inf), random.normal(size=301)
    bins = metrics.gains_by(values, gains, n_bins=20)
    assert sum(row["n"] for row in bins) == 300
    assert all(one["high"] < other["low"] for one, other in pairwise(bins))
    for row in bins:
        inside = (values >= row["low"]) & (values <= row["high"])
        wanted = metrics.mean_interval(gains[inside])
        assert (row["gain"], row["gain_low"], row["gain_high"]) == (wanted.value, wanted.low, wanted.high)
    grouped = metrics.gains_by(values, gains, groups=np.arange(301) // 30)
    assert grouped[0]["gain_high"] != metrics.gains_by(values, gains)[0]["gain_high"]
    assert metrics.gains_by([np.inf], [1.0]) == []
    assert len(metrics.gains_by([2.0, 2.0], [1.0, 3.0])) == 1
    with pytest.raises(DimensionMismatch):
        metrics.gains_by([0.1], [0.1, 0.2])
