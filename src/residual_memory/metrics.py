"""How good predictions are, and how sure one can be: every figure with its 95 % interval, differences paired by row.

Per-row measures return one number a row, so that two methods can be compared on the same rows; `mean_interval` and
`bootstrap_interval` turn them into estimates. Rows of one document are not independent: pass `groups`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.errors import DimensionMismatch, InvalidInput
from residual_memory.validation import as_count

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval.

    Attributes
    ----------
    value, low, high : in the metric's own unit; accuracy is a fraction.
    """

    value: float
    low: float
    high: float

    def __float__(self) -> float:
        return self.value

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    @property
    def text(self) -> tuple[str, str]:
        """For people: the figure, and its interval."""
        return f"{self.value:.4g}", f"{self.low:.4g} to {self.high:.4g}"

    @property
    def percent(self) -> tuple[str, str]:
        """As `text`, of a fraction; the normal interval knows no ends, so it is cut at them."""
        low, high = max(self.low, 0.0), min(self.high, 1.0)
        return f"{100 * self.value:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}"


def correctness(scores: ArrayLike, labels: ArrayLike) -> Float[ndarray, " q"]:
    """1 where the largest score is the label's, else 0. Ties go to the first class."""
    values, targets = _scores_and_labels(scores, labels)
    return (values.argmax(axis=1) == targets).astype(float)


def accuracy(scores: ArrayLike, labels: ArrayLike) -> float:
    """The part of the rows whose largest score is the label's."""
    return float(correctness(scores, labels).mean())


def log_losses(probabilities: ArrayLike, labels: ArrayLike) -> Float[ndarray, " q"]:
    """−log of the label's probability, in nats.

    Raises
    ------
    InvalidInput : if a probability is zero or negative: use `to_probabilities(scores, base)` first.
    """
    values, targets = _scores_and_labels(probabilities, labels)
    if values.size and values.min() <= 0:
        raise InvalidInput(
            f"probabilities hold {values.min():.4g}, and the logarithm of zero is infinite; "
            "use to_probabilities(scores, base=predictions), which is always positive"
        )
    return -np.log(values[np.arange(len(values)), targets].astype(np.float64))


