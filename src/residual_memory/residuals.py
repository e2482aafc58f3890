"""From a label and a base prediction to the residual: what the base could not learn."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.errors import InvalidInput
from residual_memory.types import TopM
from residual_memory.validation import as_positive, as_probabilities


def temper(predictions: ArrayLike, temperature: float) -> Float[ndarray, "b c"]:
    """Probabilities at another softmax temperature: p^(1/T), renormalised, which is softmax(logits / T).

    Parameters
    ----------
    predictions : base probabilities [b c] at temperature 1.
    temperature : the paper's T. Above 1 is less sure, below 1 is surer; 1 returns the predictions unchanged.

    Raises
    ------
    InvalidInput : if a row is not a probability distribution, or the temperature is not positive.

    References
    ----------
    Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    probabilities = as_probabilities(predictions)
    return tempered(probabilities, as_positive("temperature", temperature))


def tempered(probabilities: Float[ndarray, "... c"], temperature: float) -> Float[ndarray, "... c"]:
    """`temper` without the checks."""
    if temperature == 1.0:
        return probabilities
    largest = probabilities.max(axis=-1, keepdims=True)
    powers = (probabilities / largest) ** probabilities.dtype.type(1 / temperature)
    return powers / powers.sum(axis=-1, keepdims=True)


def classification_residuals(
    labels: Int[ndarray, " b"], probabilities: Float[ndarray, "b c"], temperature: float = 1.0
) -> Float[ndarray, "b c"]:
    """onehot(label) − softmax(logits / T), derived from the base probabilities at temperature 1. Rows sum to 0.

    References
    ----------
    Yang et al., "ResMem: Learn what you can and memorize the rest", NeurIPS 2023, step 2.
    """
    residuals = -tempered(probabilities, temperature)
    residuals[np.arange(len(labels)), labels] += 1
    return residuals


def regression_residuals(labels: Float[ndarray, "b c"], predictions: Float[ndarray, "b c"]) -> Float[ndarray, "b c"]:
    """Y − f(x)."""
    return labels - predictions


def dense(predictions: TopM, n_outputs: int) -> Float[ndarray, "*b c"]:
    """The full distributions of a top-m encoding, its left-over mass spread evenly over the classes not listed.

    Rows sum to what `probabilities` and `rest` sum to; with m = n_outputs nothing is lost.
    """
    m = predictions.indices.shape[-1]
    spread = predictions.rest / max(n_outputs - m, 1)
    full = np.repeat(spread[..., None].astype(predictions.probabilities.dtype), n_outputs, axis=-1)
    np.put_along_axis(full, predictions.indices.astype(np.int64), predictions.probabilities, axis=-1)
    return full


def top_m(predictions: ArrayLike, m: int) -> TopM:
    """The m largest probabilities of each row and the mass of all the others.

    Raises
    ------
    InvalidInput : if a row is not a probability distribution, or m is not between 1 and its width.
    """
    probabilities = as_probabilities(predictions)
    if not isinstance(m, int) or not 1 <= m <= probabilities.shape[1]:
        raise InvalidInput(f"m is {m}, expected 1 to {probabilities.shape[1]}, the number of classes")
    indices = np.argpartition(probabilities, -m, axis=1)[:, -m:]
    largest = np.take_along_axis(probabilities, indices, axis=1)
    rest = np.maximum(1 - largest.sum(axis=1), 0)
    return TopM(indices.astype(np.int32), largest, rest)
