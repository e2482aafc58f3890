"""Which memories moved a prediction, and by how much."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.correction import ResidualKNN, correct
from residual_memory.validation import as_positive, as_values


@dataclass(frozen=True)
class Explanation:
    """The correction of each query, split among the memories that made it.

    Attributes
    ----------
    ids, distances, weights : of the neighbours [q k], nearest first; weight 0 where there is none.
    contributions : what each adds to each output [q k c]; the sum over k is the correction.
    corrected : the corrected scores [q c].
    """

    ids: Shaped[ndarray, "q k"]
    distances: Float[ndarray, "q k"]
    weights: Float[ndarray, "q k"]
    contributions: Float[ndarray, "q k c"]
    corrected: Float[ndarray, "q c"]


def explain(
    knn: ResidualKNN,
    keys: ArrayLike,
    predictions: ArrayLike,
    *,
    shrinkage: float = 1.0,
    residual_share: float = 1.0,
    exclude: ArrayLike | None = None,
) -> Explanation:
    """Split corrections among the memories that made them.

    Parameters
    ----------
    knn : the regressor that corrects.
    keys : queries [q d].
    predictions : base probabilities (tempered as the knn's) or values [q c].
    shrinkage : as in `correct`.
    residual_share : as in `Averages.correction`.
    exclude : as in `ResidualKNN.__call__`.

    Raises
    ------
    InvalidInput, DimensionMismatch : if keys or predictions do not fit the memory.
    """
    amount = as_positive("shrinkage", shrinkage) if shrinkage else 0.0
    said = None if residual_share == 1 else as_values(predictions, name="predictions")
    found, parts = knn.contributions(keys, exclude, predictions=said, residual_share=residual_share)
    parts = parts * np.asarray(amount, parts.dtype)
    return Explanation(
        found.ids,
        found.distances,
        found.weights,
        parts,
        correct(predictions, parts.sum(axis=1)).reshape(parts[:, 0].shape),
    )
