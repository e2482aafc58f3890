"""A linear metric for the keys of a table, learned so that near rows are those whose residuals tell the query's.

Scaled columns are rarely a good metric: what a price depends on is where the house stands, to the street, and not how
many rooms the block has in all. The metric is learned by the loss of the memory itself: rows are left out one by one,
corrected by their neighbours, and the columns weighted (or mixed) so that the corrected prediction comes out best.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Float32, Int64, Shaped
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.indexes.base import nearest
from residual_memory.indexes.registry import build_index, parse_spec
from residual_memory.memory import Column
from residual_memory.residuals import tempered
from residual_memory.types import Neighbors, Task

Shape = Literal["diagonal", "full"]

N_NEIGHBORS = 32
MAX_ROWS = 50_000  # that neighbours are looked for among
MAX_QUERIES = {"diagonal": 3_000, "full": 6_000}  # more numbers to learn need more rows to learn them from
DIFFERENCE_BYTES = 48 << 20  # of the differences between queries and their neighbours
ROUNDS = {"diagonal": 3, "full": 2}  # of finding neighbours and learning from them
STEPS = 30  # of the minimiser in a round
PENALTY = 1e-4  # keeps columns that tell nothing near the weight that they had
SMALLEST_DISTANCE = 1e-6  # below it the slope of a distance is not followed
SMALLEST_PROBABILITY = 1e-3


@dataclass(frozen=True)
class Lesson:
    """Rows as what learning needs of them: one number an output that is to come out right.

    Attributes
    ----------
    targets : of regression, values in units of their deviation; of classification, class indices.
    predictions : what the base says of each row, in the same unit; probabilities.
    """

    task: Task
    targets: Shaped[ndarray, "n ..."]
    predictions: Float[ndarray, "n c"]

    @staticmethod
    def of(task: Task, labels: Shaped[ndarray, "n ..."], predictions: Float[ndarray, "n c"]) -> "Lesson":
        """Values are divided by the deviation of what the base leaves, so that every output counts alike."""
        if task == "classification":
            return Lesson(task, labels, predictions)
        values = labels.reshape(predictions.shape)
        scale = (values - predictions).std(axis=0)
        scale = np.where(scale > 0, scale, 1.0)
        return Lesson(task, values / scale, predictions / scale)

    def at_temperature(self, temperature: float) -> "Lesson":
        """The same with tempered base probabilities."""
        return self if temperature == 1 else replace(self, predictions=tempered(self.predictions, temperature))

    def some(self, rows: Int64[ndarray, " m"]) -> "Lesson":
        return Lesson(self.task, self.targets[rows], self.predictions[rows])

    def at_label(
        self, queries: Int64[ndarray, " q"], rows: Int64[ndarray, "q k"]
    ) -> tuple[Float[ndarray, "q o"], Float[ndarray, "q k o"], Float[ndarray, "q k o"]]:
        """The queries' base values, and the neighbours' labels and base values less these, at what is to be predicted.

        For classes that is the probability of the query's own label.
        """
        if self.task == "regression":
            said = self.predictions[queries]
            return said, self.targets[rows] - said[:, None], self.predictions[rows] - said[:, None]
        own = self.targets[queries]
        said = self.predictions[queries, own][:, None]
        labels = (self.targets[rows] == own[:, None]).astype(float)[:, :, None]
        near = np.take_along_axis(self.predictions[rows], own[:, None, None], axis=2)
        return said, labels - said[:, None], near - said[:, None]


def learn_metric(
    keys: Float[ndarray, "n d"],
    lesson: Lesson,
    shape: Shape,
    *,
    start: Float[ndarray, "d d"] | None = None,
    n_rounds: int | None = None,
    groups: Shaped[ndarray, " n"] | None = None,
    seed: int = 0,
) -> Float[ndarray, "d d"]:
    """A matrix M such that Euclidean distances between the rows of keys @ M suit a memory.

    Parameters
    ----------
    keys : finite, in comparable units.
    lesson : labels and base predictions that did not see them.
    shape : "diagonal" weighs the columns, "full" mixes them too.
    start : a metric of this shape or a simpler one to begin from; None starts from equal weights, and a full one from
        the diagonal one.
    n_rounds : of finding neighbours and learning from them; None takes what a metric from nothing needs.
    groups : rows of one group are not used for each other.
    seed : of the rows that are drawn where there are many.

    Raises
    ------
    InvalidInput : if the shape is none of those.

    References
    ----------
    Goldberger et al., "Neighbourhood components analysis", NeurIPS 2004; Weinberger and Tesauro, "Metric learning for
    kernel regression", AISTATS 2007.
    """
    if shape not in get_args(Shape):
        raise InvalidInput(f"the shape of the metric is {shape!r}, expected 'diagonal' or 'full'")
    random = np.random.default_rng(seed)
    if len(keys) > MAX_ROWS:
        rows = np.sort(random.choice(len(keys), MAX_ROWS, replace=False))
        keys, lesson, groups = keys[rows], lesson.some(rows), None if groups is None else groups[rows]
    if start is None and shape == "full":
        start = learn_metric(keys, lesson, "diagonal", groups=groups, seed=seed)
    d, k = keys.shape[1], min(N_NEIGHBORS, len(keys) - 1)
    if k < 2:
        return np.eye(d) if start is None else start
    n_queries = min(len(keys), MAX_QUERIES[shape], max(1, DIFFERENCE_BYTES // (4 * k * d)))
    queries = np.sort(random.choice(len(keys), n_queries, replace=False))
    metric = np.eye(d) if start is None else start
    if start is None:
        typical = float(np.median(_neighbors(keys, queries, k, groups).farthest))
        metric = np.eye(d) * (1.5 / typical if 0 < typical < np.inf else 1.0)
    for _ in range(ROUNDS[shape] if n_rounds is None else n_rounds):
        found = _neighbors(keys @ metric, queries, k, groups)
        metric = _improved(metric, shape, keys, lesson, queries, found)
    return metric


def _neighbors(
    keys: Float[ndarray, "n d"], queries: Int64[ndarray, " q"], k: int, groups: Shaped[ndarray, " n"] | None
) -> Neighbors:
    column = Column([np.ascontiguousarray(keys, np.float32)], np.zeros((0, keys.shape[1]), np.float32))
    index = build_index(parse_spec("exact"), column, 0, len(keys))
    owners = np.arange(len(keys)) if groups is None else groups
    return nearest(
        [index], column, column.take(queries), k, reject=lambda some, rows: owners[rows] == owners[queries[some], None]
    )


class _Weighed:
    """Distances under a diagonal metric; the parameters are logarithms of what its weights are multiplied by."""

    def __init__(self, metric: Float[ndarray, "d d"], differences: Float32[ndarray, "q k d"]) -> None:
        self._start = np.diag(metric)
        self.n_parameters = len(metric)
        self._squares = np.square(differences).reshape(-1, len(metric))
        self._shape = differences.shape[:2]

    def metric(self, parameters: Float[ndarray, " p"]) -> Float[ndarray, "d d"]:
        return np.diag(self._start * np.exp(np.clip(parameters, -10, 10)))

    def distances(self, parameters: Float[ndarray, " p"]) -> Float[ndarray, "q k"]:
        weights = np.diag(self.metric(parameters)) ** 2
        with np.errstate(invalid="ignore"):  # a BLAS may raise the flag for what it reads beyond a small table
            squared = self._squares @ weights.astype(np.float32)
        return np.sqrt(squared.astype(np.float64)).reshape(self._shape)

    def slope(
        self, parameters: Float[ndarray, " p"], along: Float[ndarray, "q k"], distances: Float[ndarray, "q k"]
    ) -> Float[ndarray, " p"]:
        """Along the parameters, from that along the distances."""
        factors = (along / np.maximum(distances, SMALLEST_DISTANCE)).ravel().astype(np.float32)
        return np.diag(self.metric(parameters)) ** 2 * (factors @ self._squares)


class _Mixed:
    """Distances under a full metric; the parameters are added to it, each row in units of its length."""

    def __init__(self, metric: Float[ndarray, "d d"], differences: Float32[ndarray, "q k d"]) -> None:
        self._start = metric
        self.n_parameters = metric.size
        self._scales = np.sqrt(np.square(metric).sum(axis=1, keepdims=True))
        self._differences = differences.reshape(-1, len(metric))
        self._shape = differences.shape[:2]
        self._placed = self._differences

    def metric(self, parameters: Float[ndarray, " p"]) -> Float[ndarray, "d d"]:
        return self._start + self._scales * parameters.reshape(self._start.shape)

    def distances(self, parameters: Float[ndarray, " p"]) -> Float[ndarray, "q k"]:
        self._placed = self._differences @ self.metric(parameters).astype(np.float32)
        return np.sqrt(np.einsum("ne,ne->n", self._placed, self._placed).astype(np.float64)).reshape(self._shape)

    def slope(
        self, parameters: Float[ndarray, " p"], along: Float[ndarray, "q k"], distances: Float[ndarray, "q k"]
    ) -> Float[ndarray, " p"]:
        """Along the parameters whose distances were asked for last, from that along the distances."""
        factors = (along / np.maximum(distances, SMALLEST_DISTANCE)).reshape(-1, 1).astype(np.float32)
        return (self._scales * (self._differences.T @ (self._placed * factors))).ravel().astype(np.float64)


def _improved(
    metric: Float[ndarray, "d d"],
    shape: Shape,
    keys: Float[ndarray, "n d"],
    lesson: Lesson,
    queries: Int64[ndarray, " q"],
    found: Neighbors,
) -> Float[ndarray, "d d"]:
    """The metric that does best with these neighbours."""
    from scipy.optimize import minimize

    present, rows = np.isfinite(found.distances), np.maximum(found.rows, 0)
    differences = keys[queries].astype(np.float32)[:, None] - keys.astype(np.float32)[rows]
    space = _Weighed(metric, differences) if shape == "diagonal" else _Mixed(metric, differences)
    said, labels, drift = lesson.at_label(queries, rows)
    wanted = lesson.targets[queries] - said if lesson.task == "regression" else 1 - said
    size = max(float(np.square(wanted).mean()), 1e-12) if lesson.task == "regression" else 1.0

    def loss_and_slope(parameters: Float[ndarray, " p"]) -> tuple[float, Float[ndarray, " p"]]:
        # The shrinkage and the residual share are learned beside the metric. For classes the share is 0: only then do
        # the corrected probabilities of all classes sum to 1 without one below 0, and the label's alone tells the loss.
        amount, share = 1 / (1 + np.exp(-np.clip(parameters[:2], -30, 30))) * (1, lesson.task == "regression")
        distances = space.distances(parameters[2:])
        weights = _softmax(np.where(present, -distances, -np.inf))
        each = labels - share * drift
        correction = np.einsum("qk,qko->qo", weights, each)
        loss, pull = _loss(lesson.task, wanted, said, amount * correction, size)
        along_weights = amount * np.einsum("qo,qko->qk", pull, each)
        along_distances = weights * ((weights * along_weights).sum(axis=1, keepdims=True) - along_weights)
        along_amount = float((pull * correction).sum()) * amount * (1 - amount)
        along_share = -amount * float(np.einsum("qo,qk,qko->", pull, weights, drift)) * share * (1 - share)
        slope = space.slope(parameters[2:], along_distances, distances) + 2 * PENALTY * parameters[2:]
        loss += PENALTY * float(np.square(parameters[2:]).sum())
        return loss, np.concatenate([[along_amount, along_share], slope])

    begun = np.concatenate([[1.0, 0.0], np.zeros(space.n_parameters)])
    best = minimize(loss_and_slope, begun, jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
    return space.metric(best.x[2:])


def _softmax(scores: Float[ndarray, "q k"]) -> Float[ndarray, "q k"]:
    """Weights that sum to 1; none where all scores are −∞."""
    weights = np.exp(scores - np.maximum(scores.max(axis=1, keepdims=True), -1e300))
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)


def _loss(
    task: Task, wanted: Float[ndarray, "q o"], said: Float[ndarray, "q o"], added: Float[ndarray, "q o"], size: float
) -> tuple[float, Float[ndarray, "q o"]]:
    """Mean loss of the corrected predictions, and its slope along the corrections."""
    if task == "regression":
        errors = wanted - added
        return float(np.square(errors).mean()) / size, -2 * errors / (errors.size * size)
    hit = said + added
    floored = np.maximum(hit, SMALLEST_PROBABILITY)
    slope = np.where(hit > SMALLEST_PROBABILITY, -1 / floored, 0.0) / len(hit)
    return float(-np.log(floored).mean()), slope
