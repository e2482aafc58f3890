"""A gate gives valid probabilities, trusts a memory as far as held-out rows say, and says the same everywhere."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray
from scipy.optimize import approx_fprime

from residual_memory import gate as room
from residual_memory.errors import DimensionMismatch, FewerNeighbors, InvalidInput
from residual_memory.evaluation import Metric, Setting, corrected_predictions, evaluate
from residual_memory.gate import Gate, fit_gate
from residual_memory.memory import Memory
from residual_memory.metrics import Estimate, log_loss
from residual_memory.models.torch import ResMemModule, build_memory, observe
from residual_memory.residuals import temper
from residual_memory.tuning import TuningResult, best_temperature, tune_gate
from tests.cli.workshop import as_npz, columns, done, noise, resmem
from tests.models.nets import Mlp, mlp_data
from tests.problems import Problem, classification, empty_memory, memory_of, regression, same_bits, softmax
from tests.test_tuning import clustered
from tests.test_tuning import noise as noise_rows

SETTING = Setting(10, 1.0)
PLAIN = Gate(1.0, (2.0, 0.1, -0.2, 0.3), (-2.0, 0.5, 0.1, -0.3), (1.0, 0.8, 0.5), (0.5, 0.3, 0.2))


def given(n: int = 40, c: int = 4, seed: int = 0) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Predictions, residuals, distances and labels."""
    random = np.random.default_rng(seed)
    said = softmax(random.normal(size=(n, c)))
    residual = 0.3 * random.normal(size=(n, c))
    return said, residual, random.uniform(0, 2, n), random.integers(0, c, n)


def looked_up(problem: Problem, setting: Setting = SETTING) -> tuple[ndarray, ndarray]:
    found = setting.knn(memory_of(problem)).look_up(problem.queries)
    return found.residual, found.farthest


# ---------------------------------------------------------------------------------------------- valid probabilities


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("sureness", [0.1, 1.0, 100.0])
def test_probabilities_are_positive_and_sum_to_one(dtype: type, size: float, sureness: float) -> None:
    _, residual, distances, _ = given()
    said: ndarray = softmax(sureness * np.random.default_rng(1).normal(size=residual.shape)).astype(dtype)
    found = PLAIN(said, (size * residual).astype(dtype), distances)
    assert found.dtype == dtype
    assert found.min() > 0
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


def test_the_distribution_is_that_of_the_formula() -> None:
    said, residual, distances, _ = given(n=5)
    found = PLAIN(said, residual, distances)
    for row in range(5):
        entropy = -(said[row] * np.log(said[row])).sum()
        raw = np.array([distances[row], entropy, np.linalg.norm(residual[row])])
        features = np.concatenate([[1.0], (raw - PLAIN.centres) / PLAIN.scales])
        trust = np.exp(features @ PLAIN.trust)
        mix = 1 / (1 + np.exp(-(features @ PLAIN.abstain)))
        powers = np.exp(PLAIN.sharpness * np.log(said[row]) + trust * residual[row])
        np.testing.assert_allclose(found[row], (1 - mix) * powers / powers.sum() + mix * said[row], rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_where_no_memory_contributes_the_base_is_given_back_bit_for_bit(dtype: type) -> None:
    said, residual, distances, _ = given()
    said, residual = said.astype(dtype), residual.astype(dtype)
    residual[::3] = 0
    found = PLAIN(said, residual, distances)
    assert same_bits(found[::3], said[::3])
    assert (found[1::3] != said[1::3]).any(axis=1).all()


def test_an_empty_memory_is_the_base_bit_for_bit() -> None:
    problem = classification()
    setting = replace(SETTING, gate=PLAIN)
    memory = empty_memory(problem)
    assert same_bits(setting.predict(setting.knn(memory), problem.queries, problem.said), problem.said)
    assert same_bits(corrected_predictions(memory, problem.queries, problem.said, setting).corrected, problem.said)


def test_the_rows_that_are_asked_together_do_not_matter() -> None:
    said, residual, distances, _ = given()
    distances[::4] = np.inf
    whole = PLAIN(said, residual, distances)
    for start in range(0, 40, 3):
        here = slice(start, start + 3)
        np.testing.assert_allclose(PLAIN(said[here], residual[here], distances[here]), whole[here], rtol=1e-12)


def test_too_few_neighbours_are_as_good_as_very_far_ones() -> None:
    said, residual, distances, _ = given()
    missing, far = np.full_like(distances, np.inf), np.full_like(distances, 1e6)
    np.testing.assert_array_equal(PLAIN(said, residual, missing), PLAIN(said, residual, far))


def test_classes_that_only_the_memory_knows_are_probable_where_it_says_so() -> None:
    said, residual, distances, _ = given()
    wide = np.pad(0.1 * residual, ((0, 0), (0, 1)))
    wide[:20, 4] = 1.0
    trusting = replace(PLAIN, trust=(4.0, 0.0, 0.0, 0.0))
    found = trusting(said, wide, distances)
    assert found.shape == (40, 5)
    assert found.min() > 0
    assert found[:20, 4].min() > 1e3 * found[20:, 4].max()
    np.testing.assert_array_equal(found, trusting(np.pad(said, ((0, 0), (0, 1))), wide, distances))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p, r, d, y: (p[1:], r, d, y), "39"),
        (lambda p, r, d, y: (p, r[1:], d, y), "do not fit"),
        (lambda p, r, d, y: (p, r[:, 1:], d, y), "do not fit"),
        (lambda p, r, d, y: (p, r, d[1:], y), "39 distances for 40"),
    ],
)
@pytest.mark.parametrize("use", [fit_gate, lambda *given: PLAIN(*given[:3])], ids=["fit", "call"])
@pytest.mark.usefixtures("unchecked")
def test_arrays_that_do_not_fit_are_refused(change: Any, said: str, use: Any) -> None:
    changed = change(*given())
    with pytest.raises(DimensionMismatch, match=said):
        use(*changed)


