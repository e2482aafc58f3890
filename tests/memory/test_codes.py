"""Probabilities on a log scale: how far off, in which order, and what stays exact."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from residual_memory.memory.codes import BLOCK, LOG_SCALES, LogScale
from residual_memory.residuals import dense, top_m
from residual_memory.types import TopM
from residual_memory.validation import SUM_TOLERANCE
from tests.problems import classification, memory_of, softmax

scales = st.sampled_from(sorted(LOG_SCALES)).map(LOG_SCALES.__getitem__)
seeds = st.integers(0, 10**6)


def rows(seed: int, n: int = 50, c: int = 40, m: int = 8) -> TopM:
    """Sure and unsure predictions, cut to their m largest."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, c)) * random.uniform(0, 6, (n, 1))
    return top_m(softmax(logits), m)


def back(scale: LogScale, kept: TopM) -> tuple[ndarray, ndarray]:
    return scale.decoded(scale.encoded(kept.probabilities), scale.encoded(kept.rest))


@pytest.mark.parametrize(
    ("name", "n_bytes", "smallest", "error"), [("log8", 1, np.exp(-16), 0.033), ("log16", 2, np.exp(-32), 0.0003)]
)
def test_a_scale_keeps_what_it_promises(name: str, n_bytes: int, smallest: float, error: float) -> None:
    scale = LOG_SCALES[name]
    assert scale.dtype.itemsize == n_bytes
    assert scale.relative_error < error
    wide = np.geomspace(smallest, 1, 100_001)
    off = np.exp(-scale.step * scale.encoded(wide)) / wide - 1
    assert np.abs(off).max() <= scale.relative_error * (1 + 1e-9)


@given(seed=seeds, scale=scales)
def test_a_decoded_row_is_within_twice_the_error_of_a_code(seed: int, scale: LogScale) -> None:
    kept = rows(seed)
    listed, rest = back(scale, kept)
    told = np.c_[kept.probabilities, kept.rest]
    found = np.c_[listed, rest].astype(np.float64)
    within = told >= np.exp(-scale.reach)
    bound = np.expm1(scale.step)  # half a step of its own, half a step of the sum
    assert np.abs(found / told - 1)[within].max() <= bound + 1e-6
    assert found[~within].max(initial=0) <= np.exp(-scale.reach) * (1 + bound)


@given(seed=seeds, scale=scales)
def test_decoded_rows_sum_to_one_in_single_precision(seed: int, scale: LogScale) -> None:
    listed, rest = back(scale, rows(seed))
    assert listed.dtype == rest.dtype == np.float32
    np.testing.assert_allclose(listed.sum(axis=1, dtype=np.float64) + rest, 1, atol=5e-7)


@given(seed=seeds, scale=scales, off=st.floats(-1.9e-3, 1.9e-3))
def test_what_goes_out_gives_the_same_codes_and_is_taken_again(seed: int, scale: LogScale, off: float) -> None:
    """Also of rows whose sum is as far from 1 as a memory takes: there a decoded value may be another code's."""
    kept = rows(seed)
    codes, rest = scale.encoded(kept.probabilities * (1 + off)), scale.encoded(kept.rest * (1 + off))
    listed, left = scale.portable(codes, rest)
    assert listed.dtype == left.dtype == np.float32
    assert (scale.encoded(listed) == codes).all()
    assert (scale.encoded(left) == rest).all()
    assert np.abs(listed.sum(axis=1, dtype=np.float64) + left - 1).max() <= SUM_TOLERANCE
    np.testing.assert_allclose(listed, scale.decoded(codes, rest)[0], rtol=2.1e-3)


@given(seed=seeds, scale=scales)
def test_the_order_of_probabilities_is_kept_up_to_ties(seed: int, scale: LogScale) -> None:
    kept = rows(seed)
    listed, rest = back(scale, kept)
    told, found = np.c_[kept.probabilities, kept.rest], np.c_[listed, rest]
    order = np.argsort(told, axis=1)
    assert (np.diff(np.take_along_axis(found, order, 1), axis=1) >= 0).all()


