"""The paper's theory: a linear base that cannot reach the truth, its residual memory, and the bound on their risk.

Setting. x is uniform in the ball of radius √(d + 2), so that E xxᵀ = I; y = x·θ* without noise, ‖θ*‖ = 1. The base is
linear, but too small: θ_n is the least-squares solution with ‖θ‖ ≤ L < 1. The memory is the one nearest neighbour.
Risk is the expected squared error at a new x, so predicting 0 has risk 1.

Theorem 5.3 (3.3 in the NeurIPS version). For independent x₁ … x_n the risk of ResMem is

    ≲  d² L² n^(−2/3)  +  d² (1 − L)² [log(n^(1/d)) / n]^(1/d)

The first term is what the base has to learn, the second what the memory has to fill in. Without the memory (1 − L)²
stays for ever; with labels in place of residuals the factor (1 − L)² of the second term is 1.

What it promises: the risk goes to 0, no slower than these powers of n. What it does not promise: how large the risk is,
since ≲ hides a constant; anything at all where the bound is above the base's (1 − L)², or above 1, the risk of
predicting 0 (at d = 10, with a constant of 1, it is above both for every n up to 10⁵); and that its powers are those of
the risk itself. They are not: an upper bound may be loose, and this one is.

Why. With x̃ the nearest of the n points,

    ResMem's error = (θ_n − θ*)·(x − x̃)          label memorization's error = −θ*·(x − x̃)

The mean of ‖x − x̃‖² falls as n^(−2/d) (`leading_risk`), faster than the bound's n^(−1/d); and as θ_n → Lθ*, the ratio
of the two risks goes to (1 − L)², which is the base's own risk.

References
----------
Yang et al., "ResMem: Learn what you can and memorize the rest", NeurIPS 2023, arXiv 2302.01576.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator
from numpy.typing import ArrayLike

from residual_memory.errors import DimensionMismatch, InvalidInput
from residual_memory.evaluation import Predicted, Setting, corrected_predictions
from residual_memory.memory import Memory
from residual_memory.metrics import Z95, Estimate, mean_interval, squared_errors
from residual_memory.validation import as_count, as_keys, as_positive, as_values

ONE_NEAREST = Setting(n_neighbors=1, bandwidth=1.0, kernel="uniform")
FIRST_EXPONENT = -2 / 3  # of n in the first term of the bound; that of the second is −1/d
FEWEST_REPEATS = 4


@dataclass(frozen=True)
class NormBallFit:
    """Least squares within a ball.

    Attributes
    ----------
    theta : the solution.
    multiplier : μ ≥ 0 with (XᵀX + μI) θ = Xᵀy; 0 where the ball does not bind.
    """

    theta: Float[ndarray, " d"]
    multiplier: float


@dataclass(frozen=True)
class Risks:
    """Mean squared errors of three predictors on the same new rows, trained on the same sample.

    Attributes
    ----------
    base : of x·θ_n.
    resmem : of x·θ_n + the nearest row's residual.
    labels : of the nearest row's label.
    """

    base: float
    resmem: float
    labels: float

    @property
    def ratio(self) -> float:
        """ResMem's risk over that of label memorization."""
        return self.resmem / self.labels


def norm_ball_least_squares(x: ArrayLike, y: ArrayLike, radius: float) -> NormBallFit:
    """The θ of norm ≤ `radius` with the least ‖y − Xθ‖², exactly: the secular equation's root, no iterative guess of θ.

    Where X has fewer than d independent columns it is the shortest solution. The right-hand side Xᵀy is in the range of
    Xᵀ, so the "hard case" of trust regions, where no multiplier fits, cannot occur.

    Parameters
    ----------
    x : [n d].
    y : [n].
    radius : the paper's L.

    Raises
    ------
    InvalidInput, DimensionMismatch : if `radius` is not positive or the arrays do not fit.

    References
    ----------
    Golub and Van Loan, "Matrix computations", 2013, section 6.2.1.
    """
    rows = as_keys(x, name="x").astype(np.float64)
    targets = as_values(y, 1, name="y").astype(np.float64)[:, 0]
    radius = as_positive("radius", radius)
    if len(rows) != len(targets):
        raise DimensionMismatch(f"there are {len(targets)} values of y for {len(rows)} rows of x")
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    kept = values > values.max(initial=0.0) * max(rows.shape) * np.finfo(np.float64).eps
    values, target = values[kept], left.T[kept] @ targets
    multiplier = _multiplier(values, target, radius)
    return NormBallFit(right[kept].T @ (values * target / (values**2 + multiplier)), multiplier)