@pytest.mark.usefixtures("unchecked")
def test_labels_of_another_length_are_refused() -> None:
    predictions, residual, distances, labels = given()
    with pytest.raises(DimensionMismatch, match="39 labels for 40"):
        fit_gate(predictions, residual, distances, labels[1:])


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape checks off, as for users."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


# ---------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("extra", [0, 1])
def test_the_gradient_is_that_of_finite_differences(seed: int, extra: int) -> None:
    """At random places, and for a class that the base gives no probability to."""
    said, residual, distances, labels = given(n=30, seed=seed)
    base, wide = np.pad(said, ((0, 0), (0, extra))), np.pad(residual, ((0, 0), (0, extra)), constant_values=0.1)
    raw = room._features(base, wide, distances)
    features = room._standard(raw, *room._centres_and_scales(raw))
    here = np.array(room.START) + 0.5 * np.random.default_rng(seed).normal(size=len(room.START))
    arguments = (base, wide, features, labels)
    _, slope = room._loss_and_slope(here, *arguments)
    wanted = approx_fprime(here, lambda parameters: room._loss_and_slope(parameters, *arguments)[0], 1e-7)
    np.testing.assert_allclose(slope, wanted, atol=2e-6)


def test_the_loss_that_is_minimised_is_the_log_loss_of_what_the_gate_says() -> None:
    said, residual, distances, labels = given()
    raw = room._features(said, residual, distances)
    features = room._standard(raw, np.array(PLAIN.centres), np.array(PLAIN.scales))
    parameters = np.array([PLAIN.sharpness, *PLAIN.trust, *PLAIN.abstain])
    loss, _ = room._loss_and_slope(parameters, said, residual, features, labels)
    penalty = room.PENALTY * ((parameters - room.START) ** 2).sum()
    assert loss - penalty == pytest.approx(log_loss(PLAIN(said, residual, distances), labels))


def test_a_fitted_gate_finds_the_trust_by_which_the_labels_were_drawn() -> None:
    """Little by each residual where the memory is far, much where it is near."""
    said, residual, distances, _ = given(n=4000)
    trust = np.where(distances > 1, 0.5, 6.0)
    right = softmax(np.log(said) + trust[:, None] * residual)
    labels = (right.cumsum(axis=1) < np.random.default_rng(1).random((4000, 1))).sum(axis=1)
    gate = fit_gate(said, residual, distances, labels)
    losses = [log_loss(probabilities, labels) for probabilities in (right, gate(said, residual, distances), said)]
    assert losses[1] < losses[0] + 0.15 * (losses[2] - losses[0])
    assert gate.abstain[1] > 1
    others = [
        replace(gate, sharpness=1.3 * gate.sharpness),
        replace(gate, trust=(gate.trust[0] + 0.5, *gate.trust[1:])),
        replace(gate, abstain=(gate.abstain[0], 0.0, *gate.abstain[2:])),
    ]
    assert all(losses[1] < log_loss(other(said, residual, distances), labels) for other in others)