@given(seed=seeds, scale=scales)
def test_what_was_decoded_comes_back_when_it_is_stored_again(seed: int, scale: LogScale) -> None:
    kept = rows(seed, c=8)
    listed, rest = back(scale, kept)
    again = back(scale, TopM(kept.indices, listed, rest))
    np.testing.assert_allclose(again[0], listed, rtol=1e-6)
    np.testing.assert_allclose(again[1], rest, rtol=1e-6)


@given(scale=scales)
def test_zeros_stay_zero_and_what_is_not_zero_does_not_become_it(scale: LogScale) -> None:
    kept = TopM(np.array([[0, 1, 2]]), np.array([[1.0, 0.0, 1e-300]]), np.array([0.0]))
    listed, rest = back(scale, kept)
    assert (listed[0, 1], rest[0]) == (0, 0)
    assert 0 < listed[0, 2] <= np.exp(-scale.reach) * (1 + 1e-6)
    assert listed[0, 0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@given(scale=scales)
def test_a_row_that_sums_to_a_little_more_than_one_is_taken(scale: LogScale, dtype: type) -> None:
    listed, rest = scale.encoded(np.array([[1.001]], dtype)), scale.encoded(np.array([0.0], dtype))
    assert scale.decoded(listed, rest)[0].tolist() == [[1]]


@pytest.mark.parametrize(("name", "error"), [("log8", 0.065), ("log16", 0.001)])
def test_a_very_sure_row_keeps_what_it_is_unsure_of(name: str, error: float) -> None:
    for doubt in (0.3, 0.03, 1e-3, 1e-4, 1e-6):
        kept = TopM(np.array([[3]]), np.array([[1 - doubt]]), np.array([doubt]))
        listed, rest = back(LOG_SCALES[name], kept)
        assert rest[0] == pytest.approx(doubt, rel=error)
        assert 1 - float(listed[0, 0]) == pytest.approx(doubt, rel=error, abs=1.2e-7)  # of single precision


def test_a_damaged_row_of_zeros_is_no_division_by_zero() -> None:
    scale = LOG_SCALES["log8"]
    listed, rest = scale.decoded(np.full((2, 3), scale.zero, np.uint8), np.full(2, scale.zero, np.uint8))
    assert not listed.any()
    assert not rest.any()


@pytest.mark.parametrize("name", LOG_SCALES)
def test_a_row_is_decoded_alike_in_any_company(name: str) -> None:
    scale = LOG_SCALES[name]
    kept = rows(0, n=BLOCK // 6, m=7)
    codes, rest = scale.encoded(kept.probabilities), scale.encoded(kept.rest)
    together = scale.decoded(codes, rest)[0]
    for row in (0, 1, BLOCK // 7, BLOCK // 7 + 1, len(kept) - 1):
        np.testing.assert_array_equal(scale.decoded(codes[row : row + 1], rest[row : row + 1])[0][0], together[row])


@pytest.mark.parametrize("prediction_dtype", ["float32", "float64"])
def test_a_memory_of_all_classes_is_the_dense_one_bit_for_bit(prediction_dtype: str) -> None:
    problem = classification(c=2)  # as many as the tests keep
    whole, cut = (memory_of(problem, residuals=r, prediction_dtype=prediction_dtype) for r in ("dense", "top-m"))
    everything = np.arange(60)
    np.testing.assert_array_equal(
        cut.snapshot.predictions(everything), whole.snapshot.predictions(everything).astype(prediction_dtype)
    )


@given(seed=seeds, name=st.sampled_from(sorted(LOG_SCALES)))
def test_residuals_of_coded_rows_sum_to_zero_and_are_near(seed: int, name: str) -> None:
    problem = classification(c=6, seed=seed)
    memory = memory_of(problem, residuals="top-m", prediction_dtype=name)
    found = memory.snapshot.residuals(np.arange(60), 1.0)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-6)
    wanted = -dense(top_m(problem.predictions, 2), 6)
    wanted[np.arange(60), problem.labels] += 1
    np.testing.assert_allclose(found, wanted, atol=2 * LOG_SCALES[name].relative_error)
