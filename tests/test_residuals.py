import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.residuals import classification_residuals, dense, regression_residuals, temper, top_m
from residual_memory.types import TopM
from tests import reference
from tests.problems import classification, regression, same_bits, softmax


@given(seed=st.integers(0, 10**6), temperature=st.floats(0.05, 50))
def test_temper_is_the_softmax_of_the_logits_over_the_temperature(seed: int, temperature: float) -> None:
    logits = 3 * np.random.default_rng(seed).normal(size=(4, 6))
    np.testing.assert_allclose(temper(softmax(logits), temperature), softmax(logits / temperature), atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_temperature_one_gives_the_predictions_back_bit_for_bit(dtype: type) -> None:
    predictions: ndarray = classification().predictions.astype(dtype)
    assert same_bits(temper(predictions, 1.0), predictions)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [0.001, 0.5, 3.0, 1e4])
def test_tempered_rows_stay_distributions_with_their_zeros(dtype: type, temperature: float) -> None:
    predictions: ndarray = np.array([[0.7, 0.3, 0.0], [1.0, 0.0, 0.0], [1e-30, 1.0, 0.0]], dtype)
    tempered = temper(predictions, temperature)
    np.testing.assert_allclose(tempered.sum(axis=1), 1, rtol=1e-6)
    assert not tempered[predictions == 0].any()


def test_a_low_temperature_is_surer_and_a_high_one_less_sure() -> None:
    predictions = np.array([[0.6, 0.4]])
    assert temper(predictions, 0.5)[0, 0] > 0.6 > temper(predictions, 2.0)[0, 0] > 0.5


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_a_temperature_that_is_no_positive_number_is_refused(temperature: float) -> None:
    with pytest.raises(InvalidInput, match="temperature"):
        temper([[0.5, 0.5]], temperature)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_the_residual_is_the_onehot_label_less_the_tempered_prediction(temperature: float) -> None:
    problem = classification()
    found = classification_residuals(problem.labels, problem.predictions, temperature)
    np.testing.assert_allclose(found, reference.residuals(problem.labels, problem.predictions, temperature), atol=1e-14)


@given(seed=st.integers(0, 10**6), temperature=st.floats(0.1, 10))
def test_classification_residuals_sum_to_zero(seed: int, temperature: float) -> None:
    problem = classification(n=5, seed=seed)
    found = classification_residuals(problem.labels, problem.predictions, temperature)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_predictions_are_not_written_to(temperature: float) -> None:
    problem = classification()
    before = problem.predictions.copy()
    classification_residuals(problem.labels, problem.predictions, temperature)
    temper(problem.predictions, temperature)
    assert same_bits(problem.predictions, before)


def test_a_regression_residual_is_the_target_less_the_prediction() -> None:
    problem = regression()
    np.testing.assert_array_equal(
        regression_residuals(problem.labels, problem.predictions), problem.labels - problem.predictions
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_top_m_of_all_classes_is_dense_bit_for_bit(dtype: type) -> None:
    predictions: ndarray = classification().predictions.astype(dtype)
    assert same_bits(dense(top_m(predictions, 4), 4), predictions)


def test_top_m_keeps_the_largest_and_the_mass_of_the_others() -> None:
    kept = top_m([[0.1, 0.5, 0.15, 0.25]], 2)
    order = np.argsort(kept.indices[0])
    assert kept.indices[0][order].tolist() == [1, 3]
    np.testing.assert_allclose(kept.probabilities[0][order], [0.5, 0.25])
    np.testing.assert_allclose(kept.rest, [0.25])


@given(seed=st.integers(0, 10**6), m=st.integers(1, 5))
def test_a_compressed_row_still_sums_to_one_with_its_rest_spread_evenly(seed: int, m: int) -> None:
    predictions = classification(n=6, c=6, seed=seed).predictions
    kept = top_m(predictions, m)
    full = dense(kept, 6)
    np.testing.assert_allclose(full.sum(axis=1), 1, atol=1e-12)
    for row in range(6):
        others = np.setdiff1d(np.arange(6), kept.indices[row])
        np.testing.assert_allclose(full[row, others], kept.rest[row] / len(others))
        np.testing.assert_array_equal(full[row, kept.indices[row]], predictions[row, kept.indices[row]])


def test_the_rest_of_a_rounded_row_is_never_negative() -> None:
    predictions = softmax(np.random.default_rng(1).normal(size=(500, 7))).astype(np.float32)
    assert top_m(predictions, 7).rest.min() >= 0


def test_a_wider_memory_spreads_the_rest_over_all_of_its_classes() -> None:
    compressed = TopM(np.array([[0, 1]]), np.array([[0.5, 0.2]]), np.array([0.3]))
    np.testing.assert_allclose(dense(compressed, 5), [[0.5, 0.2, 0.1, 0.1, 0.1]])


@pytest.mark.parametrize("m", [0, -1, 5])
def test_an_m_outside_the_classes_is_refused(m: int) -> None:
    with pytest.raises(InvalidInput, match=r"1 to 4"):
        top_m(classification().predictions, m)