def _multiplier(values: Float[ndarray, " r"], target: Float[ndarray, " r"], radius: float) -> float:
    """The root μ ≥ 0 of 1/‖θ(μ)‖ = 1/radius, where θ(μ) = values · target / (values² + μ); 0 if θ(0) is inside.

    The left side grows with μ and is concave, so Newton's steps from 0 go up to the root and none passes it; the first
    step that does not go up is rounding.
    """
    multiplier, step = 0.0, math.inf
    while step > 4 * np.finfo(np.float64).eps * multiplier:
        theta = values * target / (values**2 + multiplier)
        norm = float(np.linalg.norm(theta))
        if norm <= radius:
            break
        step = (norm / radius - 1) * norm**2 / float((theta**2 / (values**2 + multiplier)).sum())
        multiplier += step
    return multiplier


def sample_ball(n: int, d: int, generator: Generator) -> Float[ndarray, "n d"]:
    """Points that are uniform in the ball of radius √(d + 2), so that E xxᵀ = I."""
    directions = _directions(n, d, generator)
    return directions * (math.sqrt(d + 2) * generator.random((n, 1)) ** (1 / d))


def _directions(n: int, d: int, generator: Generator) -> Float[ndarray, "n d"]:
    normals = generator.normal(size=(n, d))
    return normals / np.linalg.norm(normals, axis=1, keepdims=True)


def risks(n: int, d: int, radius: float, *, seed: int, n_test: int = 4000) -> Risks:
    """One draw of the theorem's setting, measured on new rows through the library's own memory.

    Parameters
    ----------
    n, d : training rows and dimension.
    radius : the paper's L, below 1.
    seed : of rows and θ*; the same rows come for every `radius`, others for every n and d.
    n_test : new rows.

    Raises
    ------
    InvalidInput : if `radius` is not between 0 and 1, or a count is not positive.
    """
    _check_radius(radius)
    n, d, n_test = as_count("n", n), as_count("d", d), as_count("n_test", n_test)
    generator = np.random.default_rng([seed, d, n])
    truth = _directions(1, d, generator)[0]
    x, queries = sample_ball(n, d, generator), sample_ball(n_test, d, generator)
    theta = norm_ball_least_squares(x, x @ truth, radius).theta
    said = _predictions(x, x @ truth, queries, theta)
    base, resmem, labels = (
        float(squared_errors(values, queries @ truth).mean())
        for values in (said.base, said.corrected, said.memory_only)
    )
    return Risks(base, resmem, labels)


def _predictions(
    x: Float[ndarray, "n d"], y: Float[ndarray, " n"], queries: Float[ndarray, "q d"], theta: Float[ndarray, " d"]
) -> Predicted:
    """What the linear base, its one-neighbour memory and the labels alone say of the queries, in double precision."""
    memory = Memory.create(
        dim=x.shape[1], n_outputs=1, task="regression", key_dtype="float64", prediction_dtype="float64"
    )
    memory.append(x, y, x @ theta)
    return corrected_predictions(memory, queries, (queries @ theta)[:, None], ONE_NEAREST, index="exact")


def bound_terms(n: int, d: int, radius: float) -> tuple[float, float]:
    """The two terms of Theorem 5.3 without the hidden constant: d² L² n^(−2/3) and d² (1−L)² [log(n^(1/d))/n]^(1/d).

    Raises
    ------
    InvalidInput : if `radius` is not between 0 and 1, or a count is not positive.
    """
    _check_radius(radius)
    n, d = as_count("n", n), as_count("d", d)
    first = d**2 * radius**2 * n**FIRST_EXPONENT
    return first, d**2 * (1 - radius) ** 2 * (math.log(n) / d / n) ** (1 / d)


