import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.kernels import KERNELS, inverse_weights, kernel_named
from tests import reference

every_kernel = pytest.mark.parametrize("name", KERNELS)
LOCAL = ["exponential", "gaussian", "inverse"]


@st.composite
def ascending(draw: st.DrawFn) -> ndarray:
    """Distances as a search gives them: ascending, with some missing at the end of a row."""
    q, k = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    numbers = st.floats(0, 20, allow_subnormal=False)
    rows = [sorted(draw(st.lists(numbers, min_size=k, max_size=k))) for _ in range(q)]
    distances = np.array(rows)
    for row in range(q):
        distances[row, draw(st.integers(0, k)) :] = np.inf
    return distances


def test_the_four_kernels_of_the_contract_are_there() -> None:
    assert sorted(KERNELS) == ["exponential", "gaussian", "inverse", "uniform"]


@every_kernel
@pytest.mark.parametrize("bandwidth", [0.3, 1.0, 7.0])
def test_weights_equal_the_formula(name: str, bandwidth: float) -> None:
    distances = np.sort(np.random.default_rng(0).uniform(0, 3, (20, 6)), axis=1)
    found = kernel_named(name)(distances, bandwidth)
    np.testing.assert_allclose(found, reference.weights(distances, bandwidth, name), rtol=1e-12)


@every_kernel
@given(distances=ascending(), bandwidth=st.floats(1e-3, 1e3))
def test_weights_are_a_distribution_over_the_neighbors_that_are_there(
    name: str, distances: ndarray, bandwidth: float
) -> None:
    weights = kernel_named(name)(distances, bandwidth)
    present = np.isfinite(distances)
    assert weights.min() >= 0
    assert not weights[~present].any()
    np.testing.assert_allclose(weights.sum(axis=1), present.any(axis=1), atol=1e-12)


@every_kernel
@given(distances=ascending(), bandwidth=st.floats(1e-2, 1e2))
def test_a_farther_neighbor_never_weighs_more(name: str, distances: ndarray, bandwidth: float) -> None:
    assert np.diff(kernel_named(name)(distances, bandwidth), axis=1).max(initial=0) <= 0


@every_kernel
def test_missing_neighbors_leave_the_weights_of_the_others_as_they_were(name: str) -> None:
    distances = np.array([[0.5, 1.0, 2.0]])
    padded = np.array([[0.5, 1.0, 2.0, np.inf, np.inf]])
    weigh = kernel_named(name)
    np.testing.assert_array_equal(weigh(padded, 0.7)[:, :3], weigh(distances, 0.7))


@every_kernel
def test_no_neighbor_at_all_gives_zeros_and_no_nan(name: str) -> None:
    assert not kernel_named(name)(np.full((2, 3), np.inf), 1.0).any()


@every_kernel
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_empty_distances_give_empty_weights(name: str, shape: tuple[int, int]) -> None:
    assert kernel_named(name)(np.zeros(shape), 1.0).shape == shape


@every_kernel
def test_far_neighbors_do_not_underflow_to_nothing(name: str) -> None:
    weights = kernel_named(name)(np.array([[1e6, 1e6 + 1, 1e6 + 2]]), 0.01)
    np.testing.assert_allclose(weights.sum(axis=1), 1)


@pytest.mark.parametrize("name", ["exponential", "gaussian"])
@pytest.mark.parametrize("bandwidth", [1e-6, 1e-160, 1e-305])
def test_a_vanishing_bandwidth_is_the_nearest_neighbor_alone(name: str, bandwidth: float) -> None:
    distances = np.array([[0.5, 0.6, 0.9], [1e4, 2e4, np.inf]])
    np.testing.assert_array_equal(kernel_named(name)(distances, bandwidth), [[1, 0, 0], [1, 0, 0]])


@every_kernel
def test_a_huge_bandwidth_is_the_plain_mean(name: str) -> None:
    weights = kernel_named(name)(np.array([[0.5, 2.0, 3.0, np.inf]]), 1e9)
    np.testing.assert_allclose(weights, [[1 / 3, 1 / 3, 1 / 3, 0]], rtol=1e-8)


def test_exact_twins_share_all_inverse_weight_as_its_floor_vanishes() -> None:
    weights = inverse_weights(np.array([[0.0, 0.0, 1.0]]), 1e-30)
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0]], atol=1e-25)


def test_below_its_floor_an_inverse_weight_grows_no_more() -> None:
    near, nearer = inverse_weights(np.array([[0.1, 1.0], [0.0, 1.0]]), 0.2)
    np.testing.assert_array_equal(near, nearer)
    np.testing.assert_allclose(near, [5 / 6, 1 / 6])


@every_kernel
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_distances_weigh_the_same(name: str, dtype: type) -> None:
    weights = kernel_named(name)(np.full((1, 4), 0.8, dtype), 0.3)
    assert len(set(weights[0].tolist())) == 1


@pytest.mark.parametrize("name", LOCAL)
def test_the_bandwidth_has_the_unit_of_the_distances(name: str) -> None:
    distances = np.array([[0.1, 0.4, 0.5]])
    weigh = kernel_named(name)
    np.testing.assert_allclose(weigh(distances * 1000, 300.0), weigh(distances, 0.3), rtol=1e-9)


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match=r"'epanechnikov'.*'exponential', 'gaussian', 'inverse', 'uniform'"):
        kernel_named("epanechnikov")
