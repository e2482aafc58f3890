from typing import Any

import numpy as np
import pytest
from numpy import ndarray

from residual_memory.errors import DimensionMismatch, InvalidInput
from residual_memory.types import TopM
from residual_memory.validation import (
    LARGEST_VALUE,
    as_class_indices,
    as_count,
    as_fraction,
    as_ids,
    as_keys,
    as_labels,
    as_positive,
    as_predictions,
    as_probabilities,
    as_unit_keys,
    as_values,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([[0.0, NAN]], r"keys\[0, 1\] is nan"),
        ([[0.0, 1.0], [INF, 0.0]], r"keys\[1, 0\] is inf"),
        ([[-INF, 1.0]], r"keys\[0, 0\] is -inf"),
        ([[1e30, 0.0]], r"1e\+30.*scale"),
        ([[0.0, -1e16]], r"1e\+16.*scale"),
        ([["a", "b"]], "floating"),
        ([[1j, 0j]], "complex128"),
        ([[0.0, 1.0], [2.0]], "not a plain array"),
    ],
)
def test_keys_that_are_no_usable_numbers_are_refused_with_their_place(keys: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        as_keys(keys, 2)


@pytest.mark.parametrize("keys", [[0.0, 1.0], np.array(3.0), np.zeros((2, 2, 2)), np.zeros((2, 3)), np.zeros((2, 0))])
def test_keys_of_another_shape_are_refused(keys: Any) -> None:
    with pytest.raises(DimensionMismatch):
        as_keys(keys, 2)


def test_a_wrong_width_of_keys_names_both_widths_and_the_likely_cause() -> None:
    with pytest.raises(DimensionMismatch, match=r"dimension 3.*dimension 2.*layer"):
        as_keys(np.zeros((4, 3)), 2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_keys_keep_their_precision(dtype: type) -> None:
    assert as_keys(np.ones((2, 2), dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kept", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("d", [1, 3, 64, 2_048])
def test_keys_of_length_1_that_were_stored_are_left_as_they_are(dtype: type, kept: type, d: int) -> None:
    keys: ndarray = np.random.default_rng(d).normal(size=(500, d)).astype(dtype)
    once: ndarray = as_keys(keys, metric="cosine").astype(kept)
    again = as_unit_keys(once, d)
    assert again.dtype == kept
    assert (again == once).all()


def test_keys_of_another_length_are_refused_where_length_1_is_promised() -> None:
    with pytest.raises(InvalidInput, match=r"keys\[1\] has length 2, expected 1"):
        as_unit_keys([[0.0, 1.0], [2.0, 0.0]], 2)
    assert as_unit_keys(np.zeros((0, 2)), 2).shape == (0, 2)


@pytest.mark.parametrize("dtype", [np.int8, np.uint64, np.bool_])
def test_whole_numbers_become_double_precision_keys(dtype: type) -> None:
    assert as_keys(np.ones((2, 2), dtype)).dtype == np.float64


def test_the_largest_key_allowed_overflows_no_float32_distance() -> None:
    keys = as_keys(np.full((1, 64), LARGEST_VALUE, np.float32))
    assert np.isfinite(((2 * keys) ** 2).sum(dtype=np.float32))


def test_cosine_keys_have_length_one() -> None:
    keys = as_keys([[3.0, 4.0], [-1e-6, 0.0]], metric="cosine")
    np.testing.assert_allclose(keys, [[0.6, 0.8], [-1.0, 0.0]])


def test_a_zero_vector_has_no_cosine_and_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"keys\[1\] is zero.*cosine"):
        as_keys([[1.0, 0.0], [0.0, 0.0]], metric="cosine")


def test_a_zero_vector_is_fine_under_the_euclidean_metric() -> None:
    assert not as_keys([[0.0, 0.0]]).any()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_no_keys_at_all_are_fine(metric: Any) -> None:
    assert as_keys(np.zeros((0, 3)), 3, metric=metric).shape == (0, 3)


@pytest.mark.parametrize(
    ("predictions", "said"),
    [
        ([[0.5, 0.5], [0.7, 0.7]], r"predictions\[1\] sums to 1.4.*softmax"),
        ([[0.5, 0.4]], "sums to 0.9"),
        ([[1.5, -0.5]], r"predictions\[0\] holds -0.5.*softmax"),
        ([[NAN, 1.0]], r"predictions\[0, 0\] is nan"),
        ([[INF, 0.0]], "inf"),
        ([[0.0, 0.0]], "sums to 0"),
        ([[3.0, -1.2]], "softmax"),
    ],
)
def test_what_is_no_distribution_is_refused(predictions: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        as_probabilities(predictions, 2)


@pytest.mark.parametrize("predictions", [[0.5, 0.5], np.zeros((3, 0)), np.full((1, 3), 1 / 3)])
def test_predictions_of_another_shape_are_refused(predictions: Any) -> None:
    with pytest.raises(DimensionMismatch):
        as_probabilities(predictions, 2)


def test_half_precision_distributions_pass() -> None:
    random = np.random.default_rng(0)
    powers = np.exp(random.normal(size=(200, 100)))
    predictions = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float16)
    assert as_probabilities(predictions).dtype == np.float16


def test_classes_that_the_base_never_saw_get_probability_zero() -> None:
    np.testing.assert_array_equal(as_probabilities([[0.25, 0.75]], 4), [[0.25, 0.75, 0, 0]])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 3], r"labels\[1\] is 3, expected 0 to 2"),
        ([-1, 0], r"labels\[0\] is -1"),
        ([0.0, 1.0], "float64"),
        ([0.0, NAN], "float64"),
        (["a", "b"], "integers"),
        (np.array([2**63, 0], np.uint64), "expected 0 to 2"),
        ([0, [1]], "plain list"),
    ],
)
def test_labels_that_are_no_class_are_refused(labels: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        as_class_indices(labels, 3)


@pytest.mark.parametrize("labels", [[[0], [1]], np.array(0)])
def test_labels_of_another_shape_are_refused(labels: Any) -> None:
    with pytest.raises(DimensionMismatch):
        as_class_indices(labels, 3)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_labels_must_be_as_many_as_keys(task: Any) -> None:
    with pytest.raises(DimensionMismatch, match="2 labels for 3 keys"):
        as_labels([0, 0], task, 1, 3)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30])
