import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy import ndarray

from residual_memory.errors import DimensionMismatch, InvalidInput
from residual_memory.evaluation import (
    MEMORY_ONLY_MIX,
    METRICS,
    Evaluation,
    Metric,
    Setting,
    corrected_predictions,
    evaluate,
)
from residual_memory.gate import Gate
from residual_memory.memory import Memory
from residual_memory.metrics import Estimate
from tests import reference
from tests.problems import Problem, classification, empty_memory, memory_of, regression, same_bits

SETTING = Setting(n_neighbors=7, bandwidth=0.5, temperature=1.6, shrinkage=0.7)
VALUES = Setting(n_neighbors=7, bandwidth=0.5, shrinkage=0.7)
SHARED = replace(SETTING, residual_share=0.3)
SHARES = {  # settings of a classification that share the residuals, weighted in several ways
    "plain": SHARED,
    "knn-lm": replace(SHARED, residual_share=0.0),
    "local": replace(SHARED, kernel="gaussian", local=True),
    "limited": replace(SHARED, max_distance=1.7),
    "kriging": replace(SHARED, kernel="kriging", bandwidth=1.3, nugget=0.2),
}


def labels_for(problem: Problem, seed: int = 5) -> ndarray:
    """True labels of the queries."""
    random = np.random.default_rng(seed)
    if problem.task == "regression":
        return random.normal(size=problem.said.shape)
    return random.integers(0, problem.said.shape[1], len(problem.queries))


def evaluated(
    problem: Problem, setting: Setting = SETTING, labels: ndarray | None = None, **options: Any
) -> Evaluation:
    labels = labels_for(problem) if labels is None else labels
    return evaluate(memory_of(problem), problem.queries, labels, problem.said, setting, **options)


def scores_by_hand(problem: Problem, setting: Setting) -> tuple[ndarray, ndarray]:
    """Tempered base and corrected scores in plain numpy."""
    rest = reference.residuals(problem.labels, problem.predictions, setting.temperature)
    k, sigma = setting.n_neighbors, float(setting.bandwidth)
    residual = reference.correction(problem.keys, rest, problem.queries, k, sigma, setting.kernel)
    classes = problem.task == "classification"
    base = reference.tempered(problem.said, setting.temperature) if classes else problem.said
    return base, base + setting.shrinkage * residual


def weights_by_hand(problem: Problem, setting: Setting) -> tuple[ndarray, ndarray]:
    """Weights and rows of the neighbours, from a local bandwidth and up to a limit where the setting has these."""
    distances, rows = reference.neighbors(problem.keys, problem.queries, setting.n_neighbors)
    sigma, unit = float(setting.bandwidth), distances[:, -1:] if setting.local else np.ones((len(distances), 1))
    if setting.kernel == "kriging":
        lines = zip(problem.queries / unit, rows, unit[:, 0], strict=True)
        return np.array(
            [reference.kriging(q, problem.keys[some] / u, sigma, setting.nugget) for q, some, u in lines]
        ), rows
    raw = reference.KERNELS[setting.kernel](distances / unit, sigma)
    raw = np.where(distances > (setting.max_distance or np.inf), 0.0, raw)
    total = raw.sum(axis=1, keepdims=True)
    return np.divide(raw, total, out=np.zeros_like(raw), where=total > 0), rows


def labels_average(problem: Problem, setting: Setting) -> ndarray:
    weights, rows = weights_by_hand(problem, setting)
    values = problem.labels if problem.task == "regression" else np.eye(problem.said.shape[1])[problem.labels]
    return np.einsum("qk,qkc->qc", weights, values[rows])


def shared_by_hand(problem: Problem, setting: Setting) -> tuple[ndarray, ndarray]:
    """Tempered base f and f + λ Σ w (y − β f(neighbour) − (1 − β) f) in plain numpy."""
    weights, rows = weights_by_hand(problem, setting)
    near, base, values = problem.predictions, problem.said, problem.labels
    if problem.task == "classification":
        near, base = (reference.tempered(said, setting.temperature) for said in (near, base))
        values = np.eye(base.shape[1])[problem.labels]
    share = setting.residual_share
    each = values[rows] - share * near[rows] - (1 - share) * base[:, None]
    return base, base + setting.shrinkage * np.einsum("qk,qkc->qc", weights, each)


