"""How far to trust the memory at each token, and what that is worth: on numbers, without a model."""

import json
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.language import (
    FLOOR,
    N_FEATURES,
    N_WEIGHTS,
    HeldOutTokens,
    LanguageSetting,
    TokenGate,
    TokenScores,
    fit_token_gate,
    gate_features,
    token_losses,
    tune_tokens,
)

K = 8
AT_RANDOM = 0.3  # share of tokens whose neighbours are near and right, where there is anything to learn


def tokens_of(n: int = 4000, *, informative: bool = True, seed: int = 0) -> HeldOutTokens:
    """Tokens that the base gives a tenth to a half; the two nearest neighbours of the near ones know better, if any."""
    random = np.random.default_rng(seed)
    probability = random.uniform(0.1, 0.5, n)
    near = random.random(n) < AT_RANDOM
    distances = np.sort(random.uniform(1, 2, (n, K)), axis=1)
    distances[near, :2] /= 10
    said = random.uniform(0.05, 0.5, (n, K)) if informative else np.repeat(probability[:, None], K, axis=1)
    hit = (random.random((n, K)) < said).astype(np.float32)  # as often as the base said: nothing to learn
    if informative:
        hit[near, :2] = 1
    return HeldOutTokens(
        distances,
        hit,
        (hit - said).astype(np.float32),
        random.random((n, K)) < 0.5,
        probability,
        np.minimum(probability + 0.2, 0.9),
        random.uniform(1, 3, n),
        random.uniform(0, 0.5, n),
        np.arange(n) // 40,
    )


def some_gate(seed: int = 0) -> TokenGate:
    random = np.random.default_rng(seed)
    weights, centres = (tuple(random.normal(size=n).tolist()) for n in (N_WEIGHTS, N_FEATURES))
    return TokenGate(weights, centres, tuple(random.uniform(0.5, 2, N_FEATURES).tolist()))


# ---------------------------------------------------------------------- gate and setting


def test_a_setting_with_a_gate_comes_back_from_json() -> None:
    setting = LanguageSetting(32, 0.7, "gaussian", 0.3, some_gate(), 0.9, 0.5)
    again = LanguageSetting.from_dict(json.loads(json.dumps(setting.to_dict())))
    assert again == setting
    features = np.random.default_rng(1).normal(size=(5, N_FEATURES))
    assert again.gate is not None
    np.testing.assert_array_equal(again.gate(features), some_gate()(features))


def test_a_setting_without_a_gate_comes_back_and_nothing_is_the_default() -> None:
    setting = LanguageSetting(n_neighbors=5, bandwidth=2.0)
    assert LanguageSetting.from_dict(setting.to_dict()) == setting
    assert LanguageSetting.from_dict({}) == LanguageSetting()