def leading_risk(n: int, d: int, radius: float) -> float:
    """ResMem's risk to leading order for large n: (1 − L)² Γ(1 + 2/d) (d + 2)/d · n^(−2/d). Not from the paper.

    The squared distance to the nearest of n points of density f is Γ(1 + 2/d) (n f V)^(−2/d) in the mean, V the volume
    of the unit ball; here f V = (d + 2)^(−d/2), and a d-th part of it lies along θ*. Near the surface, where for large
    d most points are, neighbours are farther away, so the risk comes down to this value from above. With radius 0 it is
    that of label memorization.

    References
    ----------
    Evans, Jones and Schmidt, "Asymptotic moments of near-neighbour distance distributions", Proc. R. Soc. A, 2002.
    """
    return (1 - radius) ** 2 * math.gamma(1 + 2 / d) * (d + 2) / d * float(n) ** (-2 / d)


def fitted_constant(measured: Sequence[float], bounds: Sequence[float]) -> float:
    """The smallest constant with which the bound holds for every measured risk.

    It is a statement about these n, d and L only: the theorem's constant may be larger, and is for all n.

    Parameters
    ----------
    measured, bounds : risks, and the sums of both terms, of the same settings.
    """
    if not measured or len(measured) != len(bounds):
        raise InvalidInput(f"there are {len(measured)} risks and {len(bounds)} bounds, expected one bound a risk")
    return max(risk / bound for risk, bound in zip(measured, bounds, strict=True))


def repeated_mean(values: ArrayLike) -> Estimate:
    """The mean of a few independent repetitions with Student's 95 % interval, wider than `mean_interval`'s normal one.

    Parameters
    ----------
    values : one a repetition, at least 4.

    References
    ----------
    Abramowitz and Stegun, "Handbook of mathematical functions", 26.7.5; within 1 % from 4 repetitions on.
    """
    normal = mean_interval(values)
    freedom = np.size(values) - 1
    if freedom < FEWEST_REPEATS - 1:
        raise InvalidInput(f"there are {freedom + 1} repetitions, expected at least {FEWEST_REPEATS} for an interval")
    margin = normal.margin * _student95(freedom) / Z95
    return Estimate(normal.value, normal.value - margin, normal.value + margin)


def _student95(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    z = Z95
    corrections = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(corrections, start=1))


def log_log_slope(n_values: Sequence[int], measured: Sequence[Estimate]) -> Estimate:
    """The exponent a of risk ∝ n^a: least squares through the logarithms, with the interval of random error alone.

    A risk that is no power of n has no exponent: then it is the mean slope over these n, which the interval does not
    say. The risks are independent of each other.

    Parameters
    ----------
    n_values : at least two different ones.
    measured : the risk at each n with its interval.

    Raises
    ------
    InvalidInput : if there are fewer than two different n, or a risk is not positive.
    """
    if len(n_values) != len(measured) or len(set(n_values)) < 2:
        raise InvalidInput(f"there are {len(measured)} risks at n = {list(n_values)}, expected two or more different n")
    means = np.array([estimate.value for estimate in measured])
    if means.min() <= 0:
        raise InvalidInput(f"a risk is {means.min():g}, expected positive ones: zero has no logarithm")
    places = np.log(np.asarray(n_values, float))
    pull = (places - places.mean()) / ((places - places.mean()) ** 2).sum()
    slope = float(pull @ np.log(means))
    margin = float(np.linalg.norm(pull * np.array([estimate.margin for estimate in measured]) / means))
    return Estimate(slope, slope - margin, slope + margin)


def _check_radius(radius: float) -> None:
    if as_positive("radius", radius) >= 1:
        raise InvalidInput(
            f"radius is {radius:g}, expected a number below 1: at 1 the base reaches the truth by itself"
        )