def floored(scores: ndarray, base: ndarray) -> ndarray:
    positive = np.maximum(scores, 0.1 * base)
    return positive / positive.sum(axis=1, keepdims=True)


def losses_by_hand(metric: Metric, scores: ndarray, base: ndarray, labels: ndarray) -> ndarray:
    if metric == "accuracy":
        return (scores.argmax(axis=1) != labels).astype(float)
    if metric == "log_loss":
        return -np.log(floored(scores, base)[np.arange(len(labels)), labels])
    return ((scores - labels) ** 2).mean(axis=1)


def mean_and_margin(values: ndarray) -> tuple[float, float]:
    return float(values.mean()), float(1.959964 * values.std(ddof=1) / np.sqrt(len(values)))


def spread(estimate: Estimate) -> tuple[float, float]:
    return estimate.value, estimate.margin


# ---------------------------------------------------------------------------------------------- settings


def test_a_setting_survives_its_plain_form() -> None:
    assert Setting.from_dict(SETTING.to_dict()) == SETTING
    assert Setting.from_dict({}) == Setting()


@pytest.mark.parametrize("setting", SHARES.values(), ids=SHARES)
def test_a_share_of_the_residuals_a_local_bandwidth_and_a_limit_survive_text(setting: Setting) -> None:
    assert Setting.from_dict(json.loads(json.dumps(setting.to_dict()))) == setting
    values = setting.to_dict()
    named = (values["residual_share"], values["local"], values["max_distance"])
    assert named == (setting.residual_share, setting.local, setting.max_distance)


def test_a_setting_saved_before_residuals_were_shared_still_reads() -> None:
    values = SETTING.to_dict()
    old = {name: values[name] for name in values if name not in ("residual_share", "local", "max_distance")}
    assert len(old) == len(values) - 3
    found = Setting.from_dict(old)
    assert found == SETTING
    assert (found.residual_share, found.local, found.max_distance) == (1.0, False, None)


def test_a_setting_survives_a_memory_on_disk(tmp_path: Path) -> None:
    with memory_of(classification(), tmp_path / "memory") as memory:
        memory.save_setting(SETTING.to_dict())
    saved = Memory.open(tmp_path / "memory").setting
    assert saved is not None
    assert Setting.from_dict(saved) == SETTING


def test_a_setting_with_an_unknown_name_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(InvalidInput, match=r"n_neighbors, bandwidth, temperature, shrinkage, kernel.*'k'"):
        Setting.from_dict({"k": 5})


def test_a_setting_makes_the_regressor_that_it_describes(problem: Problem) -> None:
    knn = Setting(9, 0.3, 1.4, 0.2, "gaussian").knn(memory_of(problem), max_weight=0.5)
    assert (knn.n_neighbors, knn.bandwidth, knn.temperature, knn.kernel, knn.max_weight) == (
        9,
        0.3,
        1.4,
        "gaussian",
        0.5,
    )


def test_the_regressor_of_a_setting_weighs_as_the_setting_says(problem: Problem) -> None:
    setting = Setting(9, 0.3, kernel="kriging", nugget=0.2, local=True, max_distance=2.5)
    knn = setting.knn(memory_of(problem))
    assert (knn.local, knn.max_distance, knn.nugget) == (True, 2.5, 0.2)
    assert knn.weighting == setting.weighting()
    assert setting.weighting(0.7) == replace(setting, bandwidth=0.7).weighting()


def test_without_memory_is_the_base_at_its_own_temperature() -> None:
    assert SETTING.without_memory() == Setting(7, 0.5, 1.0, 0.0)