def log_loss(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean of `log_losses`, in nats."""
    return float(log_losses(probabilities, labels).mean())


def perplexity(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Exp of the log-loss."""
    return float(np.exp(log_loss(probabilities, labels)))


def calibration_bins(probabilities: ArrayLike, labels: ArrayLike, n_bins: int = 15) -> list[dict[str, float]]:
    """Confidence and accuracy in bins of equal width: what a reliability diagram shows.

    Returns
    -------
    For each bin that has rows: `low`, `high`, `n`, `confidence` (mean largest probability), `accuracy`.
    """
    values, targets = _scores_and_labels(probabilities, labels)
    return binned_calibration(values.max(axis=1), values.argmax(axis=1) == targets, n_bins)


def binned_calibration(
    confidence: Float[ndarray, " q"], hit: Bool[ndarray, " q"], n_bins: int = 15
) -> list[dict[str, float]]:
    """As `calibration_bins`, where the largest probability and whether it was right are at hand."""
    n_bins = as_count("n_bins", n_bins)
    place = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    bins = []
    for number in np.unique(place):
        here = place == number
        bins.append(
            {
                "low": float(number / n_bins),
                "high": float((number + 1) / n_bins),
                "n": float(here.sum()),
                "confidence": float(confidence[here].mean()),
                "accuracy": float(hit[here].mean()),
            }
        )
    return bins


def calibration_error(probabilities: ArrayLike, labels: ArrayLike, n_bins: int = 15) -> float:
    """Expected calibration error: mean |confidence − accuracy| over bins, weighted by their rows.

    References
    ----------
    Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    bins = calibration_bins(probabilities, labels, n_bins)
    total = sum(entry["n"] for entry in bins)
    return sum(entry["n"] * abs(entry["confidence"] - entry["accuracy"]) for entry in bins) / total


def risk_coverage(confidence: ArrayLike, losses: ArrayLike, n_points: int = 100) -> list[dict[str, float]]:
    """The mean loss of the surest part of the rows, for parts of growing size: what a risk-coverage curve shows.

    Parameters
    ----------
    confidence : of each row [q]; of equally sure rows the first come first.
    losses : of each row [q].
    n_points : at most so many parts.

    Returns
    -------
    For each part `coverage`, the rows in it, from above 0 to 1, and `risk`.

    References
    ----------
    El-Yaniv and Wiener, "On the foundations of noise-free selective classification", JMLR 2010.
    """
    sure, lost = np.asarray(confidence, np.float64), np.asarray(losses, np.float64)
    if sure.ndim != 1 or sure.shape != lost.shape or not len(sure):
        raise DimensionMismatch(f"confidence has shape {sure.shape} and losses {lost.shape}, expected [q] and [q]")
    counts = np.unique(np.linspace(0, len(sure), as_count("n_points", n_points) + 1).round().astype(int))[1:]
    risks = np.cumsum(lost[np.argsort(-sure, kind="stable")])[counts - 1] / counts
    return [{"coverage": float(n / len(sure)), "risk": float(risk)} for n, risk in zip(counts, risks, strict=True)]


def gains_by(
    values: ArrayLike, gains: ArrayLike, n_bins: int = 8, groups: ArrayLike | None = None
) -> list[dict[str, float]]:
    """Where a gain comes from: its mean over rows of about the same value, in bins of about as many rows each.

    Parameters
    ----------
    values : what to sort the rows by [q], such as the distance to the nearest memory; rows whose value is not finite
        are left out.
    gains : of each row [q].
    n_bins : at most so many; rows of one value are never split.
    groups : as in `mean_interval`.

    Returns
    -------
    For each bin `low`, `high`, `n`, and `gain`, `gain_low` and `gain_high`, as in a result file.
    """
    places, won = np.asarray(values, np.float64), np.asarray(gains, np.float64)
    if places.ndim != 1 or places.shape != won.shape:
        raise DimensionMismatch(f"values have shape {places.shape} and gains {won.shape}, expected [q] and [q]")
    usable = np.isfinite(places)
    if not usable.any():
        return []
    edges = np.unique(np.quantile(places[usable], np.linspace(0, 1, as_count("n_bins", n_bins) + 1)))
    bin_of = np.clip(np.searchsorted(edges, places, side="right") - 1, 0, max(len(edges) - 2, 0))
    bins = []
    for number in np.unique(bin_of[usable]):
        here = usable & (bin_of == number)
        gain = mean_interval(won[here], None if groups is None else np.asarray(groups)[here])
        bins.append(
            {
                "low": float(places[here].min()),
                "high": float(places[here].max()),
                "n": float(here.sum()),
                "gain": gain.value,
                "gain_low": gain.low,
                "gain_high": gain.high,
            }
        )
    return bins


def squared_errors(values: ArrayLike, targets: ArrayLike) -> Float[ndarray, " q"]:
    """Mean squared error of each row over its outputs."""
    found, wanted = np.asarray(values, float), np.asarray(targets, float)
    if found.shape[:1] != wanted.shape[:1] or found.size != wanted.size:
        raise DimensionMismatch(f"values have shape {found.shape}, targets {wanted.shape}")
    return ((found.reshape(len(found), -1) - wanted.reshape(len(found), -1)) ** 2).mean(axis=1)


def rmse(values: ArrayLike, targets: ArrayLike) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(squared_errors(values, targets).mean()))


def recall(distances: ArrayLike, true_distances: ArrayLike, tolerance: float = 1e-3) -> float:
    """How many of the true k nearest an approximate search found: by distance, so that ties do no harm.

    Parameters
    ----------
    distances, true_distances : [q k], ascending.
    tolerance : added to the true k-th distance.

    References
    ----------
    Aumüller et al., "ANN-benchmarks", 2020.
    """
    found, true = np.asarray(distances), np.asarray(true_distances)
    if found.shape != true.shape:
        raise DimensionMismatch(f"distances have shape {found.shape}, true distances {true.shape}")
    return float((found <= true[:, -1:] + tolerance).mean())


def auc(
    positives: ArrayLike,
    negatives: ArrayLike,
    *,
    positive_groups: ArrayLike | None = None,
    negative_groups: ArrayLike | None = None,
) -> Estimate:
    """Area under the ROC curve: how often a positive scores above a negative, ties counting half.

    The 95 % interval is DeLong's.

    Parameters
    ----------
    positives, negatives : scores [m] and [n], in any unit; infinite ones have a rank too. The interval is normal, and
        has no width where the two do not overlap at all.
    positive_groups, negative_groups : scores of one group (a document) are counted as one draw; a group of positives is
        taken to be independent of every group of negatives.

    Raises
    ------
    InvalidInput : if there are fewer than two scores of a kind, or one is NaN.
    DimensionMismatch : if groups are not one a score.

    References
    ----------
    DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
    characteristic curves: a nonparametric approach", Biometrics 44, 1988.
    Obuchowski, "Nonparametric analysis of clustered ROC curve data", Biometrics 53, 1997.
    """
    above = _scores("positives", positives, positive_groups)
    below = _scores("negatives", negatives, negative_groups)
    # Of each positive the part of the negatives below it, and of each negative the part of the positives above it.
    beaten = mean_interval(_part_below(above, np.sort(below)), positive_groups)
    beating = mean_interval(1 - _part_below(below, np.sort(above)), negative_groups)
    margin = float(np.hypot(beaten.margin, beating.margin))
    return Estimate(beaten.value, max(beaten.value - margin, 0.0), min(beaten.value + margin, 1.0))


def mean_interval(values: ArrayLike, groups: ArrayLike | None = None) -> Estimate:
    """The mean of per-row numbers (or of per-row differences, paired) with its normal 95 % interval.

    Parameters
    ----------
    values : [q].
    groups : rows of one group (a document) are counted as one draw; from one group alone nothing is known of others,
        and the interval is everything.
    """
    rows = np.asarray(values, np.float64)
    if rows.ndim != 1 or not len(rows):
        raise InvalidInput(f"values have shape {rows.shape}, expected at least one number a row")
    mean = float(rows.mean())
    deviations: ndarray = rows - mean
    if groups is not None:
        _, owner = np.unique(np.asarray(groups), return_inverse=True)
        deviations = np.bincount(owner, weights=deviations)
    n = len(deviations)
    if groups is not None and n == 1:
        return Estimate(mean, -np.inf, np.inf)
    variance = (deviations**2).sum() / len(rows) ** 2 * (n / max(n - 1, 1))
    margin = Z95 * float(np.sqrt(variance))
    return Estimate(mean, mean - margin, mean + margin)


def bootstrap_interval(
    statistic: Callable[[Int64[ndarray, " r"]], float],
    n_rows: int,
    *,
    groups: ArrayLike | None = None,
    n_resamples: int = 500,
    seed: int = 0,
) -> Estimate:
    """A figure that is no mean (calibration error, RMSE, a difference of two) with its bootstrap 95 % interval.

    Parameters
    ----------
    statistic : called with row numbers, drawn with replacement; gives the figure on those rows.
    n_rows : how many rows there are.
    groups : whole groups are drawn.

    References
    ----------
    Efron and Tibshirani, "An introduction to the bootstrap", 1993, the percentile interval.
    """
    random = np.random.default_rng(seed)
    members: Any = np.arange(n_rows)[:, None] if groups is None else _members(np.asarray(groups))
    figures = []
    for _ in range(n_resamples):
        drawn = random.integers(0, len(members), len(members))
        figures.append(statistic(np.concatenate([members[i] for i in drawn]) if groups is not None else drawn))
    low, high = np.quantile(figures, [0.025, 0.975])
    return Estimate(statistic(np.arange(n_rows)), float(low), float(high))


def _scores(name: str, scores: ArrayLike, groups: ArrayLike | None) -> Float[ndarray, " n"]:
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise InvalidInput(f"{name} have shape {values.shape}, expected one axis and at least two scores")
    if np.isnan(values).any():
        raise InvalidInput(f"{name}[{int(np.isnan(values).argmax())}] is NaN, which has no rank")
    if groups is not None and np.shape(groups) != values.shape:
        raise DimensionMismatch(f"groups of {name} have shape {np.shape(groups)}, expected one a score: {len(values)}")
    return values


def _part_below(scores: Float[ndarray, " m"], ascending: Float[ndarray, " n"]) -> Float[ndarray, " m"]:
    """How much of the others each score exceeds; equal ones count half."""
    sides = np.searchsorted(ascending, scores, "left") + np.searchsorted(ascending, scores, "right")
    return sides / (2 * len(ascending))


def _members(groups: Shaped[ndarray, " q"]) -> list[Int64[ndarray, " m"]]:
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(np.unique(groups, return_inverse=True)[1][order])) + 1)


def _scores_and_labels(scores: ArrayLike, labels: ArrayLike) -> tuple[ndarray, ndarray]:
    values, targets = np.asarray(scores), np.asarray(labels)
    if values.ndim != 2 or targets.ndim != 1 or len(values) != len(targets) or not len(values):
        raise DimensionMismatch(f"scores have shape {values.shape} and labels {targets.shape}, expected [q c] and [q]")
    if not np.issubdtype(targets.dtype, np.integer) or targets.min() < 0 or targets.max() >= values.shape[1]:
        raise InvalidInput(f"labels must be integers from 0 to {values.shape[1] - 1}")
    if not np.isfinite(values).all():
        raise InvalidInput(f"scores hold {values[~np.isfinite(values)][0]}, expected finite numbers")
    return values, targets