def test_the_order_of_the_rows_does_not_matter() -> None:
    problem, labels = clustered()
    residual, distances = looked_up(problem)
    order = np.random.default_rng(0).permutation(len(labels))
    plain = fit_gate(problem.said, residual, distances, labels)
    permuted = fit_gate(problem.said[order], residual[order], distances[order], labels[order])
    wanted = plain(problem.said, residual, distances)
    np.testing.assert_allclose(permuted(problem.said, residual, distances), wanted, atol=2e-3)


@pytest.mark.parametrize("distances", [np.full(200, np.inf), np.ones(200), np.where(np.arange(200) % 2, 1.0, np.inf)])
def test_features_that_say_nothing_or_are_missing_leave_finite_numbers(distances: ndarray) -> None:
    problem, labels = clustered()
    residual, _ = looked_up(problem)
    gate = fit_gate(problem.said, residual, distances, labels)
    assert np.isfinite([gate.sharpness, *gate.trust, *gate.abstain, *gate.centres, *gate.scales]).all()
    assert log_loss(gate(problem.said, residual, distances), labels) < 0.5 * log_loss(problem.said, labels)


# ---------------------------------------------------------------------------------------------- tuning


@pytest.mark.parametrize("metric", ["accuracy", "log_loss"])
def test_a_memory_that_helps_is_trusted(metric: Metric) -> None:
    problem, labels = clustered()
    memory = memory_of(problem)
    found = tune_gate(memory, problem.queries, labels, problem.said, SETTING, metric=metric)
    assert found.helps
    assert found.best.gate is not None
    assert replace(found.best, gate=None) == SETTING
    again = evaluate(memory, problem.queries, labels, problem.said, found.best, metric=metric)
    assert again.corrected.value == pytest.approx(found.corrected.value, abs=0.1)


def test_a_gate_is_better_than_the_base_at_its_best_temperature() -> None:
    problem, labels = clustered()
    found = tune_gate(memory_of(problem), problem.queries, labels, problem.said, SETTING, metric="log_loss")
    calm = log_loss(temper(problem.said, best_temperature(problem.said, labels)), labels)
    assert found.base.value == pytest.approx(calm, abs=0.02)
    assert found.base.value < log_loss(problem.said, labels) - 0.1
    assert found.corrected.value < 0.5 * calm
    assert found.gain.low > 0


def test_a_gate_trusts_the_near_and_not_the_far() -> None:
    """Half of the queries lie where the memory knows nothing."""
    problem, labels = clustered()
    far = np.arange(200) % 2 == 0
    queries = np.where(far[:, None], problem.queries + 60, problem.queries)
    lost = replace(problem, queries=queries)
    residual, distances = looked_up(lost)
    gate = fit_gate(lost.said, residual, distances, labels)
    found = gate(lost.said, residual, distances)
    ungated = SETTING.predict(SETTING.knn(memory_of(lost)), queries, lost.said)
    assert log_loss(found[far], labels[far]) < log_loss(ungated[far], labels[far])
    assert log_loss(found[~far], labels[~far]) < 0.5 * log_loss(lost.said[~far], labels[~far])


@pytest.mark.parametrize("metric", ["accuracy", "log_loss"])
@pytest.mark.parametrize("seed", range(2))
def test_a_memory_of_pure_noise_gets_no_trust(metric: Metric, seed: int) -> None:
    problem, labels = noise_rows(seed=seed)
    found = tune_gate(memory_of(problem), problem.queries, labels, problem.said, SETTING, metric=metric)
    assert not found.helps
    assert found.best == SETTING.without_memory()
    assert (found.best.shrinkage, found.best.gate) == (0, None)
    assert found.verdict.startswith("no gain: do not deploy")


def test_an_overconfident_base_gives_the_memory_no_credit_for_its_calibration() -> None:
    problem, labels = noise_rows(sureness=4.0)
    found = tune_gate(memory_of(problem), problem.queries, labels, problem.said, SETTING, metric="log_loss")
    assert found.base.value < log_loss(problem.said, labels) - 0.3
    assert not found.helps