def test_a_gate_stays_between_0_and_1_on_features_it_never_saw() -> None:
    wild = np.array([[1e9] * N_FEATURES, [-1e9] * N_FEATURES, [0.0] * N_FEATURES])
    amount = some_gate()(wild)
    assert ((amount >= 0) & (amount <= 1)).all()
    np.testing.assert_array_equal(amount[:2], some_gate()(wild[:2] / 1e6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_neighbors": 0}, "n_neighbors is 0, expected at least 1"),
        ({"bandwidth": -1.0}, "bandwidth is -1, expected a number above 0"),
        ({"bandwidth": "wide"}, "bandwidth is 'wide', expected a number"),
        ({"kernel": "kriging"}, "kriging"),
        ({"kernel": "box"}, "kernel"),
        ({"shrinkage": 1.5}, "shrinkage is 1.5, expected a number from 0, up to 1"),
        ({"search_below": float("nan")}, "search_below is nan, expected a finite number"),
        ({"residual_share": -0.5}, "residual_share is -0.5, expected a number from 0, up to 1"),
        ({"lambda": 0.3}, "a setting has n_neighbors, bandwidth, kernel, .*lambda"),
        ({"gate": {"weights": [1.0]}}, "a token gate has weights, centres and scales"),
        ({"gate": {**asdict(some_gate()), "centres": [0.0]}}, r"lengths \(36, 1, 7\), expected 36, 7 and 7"),
        ({"gate": {**asdict(some_gate()), "scales": "abcdefg"}}, "a token gate has weights"),
        ({"gate": [1, 2]}, "a token gate has weights"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        LanguageSetting.from_dict({**LanguageSetting().to_dict(), **change})


def test_features_of_a_token_without_neighbours_are_finite() -> None:
    nothing = np.full((1, 3), np.inf), np.zeros((1, 3)), np.zeros((1, 3), bool)
    one = np.ones(1)
    assert np.isfinite(gate_features(*nothing, one, 0 * one, 0 * one)).all()


def test_features_look_at_present_neighbours_alone() -> None:
    one = np.ones(1)
    few = np.array([[0.5, 2.0, np.inf]]), np.array([[0.75, 0.25, 0.0]]), np.array([[True, False, True]])
    features = gate_features(*few, 0.5 * one, one, 0.25 * one)[0]
    expected = [0, 1, np.log(0.5), np.log(2), 0.75, np.log(0.75**2 + 0.25**2), np.log(0.25)]
    np.testing.assert_allclose(features, expected, atol=1e-12)


def test_the_slope_of_the_gates_loss_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []
    search = scipy.optimize.minimize

    def minimize(function: Any, *arguments: Any, **options: Any) -> Any:
        caught.append(function)
        return search(function, *arguments, **options)

    monkeypatch.setattr(scipy.optimize, "minimize", minimize)
    tokens = tokens_of(300)
    weights = np.full((300, K), 1 / K)
    residual = tokens.residual.mean(axis=1).astype(np.float64)
    residual[:20] = -2.0  # far below the floor
    fit_token_gate(tokens.features(weights), tokens.probability, residual)
    random = np.random.default_rng(0)
    for _ in range(3):
        point, step = random.normal(size=N_WEIGHTS), 1e-6
        slope = caught[0](point)[1]
        shifts = step * np.eye(N_WEIGHTS)
        numeric = [(caught[0](point + shift)[0] - caught[0](point - shift)[0]) / (2 * step) for shift in shifts]
        np.testing.assert_allclose(slope, numeric, atol=1e-7, rtol=1e-5)


def test_a_gate_opens_where_the_memory_is_right() -> None:
    tokens = tokens_of()
    weights = np.repeat([[0.5] * 2 + [0.0] * (K - 2)], len(tokens), axis=0)
    gate = fit_token_gate(tokens.features(weights), tokens.probability, (weights * tokens.residual).sum(axis=1))
    amount, near = gate(tokens.features(weights)), tokens.distances[:, 0] < 0.5
    assert amount[near].mean() > 0.7
    assert amount[~near].mean() < 0.2


def test_a_gate_on_noise_closes() -> None:
    tokens = tokens_of(20_000, informative=False)
    weights = np.full((len(tokens), K), 1 / K)
    gate = fit_token_gate(tokens.features(weights), tokens.probability, (weights * tokens.residual).sum(axis=1))
    assert gate(tokens.features(weights)).mean() < 0.15


def test_the_floor_keeps_a_tenth_of_the_base() -> None:
    losses = token_losses(np.array([0.5, 0.5, 0.0]), np.array([-0.5, 0.25, 0.0]), 1.0)
    np.testing.assert_allclose(losses, -np.log([FLOOR * 0.5, 0.75, 1e-12]))


# ---------------------------------------------------------------------- tuning


def test_tuning_finds_the_neighbours_that_know() -> None:
    tokens = tokens_of()
    found = tune_tokens(tokens, n_neighbors=(1, 2, K), bandwidths=(0.1, 1.0))
    assert found.helps
    assert found.best.gate is not None
    assert found.constant.gate is None
    assert found.constant.shrinkage > 0
    assert found.gain.value == pytest.approx(found.base.value - found.corrected.value)
    assert found.base.value == pytest.approx(-np.log(tokens.probability).mean())
    assert found.verdict.startswith(f"perplexity {np.exp(found.base.value):.2f} -> {np.exp(found.corrected.value):.2f}")
    alone = tune_tokens(
        tokens, n_neighbors=(1, 2, K), bandwidths=(0.1, 1.0), residual_shares=(found.best.residual_share,)
    )
    assert alone.best == found.best == replace(alone.constant, gate=found.best.gate)
    assert alone.corrected == found.corrected


def test_the_best_constant_is_the_best_of_all_that_were_tried() -> None:
    tokens = tokens_of(800)
    tried: dict[str, Any] = {"n_neighbors": (1, 2, K), "bandwidths": (0.1, 1.0), "shrinkages": (0.2, 0.6)}
    tried["residual_shares"] = (0.25, 1.0)
    best = tune_tokens(tokens, **tried).constant
    losses = {}
    for k in tried["n_neighbors"]:
        for scale in tried["bandwidths"]:
            sigma = scale * float(np.median(tokens.distances[:, k - 1]))
            for kernel, powers in {"exponential": 1, "gaussian": 2}.items():
                raw = np.exp(-((tokens.distances[:, :k] / sigma) ** powers) / powers)
                weights = raw / raw.sum(axis=1, keepdims=True)
                theirs, own = tokens.hit[:, :k] - tokens.residual[:, :k], tokens.probability[:, None]
                for share, amount in product((0.25, 1.0), (0.0, 0.2, 0.6)):
                    added = (weights * (tokens.hit[:, :k] - share * theirs - (1 - share) * own)).sum(axis=1)
                    losses[k, kernel, share, amount, sigma] = token_losses(tokens.probability, added, amount).mean()
    chosen = best.n_neighbors, best.kernel, best.residual_share, best.shrinkage, best.bandwidth
    assert chosen == min(losses, key=lambda key: losses[key])


def test_a_memory_of_noise_is_not_to_be_deployed() -> None:
    found = tune_tokens(tokens_of(informative=False), n_neighbors=(2, K))
    assert not found.helps
    assert found.best.shrinkage == 0
    assert found.best.gate is None
    assert found.verdict == "no gain: do not deploy"


def test_k_is_tried_only_as_far_as_neighbours_were_found() -> None:
    found = tune_tokens(tokens_of(400), n_neighbors=(2, 10 * K), bandwidths=(1.0,))
    assert found.constant.n_neighbors == 2
    assert tune_tokens(tokens_of(400), n_neighbors=(10 * K,), bandwidths=(1.0,)).constant.n_neighbors == K


def test_neighbours_that_are_missing_everywhere_are_no_gain() -> None:
    tokens = tokens_of(400)
    none = replace(tokens, distances=np.full((400, K), np.inf))
    assert tune_tokens(none, n_neighbors=(K,), bandwidths=(1.0,)).verdict == "no gain: do not deploy"


def test_interpolation_is_tuned_on_the_neighbours_labels() -> None:
    """Where the stored predictions are nought, residual and interpolation differ by what is taken from the base."""
    found = tune_tokens(tokens_of(), n_neighbors=(1, 2, K), bandwidths=(0.1, 1.0))
    assert 0 < found.knn_lm.shrinkage < 1
    assert found.knn_lm.gate is None
    assert found.knn_lm.residual_share == 0
    rival = tune_tokens(tokens_of(), n_neighbors=(1, 2, K), bandwidths=(0.1, 1.0), residual_shares=(0.0,))
    assert rival.constant == found.knn_lm


def test_a_share_of_the_residuals_is_no_worse_than_all_or_none_of_them() -> None:
    tokens = tokens_of()
    losses = {
        shares: tune_tokens(tokens, n_neighbors=(K,), residual_shares=shares).corrected.value
        for shares in ((0.0,), (1.0,), (0.0, 0.5, 1.0))
    }
    assert losses[0.0, 0.5, 1.0] <= min(losses[0.0,], losses[1.0,])


def test_without_a_residual_share_there_is_nothing_to_try() -> None:
    with pytest.raises(InvalidInput, match="one residual share"):
        tune_tokens(tokens_of(100), n_neighbors=(K,), residual_shares=())


@pytest.mark.parametrize("change", [{"n_folds": 1}, {"documents": 1}])
def test_one_document_or_one_fold_cannot_be_cross_fitted(change: dict[str, Any]) -> None:
    tokens = tokens_of(100)
    if "documents" in change:
        tokens, change = replace(tokens, documents=np.zeros(100, np.int64)), {}
    with pytest.raises(InvalidInput, match=r"n_folds is \d and there are \d documents, expected at least 2 of each"):
        tune_tokens(tokens, n_neighbors=(2,), **change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_neighbors": (0,)}, "n_neighbors is 0, expected at least 1"),
        ({"n_neighbors": (2,), "kernels": ("box",)}, "kernel"),
        ({"n_neighbors": (2,), "bandwidths": (0.0,)}, "bandwidth is 0, expected a number above 0"),
        ({"n_neighbors": (2,), "shrinkages": (2.0,)}, "shrinkage is 2, expected"),
        ({"n_neighbors": (2,), "bandwidths": ()}, "there is no setting to try"),
    ],
)
def test_settings_to_try_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        tune_tokens(tokens_of(100), **options)


def test_joined_tokens_are_tuned_as_those_that_were_never_apart() -> None:
    whole = tokens_of(800)
    names = HeldOutTokens.__dataclass_fields__
    parts = [
        HeldOutTokens(**{name: getattr(whole, name)[place] for name in names})
        for place in (slice(0, 300), slice(300, 301), slice(301, None))
    ]
    options: dict[str, Any] = {"n_neighbors": (2,), "bandwidths": (0.1,)}
    assert tune_tokens(HeldOutTokens.joined(parts), **options) == tune_tokens(whole, **options)


# ---------------------------------------------------------------------- scores


def scores_of(n: int = 600, gain: float = 0.5, seed: int = 0) -> TokenScores:
    random = np.random.default_rng(seed)
    loss = random.uniform(1, 4, n)
    base_hit = random.random(n) < 0.4
    return TokenScores(
        random.integers(0, 20, n),
        np.arange(n) // 30,
        np.arange(n),
        loss,
        loss - gain,
        base_hit,
        random.random(n) < 0.3,
        base_hit | (random.random(n) < gain / 5),
        random.random(n) < 0.8,
    )


def test_the_summary_is_of_all_tokens() -> None:
    scores = scores_of()
    summary = scores.summary()
    assert summary["n_test"] == len(scores) == 600
    assert summary["base"] == pytest.approx(scores.base_hit.mean())
    assert summary["corrected"] - summary["base"] == pytest.approx(summary["gain"])
    assert summary["gain_low"] < summary["gain"] < summary["gain_high"]
    assert summary["perplexity_base"] == pytest.approx(np.exp(scores.base_loss.mean()))
    assert summary["log_loss_gain"] == pytest.approx(0.5)
    assert summary["searched"] == pytest.approx(scores.searched.mean())
    assert scores.verdict.startswith(f"gain +{100 * summary['gain']:.1f} ± ")
    assert scores.verdict.endswith("on 600 tokens")


def test_scores_that_are_no_better_are_not_to_be_deployed() -> None:
    assert scores_of(gain=0.0).verdict == "no gain: do not deploy"
    assert scores_of(gain=-0.5).verdict == "no gain: do not deploy"


def test_scores_joined_and_taken_apart_are_the_same() -> None:
    scores = scores_of()
    apart = [scores.of(np.arange(100)), scores.of(np.arange(600) >= 100)]
    np.testing.assert_equal(asdict(TokenScores.joined(apart)), asdict(scores))
    assert [len(part) for part in apart] == [100, 500]


def test_frequency_buckets_are_powers_of_ten_and_cover_every_token() -> None:
    scores = scores_of()
    counts = np.array([0, 1, 9, 10, 99, 100, 999, 1000] + [5] * 12, np.int64)
    buckets = scores.by_frequency(counts)
    assert [(bucket["low"], bucket["high"]) for bucket in buckets] == [(0, 10), (10, 100), (100, 1000), (1000, 10_000)]
    assert sum(bucket["n_test"] for bucket in buckets) == len(scores)
    rare = scores.of(counts[scores.labels] < 10)
    assert buckets[0] == {"low": 0.0, "high": 10.0, **rare.summary()}


def test_frequency_buckets_without_tokens_are_left_out() -> None:
    counts: ndarray = np.array([3] * 10 + [5000] * 10)
    assert [bucket["low"] for bucket in scores_of().by_frequency(counts)] == [0, 1000]


def test_one_lambda_is_kept_where_the_gate_only_fits_noise() -> None:
    random = np.random.default_rng(3)
    n, k = 240, 2
    hit = np.repeat((random.random(n) < 0.5).astype(np.float32)[:, None], k, axis=1)
    probability = np.full(n, 0.2, np.float32)
    tokens = HeldOutTokens(
        distances=random.random((n, k)).cumsum(axis=1) + 0.1,
        hit=hit,
        residual=hit - probability[:, None],
        agrees=random.random((n, k)) < 0.5,
        probability=probability,
        confidence=random.random(n).astype(np.float32),
        entropy=random.random(n).astype(np.float32),
        nearest=random.random(n).astype(np.float32),
        documents=np.arange(n) % 6,
    )
    tuned = tune_tokens(tokens, n_neighbors=(k,))
    assert tuned.helps
    assert tuned.best == tuned.constant
    assert tuned.best.shrinkage > 0
