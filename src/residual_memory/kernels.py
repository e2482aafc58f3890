"""From the distances of neighbours to their weights.

A kernel is a function of distances [q, k] and a bandwidth that gives weights [q, k]: non-negative, summing to 1 over
the neighbours that are there, 0 for missing ones (distance +inf). `KERNELS` names them all. Kriging weights also need
the distances among the neighbours, and need not be positive or sum to 1.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.validation import as_positive

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


KRIGING = "kriging"
WEIGHTINGS = (*KERNELS, KRIGING)
SMALLEST_NUGGET = 1e-6  # below it twins among the neighbours make the equations singular


def kriging_weights(
    distances: Float[ndarray, "q k"], among: Float[ndarray, "q k k"], bandwidth: float, nugget: float
) -> Float[ndarray, "q k"]:
    """Weights of simple kriging: the best linear guess at a zero-mean field with covariance exp(−distance / bandwidth).

    Neighbours that say the same, because they lie close together, share their weight; far from all neighbours the
    weights vanish and with them the correction. Weights may be negative and need not sum to 1.

    Parameters
    ----------
    distances : Euclidean, from each query to its neighbours; +inf marks a missing one, which gets weight 0.
    among : distances among the neighbours of each query; +inf where one is missing.
    bandwidth : the range of the covariance, in the unit of `distances`.
    nugget : variance of what no neighbour can tell, as a part of the field's own. Large: an unnormalised kernel
        average. Small: neighbours are believed to the letter.

    References
    ----------
    Matheron, "Principles of geostatistics", 1963; Rasmussen and Williams, "Gaussian processes for machine learning",
    2006, equation 2.25.
    """
    covariance = np.exp(-np.asarray(among, np.float64) / bandwidth)
    places = np.arange(distances.shape[1])
    covariance[:, places, places] = 1 + nugget
    towards = np.exp(-np.asarray(distances, np.float64) / bandwidth)
    return np.linalg.solve(covariance, towards[..., None])[..., 0]


def as_nugget(value: float) -> float:
    """A nugget for which `kriging_weights` has an answer.

    Raises
    ------
    InvalidInput : if it is too small.
    """
    nugget = as_positive("nugget", value)
    if nugget < SMALLEST_NUGGET:
        raise InvalidInput(
            f"nugget is {nugget:g}, expected at least {SMALLEST_NUGGET:g}: neighbours with the same key cannot both be "
            "believed to the letter"
        )
    return nugget


def kernel_named(name: str) -> Kernel:
    """Look a kernel up.

    Raises
    ------
    InvalidInput : if there is none of that name.
    """
    if name not in KERNELS:
        raise _no_kernel(name)
    return KERNELS[name]


def check_kernel(name: str) -> None:
    """Refuse a name that is neither a kernel's nor kriging.

    Raises
    ------
    InvalidInput : naming those that there are.
    """
    if name not in WEIGHTINGS:
        raise _no_kernel(name)


def _no_kernel(name: str) -> InvalidInput:
    return InvalidInput(f"kernel is {name!r}, expected one of {', '.join(map(repr, WEIGHTINGS))}")


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
