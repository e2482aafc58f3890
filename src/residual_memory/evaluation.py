"""Base, memory-only and corrected side by side on held-out rows, with intervals and a verdict."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.correction import (
    Averages,
    Exclude,
    ResidualKNN,
    Weighting,
    correct,
    label_average,
    neighbor_weights,
    residual_average,
    to_probabilities,
)
from residual_memory.display import html_table
from residual_memory.errors import DimensionMismatch, InvalidInput
from residual_memory.gate import Gate
from residual_memory.memory import Memory
from residual_memory.metrics import Estimate, bootstrap_interval, correctness, log_losses, mean_interval, squared_errors
from residual_memory.residuals import tempered
from residual_memory.types import Task
from residual_memory.validation import as_keys, as_labels, as_predictions

Metric = Literal["accuracy", "log_loss", "rmse"]

METRICS: dict[Task, tuple[Metric, ...]] = {"classification": ("accuracy", "log_loss"), "regression": ("rmse",)}
METRIC_NAMES: dict[Metric, str] = {"accuracy": "accuracy", "log_loss": "log-loss, nats", "rmse": "RMSE"}
MEMORY_ONLY_MIX = 0.01  # of the uniform distribution, so that the log-loss of a memory alone is finite


@dataclass(frozen=True)
class Setting:
    """How a memory is used: what tuning chooses and prediction needs.

    Attributes
    ----------
    n_neighbors, bandwidth, kernel, temperature, nugget : as in `ResidualKNN`.
    shrinkage : as in `correct`; 0 is the base alone.
    residual_share : as in `Averages.correction`; 1 is the paper's, 0 that of kNN-LM.
    local, max_distance : as in `ResidualKNN`.
    gate : in place of the shrinkage, a trust that depends on the query, and calibrated probabilities.
    """

    n_neighbors: int = 50
    bandwidth: float | str = "auto"
    temperature: float = 1.0
    shrinkage: float = 1.0
    kernel: str = "exponential"
    nugget: float = 0.1
    gate: Gate | None = None
    residual_share: float = 1.0
    local: bool = False
    max_distance: float | None = None

    def knn(self, memory: Memory, *, index: str = "exact", max_weight: float = 1.0) -> ResidualKNN:
        """The regressor with these options."""
        return ResidualKNN(
            memory,
            n_neighbors=self.n_neighbors,
            bandwidth=self.bandwidth,
            kernel=self.kernel,
            temperature=self.temperature,
            index=index,
            max_weight=max_weight,
            nugget=self.nugget,
            local=self.local,
            max_distance=self.max_distance,
        )

    def weighting(self, bandwidth: float | None = None) -> Weighting:
        """How neighbours are weighted, where the bandwidth is a number, here or in the setting."""
        sigma = float(self.bandwidth if bandwidth is None else bandwidth)
        return Weighting(self.kernel, sigma, self.nugget, self.local, self.max_distance)

    def predict(
        self,
        knn: ResidualKNN,
        keys: ArrayLike,
        predictions: Float[ndarray, "q c"],
        exclude: Exclude = None,
    ) -> Float[ndarray, "q c"]:
        """Corrected probabilities, valid ones, or corrected values.

        Parameters
        ----------
        knn : from `Setting.knn`.
        keys : queries [q d].
        predictions : base probabilities at temperature 1, or values; given back bit for bit where shrinkage is 0.
        exclude : as in `ResidualKNN.__call__`.
        """
        if not self.shrinkage:
            return predictions
        found = knn.look_up(keys, exclude, labels=self.residual_share != 1)
        return self.valid(predictions, found, knn.memory.layout.task)

    def valid(
        self, predictions: Float[ndarray, "q c"], found: Averages, task: Task = "classification"
    ) -> Float[ndarray, "q c"]:
        """Corrected probabilities, valid ones, or corrected values, of what was looked up; parameters as below."""
        base, scores = self.corrected(predictions, found, task)
        return scores if self.gate is not None or task == "regression" else to_probabilities(scores, base)

    def corrected(
        self, predictions: Float[ndarray, "q c"], found: Averages, task: Task
    ) -> tuple[Float[ndarray, "q c"], Float[ndarray, "q c"]]:
        """The base that is corrected, and the corrected scores: valid probabilities where there is a gate.

        Parameters
        ----------
        predictions : base probabilities at temperature 1, or values.
        found : from `ResidualKNN.look_up`, with labels where the residual share is below 1.
        """
        if not self.shrinkage:
            return predictions, predictions
        base = self.tempered(predictions, task)
        correction = found.correction(base, self.residual_share)
        if self.gate is not None:
            return predictions, self.gate(predictions, correction, found.farthest)
        return base, correct(base, correction, self.shrinkage)

    def tempered(self, predictions: Float[ndarray, "q c"], task: Task) -> Float[ndarray, "q c"]:
        """Base predictions at the setting's temperature; values have none."""
        return tempered(predictions, self.temperature) if task == "classification" else predictions

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `Memory.save_setting` and result files."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Setting":
        """Read back what `to_dict` gave.

        Raises
        ------
        InvalidInput : if a name is not an attribute of a setting, or the gate is none.
        """
        if "search_below" in values:
            raise InvalidInput(
                "this is the setting of a language model's memory; use ResMemForCausalLM, or resmem with a .txt file"
            )
        gate = values.get("gate")
        try:
            return Setting(**{**values, "gate": None if gate is None else Gate.from_dict(gate)})
        except TypeError as error:
            raise InvalidInput(f"a setting has {', '.join(asdict(Setting()))}: {error}") from None

    @property
    def text(self) -> str:
        """In one line, for people."""
        if not self.shrinkage:
            return "shrinkage 0, so predictions stay the base's"
        sigma = self.bandwidth if isinstance(self.bandwidth, str) else f"{self.bandwidth:.4g}"
        more = f", residual share {self.residual_share:g}" if self.residual_share != 1 else ""
        return (
            f"k {self.n_neighbors}, bandwidth {sigma}{' of the k-th distance' if self.local else ''}, "
            f"temperature {self.temperature:g}, shrinkage {self.shrinkage:g}{more}, kernel {self.kernel}"
            f"{', gated' if self.gate else ''}"
        )

    def _repr_html_(self) -> str:
        named = asdict(self) | {"gate": "none" if self.gate is None else "fitted"}
        return html_table("Setting", list(named.items()))

    def without_memory(self) -> "Setting":
        """The base alone, at the temperature that it was trained with."""
        return replace(self, shrinkage=0.0, temperature=1.0, gate=None)