# ---------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("metric", METRICS["classification"])
@pytest.mark.parametrize("seed", range(4))
def test_the_figures_of_a_classification_are_those_worked_out_by_hand(metric: Metric, seed: int) -> None:
    problem = classification(q=40, seed=seed)
    labels = labels_for(problem)
    found = evaluated(problem, metric=metric)
    base, scores = scores_by_hand(problem, SETTING)
    untouched = losses_by_hand(metric, problem.said, problem.said, labels)
    corrected = losses_by_hand(metric, scores, base, labels)
    gain = mean_and_margin(untouched - corrected)
    sign, start = (-1, 1) if metric == "accuracy" else (1, 0)
    for estimate, losses in ((found.base, untouched), (found.corrected, corrected)):
        mean, margin = mean_and_margin(losses)
        np.testing.assert_allclose(spread(estimate), (start + sign * mean, margin), atol=1e-5)
    np.testing.assert_allclose(spread(found.gain), gain, atol=1e-5)
    assert (found.metric, found.n_rows) == (metric, 40)


def test_memory_only_is_the_neighbours_labels_alone() -> None:
    problem = classification(q=40)
    labels = labels_for(problem)
    averages = labels_average(problem, SETTING)
    hits = (averages.argmax(axis=1) == labels).mean()
    assert evaluated(problem).memory_only.value == pytest.approx(hits)
    mixed = (1 - MEMORY_ONLY_MIX) * averages + MEMORY_ONLY_MIX / averages.shape[1]
    loss = -np.log(mixed[np.arange(40), labels]).mean()
    assert evaluated(problem, metric="log_loss").memory_only.value == pytest.approx(loss, rel=1e-5)


def test_the_figures_of_a_regression_are_those_worked_out_by_hand() -> None:
    problem = regression(q=40)
    labels = labels_for(problem)
    found = evaluated(problem, VALUES)
    _, scores = scores_by_hand(problem, VALUES)
    errors = [
        np.sqrt(((values - labels) ** 2).mean()) for values in (problem.said, scores, labels_average(problem, VALUES))
    ]
    assert found.metric == "rmse"
    np.testing.assert_allclose([found.base.value, found.corrected.value, found.memory_only.value], errors, rtol=1e-6)
    assert found.gain.value == pytest.approx(errors[0] - errors[1], rel=1e-6)
    assert found.gain.low < found.gain.value < found.gain.high


@pytest.mark.parametrize("metric", METRICS["classification"])
@pytest.mark.parametrize("setting", SHARES.values(), ids=SHARES)
def test_the_figures_of_shared_residuals_are_those_worked_out_by_hand(metric: Metric, setting: Setting) -> None:
    problem = classification(q=40)
    labels = labels_for(problem)
    base, scores = shared_by_hand(problem, setting)
    mean, margin = mean_and_margin(losses_by_hand(metric, scores, base, labels))
    found = evaluated(problem, setting, metric=metric)
    np.testing.assert_allclose(spread(found.corrected), (1 - mean if metric == "accuracy" else mean, margin), rtol=1e-5)
    whole = evaluated(problem, replace(setting, residual_share=1.0), metric="log_loss")
    assert evaluated(problem, setting, metric="log_loss").corrected != whole.corrected


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("local", [False, True])
def test_shared_residuals_of_values_are_those_worked_out_by_hand(share: float, local: bool) -> None:
    problem, setting = regression(q=40), replace(VALUES, residual_share=share, local=local)
    labels, memory = labels_for(problem), memory_of(problem)
    _, scores = shared_by_hand(problem, setting)
    error = np.sqrt(((scores - labels) ** 2).mean())
    assert evaluated(problem, setting).corrected.value == pytest.approx(error, rel=1e-9)
    said = setting.predict(setting.knn(memory), problem.queries, problem.said)
    np.testing.assert_allclose(said, scores, atol=1e-13)


@pytest.mark.parametrize("setting", SHARES.values(), ids=SHARES)
def test_predicting_with_shared_residuals_is_the_formula_made_valid(problem: Problem, setting: Setting) -> None:
    base, scores = shared_by_hand(problem, setting)
    said = setting.predict(setting.knn(memory_of(problem)), problem.queries, problem.said)
    np.testing.assert_allclose(said, floored(scores, base), atol=1e-13)
    found = corrected_predictions(memory_of(problem), problem.queries, problem.said, setting)
    np.testing.assert_allclose(found.corrected, scores, atol=1e-13)
    np.testing.assert_allclose(found.memory_only, labels_average(problem, setting), atol=1e-13)


