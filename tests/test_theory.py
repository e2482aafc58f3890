"""The norm-ball fit is exact, the draws are those of the theorem's setting, and the figures are honest."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray
from scipy.optimize import NonlinearConstraint, brentq, minimize

from residual_memory import theory
from residual_memory.errors import DimensionMismatch, InvalidInput
from residual_memory.metrics import Estimate, mean_interval
from residual_memory.theory import norm_ball_least_squares, repeated_mean


def noisy(n: int, d: int, seed: int = 0, condition: float = 1.0) -> tuple[ndarray, ndarray]:
    random = np.random.default_rng(seed)
    scales = np.geomspace(1, 1 / condition, d)
    return random.normal(size=(n, d)) * scales, random.normal(size=n) + random.normal(size=(n, d)) @ np.ones(d)


def loss(x: ndarray, y: ndarray, theta: ndarray) -> float:
    return float(((y - x @ theta) ** 2).sum())


def rejects_the_optimality_conditions(x: ndarray, y: ndarray, radius: float) -> str | None:
    """Karush, Kuhn and Tucker: feasible, multiplier ≥ 0, stationary, and no multiplier where the ball does not bind."""
    fit = norm_ball_least_squares(x, y, radius)
    norm = np.linalg.norm(fit.theta)
    size = np.linalg.norm(x, 2) * (np.linalg.norm(y) + np.linalg.norm(x, 2) * norm) + 1e-300
    gradient = x.T @ (x @ fit.theta - y) + fit.multiplier * fit.theta
    if norm > radius * (1 + 1e-12):
        return f"norm {norm} beyond {radius}"
    if fit.multiplier < 0 or (fit.multiplier > 0 and norm < radius * (1 - 1e-12)):
        return f"multiplier {fit.multiplier} at norm {norm} of {radius}"
    if np.linalg.norm(gradient) > 1e-12 * size:
        return f"gradient {gradient}"
    return None


@given(
    n=st.integers(1, 12),
    d=st.integers(1, 6),
    rank=st.integers(1, 6),
    radius=st.floats(1e-4, 1e4),
    condition=st.sampled_from([1.0, 1e3, 1e6]),
    seed=st.integers(0, 1000),
)
def test_every_fit_satisfies_the_optimality_conditions(
    n: int, d: int, rank: int, radius: float, condition: float, seed: int
) -> None:
    x, y = noisy(n, d, seed, condition)
    mixed = x[:, :rank] @ np.random.default_rng(seed).normal(size=(min(rank, d), d))
    assert rejects_the_optimality_conditions(x, y, radius) is None
    assert rejects_the_optimality_conditions(mixed, y, radius) is None


@pytest.mark.parametrize("radius", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("n", "d"), [(30, 1), (30, 3), (50, 8), (4, 6)])
def test_the_fit_equals_that_of_two_general_optimizers(n: int, d: int, radius: float) -> None:
    x, y = noisy(n, d)
    theta = norm_ball_least_squares(x, y, radius).theta

    def gradient(theta: ndarray) -> ndarray:
        return 2 * x.T @ (x @ theta - y)

    inside = {"type": "ineq", "fun": lambda theta: radius**2 - theta @ theta}
    start = np.full(d, radius / d)
    sequential = minimize(
        lambda t: loss(x, y, t), start, jac=gradient, method="SLSQP", constraints=inside, options={"ftol": 1e-14}
    )
    interior = minimize(
        lambda t: loss(x, y, t),
        start,
        jac=gradient,
        hess=lambda _: 2 * x.T @ x,
        method="trust-constr",
        constraints=NonlinearConstraint(
            lambda t: t @ t, -np.inf, radius**2, jac=lambda t: 2 * t, hess=lambda _, v: 2 * v[0] * np.eye(d)
        ),
        options={"gtol": 1e-10, "xtol": 1e-12, "maxiter": 2000},
    )
    np.testing.assert_allclose(sequential.x, theta, atol=1e-5)
    np.testing.assert_allclose(interior.x, theta, atol=1e-5)
    assert loss(x, y, theta) <= min(sequential.fun, interior.fun) * (1 + 1e-9)


def test_the_multiplier_is_the_root_of_the_secular_equation_in_the_eigenbasis() -> None:
    x, y = noisy(40, 5, condition=1e4)
    values, vectors = np.linalg.eigh(x.T @ x)
    target = vectors.T @ x.T @ y
    for radius in (1e-3, 0.1, 0.7):

        def secular(mu: float, radius: float = radius) -> float:
            return float(1 / np.linalg.norm(target / (values + mu)) - 1 / radius)

        wanted = brentq(secular, 0, np.linalg.norm(target) / radius, xtol=1e-14, rtol=1e-14)
        assert norm_ball_least_squares(x, y, radius).multiplier == pytest.approx(wanted, rel=1e-9)


def test_a_ball_that_does_not_bind_leaves_plain_least_squares_and_no_multiplier() -> None:
    x, y = noisy(30, 4)
    plain = np.linalg.lstsq(x, y, rcond=None)[0]
    fit = norm_ball_least_squares(x, y, float(np.linalg.norm(plain)) * 1.001)
    assert fit.multiplier == 0
    np.testing.assert_allclose(fit.theta, plain, rtol=1e-12)
    bound = norm_ball_least_squares(x, y, float(np.linalg.norm(plain)) * 0.999)
    assert bound.multiplier > 0
    assert np.linalg.norm(bound.theta) == pytest.approx(np.linalg.norm(plain) * 0.999, rel=1e-14)


def test_with_dependent_columns_the_fit_is_the_shortest_solution() -> None:
    x, y = noisy(20, 3)
    twice = np.hstack([x, x])
    np.testing.assert_allclose(
        norm_ball_least_squares(twice, y, 1e6).theta, np.linalg.pinv(twice) @ y, rtol=1e-9, atol=1e-12
    )
    fit = norm_ball_least_squares(twice, y, 0.1)
    np.testing.assert_allclose(fit.theta[:3], fit.theta[3:], rtol=1e-9)
    assert np.linalg.norm(fit.theta) == pytest.approx(0.1, rel=1e-13)


def test_nothing_to_fit_gives_zero() -> None:
    x, y = noisy(10, 3)
    for rows, targets in ((x, 0 * y), (0 * x, y), (x[:0], y[:0])):
        fit = norm_ball_least_squares(rows, targets, 0.5)
        assert (fit.theta.tolist(), fit.multiplier) == ([0, 0, 0], 0)


def test_a_truth_outside_the_ball_is_shrunk_towards_the_surface() -> None:
    """With E xxᵀ = I and no noise θ_n goes to Lθ*, and μ/n to (1 − L)/L."""
    random = np.random.default_rng(0)
    x, truth = theory.sample_ball(100_000, 4, random), np.array([0.6, 0.0, -0.8, 0.0])
    fit = norm_ball_least_squares(x, x @ truth, 0.5)
    np.testing.assert_allclose(fit.theta, 0.5 * truth, atol=5e-3)
    assert fit.multiplier / 100_000 == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(
    ("x", "y", "radius", "error"),
    [
        (np.eye(3), np.ones(2), 1.0, DimensionMismatch),
        (np.ones(3), np.ones(3), 1.0, DimensionMismatch),
        (np.eye(3), np.ones((3, 2)), 1.0, DimensionMismatch),
        (np.eye(3), np.ones(3), 0.0, InvalidInput),
        (np.eye(3), np.ones(3), np.nan, InvalidInput),
        (np.eye(3), np.array([1.0, np.nan, 1.0]), 1.0, InvalidInput),
        (np.full((3, 3), np.inf), np.ones(3), 1.0, InvalidInput),
    ],
)
def test_a_fit_of_what_does_not_fit_together_is_refused(x: ndarray, y: ndarray, radius: float, error: Any) -> None:
    with pytest.raises(error):
        norm_ball_least_squares(x, y, radius)


@pytest.mark.parametrize("d", [1, 2, 5, 10])
def test_the_ball_is_uniform_and_its_covariance_is_the_identity(d: int) -> None:
    x = theory.sample_ball(200_000, d, np.random.default_rng(0))
    np.testing.assert_allclose(x.T @ x / len(x), np.eye(d), atol=0.015)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=0.01)
    volumes = (np.linalg.norm(x, axis=1) / np.sqrt(d + 2)) ** d
    assert volumes.max() <= 1 + 1e-12
    assert scipy.stats.kstest(volumes, "uniform").pvalue > 1e-3


def simulated(n: int, d: int, radius: float, seed: int) -> tuple[float, float, float]:
    """The three risks written out: every distance, no memory."""
    random = np.random.default_rng(seed)
    truth = np.eye(d)[0]
    x, queries = theory.sample_ball(n, d, random), theory.sample_ball(500, d, random)
    theta = norm_ball_least_squares(x, x @ truth, radius).theta
    nearest = x[((queries[:, None] - x) ** 2).sum(axis=2).argmin(axis=1)]
    base = queries @ (theta - truth)
    return (
        (base**2).mean(),
        ((base - nearest @ (theta - truth)) ** 2).mean(),
        (((nearest - queries) @ truth) ** 2).mean(),
    )


@pytest.mark.parametrize(("n", "d", "radius"), [(50, 2, 0.5), (200, 3, 0.8), (30, 10, 0.5)])
def test_risks_agree_with_a_simulation_that_is_written_out(n: int, d: int, radius: float) -> None:
    wanted = np.array([simulated(n, d, radius, seed) for seed in range(100, 160)])
    drawn = [theory.risks(n, d, radius, seed=seed, n_test=500) for seed in range(60)]
    found = np.array([(draw.base, draw.resmem, draw.labels) for draw in drawn])
    for column in range(3):
        assert scipy.stats.ttest_ind(found[:, column], wanted[:, column], equal_var=False).pvalue > 1e-3
        assert found[:, column].mean() == pytest.approx(wanted[:, column].mean(), rel=0.2)


@pytest.mark.parametrize("radius", [0.5, 0.8])
def test_in_one_dimension_the_ratio_is_exactly_one_minus_l_squared(radius: float) -> None:
    """There θ_n = Lθ* whatever the rows, and ResMem's error is label memorization's times 1 − L."""
    assert theory.risks(40, 1, radius, seed=3, n_test=200).ratio == pytest.approx((1 - radius) ** 2, rel=1e-9)


def test_the_same_seed_gives_the_same_rows_to_every_radius() -> None:
    half, more, other = (
        theory.risks(60, 3, radius, seed=s, n_test=100) for radius, s in ((0.5, 1), (0.8, 1), (0.5, 2))
    )
    assert half.labels == more.labels
    assert half == theory.risks(60, 3, 0.5, seed=1, n_test=100)
    assert half.labels != other.labels


def test_the_terms_of_the_bound_equal_a_count_by_hand() -> None:
    first, second = theory.bound_terms(1000, 3, 0.5)
    assert first == pytest.approx(9 * 0.25 / 100, rel=1e-12)
    assert second == pytest.approx(9 * 0.25 * (np.log(10) / 1000) ** (1 / 3), rel=1e-12)


def test_at_ten_dimensions_the_bound_without_its_constant_says_nothing() -> None:
    assert all(sum(theory.bound_terms(n, 10, radius)) > 1 for n in (100, 1_000, 100_000) for radius in (0.5, 0.8))


@pytest.mark.parametrize("d", [2, 3])
def test_the_risk_goes_to_its_leading_term(d: int) -> None:
    found = [theory.risks(20_000, d, 0.5, seed=seed, n_test=2_000).resmem for seed in range(4)]
    assert np.mean(found) == pytest.approx(theory.leading_risk(20_000, d, 0.5), rel=0.1)


@pytest.mark.parametrize("radius", [0.0, 1.0, 1.5, -0.5])
def test_a_base_that_reaches_the_truth_is_not_the_theorems(radius: float) -> None:
    with pytest.raises(InvalidInput, match="radius"):
        theory.bound_terms(10, 2, radius)
    with pytest.raises(InvalidInput, match="radius"):
        theory.risks(10, 2, radius, seed=0)


def test_the_fitted_constant_is_the_smallest_that_holds() -> None:
    measured, bounds = [0.1, 0.3, 0.2], [1.0, 2.0, 4.0]
    constant = theory.fitted_constant(measured, bounds)
    assert constant == 0.15
    with pytest.raises(InvalidInput, match="3 risks and 2 bounds"):
        theory.fitted_constant(measured, bounds[:2])


@pytest.mark.parametrize("n", [4, 5, 10, 20, 100])
def test_the_interval_of_few_repetitions_is_students(n: int) -> None:
    values = np.random.default_rng(0).normal(size=n)
    found = repeated_mean(values)
    wanted = scipy.stats.t.interval(0.95, n - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx(wanted, abs=0.01 * found.margin)
    assert found.margin > mean_interval(values).margin


def test_three_repetitions_are_too_few() -> None:
    with pytest.raises(InvalidInput, match="at least 4"):
        repeated_mean([1.0, 2.0, 3.0])


def test_the_slope_of_a_power_is_its_exponent() -> None:
    sizes = [10, 100, 1_000, 5_000]
    exact = [Estimate(3 * n**-0.7, 3 * n**-0.7, 3 * n**-0.7) for n in sizes]
    found = theory.log_log_slope(sizes, exact)
    assert (found.value, found.low, found.high) == pytest.approx((-0.7, -0.7, -0.7), rel=1e-12)


def test_ninety_five_of_a_hundred_slope_intervals_hold_the_exponent() -> None:
    random = np.random.default_rng(0)
    sizes = np.array([100, 300, 1_000, 3_000])
    held = 0
    for _ in range(1000):
        draws = sizes[:, None] ** -0.5 * (1 + 0.05 * random.normal(size=(4, 20)))
        found = theory.log_log_slope(sizes.tolist(), [repeated_mean(values) for values in draws])
        held += found.low <= -0.5 <= found.high
    assert 930 <= held <= 985


@pytest.mark.parametrize(("sizes", "risk"), [([10], 0.1), ([10, 10], 0.1), ([10, 100], 0.0)])
def test_a_slope_needs_two_sizes_and_positive_risks(sizes: list[int], risk: float) -> None:
    with pytest.raises(InvalidInput):
        theory.log_log_slope(sizes, [Estimate(risk, risk, risk)] * len(sizes))
