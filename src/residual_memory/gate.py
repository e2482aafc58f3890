"""From a base prediction and its correction to a calibrated distribution, with a trust that depends on the query."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from residual_memory.errors import DimensionMismatch, InvalidInput

SMALLEST = 1e-12  # of a probability whose logarithm is taken
N_FEATURES = 4
START = (1.0, 2.0, 0.0, 0.0, 0.0, -2.0, 0.0, 0.0, 0.0)  # the base at T = 1, a correction of weight e², a mix of 12 %
PENALTY = 1e-4  # keeps weights of features that say nothing near zero


@dataclass(frozen=True)
class Gate:
    """How far to trust the correction of each query, and the valid distribution that follows.

    The corrected distribution is (1 − m) softmax(a log p + b r) + m p, with p the base's prediction, r the residual
    from the memory, and b > 0 and 0 < m < 1 functions of the query: its distance to the k-th memory, the base's
    entropy, and the size of r. The second term is a candidate of its own: no correction at all.

    Attributes
    ----------
    sharpness : a.
    trust : weights of the features in log b, the constant first.
    abstain : weights of the features in log (m / (1 − m)), the constant first.
    centres, scales : of the features, on the rows that the gate was fitted on.
    """

    sharpness: float
    trust: tuple[float, ...]
    abstain: tuple[float, ...]
    centres: tuple[float, ...]
    scales: tuple[float, ...]

    def __call__(
        self, predictions: Float[ndarray, "q p"], residual: Float[ndarray, "q c"], distances: Float[ndarray, " q"]
    ) -> Float[ndarray, "q c"]:
        """Probabilities, all positive, that sum to 1; the prediction itself where no memory contributes.

        Parameters
        ----------
        predictions : base probabilities at temperature 1; classes that only the memory knows count as probability 0.
        residual : what `ResidualKNN` gives.
        distances : to the k-th neighbour; +inf where there are fewer.

        Raises
        ------
        DimensionMismatch : if the shapes differ.
        """
        base = _padded(predictions, residual, distances)
        raw = _features(base, residual, distances)
        features = _standard(raw, np.array(self.centres), np.array(self.scales))
        parameters = np.array([self.sharpness, *self.trust, *self.abstain])
        mixed = _forward(parameters, base, np.asarray(residual, np.float64), features)[0]
        mixed = np.maximum(mixed, SMALLEST)
        mixed /= mixed.sum(axis=1, keepdims=True)
        untouched = ~np.asarray(residual).any(axis=1)
        mixed[untouched] = base[untouched]
        return mixed.astype(np.result_type(predictions, np.float32), copy=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Gate":
        """Read back what `to_dict` gave.

        Raises
        ------
        InvalidInput : if a name is missing or unknown, a list has another length, or a value is no number.
        """
        try:
            lists: dict[str, Any] = {
                name: tuple(float(number) for number in value) for name, value in values.items() if name != "sharpness"
            }
            gate = Gate(sharpness=float(values["sharpness"]), **lists)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"a gate has sharpness, trust, abstain, centres and scales: {error}") from None
        lengths = [len(part) for part in (gate.trust, gate.abstain, gate.centres, gate.scales)]
        if lengths != [N_FEATURES, N_FEATURES, N_FEATURES - 1, N_FEATURES - 1]:
            raise InvalidInput(f"the lists of a gate have lengths {lengths}, expected 4, 4, 3 and 3")
        return gate


def fit_gate(
    predictions: Float[ndarray, "q p"],
    residual: Float[ndarray, "q c"],
    distances: Float[ndarray, " q"],
    labels: Int[ndarray, " q"],
) -> Gate:
    """The gate with the least log-loss on held-out rows.

    Parameters
    ----------
    predictions, residual, distances : as in `Gate.__call__`, of rows that the memory does not hold.
    labels : their classes.

    Raises
    ------
    DimensionMismatch : if the shapes differ.
    """
    from scipy.optimize import minimize

    base = _padded(predictions, residual, distances)
    if len(labels) != len(base):
        raise DimensionMismatch(f"there are {len(labels)} labels for {len(base)} predictions")
    correction = np.asarray(residual, np.float64)
    raw = _features(base, correction, distances)
    centres, scales = _centres_and_scales(raw)
    features = _standard(raw, centres, scales)
    chosen = np.asarray(labels)
    best = minimize(_loss_and_slope, START, args=(base, correction, features, chosen), jac=True, method="L-BFGS-B")
    numbers = tuple(float(value) for value in best.x)
    return Gate(
        numbers[0],
        numbers[1 : 1 + N_FEATURES],
        numbers[1 + N_FEATURES :],
        tuple(centres.tolist()),
        tuple(scales.tolist()),
    )


def _padded(
    predictions: Float[ndarray, "q c"], residual: Float[ndarray, "p e"], distances: Float[ndarray, " d"]
) -> Float[ndarray, "q e"]:
    """The predictions in float64, with probability 0 for the classes that only the memory knows."""
    base = np.asarray(predictions, np.float64)
    if len(distances) != len(base):
        raise DimensionMismatch(f"there are {len(distances)} distances for {len(base)} predictions")
    if len(base) != len(residual) or base.shape[1] > residual.shape[1]:
        raise DimensionMismatch(f"predictions {base.shape} and residual {residual.shape} do not fit")
    return np.pad(base, ((0, 0), (0, residual.shape[1] - base.shape[1])))


def _features(
    base: Float[ndarray, "q c"], residual: Float[ndarray, "q c"], distances: Float[ndarray, " q"]
) -> Float[ndarray, "q 3"]:
    """Distance to the k-th memory (+inf where there are fewer), the base's entropy, and the length of the residual."""
    entropy = -(base * np.log(np.maximum(base, SMALLEST))).sum(axis=1)
    length = np.sqrt(np.square(residual, dtype=np.float64).sum(axis=1))
    return np.stack([distances, entropy, length], axis=1)