@pytest.mark.parametrize("setting", SHARES.values(), ids=SHARES)
def test_a_gate_weighs_the_shared_correction_wherever_it_is_asked(problem: Problem, setting: Setting) -> None:
    gate = Gate(1.0, (2.0, 0.1, -0.2, 0.3), (-2.0, 0.5, 0.1, -0.3), (1.0, 0.8, 0.5), (0.5, 0.3, 0.2))
    gated, memory = replace(setting, gate=gate), memory_of(problem)
    base, scores = shared_by_hand(problem, replace(setting, shrinkage=1.0))
    farthest = reference.neighbors(problem.keys, problem.queries, 7)[0][:, -1]
    wanted = gate(problem.said, scores - base, farthest)
    said = gated.predict(gated.knn(memory), problem.queries, problem.said)
    np.testing.assert_allclose(said, wanted, atol=1e-12)
    found = corrected_predictions(memory, problem.queries, problem.said, gated)
    np.testing.assert_allclose(found.corrected, wanted, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_shrinkage_zero_gives_the_predictions_back_whatever_the_share(problem: Problem, share: float) -> None:
    setting = replace(SHARED, shrinkage=0.0, residual_share=share)
    assert same_bits(setting.predict(setting.knn(memory_of(problem)), problem.queries, problem.said), problem.said)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "share",
    [
        1.0,
        0.3,
    ],
)
def test_predictions_of_fewer_classes_than_the_memorys_are_filled_up(problem: Problem, share: float) -> None:
    memory, setting = memory_of(problem, n_outputs=5), replace(SETTING, residual_share=share)
    knn, padded = setting.knn(memory), np.pad(problem.said, ((0, 0), (0, 1)))
    wanted = setting.predict(knn, problem.queries, padded)
    np.testing.assert_allclose(setting.predict(knn, problem.queries, problem.said), wanted, atol=1e-12)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_no_part_is_refused(share: float) -> None:
    with pytest.raises(InvalidInput, match="residual_share is"):
        evaluated(classification(), replace(SETTING, residual_share=share))


@pytest.mark.parametrize("metric", METRICS["classification"])
def test_shrinkage_zero_has_no_gain_at_all_whatever_the_temperature(metric: Metric) -> None:
    found = evaluated(classification(q=40), replace(SETTING, shrinkage=0.0), metric=metric)
    assert spread(found.gain) == (0, 0)
    assert found.corrected == found.base
    assert not found.helps


def test_intervals_are_paired_by_row() -> None:
    """A base that is bad on many rows, and a memory that mends one in ten: sure, though the figures overlap."""
    random = np.random.default_rng(0)
    keys = random.normal(size=(200, 3))
    labels = np.zeros(200, int)
    said = np.where((np.arange(200) % 2 == 0)[:, None], [0.9, 0.1], [0.1, 0.9])
    memory = Memory.create(dim=3, n_outputs=2)
    mended = np.arange(1, 200, 10)
    memory.append(keys[mended], labels[mended], said[mended])
    memory.append(
        np.delete(keys, mended, 0), np.delete(said.argmax(1), mended), np.delete(np.eye(2)[said.argmax(1)], mended, 0)
    )
    found = evaluate(memory, keys, labels, said, Setting(1, 1.0))
    assert (found.base.value, found.corrected.value) == pytest.approx((0.5, 0.6))
    assert found.base.high > found.corrected.low
    assert found.helps
    assert found.gain.margin < found.base.margin


def test_rows_of_one_group_count_as_one_draw() -> None:
    problem = classification(q=30)
    labels = labels_for(problem)
    single = evaluated(problem)
    four = replace(problem, queries=np.repeat(problem.queries, 4, 0), said=np.repeat(problem.said, 4, 0))
    together = evaluated(four, labels=np.repeat(labels, 4), groups=np.repeat(np.arange(30), 4))
    alone = evaluated(four, labels=np.repeat(labels, 4))
    assert spread(together.gain) == pytest.approx(spread(single.gain))
    assert spread(together.base) == pytest.approx(spread(single.base))
    assert alone.gain.margin == pytest.approx(single.gain.margin / 2, rel=0.05)


