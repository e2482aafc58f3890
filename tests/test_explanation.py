from typing import Any

import numpy as np
import pytest

from residual_memory.correction import correct
from residual_memory.errors import DimensionMismatch, InvalidInput
from residual_memory.explanation import explain
from tests.problems import Problem, classification, knn_of, memory_of, regression

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


def test_missing_neighbors_contribute_nothing(problem: Problem) -> None:
    memory = memory_of(problem)
    knn = knn_of(memory)
    memory.forget(np.arange(3, 60))
    report = explain(knn, problem.queries, problem.said)
    assert (report.ids[:, 3:] == -1).all()
    assert not report.contributions[:, 3:].any()
    np.testing.assert_allclose(report.contributions.sum(axis=1), knn(problem.queries), atol=1e-14)


def test_string_ids_are_named_as_they_were_given(problem: Problem) -> None:
    names = np.array([f"row {number}" for number in range(60)])
    knn = knn_of(memory_of(problem, ids=names), n_neighbors=1)
    np.testing.assert_array_equal(explain(knn, problem.keys, problem.predictions).ids[:, 0], names)


def test_one_output_given_as_one_axis_is_corrected_row_by_row() -> None:
    problem = regression(c=1)
    knn = knn_of(memory_of(problem))
    report = explain(knn, problem.queries, problem.said[:, 0])
    assert report.corrected.shape == (12, 1)
    np.testing.assert_allclose(report.corrected, problem.said + knn(problem.queries), atol=1e-14)


def test_predictions_of_another_length_are_refused(problem: Problem) -> None:
    with pytest.raises(DimensionMismatch):
        explain(knn_of(memory_of(problem)), problem.queries, problem.said[:3])


def test_a_negative_shrinkage_is_refused(problem: Problem) -> None:
    with pytest.raises(InvalidInput, match="shrinkage"):
        explain(knn_of(memory_of(problem)), problem.queries, problem.said, shrinkage=-1.0)