@dataclass(frozen=True)
class Evaluation:
    """Three methods on the same rows.

    Attributes
    ----------
    metric : "accuracy" (more is better), "log_loss" in nats, or "rmse" in the target's unit (less is better).
    n_rows : held-out rows that were measured.
    base, memory_only, corrected : with 95 % intervals.
    gain : of corrected over base, paired by row; more is better whatever the metric.
    """

    metric: Metric
    n_rows: int
    base: Estimate
    memory_only: Estimate
    corrected: Estimate
    gain: Estimate

    @property
    def helps(self) -> bool:
        """Whether the whole interval of the gain is above zero."""
        return self.gain.low > 0

    @property
    def verdict(self) -> str:
        """One line for whoever decides."""
        if self.metric == "accuracy":
            figure = f"{100 * self.gain.value:+.1f} ± {100 * self.gain.margin:.1f} points"
        else:
            unit = "nats" if self.metric == "log_loss" else "RMSE"
            figure = f"{self.gain.value:+.4g} ± {self.gain.margin:.2g} {unit}"
        rows = f"on {self.n_rows:,} held-out rows"
        return f"gain {figure} {rows}" if self.helps else f"no gain: do not deploy ({figure} {rows})"

    @property
    def table(self) -> tuple[tuple[str, str, str], ...]:
        """For people: a header, and each method with its figure and interval."""
        figures = (("base", self.base), ("memory only", self.memory_only), ("corrected", self.corrected))
        rows = ((name, *(part.percent if self.metric == "accuracy" else part.text)) for name, part in figures)
        return ("", METRIC_NAMES[self.metric], "95 % interval"), *rows

    def _repr_html_(self) -> str:
        return html_table(self.verdict, self.table[1:], self.table[0])

    def to_dict(self) -> dict[str, Any]:
        """The fields of a row of a result file."""
        return {
            "metric": self.metric,
            "base": self.base.value,
            "memory_only": self.memory_only.value,
            "corrected": self.corrected.value,
            "gain": self.gain.value,
            "gain_low": self.gain.low,
            "gain_high": self.gain.high,
            "n_test": self.n_rows,
        }