def test_targets_and_values_that_are_no_usable_numbers_are_refused(bad: float) -> None:
    with pytest.raises(InvalidInput, match=r"labels"):
        as_labels([0.0, bad], "regression", 1, 2)
    with pytest.raises(InvalidInput, match=r"predictions"):
        as_predictions([0.0, bad], "regression", 1)


def test_one_axis_of_values_is_one_output() -> None:
    assert as_values([1.0, 2.0], 1, name="values").shape == (2, 1)


@pytest.mark.parametrize("values", [[1.0, 2.0], np.zeros((2, 2)), np.zeros((1, 3, 1)), np.array(1.0)])
def test_values_of_another_width_are_refused(values: Any) -> None:
    with pytest.raises(DimensionMismatch):
        as_values(values, 3, name="values")


def top(indices: Any, probabilities: Any, rest: Any) -> TopM:
    return TopM(np.asarray(indices), np.asarray(probabilities, float), np.asarray(rest, float))


@pytest.mark.parametrize(
    "predictions",
    [
        top([[0, 0]], [[0.5, 0.2]], [0.3]),
        top([[0, 4]], [[0.5, 0.2]], [0.3]),
        top([[-1, 0]], [[0.5, 0.2]], [0.3]),
        top([[0, 1]], [[0.5, 0.2]], [0.9]),
        top([[0, 1]], [[0.9, 0.2]], [-0.1]),
        top([[0, 1]], [[1.2, -0.5]], [0.3]),
        top([[0, 1]], [[NAN, 0.5]], [0.5]),
        top([[0, 1]], [[0.5, 0.2]], [INF]),
        top(np.zeros((2, 0), int), np.zeros((2, 0)), [1.0, 1.0]),
    ],
)
def test_a_top_m_row_that_is_no_distribution_is_refused(predictions: TopM) -> None:
    with pytest.raises(InvalidInput):
        as_predictions(predictions, "classification", 4)


def test_an_empty_top_m_batch_is_fine() -> None:
    empty = top(np.zeros((0, 2), int), np.zeros((0, 2)), np.zeros(0))
    assert len(as_predictions(empty, "classification", 4)) == 0


@pytest.mark.parametrize("ids", [[0, 5, 2**63 - 1], np.array([1], np.uint8), ["a", "ü", "日本"], []])
def test_integers_and_strings_are_ids(ids: Any) -> None:
    assert as_ids(ids).tolist() == list(ids)


@pytest.mark.parametrize(
    "ids",
    [
        [-1],
        [2**63],
        [2**64],
        [0.0],
        [NAN],
        [True, False],
        [None],
        [b"a"],
        [""],
        ["a", ""],
        ["a\0b"],
        ["a\0"],
        ["\ud800"],
        [(1, 2), "a"],
        [1, "a"],
        ["a", 1],
    ],
)
def test_what_is_no_id_is_refused(ids: Any) -> None:
    array: ndarray | list = np.array(ids, object) if any(isinstance(value, tuple) for value in ids) else ids
    with pytest.raises(InvalidInput):
        as_ids(array)


@pytest.mark.parametrize("ids", [np.array(3), [[1, 2]]])
def test_ids_have_one_axis(ids: Any) -> None:
    with pytest.raises(DimensionMismatch):
        as_ids(ids)


def test_ids_are_as_many_as_rows() -> None:
    with pytest.raises(DimensionMismatch, match="3, one a row"):
        as_ids([1, 2], 3)


@pytest.mark.parametrize("value", [0, -3, 1.5, "7", None, NAN])
def test_a_count_is_a_whole_number_of_at_least_one(value: Any) -> None:
    with pytest.raises(InvalidInput, match="n_neighbors"):
        as_count("n_neighbors", value)


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF, "wide", None])
def test_a_bandwidth_is_a_finite_number_above_zero(value: Any) -> None:
    with pytest.raises(InvalidInput, match="bandwidth"):
        as_positive("bandwidth", value)


@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, INF, "half", None])
def test_a_fraction_lies_between_zero_and_one(value: Any) -> None:
    with pytest.raises(InvalidInput, match="max_weight"):
        as_fraction("max_weight", value)


def test_zero_is_a_fraction_only_where_it_may_be() -> None:
    assert as_fraction("share", 0) == 0
    with pytest.raises(InvalidInput, match="above 0"):
        as_fraction("share", 0, above_zero=True)
