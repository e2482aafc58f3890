from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy import ndarray

from residual_memory import correction
from residual_memory.correction import ResidualKNN, correct, to_probabilities
from residual_memory.errors import DimensionMismatch, InvalidInput
from residual_memory.evaluation import MEMORY_ONLY_MIX, Metric, Setting, evaluate
from residual_memory.gate import fit_gate
from residual_memory.indexes.base import nearest
from residual_memory.memory import Memory
from residual_memory.residuals import temper, top_m
from residual_memory.tuning import N_NEIGHBORS, SHRINKAGES, TEMPERATURES, TuningResult, tune, tune_gate
from tests import reference
from tests.problems import Problem, classification, empty_memory, memory_of, regression, softmax

GRID: dict[str, Any] = {
    "n_neighbors": (1, 3, 10),
    "bandwidths": (0.1, 0.5),
    "temperatures": (1.0, 1.7),
    "shrinkages": (0.0, 0.3, 0.6, 1.0),
}


def clustered(n: int = 300, q: int = 200, seed: int = 0) -> tuple[Problem, ndarray]:
    """Clusters of one class each; the base knows eight of twenty and is wrong about the others."""
    random = np.random.default_rng(seed)
    centers, cluster = 6 * random.normal(size=(20, 3)), np.arange(20)
    off = np.where(cluster < 8, 0, 1 + cluster // 4 % 3)  # each class as often taken for each other one
    owner = random.integers(0, 20, n + q)
    keys = centers[owner] + 0.3 * random.normal(size=(n + q, 3))
    labels = owner % 4
    told = (labels + off[owner]) % 4
    predictions = softmax(2.0 * np.eye(4)[told] + 0.3 * random.normal(size=(n + q, 4)))
    return Problem(keys[:n], labels[:n], predictions[:n], keys[n:], predictions[n:]), labels[n:]


def noise(n: int = 200, q: int = 150, seed: int = 0, sureness: float = 1.0) -> tuple[Problem, ndarray]:
    """Labels drawn from the base's own probabilities: its residuals have nothing to do with the keys.

    With `sureness` above 1 the base says more than it knows.
    """
    random = np.random.default_rng(seed)
    logits = 1.5 * random.normal(size=(n + q, 4))
    labels = (softmax(logits).cumsum(axis=1) < random.random((n + q, 1))).sum(axis=1)
    keys, said = random.normal(size=(n + q, 3)), softmax(sureness * logits)
    return Problem(keys[:n], labels[:n], said[:n], keys[n:], said[n:]), labels[n:]


def smooth_values(n: int = 300, q: int = 150, seed: int = 0) -> tuple[Problem, ndarray]:
    """A linear base of a curved function."""
    random = np.random.default_rng(seed)
    keys = random.uniform(-2, 2, size=(n + q, 2))
    truth = np.stack([np.sin(2 * keys[:, 0]) + keys[:, 1], keys[:, 0] * keys[:, 1]], axis=1)
    labels, said = truth + 0.1 * random.normal(size=truth.shape), np.stack([keys[:, 1], 0 * keys[:, 0]], axis=1)
    return Problem(keys[:n], labels[:n], said[:n], keys[n:], said[n:]), labels[n:]


def shared_values(known: float, n: int = 200, q: int = 100, seed: int = 0) -> tuple[Problem, ndarray]:
    """A curve that the base knows nothing of, and noise of each row's own that is this part of what the base says.

    Where the base says nothing but noise its residuals mislead; where it knows the noise they alone tell the curve.
    """
    random = np.random.default_rng(seed)
    keys = random.uniform(-2, 2, size=(n + q, 1))
    said = 3 * random.normal(size=(n + q, 1))
    labels = np.sin(2 * keys) + known * said
    return Problem(keys[:n], labels[:n], said[:n], keys[n:], said[n:]), labels[n:]


def tuned(given: tuple[Problem, ndarray], memory: Memory | None = None, **options: Any) -> TuningResult:
    """Tuned over a small grid unless told otherwise."""
    problem, labels = given
    memory = memory_of(problem) if memory is None else memory
    return tune(memory, problem.queries, labels, problem.said, **{**GRID, **options})


# ---------------------------------------------------------------------------------------------- does it help


@pytest.mark.parametrize("metric", ["accuracy", "log_loss"])
def test_a_memory_that_helps_is_found_and_its_gain_is_that_of_fresh_rows(metric: Metric) -> None:
    problem, labels = clustered(q=400)
    half = replace(problem, queries=problem.queries[:200], said=problem.said[:200])
    found = tuned((half, labels[:200]), metric=metric)
    assert found.helps
    assert found.verdict.startswith("gain +")
    assert found.best.shrinkage > 0.5
    fresh = evaluate(
        memory_of(problem), problem.queries[200:], labels[200:], problem.said[200:], found.best, metric=metric
    )
    assert fresh.helps
    assert fresh.gain.low < found.gain.high
    assert found.gain.low < fresh.gain.high


def test_a_memory_of_values_that_helps_is_found() -> None:
    problem, labels = smooth_values()
    found = tuned((problem, labels))
    assert (found.metric, found.best.temperature) == ("rmse", 1.0)
    assert found.verdict.startswith("gain +")
    assert found.corrected.value < 0.4 * found.base.value
    again = evaluate(memory_of(problem), problem.queries, labels, problem.said, found.best)
    assert again.corrected.value == pytest.approx(found.corrected.value, rel=0.1)


@pytest.mark.parametrize("metric", ["accuracy", "log_loss"])
@pytest.mark.parametrize("seed", range(4))
def test_residuals_of_other_rows_do_not_help_and_it_says_so(metric: Metric, seed: int) -> None:
    found = tuned(noise(seed=seed), metric=metric)
    assert found.best.shrinkage == 0
    assert found.best.temperature == 1
    assert found.verdict.startswith("no gain: do not deploy")


def test_shuffled_residual_rows_do_not_help_where_the_right_ones_do() -> None:
    problem, labels = clustered()
    assert tuned((problem, labels)).helps
    order = np.random.default_rng(1).permutation(len(problem))
    shuffled = replace(problem, labels=problem.labels[order], predictions=problem.predictions[order])
    found = tuned((shuffled, labels))
    assert found.best.shrinkage == 0
    assert found.verdict.startswith("no gain")


def test_stored_predictions_of_a_temperature_of_a_hundredth_do_not_help() -> None:
    """The base seems to know its own rows by heart: there is no residual in them."""
    problem, labels = noise()
    by_heart = temper(0.9 * np.eye(4)[problem.labels] + 0.1 * problem.predictions, 0.01)
    found = tuned((replace(problem, predictions=by_heart), labels))
    assert found.best.shrinkage == 0
    assert found.verdict.startswith("no gain")


def test_a_temperature_alone_is_no_gain_of_the_memory() -> None:
    """An overconfident base gains by any T above 1; a memory of noise deserves no credit for it."""
    found = tuned(noise(n=300, q=300, sureness=4.0), metric="log_loss")
    assert found.best.shrinkage == 0
    assert found.verdict.startswith("no gain")


def test_the_figures_are_not_optimistic_where_choosing_alone_would_be() -> None:
    chosen, crossfitted = [], []
    settings = [Setting(k, 1.0, shrinkage=amount) for k, amount in product((1, 3, 10), (0.0, 0.2, 0.5, 1.0))]
    for seed in range(12):
        problem, labels = noise(seed=seed, q=60)
        memory = memory_of(problem)
        figures = [evaluate(memory, problem.queries, labels, problem.said, setting).gain.value for setting in settings]
        chosen.append(max(figures))
        crossfitted.append(tuned((problem, labels)).gain.value)
    assert np.mean(chosen) > 0.015
    assert np.mean(crossfitted) < 0.005


# ---------------------------------------------------------------------------------------------- against a plain loop


def losses_of(metric: Metric, scores: ndarray, base: ndarray, labels: ndarray) -> ndarray:
    rows = np.arange(len(labels))
    if metric == "accuracy":
        return (scores.argmax(axis=1) != labels).astype(float)
    if metric == "log_loss":
        return -np.log(to_probabilities(scores, base)[rows, labels])
    return ((scores - labels) ** 2).mean(axis=1)


def losses_alone(metric: Metric, averages: ndarray, labels: ndarray) -> ndarray:
    if metric != "log_loss":
        return losses_of(metric, averages, averages, labels)
    mixed = (1 - MEMORY_ONLY_MIX) * averages + MEMORY_ONLY_MIX / averages.shape[1]
    return -np.log(mixed[np.arange(len(labels)), labels])


def figure(metric: Metric, mean_loss: float) -> float:
    if metric == "accuracy":
        return 1 - mean_loss
    return float(np.sqrt(mean_loss)) if metric == "rmse" else mean_loss


def left_out_one_by_one(losses: ndarray) -> ndarray:
    """The loss of each row [q] under the setting that all other rows choose, from [s q]."""
    others = losses.sum(axis=1, keepdims=True) - losses
    return losses[others.argmin(axis=0), np.arange(losses.shape[1])]


def plain_loop(
    problem: Problem, labels: ndarray, metric: Metric, shares: tuple[float, ...]
) -> tuple[list[Setting], ndarray, ndarray]:
    """Every setting one after another: settings, losses [s q], and those of the labels alone [s q]."""
    memory = memory_of(problem)
    distances, _ = reference.neighbors(problem.keys, problem.queries, max(GRID["n_neighbors"]))
    classes = problem.task == "classification"
    temperatures = GRID["temperatures"] if classes else (1.0,)
    answers = {}
    for temperature, k, scale in product(temperatures, GRID["n_neighbors"], GRID["bandwidths"]):
        sigma = scale * float(np.median(distances[:, k - 1]))
        knn = ResidualKNN(memory, n_neighbors=k, bandwidth=sigma, temperature=temperature)
        answers[temperature, k, scale] = sigma, knn(problem.queries), knn.memory_only(problem.queries)
    settings, losses, alone = [], [], []
    for temperature, share, shrinkage, k, scale in product(
        temperatures, shares, GRID["shrinkages"], GRID["n_neighbors"], GRID["bandwidths"]
    ):
        sigma, residual, labels_alone = answers[temperature, k, scale]
        base = temper(problem.said, temperature) if classes else problem.said
        settings.append(Setting(k, sigma, temperature, shrinkage, residual_share=share))
        scores = correct(base, share * residual + (1 - share) * (labels_alone - base), shrinkage)
        losses.append(losses_of(metric, scores, base, labels))
        alone.append(losses_alone(metric, labels_alone, labels))
    return settings, np.stack(losses), np.stack(alone)


@pytest.mark.parametrize(
    ("given", "metric"),
    [
        (clustered(n=80, q=50), "accuracy"),
        (clustered(n=80, q=50, seed=1), "accuracy"),
        (clustered(n=80, q=50), "log_loss"),
        (smooth_values(n=80, q=50), "rmse"),
    ],
    ids=["accuracy", "accuracy again", "log-loss", "rmse"],
)
@pytest.mark.parametrize("shares", [(1.0,), (0.7, 0.0, 1.0)], ids=["residuals", "shares"])
def test_the_figures_are_those_of_a_plain_loop_over_the_settings(
    given: tuple[Problem, ndarray], metric: Metric, shares: tuple[float, ...]
) -> None:
    problem, labels = given
    found = tuned(given, metric=metric, n_folds=len(labels), residual_shares=shares)
    settings, losses, alone = plain_loop(problem, labels, metric, shares)
    means = [left_out_one_by_one(rows).mean() for rows in (losses, alone)]
    assert found.corrected.value == pytest.approx(figure(metric, means[0]), abs=1e-5)
    assert found.memory_only.value == pytest.approx(figure(metric, means[1]), abs=1e-5)
    base = left_out_one_by_one(losses[[setting.shrinkage == 0 for setting in settings]])
    assert found.base.value == pytest.approx(figure(metric, base.mean()), abs=1e-5)
    best = settings[int(losses.mean(axis=1).argmin())]
    assert found.helps
    assert replace(found.best, bandwidth=0.0) == replace(best, bandwidth=0.0)
    assert found.best.bandwidth == pytest.approx(best.bandwidth, rel=1e-5)
    label_best = settings[int(alone.mean(axis=1).argmin())]
    assert found.best_memory_only.n_neighbors == label_best.n_neighbors
    assert found.best_memory_only.bandwidth == pytest.approx(label_best.bandwidth, rel=1e-5)


def test_rows_excluded_one_by_one_are_as_if_they_were_not_there() -> None:
    problem, _ = clustered(n=120, q=1)
    memory = memory_of(problem)
    given = (problem.keys, problem.labels, problem.predictions)
    everything = tune(memory, *given, exclude=memory.ids, **GRID)
    by_hand = []
    for row in range(120):
        others = memory_of(problem.rows(np.arange(120) != row))
        keys, labels, predictions = (part[[row]] for part in given)
        by_hand.append(evaluate(others, keys, labels, predictions, everything.best).corrected.value)
    excluded = evaluate(memory, *given, everything.best, exclude=memory.ids)
    assert excluded.corrected.value == pytest.approx(np.mean(by_hand))


def test_a_row_that_may_see_itself_seems_wonderful_and_excluded_does_not() -> None:
    problem, _ = noise()
    memory = memory_of(problem)
    given = (problem.keys, problem.labels, problem.predictions)
    assert tune(memory, *given, **GRID).corrected.value == 1
    assert not tune(memory, *given, exclude=memory.ids, **GRID).helps


def test_the_neighbours_are_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[tuple[int, int]] = []

    def counted(parts: Any, keys: Any, queries: ndarray, k: int, **options: Any) -> Any:
        searched.append((len(queries), k))
        return nearest(parts, keys, queries, k, **options)

    monkeypatch.setattr(correction, "nearest", counted)
    tuned(clustered())
    assert searched == [(200, 10)]


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tuned(clustered(), metric="log_loss")
    monkeypatch.setattr("residual_memory.tuning.BLOCK_BYTES", 1 << 14)  # a few rows at a time
    in_blocks = tuned(clustered(), metric="log_loss")
    assert in_blocks.best == whole.best
    assert in_blocks.corrected.value == pytest.approx(whole.corrected.value, abs=1e-6)


# ---------------------------------------------------------------------------------------------- folds and groups


def test_rows_of_a_group_are_never_split_between_choosing_and_measuring() -> None:
    """Rows said five times over, one group each: as if they were said once. Split, each would choose for its twins."""
    optimism = []
    for seed in range(4):
        problem, labels = noise(q=40, seed=seed)
        single = tuned((problem, labels), n_folds=40)
        five = replace(problem, queries=np.repeat(problem.queries, 5, 0), said=np.repeat(problem.said, 5, 0))
        groups = np.repeat(np.arange(40), 5)
        together = tuned((five, np.repeat(labels, 5)), n_folds=40, groups=groups)
        assert together.corrected.value == pytest.approx(single.corrected.value)
        assert together.gain.margin == pytest.approx(single.gain.margin)
        split = tuned((five, np.repeat(labels, 5)), n_folds=40)
        optimism.append(split.corrected.value - together.corrected.value)
    assert np.mean(optimism) > 0.01


@pytest.mark.parametrize("kind", [str, int])
def test_groups_go_by_name_whatever_their_order(kind: Any) -> None:
    given = clustered()
    groups = np.array([kind(7 * (row % 40)) for row in range(200)])
    order = np.random.default_rng(0).permutation(200)
    problem, labels = given
    mixed = replace(problem, queries=problem.queries[order], said=problem.said[order])
    first, second = tuned(given, groups=groups), tuned((mixed, labels[order]), groups=groups[order])
    assert first.corrected.value == pytest.approx(second.corrected.value)
    assert first.gain.margin == pytest.approx(second.gain.margin)


def test_the_seed_draws_the_folds_and_nothing_else() -> None:
    given = clustered(seed=3)
    first = tuned(given, seed=1)
    assert tuned(given, seed=1) == first
    assert tuned(given, seed=2).best == first.best


@pytest.mark.parametrize("options", [{"groups": np.zeros(200, int)}, {"n_folds": 1}])
def test_one_part_alone_cannot_be_cross_fitted(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"fold|group"):
        tuned(clustered(), **options)


# ---------------------------------------------------------------------------------------------- what is tried


def test_the_best_setting_is_one_of_those_tried() -> None:
    found = tuned(clustered())
    assert found.best.n_neighbors in GRID["n_neighbors"]
    assert found.best.temperature in GRID["temperatures"]
    assert found.best.shrinkage in GRID["shrinkages"]


def test_shrinkage_zero_is_tried_even_where_it_is_not_asked_for() -> None:
    found = tuned(noise(), shrinkages=(1.0,))
    assert found.best.shrinkage == 0
    assert found.corrected.value >= found.base.value - 0.05


def test_the_metric_decides_what_is_best() -> None:
    """One half is predicted surely and well; corrections that keep the ranking but blur it cost log-loss alone."""
    given = clustered(seed=2)
    accuracy, log_loss = tuned(given), tuned(given, metric="log_loss")
    assert accuracy.best != log_loss.best
    assert accuracy == tuned(given, metric="accuracy")
    problem, labels = given
    settings = (accuracy.best, log_loss.best)
    measured = [
        evaluate(memory_of(problem), problem.queries, labels, problem.said, setting, metric="log_loss").corrected.value
        for setting in settings
    ]
    assert measured[1] < measured[0]


@pytest.mark.parametrize(("asked", "used"), [((2, 1000), 2), ((500, 1000), 30), ((30, 31), 30)])
def test_more_neighbours_than_there_are_rows_are_left_out(asked: tuple[int, ...], used: int) -> None:
    found = tuned(clustered(n=30), n_neighbors=asked)
    assert (found.best.n_neighbors, found.best_memory_only.n_neighbors) == (used, used)


def test_forgotten_rows_are_not_counted() -> None:
    problem, labels = clustered(n=60)
    memory = memory_of(problem)
    memory.forget(memory.ids[30:])
    found = tuned((problem, labels), memory, n_neighbors=(5, 40))
    kept = tuned((problem.rows(slice(30)), labels), n_neighbors=(5, 40))
    assert found == kept
    assert found.best.n_neighbors == 5


@pytest.mark.parametrize("make", [classification, regression])
def test_an_empty_memory_is_no_gain(make: Any) -> None:
    problem = make()
    labels = np.zeros(12, int) if problem.task == "classification" else np.zeros((12, 2))
    found = tuned((problem, labels), empty_memory(problem))
    assert found.best.shrinkage == 0
    assert found.corrected.value == pytest.approx(found.base.value)
    assert found.verdict.startswith("no gain")


def test_one_row_is_enough_of_a_memory() -> None:
    problem, labels = clustered(n=1)
    assert tuned((problem, labels)).best.n_neighbors == 1


def test_twins_alone_have_a_bandwidth_too() -> None:
    problem, labels = clustered(n=10)
    same = replace(problem, keys=np.zeros((10, 3)), queries=np.zeros((200, 3)))
    found = tuned((same, labels))
    assert float(found.best.bandwidth) > 0


def test_whole_top_m_rows_are_tuned_as_dense_ones_at_temperature_one() -> None:
    problem, labels = clustered()
    memory = empty_memory(problem, residuals="top-m")
    memory.append(problem.keys, problem.labels, top_m(problem.predictions, 4))
    found = tuned((problem, labels), memory)
    dense = tuned((problem, labels), temperatures=(1.0,))
    assert found.best == dense.best
    assert found.corrected.value == pytest.approx(dense.corrected.value)


def test_a_cut_top_m_memory_still_helps_and_keeps_its_temperature() -> None:
    problem, labels = clustered()
    memory = empty_memory(problem, residuals="top-m")
    memory.append(problem.keys, problem.labels, top_m(problem.predictions, 2))
    found = tuned((problem, labels), memory, metric="log_loss")
    assert found.helps
    assert found.best.temperature == 1
    Setting.from_dict(found.best.to_dict()).knn(memory)


def test_lists_of_classes_are_tuned_with_a_lambda_above_one_where_that_is_best() -> None:
    """A base that is so sure that a whole residual does not turn it over."""
    random = np.random.default_rng(0)
    labels, said = random.integers(0, 2, 400), np.tile([0.99, 0.01], (400, 1))
    keys = labels[:, None] + 0.8 * random.normal(size=(400, 1))
    problem = Problem(keys[:200], labels[:200], said[:200], keys[200:], said[200:])
    listed = empty_memory(problem, residuals="top-m")
    listed.append(problem.keys, problem.labels, top_m(problem.predictions, 2))
    options: dict[str, Any] = {"temperatures": (1.0,), "shrinkages": None}
    best = [tuned((problem, labels[200:]), some, **options).best for some in (listed, memory_of(problem))]
    assert best[0].shrinkage > 1
    assert 0 < best[1].shrinkage <= 1


@pytest.mark.parametrize("kernel", ["gaussian", "inverse", "uniform"])
def test_other_kernels_are_tuned_by_the_same_rules(kernel: str) -> None:
    problem, labels = clustered()
    found = tuned((problem, labels), kernel=kernel)
    assert (found.best.kernel, found.helps) == (kernel, True)
    again = evaluate(memory_of(problem), problem.queries, labels, problem.said, found.best)
    assert again.corrected.value == pytest.approx(found.corrected.value, abs=0.05)


@pytest.mark.parametrize("known", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kernel", ["exponential", "kriging"])
def test_the_share_of_the_residuals_is_the_part_of_what_the_base_says_that_it_knows(known: float, kernel: str) -> None:
    given = shared_values(known)
    options: dict[str, Any] = {"kernel": kernel, "shrinkages": None, "n_neighbors": (5, 10)}
    found = tuned(given, residual_shares=(0.0, 0.5, 1.0), **options)
    assert found.helps
    assert found.best.residual_share == known
    for other in {0.0, 0.5, 1.0} - {known}:
        assert tuned(given, residual_shares=(other,), **options).corrected.value > 1.2 * found.corrected.value


def test_the_papers_share_alone_is_tried_by_default() -> None:
    given = shared_values(0.5)
    found = tuned(given)
    assert found.best.residual_share == 1
    assert found == tuned(given, residual_shares=(1.0,))
    assert tuned(given, residual_shares=(0.5,)).corrected.value < found.corrected.value


@pytest.mark.parametrize(("metric", "shares"), [("accuracy", (0.3,)), ("log_loss", (0.3,)), ("log_loss", (0.0,))])
@pytest.mark.parametrize("kernel", ["exponential", "kriging"])
def test_the_losses_of_a_share_are_those_of_evaluating_it(
    metric: Metric, shares: tuple[float, ...], kernel: str
) -> None:
    """With one value of each there is nothing to choose, and cross-fitting changes nothing."""
    problem, labels = clustered()
    memory = memory_of(problem)
    found = tuned(
        (problem, labels), memory, metric=metric, residual_shares=shares, kernel=kernel, n_neighbors=(7,),
        bandwidths=(0.6,), temperatures=(1.4,), shrinkages=(0.8,), nuggets=(0.2,),
    )  # fmt: skip
    assert found.helps
    assert (found.best.residual_share, found.best.shrinkage, found.best.temperature) == (*shares, 0.8, 1.4)
    again = evaluate(memory, problem.queries, labels, problem.said, found.best, metric=metric)
    assert again.corrected.value == pytest.approx(found.corrected.value, rel=1e-4)
    assert again.memory_only.value == pytest.approx(found.memory_only.value, rel=1e-4)


def test_shares_of_a_top_m_memory_are_tuned_as_those_of_a_dense_one() -> None:
    problem, labels = clustered()
    memory = empty_memory(problem, residuals="top-m")
    memory.append(problem.keys, problem.labels, top_m(problem.predictions, 4))
    found = tuned((problem, labels), memory, residual_shares=(0.0, 0.5))
    dense = tuned((problem, labels), temperatures=(1.0,), residual_shares=(0.0, 0.5))
    assert found.best == dense.best
    assert found.corrected.value == pytest.approx(dense.corrected.value)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_gate_is_fitted_to_the_shared_correction(share: float) -> None:
    problem, labels = clustered()
    memory, setting = memory_of(problem), Setting(10, 1.0, temperature=1.4, residual_share=share)
    found = tune_gate(memory, problem.queries, labels, problem.said, setting, metric="log_loss")
    knn, base = setting.knn(memory), temper(problem.said, 1.4)
    correction = share * knn(problem.queries) + (1 - share) * (knn.memory_only(problem.queries) - base)
    wanted = fit_gate(problem.said, correction, knn.look_up(problem.queries).farthest, labels)
    assert found.helps
    assert found.best.gate is not None
    for name, values in wanted.to_dict().items():
        np.testing.assert_allclose(found.best.gate.to_dict()[name], values, rtol=1e-4, atol=1e-6)
    again = evaluate(memory, problem.queries, labels, problem.said, found.best, metric="log_loss")
    assert again.corrected.value == pytest.approx(found.corrected.value, rel=0.3)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"n_neighbors": ()}, InvalidInput, "n_neighbors is empty"),
        ({"bandwidths": ()}, InvalidInput, "bandwidths is empty"),
        ({"temperatures": ()}, InvalidInput, "temperatures is empty"),
        ({"residual_shares": ()}, InvalidInput, "residual_shares is empty"),
        ({"residual_shares": (0.5, 1.5)}, InvalidInput, "residual_share is 1.5"),
        ({"residual_shares": (-0.1,)}, InvalidInput, "residual_share is -0.1"),
        ({"residual_shares": (float("nan"),)}, InvalidInput, "residual_share is nan"),
        ({"n_neighbors": (0,)}, InvalidInput, "n_neighbors is 0"),
        ({"bandwidths": (0.0,)}, InvalidInput, "bandwidth is 0"),
        ({"temperatures": (0.0,)}, InvalidInput, "temperature is 0"),
        ({"shrinkages": (-0.5,)}, InvalidInput, "shrinkage is -0.5"),
        ({"kernel": "square"}, InvalidInput, "kernel is 'square'"),
        ({"metric": "rmse"}, InvalidInput, "metric is 'rmse'"),
        ({"n_folds": 201}, InvalidInput, "200 held-out rows for 201 folds"),
        ({"groups": np.arange(199)}, DimensionMismatch, "199"),
        ({"exclude": np.arange(199)}, InvalidInput, "199"),
    ],
)
def test_options_that_cannot_be_used_are_refused_by_name(change: dict[str, Any], error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        tuned(clustered(), **change)


def test_the_lists_tried_by_default_find_the_help_too() -> None:
    problem, labels = clustered()
    found = tune(memory_of(problem), problem.queries, labels, problem.said)
    assert found.helps
    assert found.best.n_neighbors in N_NEIGHBORS
    assert found.best.temperature in TEMPERATURES
    assert found.best.shrinkage in SHRINKAGES
    assert found.corrected.value >= tuned((problem, labels)).corrected.low