def _centres_and_scales(raw: Float[ndarray, "q 3"]) -> tuple[Float[ndarray, " 3"], Float[ndarray, " 3"]]:
    """Mean and deviation of each feature over the rows where it is finite; 0 and 1 where it is nowhere."""
    centres, scales = np.zeros(N_FEATURES - 1), np.ones(N_FEATURES - 1)
    for place, column in enumerate(raw.T):
        present = column[np.isfinite(column)]
        if len(present):
            centres[place], scales[place] = present.mean(), present.std() or 1.0
    return centres, scales


def _standard(
    raw: Float[ndarray, "q 3"], centres: Float[ndarray, " 3"], scales: Float[ndarray, " 3"]
) -> Float[ndarray, "q 4"]:
    """Features in deviations from their centre, no further than 4, after the constant."""
    return np.pad(np.clip((raw - centres) / scales, -4, 4), ((0, 0), (1, 0)), constant_values=1.0)


def _forward(
    parameters: Float[ndarray, " p"],
    base: Float[ndarray, "q c"],
    residual: Float[ndarray, "q c"],
    features: Float[ndarray, "q 4"],
) -> tuple[Float[ndarray, "q c"], Float[ndarray, "q c"], Float[ndarray, " q"], Float[ndarray, " q"]]:
    """The mixture, its corrected part, b and m."""
    trust = np.exp(np.clip(features @ parameters[1 : 1 + N_FEATURES], -20, 20))
    mix = 1 / (1 + np.exp(-np.clip(features @ parameters[1 + N_FEATURES :], -30, 30)))
    scores = parameters[0] * np.log(np.maximum(base, SMALLEST)) + trust[:, None] * residual
    scores -= scores.max(axis=1, keepdims=True)
    corrected = np.exp(scores)
    corrected /= corrected.sum(axis=1, keepdims=True)
    return (1 - mix[:, None]) * corrected + mix[:, None] * base, corrected, trust, mix


def _loss_and_slope(
    parameters: Float[ndarray, " p"],
    base: Float[ndarray, "q c"],
    residual: Float[ndarray, "q c"],
    features: Float[ndarray, "q 4"],
    labels: Int[ndarray, " q"],
) -> tuple[float, Float[ndarray, " p"]]:
    """Mean log-loss, with a small penalty, and its gradient."""
    rows = np.arange(len(base))
    mixed, corrected, trust, mix = _forward(parameters, base, residual, features)
    hit = np.maximum(mixed[rows, labels], SMALLEST)
    ours, theirs = corrected[rows, labels], base[rows, labels]
    # The loss of a row falls with each score as: (1 − m) q_y / P_y (onehot(y) − q).
    share = (1 - mix) * ours / hit
    logs = np.log(np.maximum(base, SMALLEST))
    along_base = share * (logs[rows, labels] - (corrected * logs).sum(axis=1))
    along_residual = share * (residual[rows, labels] - (corrected * residual).sum(axis=1)) * trust
    along_mix = mix * (1 - mix) * (theirs - ours) / hit
    slope = np.concatenate([[along_base.sum()], features.T @ along_residual, features.T @ along_mix]) / len(rows)
    centred = parameters - START
    return float(-np.log(hit).mean() + PENALTY * (centred**2).sum()), -slope + 2 * PENALTY * centred