def test_a_setting_of_no_shrinkage_gets_some_with_its_gate() -> None:
    """Shrinkage 0 is the base bit for bit, so a gate that helps would have no effect beside it."""
    problem, labels = clustered()
    memory = memory_of(problem)
    found = tune_gate(memory, problem.queries, labels, problem.said, replace(SETTING, shrinkage=0.0))
    assert found.helps
    assert evaluate(memory, problem.queries, labels, problem.said, found.best).helps


def test_classes_that_the_model_never_saw_are_gated_too() -> None:
    problem, labels = clustered()
    labels, problem = np.where(labels == 3, 4, labels), replace(problem, labels=np.where(problem.labels == 3, 4, 0))
    memory = empty_memory(problem, n_outputs=5)
    memory.append(problem.keys, problem.labels, problem.predictions)
    found = tune_gate(memory, problem.queries, labels, problem.said, SETTING, metric="log_loss")
    assert found.helps
    said = found.best.predict(found.best.knn(memory), problem.queries, np.pad(problem.said, ((0, 0), (0, 1))))
    assert said.min() > 0
    assert (said.argmax(axis=1)[labels == 4] == 4).mean() > 0.9


def test_rows_left_out_are_as_if_they_were_not_there() -> None:
    problem, _ = noise_rows()
    memory = memory_of(problem)
    own = (problem.keys, problem.labels, problem.predictions)
    assert tune_gate(memory, *own, replace(SETTING, n_neighbors=1)).corrected.value == 1
    assert not tune_gate(memory, *own, SETTING, exclude=memory.ids).helps


def test_a_gate_on_kriging_helps_as_well() -> None:
    problem, labels = clustered()
    kriging = Setting(10, 2.0, kernel="kriging", nugget=0.2)
    found = tune_gate(memory_of(problem), problem.queries, labels, problem.said, kriging)
    assert found.helps
    assert found.best.kernel == "kriging"


def test_documents_are_never_split_and_widen_the_interval() -> None:
    problem, labels = clustered()
    rows = (memory_of(problem), problem.queries, labels, problem.said, SETTING)
    twenty = tune_gate(*rows, groups=np.arange(200) // 10, metric="log_loss")
    assert twenty.gain.margin != tune_gate(*rows, metric="log_loss").gain.margin


def test_the_seed_draws_the_folds_alone() -> None:
    problem, labels = clustered()
    rows = (memory_of(problem), problem.queries, labels, problem.said, SETTING)
    first, second = (tune_gate(*rows, metric="log_loss", seed=seed, n_folds=2) for seed in (1, 2))
    assert first.best == second.best
    assert first.corrected != second.corrected


def test_a_regression_is_refused() -> None:
    problem = regression()
    with pytest.raises(InvalidInput, match="memory is of a regression"):
        tune_gate(memory_of(problem), problem.queries, np.zeros((12, 2)), problem.said, SETTING)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"metric": "rmse"}, InvalidInput, "metric is 'rmse'"),
        ({"n_folds": 1}, InvalidInput, "n_folds is 1"),
        ({"groups": np.arange(199)}, DimensionMismatch, "199"),
        ({"exclude": np.arange(199)}, InvalidInput, "199"),
    ],
)
def test_options_that_cannot_be_used_are_refused_by_name(change: dict[str, Any], error: Any, said: str) -> None:
    problem, labels = clustered()
    with pytest.raises(error, match=said):
        tune_gate(memory_of(problem), problem.queries, labels, problem.said, SETTING, **change)


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_the_best_temperature_undoes_what_was_done(true: float) -> None:
    random = np.random.default_rng(0)
    right = softmax(1.5 * random.normal(size=(4000, 4)))
    labels = (right.cumsum(axis=1) < random.random((4000, 1))).sum(axis=1)
    assert best_temperature(temper(right, 1 / true), labels) == pytest.approx(true, rel=0.08)


def test_the_best_temperature_is_the_best_of_many_to_a_hundredth() -> None:
    problem, labels = clustered()
    tried = np.exp(np.linspace(np.log(0.21), np.log(4.9), 200))
    losses = [log_loss(temper(problem.said, float(temperature)), labels) for temperature in tried]
    assert best_temperature(problem.said, labels) == pytest.approx(tried[np.argmin(losses)], rel=0.02)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_best_temperature_of_predictions_with_zeros_is_found(dtype: type) -> None:
    """Of a class that the base never saw, or of a base so sure that a small temperature leaves zeros."""
    sure: ndarray = temper(given(n=200)[0], 0.03).astype(dtype)
    wide = np.pad(sure, ((0, 0), (0, 1)))
    labels = given(n=200)[3]
    assert best_temperature(wide, labels) == pytest.approx(best_temperature(sure, labels), rel=0.02)
    assert best_temperature(sure, labels) > 4.9


