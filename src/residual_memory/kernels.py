"""From the distances of neighbours to their weights.

A kernel is a function of distances [q, k] and a bandwidth that gives weights [q, k]: non-negative, summing to 1 over
the neighbours that are there, 0 for missing ones (distance +inf). `KERNELS` names them all.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from residual_memory.errors import InvalidInput

Kernel = Callable[[Float[ndarray, "q k"], float], Float[ndarray, "q k"]]


def exponential_weights(distances: Float[ndarray, "q k"], bandwidth: float) -> Float[ndarray, "q k"]:
    """Weights proportional to exp(−distance / bandwidth): the paper's kernel.

    Parameters
    ----------
    distances : Euclidean, ascending; +inf marks a missing neighbour, which gets weight 0.
    bandwidth : the paper's sigma, in the unit of `distances`. Small: the nearest alone; large: the plain mean.

    References
    ----------
    Yang et al., "ResMem: Learn what you can and memorize the rest", NeurIPS 2023.
    """
    return _normalized_exponentials(distances, lambda beyond, _: beyond / bandwidth)


def gaussian_weights(distances: Float[ndarray, "q k"], bandwidth: float) -> Float[ndarray, "q k"]:
    """Weights proportional to exp(−distance² / (2 bandwidth²)).

    Parameters
    ----------
    distances : Euclidean, ascending; +inf marks a missing neighbour, which gets weight 0.
    bandwidth : the deviation of the Gaussian, in the unit of `distances`.

    References
    ----------
    Nadaraya, "On estimating regression", 1964; Watson, "Smooth regression analysis", 1964.
    """
    return _normalized_exponentials(
        distances, lambda beyond, nearest: (beyond / bandwidth) * ((beyond + 2 * nearest) / bandwidth) / 2
    )


def inverse_weights(distances: Float[ndarray, "q k"], bandwidth: float) -> Float[ndarray, "q k"]:
    """Weights proportional to 1 / max(distance, bandwidth).

    Parameters
    ----------
    distances : Euclidean, ascending; +inf marks a missing neighbour, which gets weight 0.
    bandwidth : the distance floor. Nothing nearer than it counts for more, so a stored twin of the query cannot take
        all the weight; as it goes to 0, exact twins share everything, as in scikit-learn's ``weights="distance"``.

    References
    ----------
    Shepard, "A two-dimensional interpolation function for irregularly-spaced data", 1968.
    """
    floored = np.maximum(distances, bandwidth)
    nearest = np.min(floored, axis=1, keepdims=True, initial=np.inf)
    with np.errstate(invalid="ignore"):
        return _normalized(np.where(np.isfinite(distances), nearest / floored, 0.0))


def uniform_weights(distances: Float[ndarray, "q k"], bandwidth: float) -> Float[ndarray, "q k"]:
    """The same weight for every neighbour; the bandwidth has no effect.

    Parameters
    ----------
    distances : Euclidean, ascending; +inf marks a missing neighbour, which gets weight 0.
    bandwidth : not used.

    References
    ----------
    Fix and Hodges, "Discriminatory analysis: nonparametric discrimination", 1951.
    """
    del bandwidth
    return _normalized(np.isfinite(distances).astype(distances.dtype))


KERNELS: dict[str, Kernel] = {
    "exponential": exponential_weights,
    "gaussian": gaussian_weights,
    "inverse": inverse_weights,
    "uniform": uniform_weights,
}


def kernel_named(name: str) -> Kernel:
    """Look a kernel up.

    Raises
    ------
    InvalidInput : if there is none of that name.
    """
    if name not in KERNELS:
        raise InvalidInput(f"kernel is {name!r}, expected one of {', '.join(map(repr, KERNELS))}")
    return KERNELS[name]


def _normalized_exponentials(
    distances: Float[ndarray, "q k"], exponent: Callable[[ndarray, ndarray], ndarray]
) -> Float[ndarray, "q k"]:
    """exp(−exponent), where the exponent is measured from the nearest neighbour so that nothing underflows."""
    present = np.isfinite(distances)
    nearest = np.min(distances, axis=1, keepdims=True, initial=np.inf)
    nearest = np.where(np.isfinite(nearest), nearest, 0.0)
    beyond = np.where(present, distances - nearest, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        exponents = np.where(beyond > 0, exponent(beyond, nearest), 0.0)
        return _normalized(np.where(present, np.exp(-exponents), 0.0))


def _normalized(weights: Float[ndarray, "q k"]) -> Float[ndarray, "q k"]:
    totals = weights.sum(axis=1, keepdims=True)
    return np.divide(weights, totals, out=np.zeros_like(weights), where=totals > 0)
