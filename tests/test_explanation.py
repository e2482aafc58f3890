from typing import Any

import numpy as np
import pytest

from residual_memory.correction import correct
from residual_memory.errors import DimensionMismatch, InvalidInput
from residual_memory.explanation import explain
from tests.problems import Problem, classification, empty_memory, knn_of, memory_of, regression

every_task = pytest.mark.parametrize("task", [classification, regression])


@every_task
@pytest.mark.parametrize("shrinkage", [0.0, 0.4, 1.0])
def test_contributions_sum_to_the_correction(task: Any, shrinkage: float) -> None:
    problem = task()
    knn = knn_of(memory_of(problem))
    report = explain(knn, problem.queries, problem.said, shrinkage=shrinkage)
    np.testing.assert_allclose(report.contributions.sum(axis=1), shrinkage * knn(problem.queries), atol=1e-14)
    np.testing.assert_allclose(report.corrected, correct(problem.said, knn(problem.queries), shrinkage), atol=1e-14)


@every_task
@pytest.mark.parametrize("kernel", ["exponential", "kriging"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_with_any_share_of_the_residuals_contributions_sum_to_the_correction(
    task: Any, kernel: str, share: float
) -> None:
    problem = task()
    knn = knn_of(memory_of(problem), kernel=kernel)
    report = explain(knn, problem.queries, problem.said, shrinkage=0.4, residual_share=share)
    correction = knn.look_up(problem.queries, labels=True).correction(problem.said, share)
    np.testing.assert_allclose(report.contributions.sum(axis=1), 0.4 * correction, atol=1e-14)
    np.testing.assert_allclose(report.corrected, correct(problem.said, correction, 0.4), atol=1e-14)


@every_task
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_each_contribution_of_a_share_is_that_of_the_formula(task: Any, share: float) -> None:
    problem = task()
    report = explain(knn_of(memory_of(problem)), problem.queries, problem.said, residual_share=share)
    targets = problem.labels if task is regression else np.eye(4)[problem.labels]
    each = targets[report.ids] - share * problem.predictions[report.ids] - (1 - share) * problem.said[:, None]
    np.testing.assert_allclose(report.contributions, report.weights[..., None] * each, atol=1e-14)


@every_task
def test_each_contribution_is_the_weight_times_the_memorys_own_residual(task: Any) -> None:
    problem = task()
    report = explain(knn_of(memory_of(problem)), problem.queries, problem.said)
    targets = problem.labels if task is regression else np.eye(4)[problem.labels]
    rest = (targets - problem.predictions)[report.ids]
    np.testing.assert_allclose(report.contributions, report.weights[..., None] * rest, atol=1e-14)


def test_the_report_names_what_the_search_found(problem: Problem) -> None:
    knn = knn_of(memory_of(problem))
    report, found = explain(knn, problem.queries, problem.said), knn.neighbors(problem.queries)
    np.testing.assert_array_equal(report.ids, found.ids)
    np.testing.assert_array_equal(report.distances, found.distances)
    np.testing.assert_array_equal(report.weights, found.weights)


def test_an_excluded_memory_contributes_nothing(problem: Problem) -> None:
    knn = knn_of(memory_of(problem))
    exclude = np.arange(60)
    report = explain(knn, problem.keys, problem.predictions, exclude=exclude)
    assert not (report.ids == exclude[:, None]).any()
    np.testing.assert_allclose(report.contributions.sum(axis=1), knn(problem.keys, exclude), atol=1e-14)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_missing_neighbors_contribute_nothing(problem: Problem, share: float) -> None:
    memory = memory_of(problem)
    knn = knn_of(memory)
    memory.forget(np.arange(3, 60))
    report = explain(knn, problem.queries, problem.said, residual_share=share)
    assert (report.ids[:, 3:] == -1).all()
    assert not report.contributions[:, 3:].any()
    correction = knn.look_up(problem.queries, labels=True).correction(problem.said, share)
    np.testing.assert_allclose(report.contributions.sum(axis=1), correction, atol=1e-14)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_memories_too_far_to_count_contribute_nothing(problem: Problem, share: float) -> None:
    knn = knn_of(memory_of(problem), max_distance=1.7)
    report = explain(knn, problem.queries, problem.said, residual_share=share)
    far = report.distances > 1.7
    assert far.any()
    assert not report.contributions[far].any()
    assert report.contributions[~far].any(axis=1).all()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_an_empty_memory_explains_nothing(problem: Problem, share: float) -> None:
    report = explain(knn_of(empty_memory(problem)), problem.queries, problem.said, residual_share=share)
    assert not report.contributions.any()
    np.testing.assert_array_equal(report.corrected, problem.said)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_class_that_the_base_never_saw_is_explained_too(problem: Problem, share: float) -> None:
    memory = memory_of(problem, n_outputs=5)
    report = explain(knn_of(memory), problem.queries, problem.said, residual_share=share)
    padded = np.pad(problem.said, ((0, 0), (0, 1)))
    wanted = explain(knn_of(memory), problem.queries, padded, residual_share=share)
    np.testing.assert_array_equal(report.contributions, wanted.contributions)
    np.testing.assert_array_equal(report.corrected, wanted.corrected)


def test_string_ids_are_named_as_they_were_given(problem: Problem) -> None:
    names = np.array([f"row {number}" for number in range(60)])
    knn = knn_of(memory_of(problem, ids=names), n_neighbors=1)
    np.testing.assert_array_equal(explain(knn, problem.keys, problem.predictions).ids[:, 0], names)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_one_output_given_as_one_axis_is_corrected_row_by_row(share: float) -> None:
    problem = regression(c=1)
    knn = knn_of(memory_of(problem))
    report = explain(knn, problem.queries, problem.said[:, 0], residual_share=share)
    correction = knn.look_up(problem.queries, labels=True).correction(problem.said, share)
    assert report.corrected.shape == (12, 1)
    np.testing.assert_allclose(report.corrected, problem.said + correction, atol=1e-14)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "share",
    [
        1.0,
        0.3,
    ],
)
@pytest.mark.parametrize("rows", [3, 0])
def test_predictions_of_another_length_are_refused(problem: Problem, share: float, rows: int) -> None:
    with pytest.raises(DimensionMismatch):
        explain(knn_of(memory_of(problem)), problem.queries, problem.said[:rows], residual_share=share)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_no_part_is_refused(problem: Problem, share: float) -> None:
    with pytest.raises(InvalidInput, match="residual_share is"):
        explain(knn_of(memory_of(problem)), problem.queries, problem.said, residual_share=share)


def test_a_negative_shrinkage_is_refused(problem: Problem) -> None:
    with pytest.raises(InvalidInput, match="shrinkage"):
        explain(knn_of(memory_of(problem)), problem.queries, problem.said, shrinkage=-1.0)