# ---------------------------------------------------------------------------------------------- kept and read back


def test_a_gate_survives_json_to_the_last_bit() -> None:
    problem, labels = clustered()
    residual, distances = looked_up(problem)
    gate = fit_gate(problem.said, residual, distances, labels)
    assert Gate.from_dict(json.loads(json.dumps(gate.to_dict()))) == gate
    setting = replace(SETTING, gate=gate)
    assert Setting.from_dict(json.loads(json.dumps(setting.to_dict()))) == setting


def test_a_gate_is_kept_with_a_memory_on_disk(tmp_path: Path) -> None:
    setting = replace(SETTING, gate=PLAIN)
    with memory_of(classification(), tmp_path / "memory") as memory:
        memory.save_setting(setting.to_dict())
    saved = Memory.open(tmp_path / "memory").setting
    assert saved is not None
    assert Setting.from_dict(saved) == setting


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trust": (1.0, 2.0)}, r"lengths \[2, 4, 3, 3\], expected 4, 4, 3 and 3"),
        ({"scales": ()}, r"lengths \[4, 4, 3, 0\]"),
        ({"trust": 2.0}, "a gate has sharpness, trust"),
        ({"trust": "abcd"}, "a gate has sharpness, trust"),
        ({"abstain": None}, "a gate has sharpness, trust"),
        ({"sharpness": "sharp"}, "a gate has sharpness, trust"),
        ({"sharpnes": (1.0,)}, "a gate has sharpness, trust"),
    ],
)
def test_wrong_lengths_names_and_values_are_refused(change: dict[str, Any], said: str) -> None:
    values = {**PLAIN.to_dict(), **change}
    with pytest.raises(InvalidInput, match=said):
        Gate.from_dict(values)
    with pytest.raises(InvalidInput, match=said):
        Setting.from_dict({"gate": values})


@pytest.mark.parametrize("name", ["sharpness", "trust", "abstain", "centres", "scales"])
def test_a_part_that_is_missing_is_refused(name: str) -> None:
    values = {part: value for part, value in PLAIN.to_dict().items() if part != name}
    with pytest.raises(InvalidInput, match=f"a gate has sharpness, trust.*{name}"):
        Gate.from_dict(values)


def test_a_gate_of_nothing_is_no_gate() -> None:
    with pytest.raises(InvalidInput, match="a gate has sharpness, trust"):
        Setting.from_dict({"gate": {}})
    assert Setting.from_dict({"gate": None}).gate is None


# ---------------------------------------------------------------------------------------------- wherever it is used


def test_without_memory_there_is_no_gate() -> None:
    setting = replace(SETTING, gate=PLAIN).without_memory()
    assert (setting.gate, setting.shrinkage, setting.temperature) == (None, 0, 1)


@pytest.mark.parametrize("n", [60, 6])
@pytest.mark.filterwarnings("ignore::residual_memory.errors.FewerNeighbors")
def test_evaluating_is_predicting(n: int) -> None:
    """Also with fewer rows than neighbours: in both the k-th is not there."""
    problem = classification(n=n)
    memory, labels = memory_of(problem), np.arange(12) % 4
    setting = replace(SETTING, gate=PLAIN)
    said = setting.predict(setting.knn(memory), problem.queries, problem.said)
    found = corrected_predictions(memory, problem.queries, problem.said, setting)
    assert found.gated
    np.testing.assert_allclose(found.corrected, said, rtol=1e-12)
    measured = evaluate(memory, problem.queries, labels, problem.said, setting, metric="log_loss")
    assert measured.corrected.value == pytest.approx(log_loss(said, labels))


def test_the_shrinkage_beside_a_gate_has_no_effect_unless_it_is_zero() -> None:
    problem = classification()
    memory = memory_of(problem)
    said = [
        setting.predict(setting.knn(memory), problem.queries, problem.said)
        for setting in (replace(SETTING, gate=PLAIN, shrinkage=amount) for amount in (1.0, 0.3, 0.0))
    ]
    assert same_bits(said[0], said[1])
    assert same_bits(said[2], problem.said)