def test_groups_widen_the_interval_of_an_rmse_too() -> None:
    problem = regression(q=30)
    labels = labels_for(problem)
    four = replace(problem, queries=np.repeat(problem.queries, 4, 0), said=np.repeat(problem.said, 4, 0))
    together = evaluated(four, VALUES, np.repeat(labels, 4, 0), groups=np.repeat(np.arange(30), 4))
    alone = evaluated(four, VALUES, np.repeat(labels, 4, 0))
    assert together.gain.value == pytest.approx(alone.gain.value)
    assert together.gain.margin > 1.5 * alone.gain.margin


def test_the_memory_only_line_can_have_a_setting_of_its_own() -> None:
    problem, other = classification(q=40), Setting(2, 3.0)
    hits = labels_average(problem, other).argmax(axis=1) == labels_for(problem)
    found = evaluated(problem, memory_only=other)
    assert found.memory_only.value == pytest.approx(hits.mean())
    assert found.corrected == evaluated(problem).corrected


@pytest.mark.parametrize(
    "other",
    [
        replace(SHARED, local=True),
        replace(SHARED, max_distance=1.7),
        replace(SHARED, kernel="kriging", bandwidth=1.3),
        replace(SHARED, n_neighbors=4, local=True),
    ],
    ids=["local", "limited", "kriging", "fewer"],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_memory_only_line_is_weighted_as_its_own_setting_says(other: Setting, swapped: bool) -> None:
    problem = classification()
    setting, alone = (other, SHARED) if swapped else (SHARED, other)
    found = corrected_predictions(memory_of(problem), problem.queries, problem.said, setting, memory_only=alone)
    np.testing.assert_allclose(found.memory_only, labels_average(problem, alone), atol=1e-13)
    np.testing.assert_allclose(found.corrected, shared_by_hand(problem, setting)[1], atol=1e-13)


def test_a_share_of_the_residuals_does_not_move_the_memory_only_line() -> None:
    problem = classification(q=40)
    lines = [evaluated(problem, setting, metric="log_loss").memory_only for setting in (SETTING, SHARED)]
    assert lines[0] == lines[1]


def test_the_memory_only_lines_automatic_local_bandwidth_is_one(problem: Problem) -> None:
    automatic = Setting(7, "auto", local=True)
    found = corrected_predictions(
        memory_of(problem), problem.queries, problem.said, SHARED, memory_only=automatic
    ).memory_only
    np.testing.assert_allclose(found, labels_average(problem, replace(automatic, bandwidth=1.0)), atol=1e-13)


def test_the_memory_only_lines_own_automatic_bandwidth_is_that_of_its_own_neighbours() -> None:
    problem, other = classification(n=200, q=100), Setting(100, "auto")
    measured = replace(other, bandwidth=other.knn(memory_of(problem)).bandwidth)
    narrow = Setting(1, 0.01)
    found = evaluated(problem, narrow, memory_only=other, metric="log_loss")
    wanted = evaluated(problem, narrow, memory_only=measured, metric="log_loss")
    assert found.memory_only == wanted.memory_only


def test_rows_that_are_in_the_memory_can_be_excluded_one_by_one(problem: Problem) -> None:
    memory = memory_of(problem)
    given = (problem.keys, problem.labels, problem.predictions)
    with_itself = evaluate(memory, *given, Setting(1, 1.0))
    without = evaluate(memory, *given, Setting(1, 1.0), exclude=memory.ids)
    assert with_itself.corrected.value == 1
    _, rows = reference.neighbors(problem.keys, problem.keys, 2)
    rest = reference.residuals(problem.labels, problem.predictions)[rows[:, 1]]
    hits = (problem.predictions + rest).argmax(axis=1) == problem.labels
    assert without.corrected.value == pytest.approx(hits.mean())


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (classification, SETTING),
        (regression, VALUES),
        (classification, replace(SHARED, local=True)),
        (regression, replace(VALUES, residual_share=0.0, max_distance=2.0)),
    ],
)
def test_an_empty_memory_changes_nothing(make: Any, setting: Setting) -> None:
    problem = make()
    found = evaluate(empty_memory(problem), problem.queries, labels_for(problem), problem.said, setting)
    assert found.corrected.value == pytest.approx(found.base.value)
    assert found.gain.value == 0
    assert not found.helps