def evaluate(
    memory: Memory,
    keys: ArrayLike,
    labels: ArrayLike,
    predictions: ArrayLike,
    setting: Setting,
    *,
    memory_only: Setting | None = None,
    metric: Metric | None = None,
    index: str = "auto",
    groups: ArrayLike | None = None,
    exclude: ArrayLike | None = None,
) -> Evaluation:
    """Measure a setting that was chosen elsewhere.

    Parameters
    ----------
    memory, keys, labels, predictions : the memory, and held-out rows: keys [q d], labels, base predictions at T = 1.
    setting : of the corrected predictions.
    memory_only : setting of the memory-only line; by default the same.
    metric : "accuracy" or "log_loss" for classification, "rmse" for regression; the first by default.
    index : engine, as in `ResidualKNN`.
    groups : rows of one group count as one draw in the intervals.
    exclude : as in `ResidualKNN.__call__`.

    Raises
    ------
    InvalidInput, DimensionMismatch : if the rows do not fit the memory.
    """
    rows = HeldOut.checked(memory, keys, labels, predictions, metric, groups)
    said = corrected_predictions(
        memory, rows.keys, rows.predictions, setting, memory_only=memory_only, index=index, exclude=exclude
    )
    return evaluation_of(rows, said, groups)


@dataclass(frozen=True)
class Predicted:
    """What three methods say of the same queries.

    Attributes
    ----------
    base : predictions at the setting's temperature; as they came where there is a gate.
    memory_only : the neighbours' labels alone.
    corrected : scores; `to_probabilities(corrected, support)` makes them valid.
    nearest : distance to the nearest memory; +inf where there is none.
    gated : whether a gate made them valid already.
    """

    base: Float[ndarray, "q c"]
    memory_only: Float[ndarray, "q c"]
    corrected: Float[ndarray, "q c"]
    nearest: Float[ndarray, " q"]
    gated: bool = False

    @property
    def support(self) -> Float[ndarray, "q c"]:
        """What no corrected probability may fall far below: the base, or what a gate says."""
        return self.corrected if self.gated else self.base


