"""The report of an evaluation: figures, where the gain comes from, and rows that the memory put right and wrong."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int64, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory import figures
from residual_memory.correction import to_probabilities
from residual_memory.display import shown
from residual_memory.evaluation import (
    Evaluation,
    HeldOut,
    Metric,
    Predicted,
    Setting,
    corrected_predictions,
    evaluation_of,
)
from residual_memory.examples import Examples, examples_for
from residual_memory.explanation import class_label
from residual_memory.memory import Memory
from residual_memory.metrics import calibration_bins, calibration_error, correctness, gains_by, risk_coverage
from residual_memory.reports.page import LABEL_WIDTH, Case, Chart, Comparison, Example, Gallery, Near, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PUT_RIGHT, PUT_WRONG, NEAR = 12, 6, 5
LOOKED_AT, LARGEST_WEIGHT = 200, 0.5
SPREAD = "Those that one memory alone corrects, often a near-duplicate, come last."
GAIN_UNITS: dict[Metric, tuple[str, float]] = {
    "accuracy": ("points", 100.0),
    "log_loss": ("nats", 1.0),
    "rmse": ("in squared error", 1.0),
}
HELD_OUT = (
    "The figures are those of other data only where these rows neither trained the base nor chose the setting, and are "
    "not in the memory."
)


def make_report(
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
    examples: Any = None,
    held_out: Any = None,
    title: str = "What the memory adds",
    facts: Sequence[tuple[str, str]] = (),
) -> Report:
    """Measure a setting on held-out rows and tell of it; `Report.write` makes an HTML file of that.

    Parameters
    ----------
    memory, keys, labels, predictions, setting, memory_only, metric, index, groups : as in `evaluate`.
    examples : what the memory's rows were made of, to be shown: a data set of (image, label) or a data frame, in the
        order of their ids.
    held_out : likewise of the held-out rows, in their order.
    title : of the page.
    facts : names and values that are told beside those of the memory: where the data come from, …

    Raises
    ------
    InvalidInput, DimensionMismatch : if the rows do not fit the memory.
    """
    rows = HeldOut.checked(memory, keys, labels, predictions, metric, groups)
    said = corrected_predictions(memory, rows.keys, rows.predictions, setting, memory_only=memory_only, index=index)
    found = evaluation_of(rows, said, groups)
    return report_of(
        memory,
        rows,
        setting,
        said,
        found,
        index=index,
        groups=groups,
        examples=examples,
        held_out=held_out,
        title=title,
        facts=facts,
    )


def report_of(
    memory: Memory,
    rows: HeldOut,
    setting: Setting,
    said: Predicted,
    found: Evaluation,
    *,
    index: str = "auto",
    groups: ArrayLike | None = None,
    examples: Any = None,
    held_out: Any = None,
    title: str = "What the memory adds",
    facts: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> Report:
    """The report of what was measured already; parameters as in `make_report`."""
    seen = examples_for(examples), examples_for(held_out)
    by_group = ("Rows of one group count as one draw in the intervals.",) if groups is not None else ()
    return Report(
        title=title,
        lead=(
            f"{found.n_rows:,} held-out rows, corrected by {len(memory):,} memories. Nothing was trained again: the "
            "base stays as it is, and the weighted residuals of the nearest memories are added to what it says."
        ),
        verdict=found.verdict,
        helps=found.helps,
        comparisons=(Comparison.of(found),),
        galleries=galleries_of(memory, rows, setting, said, index, *seen) if setting.shrinkage else (),
        charts=charts_of(rows, said, memory.class_names, groups),
        facts=(*facts, *facts_of(memory, setting)),
        notes=(HELD_OUT, *by_group, *notes),
    )


def tuning_report(
    memory: Memory, found: Evaluation, setting: Setting, *, facts: Sequence[tuple[str, str]], notes: Sequence[str]
) -> Report:
    """What tuning found; it keeps no predictions, so there are figures alone."""
    return Report(
        title="What tuning found",
        lead=f"{found.n_rows:,} held-out rows, corrected by {len(memory):,} memories. Nothing was trained again.",
        verdict=found.verdict,
        helps=found.helps,
        comparisons=(Comparison.of(found),),
        facts=(*facts, *facts_of(memory, setting)),
        notes=tuple(notes),
    )


def facts_of(memory: Memory, setting: Setting) -> tuple[tuple[str, str], ...]:
    """The memory and its setting, for people."""
    layout = memory.layout
    where = "in RAM" if memory.path is None else str(memory.path)
    layer = "" if memory.source is None else f" from the {memory.source['side']} of {memory.source['layer']}"
    return (
        ("memory", f"{where}, version {memory.version:,}, {len(memory):,} rows"),
        ("keys", f"{layout.dim:,} numbers, {layout.key_dtype}, {layout.metric}{layer}"),
        ("setting", setting.text),
    )


# ---------------------------------------------------------------------- where the gain comes from


def charts_of(
    rows: HeldOut, said: Predicted, class_names: Sequence[str] | None, groups: ArrayLike | None = None
) -> tuple[Chart, ...]:
    """Gain by class, confidence and distance; reliability and risk before and after."""
    gains = rows.losses(rows.predictions, rows.predictions) - rows.losses(said.corrected, said.support)
    unit, factor = GAIN_UNITS[rows.metric]
    near = Chart(
        "Gain by distance",
        "Rows sorted by how near the nearest memory is, in parts of about equal size.",
        figures.gain_along(
            gains_by(said.nearest, gains, groups=groups), "distance to the nearest memory", unit=unit, factor=factor
        ),
    )
    if rows.metric == "rmse":
        return (near,)
    valid = to_probabilities(said.corrected, said.support)
    methods = {"base": rows.predictions, "corrected": valid}
    confidence = {name: values.max(axis=1) for name, values in methods.items()}
    hits = {name: correctness(values, rows.labels) for name, values in methods.items()}
    return (
        Chart(
            "Gain by class", "Accuracy, of the classes that gain most and least.", _by_class(rows, said, class_names)
        ),
        near,
        Chart(
            "Gain by confidence",
            "Rows sorted by how sure the base is, in parts of about equal size.",
            figures.gain_along(
                gains_by(confidence["base"], gains, groups=groups),
                "largest probability of the base",
                unit=unit,
                factor=factor,
            ),
        ),
        Chart(
            "Reliability",
            "How often each is right, against how sure it says it is; corrected scores as valid probabilities.",
            figures.reliability(
                {name: calibration_bins(values, rows.labels) for name, values in methods.items()},
                {name: calibration_error(values, rows.labels) for name, values in methods.items()},
            ),
        ),
        Chart(
            "Risk and coverage",
            "The error left where only the surest queries are answered.",
            figures.risk_coverage({name: risk_coverage(confidence[name], 1 - hits[name]) for name in methods}),
        ),
    )


def _by_class(rows: HeldOut, said: Predicted, class_names: Sequence[str] | None) -> "Figure":
    present, owner, counts = np.unique(rows.labels, return_inverse=True, return_counts=True)
    base, corrected = (
        np.bincount(owner, weights=correctness(scores, rows.labels)) / counts
        for scores in (rows.predictions, said.corrected)
    )
    names = [class_names[label] if class_names else str(label) for label in present.tolist()]
    return figures.gain_by_class(names, base.tolist(), corrected.tolist(), shown=8)


# ---------------------------------------------------------------------- rows that the memory changed


def galleries_of(
    memory: Memory,
    rows: HeldOut,
    setting: Setting,
    said: Predicted,
    index: str,
    examples: Examples | None,
    held_out: Examples | None,
) -> tuple[Gallery, ...]:
    """Some of the rows that the memory put right, and some that it put wrong, with the memories that did it."""
    told = _Telling(memory, rows, setting, said, index, examples, held_out)
    n = len(rows.labels)
    if rows.metric == "rmse":
        return _of_values(told, rows.losses(rows.predictions, said.base) - rows.losses(said.corrected, said.support))
    first = rows.predictions.argmax(axis=1)
    before, after = first == rows.labels, said.corrected.argmax(axis=1) == rows.labels
    moved = said.corrected.max(axis=1) - said.corrected[np.arange(n), first]
    pairs = rows.labels.astype(np.int64) * rows.predictions.shape[1] + first
    return tuple(
        Gallery(title, f"{len(changed):,} of {n:,} rows, {text}", told.cases(_varied(changed, moved, pairs), most))
        for title, text, changed, most in (
            ("Put right", f"here some that moved far. {SPREAD}", np.flatnonzero(~before & after), PUT_RIGHT),
            (
                "Put wrong",
                "which the base had right; they count in the gain.",
                np.flatnonzero(before & ~after),
                PUT_WRONG,
            ),
        )
        if len(changed)
    )


def _of_values(told: "_Telling", gains: Float[ndarray, " q"]) -> tuple[Gallery, ...]:
    order = np.argsort(-gains, kind="stable")
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    return tuple(
        Gallery(title, f"{count:,} of {len(gains):,} rows, here some that moved far. {SPREAD}", told.cases(some, most))
        for title, count, some, most in (
            ("Brought nearer", better, order[:better], PUT_RIGHT),
            ("Taken further away", worse, order[::-1][:worse], PUT_WRONG),
        )
        if count
    )


def _varied(
    rows: Int64[ndarray, " r"], moved: Float[ndarray, " q"], pairs: Int64[ndarray, " q"]
) -> Int64[ndarray, " r"]:
    """The rows that moved furthest, first one of each pair of classes and then others."""
    order = rows[np.argsort(-moved[rows], kind="stable")]
    firsts = np.zeros(len(order), bool)
    firsts[np.unique(pairs[order], return_index=True)[1]] = True
    return np.concatenate([order[firsts], order[~firsts]])


class _Telling:
    """Turns rows into cases, from one search."""

    def __init__(
        self,
        memory: Memory,
        rows: HeldOut,
        setting: Setting,
        said: Predicted,
        index: str,
        examples: Examples | None,
        held_out: Examples | None,
    ) -> None:
        self._memory, self._rows, self._said = memory, rows, said
        self._examples, self._held_out = examples, held_out
        self._knn = setting.knn(memory, index=index)

    def cases(self, order: Int64[ndarray, " r"], most: int) -> tuple[Case, ...]:
        """The first rows; those that a single memory corrects, which is often a near-duplicate, come after others."""
        order = order[:LOOKED_AT]
        found = self._knn.neighbors(self._rows.keys[order])
        nearest = np.argsort(-found.weights, axis=1, kind="stable")[:, :NEAR]
        places = np.argsort(found.weights.max(axis=1) > LARGEST_WEIGHT, kind="stable")[:most]
        return tuple(
            self._case(int(order[place]), found.ids[place, nearest[place]], found.weights[place, nearest[place]])
            for place in places
        )

    def _case(self, row: int, ids: Shaped[ndarray, " k"], weights: Float[ndarray, " k"]) -> Case:
        ids, weights = ids[weights > 0], weights[weights > 0]
        snapshot = self._memory.snapshot
        rows = snapshot.rows_of(ids)
        truth, labels, groups = self._rows.labels[row], snapshot.targets(rows), snapshot.groups(rows)
        before, after, scores = self._said_of(row)
        near = tuple(
            Near(
                self._example(self._examples, name, self._label(label), group), float(weight), self._agrees(row, label)
            )
            for name, label, weight, group in zip(ids.tolist(), labels, weights, groups, strict=True)
        )
        return Case(self._example(self._held_out, row, self._label(truth)), before, after, scores, near)

    def _said_of(self, row: int) -> tuple[str, str, tuple[str, ...]]:
        base, corrected, support = (
            some[row] for some in (self._rows.predictions, self._said.corrected, self._said.support)
        )
        if self._rows.metric == "rmse":
            return self._label(base), self._label(corrected), ()
        corrected = to_probabilities(corrected[None], support[None])[0]
        before, after = int(base.argmax()), int(corrected.argmax())
        scores = tuple(
            f"{shown(self._label(label), LABEL_WIDTH)} {base[label]:.2f} → {corrected[label]:.2f}"
            for label in (before, after)
        )
        return self._label(before), self._label(after), scores

    def _agrees(self, row: int, label: Any) -> bool:
        """Whether a memory speaks for the truth: has its class, or is nearer to its value than the base."""
        truth = self._rows.labels[row]
        if self._rows.metric != "rmse":
            return bool(label == truth)
        return bool(np.square(label - truth).sum() < np.square(self._rows.predictions[row] - truth).sum())

    def _label(self, label: Any) -> str:
        if self._memory.layout.task == "classification":
            return class_label(self._memory, int(label)).replace("_", " ")
        return ", ".join(f"{value:.4g}" for value in np.ravel(label))

    def _example(
        self, examples: Examples | None, name: int | str, label: str, group: int | str | None = None
    ) -> Example:
        place = None if examples is None else examples.find(name, group)
        if examples is None or place is None:
            return Example(str(name), label)
        return Example(str(name), label, examples.picture(place), examples.cells(place))