def test_a_class_that_the_base_never_saw_counts_as_missed_by_it() -> None:
    problem = classification(q=20)
    memory = memory_of(problem, n_outputs=5)
    memory.append(problem.queries, np.full(20, 4), problem.said)
    found = evaluate(memory, problem.queries, np.full(20, 4), problem.said, Setting(1, 1.0))
    assert (found.base.value, found.corrected.value) == (0, 1)


def test_half_precision_predictions_are_measured_like_single_ones() -> None:
    problem = classification(q=40)
    half = replace(problem, said=problem.said.astype(np.float16))
    assert evaluated(half, metric="log_loss").base.value == pytest.approx(
        evaluated(problem, metric="log_loss").base.value, abs=1e-3
    )


# ---------------------------------------------------------------------------------------------- words


def test_a_verdict_says_the_gain_in_points_or_that_there_is_none() -> None:
    figure = Estimate(0.5, 0.4, 0.6)
    gain = Evaluation("accuracy", 5000, figure, figure, figure, Estimate(0.029, 0.024, 0.034))
    assert gain.verdict == "gain +2.9 ± 0.5 points on 5,000 held-out rows"
    none = replace(gain, gain=Estimate(0.001, -0.004, 0.006))
    assert none.verdict == "no gain: do not deploy (+0.1 ± 0.5 points on 5,000 held-out rows)"


@pytest.mark.parametrize(("metric", "unit"), [("log_loss", "nats"), ("rmse", "RMSE")])
def test_a_verdict_names_the_unit(metric: Metric, unit: str) -> None:
    figure = Estimate(0.5, 0.4, 0.6)
    given = Evaluation(metric, 10, figure, figure, figure, Estimate(0.25, 0.2, 0.3))
    assert given.verdict == f"gain +0.25 ± 0.05 {unit} on 10 held-out rows"


def test_the_fields_are_those_of_a_result_file() -> None:
    found = evaluated(classification())
    assert found.to_dict() == {
        "metric": "accuracy",
        "base": found.base.value,
        "memory_only": found.memory_only.value,
        "corrected": found.corrected.value,
        "gain": found.gain.value,
        "gain_low": found.gain.low,
        "gain_high": found.gain.high,
        "n_test": 12,
    }


# ---------------------------------------------------------------------------------------------- the door


@pytest.mark.parametrize(
    ("make", "metric"), [(classification, "rmse"), (regression, "accuracy"), (regression, "log_loss")]
)
def test_a_metric_of_another_task_is_refused(make: Any, metric: Metric) -> None:
    with pytest.raises(InvalidInput, match=f"metric is '{metric}', expected"):
        evaluated(make(), VALUES, metric=metric)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"queries": np.zeros((12, 4))}, DimensionMismatch, "dimension 4"),
        ({"queries": np.zeros((11, 5))}, DimensionMismatch, "12 labels for 11 keys"),
        ({"said": np.full((11, 4), 0.25)}, InvalidInput, "11 predictions for 12 held-out keys"),
        ({"said": np.full((12, 4), 2.0)}, InvalidInput, "expected 1"),
        ({"queries": np.full((12, 5), np.nan)}, InvalidInput, "finite"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change: dict[str, ndarray], error: Any, said: str) -> None:
    problem = classification()
    with pytest.raises(error, match=said):
        evaluated(replace(problem, **change), labels=labels_for(problem))


@pytest.mark.parametrize("make", [classification, regression])
def test_one_group_a_row_is_asked_for(make: Any) -> None:
    setting = SETTING if make is classification else VALUES
    with pytest.raises(InvalidInput, match="11"):
        evaluated(make(), setting, groups=np.arange(11))


def test_no_rows_are_refused() -> None:
    problem = classification()
    nothing = replace(problem, queries=problem.queries[:0], said=problem.said[:0])
    with pytest.raises(InvalidInput, match="at least one"):
        evaluated(nothing, labels=np.zeros(0, int))
