"""The audit: attacks that succeed where a memory tells, fail where it has nothing to tell, and a cap in between."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from numpy import ndarray

from residual_memory.errors import DimensionMismatch, HeldRows, InvalidInput
from residual_memory.evaluation import Setting, evaluate
from residual_memory.gate import Gate
from residual_memory.memory import Memory, share_held
from residual_memory.metrics import Estimate
from residual_memory.privacy import MAX_WEIGHTS, PrivacyReport, audit_privacy
from residual_memory.tuning import tune_gate
from tests import reference
from tests.problems import Problem, classification, memory_of, regression

SETTING = Setting(n_neighbors=7, bandwidth=0.5, temperature=1.6, shrinkage=0.7)
VALUES = Setting(n_neighbors=7, bandwidth=0.5, shrinkage=0.7)
CAPS = (1.0, 0.3, 0.05)


def labels_for(problem: Problem) -> ndarray:
    random = np.random.default_rng(5)
    if problem.task == "regression":
        return random.normal(size=problem.said.shape)
    return random.integers(0, problem.said.shape[1], len(problem.queries))


def audited(
    problem: Problem, setting: Setting = SETTING, memory: Memory | None = None, **options: Any
) -> PrivacyReport:
    memory = memory_of(problem) if memory is None else memory
    options = {"max_weights": CAPS, **options}
    return audit_privacy(memory, problem.queries, labels_for(problem), problem.said, setting, **options)


def area(members: ndarray, others: ndarray) -> float:
    """By scikit-learn."""
    truth = np.repeat([1, 0], [len(members), len(others)])
    return float(sklearn.metrics.roc_auc_score(truth, np.concatenate([members, others])))


def by_hand(problem: Problem, setting: Setting, cap: float) -> tuple[ndarray, ndarray, ndarray]:
    """Base, tempered base and valid corrected probabilities of the true labels: members first, then the others."""
    keys = np.concatenate([problem.keys, problem.queries])
    said = np.concatenate([problem.predictions, problem.said])
    labels = np.concatenate([problem.labels, labels_for(problem)])
    rest = reference.residuals(problem.labels, problem.predictions, setting.temperature)
    distances, rows = reference.neighbors(problem.keys, keys, setting.n_neighbors)
    weights = np.minimum(reference.weights(distances, float(setting.bandwidth), setting.kernel), cap)
    base = reference.tempered(said, setting.temperature)
    scores = base + setting.shrinkage * np.einsum("qk,qkc->qc", weights, rest[rows])
    floored = np.maximum(scores, 0.1 * base)
    corrected = floored / floored.sum(axis=1, keepdims=True)
    own = np.arange(len(labels)), labels
    return said[own], base[own], corrected[own]


@pytest.mark.parametrize("place", range(len(CAPS)))
def test_the_areas_are_those_of_the_attacks_by_hand(place: int) -> None:
    problem, n = classification(60, 40), 60
    report = audited(problem)
    said, base, corrected = by_hand(problem, SETTING, CAPS[place])
    assert report.auc_base.value == pytest.approx(area(said[:n], said[n:]), abs=1e-9)
    cap = report.caps[place]
    assert cap.max_weight == CAPS[place]
    assert cap.auc_corrected.value == pytest.approx(area(corrected[:n], corrected[n:]), abs=1e-9)
    ways = [area(way[:n], way[n:]) for way in (corrected, corrected - base, np.log(corrected / base))]
    assert cap.auc_calibrated.value == pytest.approx(max(ways, key=lambda way: abs(way - 0.5)), abs=1e-9)


def test_regression_is_attacked_by_its_errors() -> None:
    problem, n = regression(60, 40), 60
    report = audited(problem, VALUES)
    keys = np.concatenate([problem.keys, problem.queries])
    said = np.concatenate([problem.predictions, problem.said])
    labels = np.concatenate([problem.labels, labels_for(problem)])
    distances, rows = reference.neighbors(problem.keys, keys, 7)
    rest = problem.labels - problem.predictions
    base = np.abs(said - labels).mean(axis=1)
    assert report.metric == "rmse"
    assert report.auc_base.value == pytest.approx(area(-base[:n], -base[n:]), abs=1e-9)
    for cap in report.caps:
        weights = np.minimum(reference.weights(distances, 0.5), cap.max_weight)
        corrected = np.abs(said + 0.7 * np.einsum("qk,qkc->qc", weights, rest[rows]) - labels).mean(axis=1)
        assert cap.auc_corrected.value == pytest.approx(area(-corrected[:n], -corrected[n:]), abs=1e-9)
        ways = [area(way[:n], way[n:]) for way in (-corrected, base - corrected)]
        assert cap.auc_calibrated.value == pytest.approx(max(ways, key=lambda way: abs(way - 0.5)), abs=1e-9)


def test_without_a_cap_the_accuracy_is_that_of_an_evaluation() -> None:
    problem = classification(60, 40)
    wanted = evaluate(memory_of(problem), problem.queries, labels_for(problem), problem.said, SETTING)
    report = audited(problem)
    assert report.base == wanted.base
    assert (report.caps[0].corrected, report.caps[0].gain) == (wanted.corrected, wanted.gain)
    assert (report.n_members, report.n_rows) == (60, 40)


GATE = Gate(0.9, (0.5, 0.2, -0.1, 0.3), (-1.0, 0.1, 0.2, -0.2), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0))
SETTINGS = {
    "plain": SETTING,
    "shared": replace(SETTING, residual_share=0.4),
    "gated": replace(
        SETTING, gate=Gate(0.9, (0.5, 0.2, -0.1, 0.3), (-1.0, 0.1, 0.2, -0.2), (0.5, 1.0, 1.0), (1.0,) * 3)
    ),
    "kriging": replace(SETTING, kernel="kriging", bandwidth=1.3, shrinkage=1.5),
    "local": replace(SETTING, kernel="gaussian", local=True),
    "few rows": replace(SETTING, n_neighbors=90),
}


@pytest.mark.filterwarnings("ignore:n_neighbors is 90")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_cap_is_the_one_of_the_regressor(name: str) -> None:
    """The weights are capped after one search; `ResidualKNN(max_weight=…)` is asked once a cap."""
    problem, setting = classification(60, 40), SETTINGS[name]
    memory, labels = memory_of(problem), labels_for(problem)
    report = audited(problem, setting, memory)
    for cap in report.caps:
        knn = setting.knn(memory, max_weight=cap.max_weight)
        members = setting.predict(knn, problem.keys, problem.predictions)[np.arange(60), problem.labels]
        given = setting.predict(knn, problem.queries, problem.said)
        others = given[np.arange(40), labels]
        assert cap.auc_corrected.value == pytest.approx(area(members, others), abs=1e-9)
        assert cap.corrected.value == pytest.approx((given.argmax(axis=1) == labels).mean())


def test_a_row_that_finds_itself_is_told_from_others_and_a_cap_hides_it() -> None:
    """Random labels: all that helps a member is its own row."""
    problem = classification(400, 400, c=10)
    report = audited(problem, replace(SETTING, bandwidth=0.2, shrinkage=1.0))
    loose, tight = report.caps[0], report.caps[-1]
    assert report.auc_base.low < 0.5 < report.auc_base.high
    assert loose.auc_corrected.low > 0.8
    assert loose.auc_calibrated.low > 0.9
    assert tight.auc_corrected.high < loose.auc_corrected.low
    assert tight.auc_calibrated.high < loose.auc_calibrated.low
    assert report.auc_nearest == Estimate(1.0, 1.0, 1.0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_how_numbers_are_stored_tells_nothing(dtype: str) -> None:
    """A base that says the same of every row, which no type holds exactly: members have no rounder numbers."""
    problem = classification(300, 300, c=3)
    third = np.full((300, 3), 1 / 3)
    same = replace(problem, predictions=third, said=third)
    memory = memory_of(same, key_dtype=dtype, prediction_dtype=dtype)
    assert audited(same, memory=memory).auc_base == Estimate(0.5, 0.5, 0.5)
    values = regression(300, 300)
    zero = replace(values, predictions=values.labels, said=labels_for(values))  # a base without an error
    memory = memory_of(zero, key_dtype=dtype, prediction_dtype=dtype)
    assert audited(zero, VALUES, memory).auc_base == Estimate(0.5, 0.5, 0.5)


def test_others_that_are_in_the_memory_too_cannot_be_told_from_members() -> None:
    """Keys a hair beside the stored ones, with the same labels and predictions: the audit sees no difference."""
    problem = classification(400, 400, seed=1)
    memory = memory_of(problem)
    near = problem.keys * (1 + 1e-9)
    report = audit_privacy(memory, near, problem.labels, problem.predictions, SETTING)
    for figure in (report.auc_base, *(cap.auc_corrected for cap in report.caps)):
        assert figure.value == pytest.approx(0.5, abs=0.01)


def test_without_shrinkage_there_is_nothing_to_see_but_the_base() -> None:
    report = audited(classification(60, 40), SETTING.without_memory())
    for cap in report.caps:
        assert cap.auc_corrected == cap.auc_calibrated == report.auc_base
        assert cap.gain.value == 0


def test_members_are_drawn_by_the_seed_and_are_not_forgotten_rows() -> None:
    problem = classification(200, 40)
    memory = memory_of(problem)
    first, again, other = (audited(problem, memory=memory, n_members=50, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first.n_members == 50
    memory.forget(memory.ids[:190])
    assert audited(problem, memory=memory).n_members == 10


def test_groups_widen_the_intervals_of_both_sides() -> None:
    problem = classification(64, 40)
    alone = audited(problem)
    of_others = audited(problem, groups=np.arange(40) // 20)
    of_members = audited(problem, memory=memory_of(problem, groups=np.arange(64) // 32))
    for report in (of_others, of_members):
        assert report.auc_base.value == alone.auc_base.value
        assert report.auc_base.margin != alone.auc_base.margin
    assert of_others.caps[0].gain.margin != alone.caps[0].gain.margin
    assert of_members.caps[0].gain == alone.caps[0].gain


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_stored_keys_find_themselves_however_they_are_stored(metric: str, dtype: str, tmp_path: Path) -> None:
    problem = classification(300, 100)
    memory = memory_of(problem, tmp_path / "memory", key_dtype=dtype, metric=metric)
    assert audited(problem, memory=memory).auc_nearest.value > 0.999


def test_held_out_rows_that_the_memory_holds_are_refused_or_pointed_out() -> None:
    problem = classification(100, 40)
    memory = memory_of(problem)

    def with_held(n: int) -> Problem:
        return replace(problem, queries=np.concatenate([problem.keys[:n], problem.queries[n:]]))

    assert share_held(memory, with_held(10).queries) == 0.25
    with pytest.warns(HeldRows, match="25 % of the held-out keys"):
        audited(with_held(10), memory=memory)
    with pytest.raises(InvalidInput, match="75 % of the held-out rows are in the memory"):
        audited(with_held(30), memory=memory)
    memory.forget(memory.ids[:30])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audited(with_held(30), memory=memory)  # forgotten rows are not held


def report_with(problem: Problem | None = None, setting: Setting = SETTING, **areas: float) -> PrivacyReport:
    """A real report whose caps have these areas."""
    caps = tuple(float(name.removeprefix("at_")) / 100 for name in areas)
    report = audited(problem or classification(60, 40), setting, max_weights=caps)
    given = zip(report.caps, areas.values(), strict=True)
    changed = (replace(cap, auc_calibrated=Estimate(area, area - 0.01, area + 0.01)) for cap, area in given)
    return replace(report, caps=tuple(changed))


def test_the_verdict_sets_the_loosest_cap_against_the_one_that_hides_most() -> None:
    """An area of 0.28 tells more than one of 0.57."""
    report = report_with(at_5=0.28, at_100=0.9, at_10=0.57)
    loose, best = report.caps[1], report.caps[2]
    assert "AUC 0.900 ± 0.010 at max_weight 1," in report.verdict
    assert "at best 0.570 ± 0.010 at 0.1," in report.verdict
    assert f"{100 * best.corrected.value:.1f} % instead of {100 * loose.corrected.value:.1f} %" in report.verdict
    assert "at best" not in report_with(at_100=0.9).verdict
    assert "at best" not in report_with(at_100=0.5, at_5=0.3).verdict


def test_the_verdict_of_a_regression_is_in_its_unit() -> None:
    report = report_with(regression(60, 40), VALUES, at_100=0.9, at_10=0.6)
    loose, tight = (f"{cap.corrected.value:.4g}" for cap in report.caps)
    assert report.verdict.endswith(f"RMSE {tight} instead of {loose}")


def test_a_report_as_a_dictionary_is_json_with_every_interval() -> None:
    report = audited(classification(60, 40))
    found = json.loads(json.dumps(report.to_dict()))
    assert found["auc_nearest_high"] == report.auc_nearest.high
    assert [cap["max_weight"] for cap in found["caps"]] == list(CAPS)
    assert found["caps"][1]["auc_calibrated_low"] == report.caps[1].auc_calibrated.low
    assert found["n_members"] == 60


def test_usual_caps_begin_without_one() -> None:
    assert MAX_WEIGHTS[0] == 1
    assert list(MAX_WEIGHTS) == sorted(MAX_WEIGHTS, reverse=True)


def test_a_tuned_gate_is_audited_as_it_predicts() -> None:
    problem = classification(300, 200)
    memory, labels = memory_of(problem), labels_for(problem)
    best = tune_gate(memory, problem.queries, labels, problem.said, SETTING).best
    report = audited(problem, replace(best, shrinkage=1.0), memory)
    assert 0 <= report.caps[0].auc_calibrated.value <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_weights": ()}, "max_weights is empty"),
        ({"max_weights": (1.0, 0.0)}, "max_weight is 0"),
        ({"max_weights": (1.5,)}, "max_weight is 1.5"),
        ({"n_members": 0}, "n_members is 0"),
        ({"n_members": 1}, "at least two scores"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        audited(classification(60, 40), **options)


def test_rows_that_do_not_fit_are_refused() -> None:
    problem = classification(60, 40)
    with pytest.raises(DimensionMismatch, match="groups have shape"):
        audited(problem, groups=np.arange(3))
    with pytest.raises(DimensionMismatch):
        audited(replace(problem, queries=problem.queries[:, :2]), memory=memory_of(problem))
    with pytest.raises(InvalidInput, match="holds 0 rows"):
        audited(problem, memory=memory_of(problem.rows(slice(0, 0))))
    with pytest.raises(InvalidInput, match="top-m"):
        audited(problem, memory=memory_of(problem, residuals="top-m", prediction_dtype="log8"))