def test_a_gate_fitted_before_rows_were_forgotten_says_the_same_everywhere() -> None:
    problem, labels = clustered()
    memory = memory_of(problem)
    setting = tune_gate(memory, problem.queries, labels, problem.said, SETTING).best
    memory.forget(memory.ids[5:])
    with pytest.warns(FewerNeighbors):
        knn = setting.knn(memory)
    whole = setting.predict(knn, problem.queries, problem.said)
    with pytest.warns(FewerNeighbors):
        evaluated = corrected_predictions(memory, problem.queries, problem.said, setting).corrected
    np.testing.assert_allclose(evaluated, whole, rtol=1e-12)


def test_a_module_gives_the_logarithm_of_what_evaluation_measures() -> None:
    torch.manual_seed(0)
    model, data, held = Mlp().eval(), mlp_data(60), mlp_data(40, seed=1)
    memory = build_memory(model, data, None, verbose=False)
    setting = Setting(5, 0.7, gate=PLAIN)
    memory.save_setting(setting.to_dict())
    seen = observe(model, held, memory, verbose=False)
    said = np.asarray(seen.predictions)
    measured = evaluate(memory, seen.keys, seen.labels, said, setting, metric="log_loss")
    logs = ResMemModule(model, memory)(held.inputs)
    assert -logs[torch.arange(40), held.labels].mean().item() == pytest.approx(measured.corrected.value, rel=1e-4)
    found = corrected_predictions(memory, seen.keys, said, setting).corrected
    np.testing.assert_allclose(logs.exp(), found, rtol=1e-4)


def test_the_command_line_fits_saves_predicts_and_evaluates_with_a_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    held = columns(60, 4)
    as_npz(Path("train.npz"), columns(30, 3))
    as_npz(Path("held.npz"), held)
    done("build", "mem", "--data", "train.npz")
    tuned = done("tune", "mem", "--kernel", "kriging", "--gate", "--data", "held.npz", "--json").json["setting"]
    saved = Memory.open("mem").setting
    assert saved is not None
    setting = Setting.from_dict(saved)
    assert setting.gate is not None
    assert setting.kernel == "kriging"
    assert Setting.from_dict(tuned) == setting
    words = ("evaluate", "mem", "--data", "held.npz")
    evaluated = done(*words, "--metric", "log_loss", "--json").json
    done("predict", "mem", "--data", "held.npz", "--out", "out.npz")
    with np.load("out.npz") as out:
        assert log_loss(out["corrected"], held["labels"]) == pytest.approx(evaluated["corrected"], rel=1e-5)
    assert "gated" in done(*words).out
    done("info", "mem")
    done("explain", "mem", "--data", "held.npz", "--row", 0)
    lighter = done(*words, "--shrinkage", 0.5, "--json").json["setting"]
    assert (lighter["gate"], lighter["shrinkage"]) == (None, 0.5)
    assert "'kriging'" in resmem("tune", "mem", "--data", "held.npz", "--kernel", "krigging").err


def test_the_command_line_keeps_the_setting_where_the_gate_alone_does_not_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    as_npz(Path("train.npz"), columns(20, 3))
    as_npz(Path("held.npz"), columns(60, 4))
    done("build", "mem", "--data", "train.npz")
    plain = done("tune", "mem", "--data", "held.npz", "--json").json

    def helpless(*rows: Any, **options: Any) -> TuningResult:
        found = tune_gate(*rows, **options)
        return replace(found, gain=Estimate(0.0, -1.0, 1.0), best=found.best.without_memory())

    monkeypatch.setattr("residual_memory.tuning.tune_gate", helpless)
    ran = done("tune", "mem", "--data", "held.npz", "--gate", "--json")
    assert ran.json == plain
    assert "the gate is left out, no gain" in ran.err


def test_the_command_line_leaves_the_base_alone_where_nothing_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    as_npz(Path("train.npz"), noise(8, 3))
    as_npz(Path("held.npz"), noise(60, 4))
    done("build", "mem", "--data", "train.npz")
    ran = resmem("tune", "mem", "--data", "held.npz", "--gate", "--json")
    assert ran.code == 1
    assert (ran.json["setting"]["gate"], ran.json["setting"]["shrinkage"]) == (None, 0)
