"""What a memory tells of who is in it: the success of membership attacks, and what a cap on weights costs and hides.

A memory stores rows of its training data, and a row that is asked for finds itself: storing is the method. Every figure
here is the area under the ROC curve of one attack that guesses "member" where its score is high: 0.5 is a coin, 1 is
certainty. The attacks are average ones, and a better attack may exist: the figures are no bound.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.correction import (
    Averages,
    ResidualKNN,
    label_average,
    neighbor_weights,
    residual_averages,
    to_probabilities,
)
from residual_memory.display import html_table
from residual_memory.errors import HeldRows, InvalidInput
from residual_memory.evaluation import HeldOut, Metric, Setting, summarize
from residual_memory.memory import HELD_TOO_OFTEN, Memory, share_held
from residual_memory.metrics import Estimate, auc
from residual_memory.types import Task
from residual_memory.validation import as_count, as_fraction, as_keys

MAX_WEIGHTS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
N_MEMBERS = 10_000
HELD_AT_MOST = 0.5  # of the held-out rows may be in the memory before the audit refuses them
SMALLEST = 1e-12  # of a probability whose logarithm is taken
BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Answers:
    """What an attacker gets for rows that he asks about, under s caps, and how good the answers are.

    Attributes
    ----------
    base : the base's confidence in the true label: its probability, or −|error|.
    corrected : the corrected confidence under each cap.
    calibrated : corrected against base, for who has the base too, in a ways: their difference and, of probabilities,
        the difference of their logarithms.
    nearest : distance to the nearest memory, for who may ask for neighbours.
    base_losses, losses : as in `HeldOut.losses`, of the base and under each cap.
    groups : rows of one group count as one draw; None where each row does.
    """

    base: Float[ndarray, " q"]
    corrected: Float[ndarray, "s q"]
    calibrated: Float[ndarray, "a s q"]
    nearest: Float[ndarray, " q"]
    base_losses: Float[ndarray, " q"]
    losses: Float[ndarray, "s q"]
    groups: Shaped[ndarray, " q"] | None = None

    def __len__(self) -> int:
        return len(self.base)


@dataclass(frozen=True)
class Capped:
    """One cap on what a row may contribute: what it costs, and what an attacker still sees.

    Attributes
    ----------
    max_weight : as in `ResidualKNN`; 1 is no cap.
    corrected : accuracy (a fraction) or RMSE (in the target's unit) on the held-out rows.
    gain : of corrected over base, paired by row; more is better whatever the metric.
    auc_corrected : of the corrected confidence in the true label.
    auc_calibrated : for who has the base too, by the score that tells most of three: that confidence alone, its
        difference from the base's, and the difference of their logarithms.

    An area below 0.5 tells as much as one as far above, to whoever knows the direction: a tight cap cuts more from rows
    that find themselves than from others, whose corrections are then the larger ones.
    """

    max_weight: float
    corrected: Estimate
    gain: Estimate
    auc_corrected: Estimate
    auc_calibrated: Estimate

    def to_dict(self) -> dict[str, float]:
        """Every figure with its ends, as `gain`, `gain_low`, `gain_high`."""
        return {"max_weight": self.max_weight, **_with_ends(self, _IN_CAP)}


@dataclass(frozen=True)
class PrivacyReport:
    """What an attacker learns of who is in a memory.

    Attributes
    ----------
    metric : "accuracy" (a fraction) or "rmse" (in the target's unit).
    n_members, n_rows : rows of the memory that were asked for, and held-out rows.
    base : accuracy or RMSE of the base on the held-out rows.
    auc_base : of the base's confidence in the true label: what is known without a memory.
    auc_nearest : of the distance to the nearest memory: what is known to whoever may ask for neighbours. A cap does
        nothing about it.
    caps : one entry a cap, in the order in which they were asked for.
    """

    metric: Metric
    n_members: int
    n_rows: int
    base: Estimate
    auc_base: Estimate
    auc_nearest: Estimate
    caps: tuple[Capped, ...]

    @property
    def verdict(self) -> str:
        """The loosest cap against the one that hides most, in one line."""
        loose = max(self.caps, key=lambda cap: cap.max_weight)
        tight = min(self.caps, key=lambda cap: abs(cap.auc_calibrated.value - 0.5))
        told = f"members are told from others with AUC {_short(loose.auc_calibrated)}"
        told += f" at max_weight {loose.max_weight:g}, {_short(self.auc_base)} by the base alone"
        if tight.max_weight == loose.max_weight:
            return told
        cost = (
            f"{100 * tight.corrected.value:.1f} % instead of {100 * loose.corrected.value:.1f} % right"
            if self.metric == "accuracy"
            else f"RMSE {tight.corrected.value:.4g} instead of {loose.corrected.value:.4g}"
        )
        return f"{told}; at best {_short(tight.auc_calibrated)} at {tight.max_weight:g}, {cost}"

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """For people: what holds whatever the cap."""
        return (
            (f"base, {_NAMES[self.metric]}", self._figure(self.base)),
            ("base, AUC", _area(self.auc_base)),
            ("nearest memory, AUC", f"{_area(self.auc_nearest)}, for whoever may ask for neighbors"),
        )

    @property
    def table(self) -> tuple[tuple[str, ...], ...]:
        """For people: a header, and a row for each cap."""
        rows = (
            (
                f"{cap.max_weight:g}",
                self._figure(cap.corrected),
                self._figure(cap.gain, "+"),
                _area(cap.auc_corrected),
                _area(cap.auc_calibrated),
            )
            for cap in self.caps
        )
        return ("max_weight", _NAMES[self.metric], "gain", "AUC corrected", "AUC with base"), *rows

    def _figure(self, figure: Estimate, sign: str = "") -> str:
        if self.metric == "accuracy":
            return f"{100 * figure.value:{sign}.1f} ± {100 * figure.margin:.1f}"
        return f"{figure.value:{sign}.4g} ± {figure.margin:.2g}"

    def _repr_html_(self) -> str:
        return html_table(self.verdict, self.table[1:], self.table[0]) + html_table("whatever the cap", self.facts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: every figure with its ends, and a list of the caps."""
        return {
            "metric": self.metric,
            "n_members": self.n_members,
            "n_test": self.n_rows,
            **_with_ends(self, _IN_REPORT),
            "caps": [cap.to_dict() for cap in self.caps],
        }


_IN_CAP = ("corrected", "gain", "auc_corrected", "auc_calibrated")
_NAMES: dict[Metric, str] = {"accuracy": "accuracy, %", "rmse": "RMSE"}
_IN_REPORT = ("base", "auc_base", "auc_nearest")


def audit_privacy(
    memory: Memory,
    keys: ArrayLike,
    labels: ArrayLike,
    predictions: ArrayLike,
    setting: Setting,
    *,
    max_weights: Sequence[float] = MAX_WEIGHTS,
    n_members: int = N_MEMBERS,
    seed: int = 0,
    index: str = "auto",
    groups: ArrayLike | None = None,
) -> PrivacyReport:
    """Attack a memory: tell rows that it holds from rows that it does not, with and without a cap on weights.

    Members are drawn from the memory and asked for with their stored keys, labels and predictions, as a user would ask:
    their own row is not excluded. In a memory that was built with out-of-fold predictions these are not what the
    deployed base says of its own training rows, so `auc_base` is then of other bases than the one that is deployed, and
    lower. The attacks guess "member" by how sure the answer is of the true label.

    If more than a twentieth of the held-out keys are in the memory bit for bit, the attacks look weaker than they are,
    and a `HeldRows` warning says so.

    Parameters
    ----------
    memory : what is attacked.
    keys, labels, predictions : rows that are not in the memory, drawn like those that are: keys [q d], labels, base
        predictions at temperature 1. They are rounded as the memory rounds its rows.
    setting : how the memory is used, chosen on other rows.
    max_weights : caps to try, each as in `ResidualKNN`. The setting is not tuned again under a cap.
    n_members : rows to draw; all of them where the memory holds fewer.
    seed : of the draw.
    index : as in `ResidualKNN`. An approximate one may miss rows that ask for themselves; what it hides, another one
        shows.
    groups : held-out rows of one group count as one draw in the intervals; members do by the memory's own groups.

    Raises
    ------
    InvalidInput : if most of the held-out rows are in the memory, there are fewer than two rows of a kind, no cap is
        given or one is none, or the memory keeps parts of its predictions alone (top-m).
    DimensionMismatch : if the rows do not fit the memory.

    References
    ----------
    Yeom et al., "Privacy risk in machine learning: analyzing the connection to overfitting", CSF 2018: the attack by
    the loss.
    Watson et al., "On the importance of difficulty calibration in membership inference attacks", ICLR 2022: the loss
    beside that of another model.
    """
    caps = [as_fraction("max_weight", value, above_zero=True) for value in max_weights]
    if not caps:
        raise InvalidInput("max_weights is empty, expected at least one cap to try")
    if memory.layout.residuals == "top-m":
        raise InvalidInput(
            "the memory keeps parts of its predictions alone (top-m), so what the base said of its rows is not known; "
            "run the model on their text instead, as experiments/privacy.py does"
        )
    others = _as_stored(memory, HeldOut.checked(memory, keys, labels, predictions, None, groups))
    _check_held_out(memory, others)
    knn = setting.knn(memory, index=index)
    members, member_groups = _drawn(memory, others.metric, as_count("n_members", n_members), seed)
    asked = (
        (members, member_groups),
        (others, None if groups is None else np.asarray(groups)),
    )
    return report_of(others.metric, caps, *(_answers(knn, setting, rows, caps, named) for rows, named in asked))


def report_of(metric: Metric, max_weights: Sequence[float], members: Answers, others: Answers) -> PrivacyReport:
    """From answers to figures with intervals.

    Parameters
    ----------
    metric : of the losses.
    max_weights : the caps of the answers.
    members, others : answers for rows that the memory holds, and for rows that it does not.

    Raises
    ------
    InvalidInput : if there are fewer than two rows of a kind.
    """
    caps = []
    base = None
    for place, cap in enumerate(max_weights):
        of_base, losses = others.base_losses, others.losses[place]
        # The labels alone are not asked for; the base stands in for them.
        figures = summarize(metric, base=of_base, memory_only=of_base, corrected=losses, groups=others.groups)
        base = figures.base
        alone = _attack(members.corrected[place], others.corrected[place], members, others)
        beside = [
            _attack(of_members, of_others, members, others)
            for of_members, of_others in zip(members.calibrated[:, place], others.calibrated[:, place], strict=True)
        ]
        caps.append(Capped(float(cap), figures.corrected, figures.gain, alone, most_telling([alone, *beside])))
    assert base is not None
    return PrivacyReport(
        metric,
        len(members),
        len(others),
        base,
        _attack(members.base, others.base, members, others),
        _attack(-members.nearest, -others.nearest, members, others),
        tuple(caps),
    )


def most_telling(areas: Sequence[Estimate]) -> Estimate:
    """The area that is farthest from a coin's."""
    return max(areas, key=lambda area: abs(area.value - 0.5))


def _attack(
    of_members: Float[ndarray, " m"], of_others: Float[ndarray, " q"], members: Answers, others: Answers
) -> Estimate:
    return auc(of_members, of_others, positive_groups=members.groups, negative_groups=others.groups)


def _check_held_out(memory: Memory, rows: HeldOut) -> None:
    """Rows of the memory among the others make an attack look weak."""
    share = share_held(memory, rows.keys)
    if share > HELD_AT_MOST:
        raise InvalidInput(
            f"{100 * share:.0f} % of the held-out rows are in the memory, expected rows that it does not hold; "
            "use data that it was not built from"
        )
    if share > HELD_TOO_OFTEN:
        warnings.warn(
            f"{100 * share:.0f} % of the held-out keys are in the memory bit for bit, so the attacks look weaker than "
            "they are",
            HeldRows,
            stacklevel=3,
        )


def _as_stored(memory: Memory, rows: HeldOut) -> HeldOut:
    """Rows rounded as the memory rounds its own: otherwise the last bits would tell them apart."""
    columns = {name: memory.snapshot.column(name).dtype for name in ("keys", "predictions", "labels")}
    keys = _rounded(as_keys(rows.keys, metric=memory.layout.metric), columns["keys"])
    labels = _rounded(rows.labels, columns["labels"]) if memory.layout.task == "regression" else rows.labels
    return replace(rows, keys=keys, labels=labels, predictions=_rounded(rows.predictions, columns["predictions"]))


def _rounded(values: ndarray, dtype: np.dtype) -> ndarray:
    stored = values.astype(dtype)
    return stored.astype(np.float32) if dtype == np.float16 else stored


def _drawn(memory: Memory, metric: Metric, count: int, seed: int) -> tuple[HeldOut, Shaped[ndarray, " m"] | None]:
    """Rows of the memory, as they are stored, and their groups."""
    snapshot = memory.snapshot
    alive = np.flatnonzero(snapshot.alive)
    if len(alive) < 2:
        raise InvalidInput(f"the memory holds {len(alive)} rows, expected at least 2 to attack")
    rows = np.sort(np.random.default_rng(seed).choice(alive, min(count, len(alive)), replace=False))
    keys = _rounded(snapshot.keys.take(rows), snapshot.keys.dtype)
    groups = snapshot.group_column
    drawn = HeldOut(metric, keys, snapshot.targets(rows), snapshot.predictions(rows))
    return drawn, None if groups is None else groups.take(rows)


def _answers(
    knn: ResidualKNN, setting: Setting, rows: HeldOut, caps: Sequence[float], groups: Shaped[ndarray, " q"] | None
) -> Answers:
    """What the memory says of some rows under every cap, from one search."""
    task, n = knn.memory.layout.task, len(rows.keys)
    snapshot, found = knn.search(rows.keys, min(setting.n_neighbors, len(knn.memory)))
    farthest = found.farthest if found.rows.shape[1] == setting.n_neighbors else np.full(n, np.inf)
    weights = neighbor_weights(snapshot.keys, found, knn.weighting)
    base = _confidence(rows.predictions, rows.labels, task)
    corrected, losses = np.empty((len(caps), n)), np.empty((len(caps), n))
    calibrated = np.empty((1 if task == "regression" else 2, len(caps), n))
    step = max(1, BLOCK_BYTES // (8 * snapshot.layout.n_outputs * (found.rows.shape[1] + 2 * len(caps))))
    for start in range(0, n, step):
        here = slice(start, start + step)
        some = replace(rows, keys=rows.keys[here], labels=rows.labels[here], predictions=rows.predictions[here])
        capped = np.stack([np.clip(weights[here], -cap, cap) for cap in caps], axis=1)
        residuals = residual_averages(snapshot, found.rows[here], capped, setting.temperature)
        labels = label_average(snapshot, found.rows[here], capped) if setting.residual_share != 1 else None
        for place in range(len(caps)):
            averages = Averages(residuals[:, place], farthest[here])
            if labels is not None:
                averages = replace(averages, labels=labels[:, place], mass=capped[:, place].sum(axis=1))
            reference, scores = setting.corrected(some.predictions, averages, task)
            losses[place, here] = some.losses(scores, reference)
            given = scores if _valid(setting, task) else to_probabilities(scores, reference)
            corrected[place, here] = _confidence(given, some.labels, task)
            beside = compared(corrected[place, here], _confidence(reference, some.labels, task))
            calibrated[:, place, here] = beside[: len(calibrated)]  # −|error| has no logarithm
    told = rows.losses(rows.predictions, rows.predictions)
    return Answers(base, corrected, calibrated, found.distances[:, 0].astype(np.float64), told, losses, groups)


def compared(corrected: Float[ndarray, " q"], base: Float[ndarray, " q"]) -> Float[ndarray, "2 q"]:
    """Two confidences in the true label against each other: their difference, and that of their logarithms."""
    ratio = np.log(np.maximum(corrected, SMALLEST) / np.maximum(base, SMALLEST))
    return np.stack([corrected - base, ratio])


def _valid(setting: Setting, task: Task) -> bool:
    """Whether scores are given out as they are: values, and probabilities that are valid already."""
    return task == "regression" or setting.gate is not None or not setting.shrinkage


def _confidence(said: Float[ndarray, "q c"], labels: Shaped[ndarray, "q ..."], task: Task) -> Float[ndarray, " q"]:
    """The probability of the true label, or −|error|, the mean over the outputs."""
    if task == "regression":
        return -np.abs(said - labels).mean(axis=1, dtype=np.float64)
    return said[np.arange(len(said)), labels].astype(np.float64)


def _area(figure: Estimate) -> str:
    return f"{figure.value:.3f} ± {figure.margin:.3f}"


def _with_ends(figures: Capped | PrivacyReport, names: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in names:
        estimate: Estimate = getattr(figures, name)
        found |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return found


def _short(figure: Estimate) -> str:
    return f"{figure.value:.3f} ± {figure.margin:.3f}"