def corrected_predictions(
    memory: Memory,
    keys: Float[ndarray, "q d"],
    predictions: Float[ndarray, "q c"],
    setting: Setting,
    *,
    memory_only: Setting | None = None,
    index: str = "auto",
    exclude: ArrayLike | None = None,
) -> Predicted:
    """Base, memory-only and corrected predictions from one search; parameters as in `evaluate`."""
    knn, alone = setting.knn(memory, index=index), memory_only or setting
    counts = min(setting.n_neighbors, max(len(memory), 1)), min(alone.n_neighbors, max(len(memory), 1))
    snapshot, found = knn.search(keys, max(counts), exclude)
    nearest, labelled = found.first(counts[0]), found.first(counts[1])
    weights = neighbor_weights(snapshot.keys, nearest, knn.weighting)
    sigma = alone.bandwidth
    if isinstance(sigma, str):
        sigma = knn.bandwidth if alone == setting else alone.knn(memory, index=index).bandwidth
    alone_weighting = alone.weighting(sigma)
    same = counts[0] == counts[1] and alone_weighting == knn.weighting
    label_weights = weights if same else neighbor_weights(snapshot.keys, labelled, alone_weighting)
    farthest = nearest.farthest if counts[0] == setting.n_neighbors else np.full(len(keys), np.inf)
    averages = Averages(residual_average(snapshot, nearest.rows, weights, setting.temperature), farthest)
    if setting.residual_share != 1:
        near = label_average(snapshot, nearest.rows, weights[:, None, :])[:, 0]
        averages = replace(averages, labels=near, mass=weights.sum(axis=1))
    labels = label_average(snapshot, labelled.rows, label_weights[:, None, :])
    base, corrected = setting.corrected(predictions, averages, memory.layout.task)
    return Predicted(base, labels[:, 0], corrected, found.distances[:, 0], gated=setting.gate is not None)


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows, checked, and the loss by which they are measured (less is better)."""

    metric: Metric
    keys: Float[ndarray, "q d"]
    labels: Shaped[ndarray, "q ..."]
    predictions: Float[ndarray, "q c"]

    @staticmethod
    def checked(
        memory: Memory,
        keys: ArrayLike,
        labels: ArrayLike,
        predictions: ArrayLike,
        metric: Metric | None,
        groups: ArrayLike | None = None,
    ) -> "HeldOut":
        """Validate at the door."""
        layout = memory.layout
        allowed = METRICS[layout.task]
        if metric not in (None, *allowed):
            names = ", ".join(map(repr, allowed))
            raise InvalidInput(f"metric is {metric!r}, expected {names} for {layout.task}")
        queries = as_keys(keys, layout.dim)
        targets = as_labels(labels, layout.task, layout.n_outputs, len(queries))
        said = as_predictions(predictions, layout.task, layout.n_outputs)
        if not isinstance(said, ndarray) or len(said) != len(queries) or not len(queries):
            raise InvalidInput(
                f"there are {len(said)} predictions for {len(queries)} held-out keys, expected whole rows, one each, "
                "and at least one"
            )
        if groups is not None and np.shape(groups) != (len(queries),):
            raise DimensionMismatch(f"groups have shape {np.shape(groups)}, expected one a row: {len(queries)}")
        said = said.astype(np.float32) if said.dtype == np.float16 else said
        return HeldOut(metric or allowed[0], queries, targets, said)

    def losses(self, scores: Float[ndarray, "q c"], base: Float[ndarray, "q c"]) -> Float[ndarray, " q"]:
        """Loss of each row: 1 − hit, −log probability (made valid with the base), or squared error."""
        if self.metric == "accuracy":
            return 1 - correctness(scores, self.labels)
        if self.metric == "log_loss":
            return log_losses(to_probabilities(scores, base), self.labels)
        return squared_errors(scores, self.labels)

    def losses_alone(self, averages: Float[ndarray, "q c"]) -> Float[ndarray, " q"]:
        """Loss of each row by the neighbours' labels alone."""
        if self.metric == "log_loss":
            valid, uniform = to_probabilities(averages), 1 / averages.shape[1]
            return log_losses((1 - MEMORY_ONLY_MIX) * valid + MEMORY_ONLY_MIX * uniform, self.labels)
        return self.losses(averages, averages)


def evaluation_of(rows: HeldOut, said: Predicted, groups: ArrayLike | None = None) -> Evaluation:
    """The figures of what three methods say of held-out rows; `groups` as in `evaluate`."""
    return summarize(
        rows.metric,
        base=rows.losses(rows.predictions, rows.predictions),
        memory_only=rows.losses_alone(said.memory_only),
        corrected=rows.losses(said.corrected, said.support),
        groups=groups,
    )


def summarize(
    metric: Metric,
    *,
    base: Float[ndarray, " q"],
    memory_only: Float[ndarray, " q"],
    corrected: Float[ndarray, " q"],
    groups: ArrayLike | None = None,
) -> Evaluation:
    """From per-row losses to figures with intervals."""
    if metric == "rmse":
        gain = bootstrap_interval(
            lambda rows: float(np.sqrt(base[rows].mean()) - np.sqrt(corrected[rows].mean())), len(base), groups=groups
        )
    else:
        gain = mean_interval(base - corrected, groups)
    return Evaluation(
        metric,
        len(base),
        base=_figure(metric, base, groups),
        memory_only=_figure(metric, memory_only, groups),
        corrected=_figure(metric, corrected, groups),
        gain=gain,
    )


def _figure(metric: Metric, losses: Float[ndarray, " q"], groups: ArrayLike | None) -> Estimate:
    mean = mean_interval(losses, groups)
    if metric == "accuracy":
        return Estimate(1 - mean.value, max(1 - mean.high, 0.0), min(1 - mean.low, 1.0))
    if metric == "rmse":
        return Estimate(*(float(np.sqrt(max(part, 0.0))) for part in (mean.value, mean.low, mean.high)))
    return mean
