"""What else can be done with the same keys: the formulas, and that nothing is chosen on the rows that are measured."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.cifar100 import comparisons
from experiments.cifar100.comparisons import Searched, Seen, cache, compare, knn_lm, label_knn, tip_adapter
from experiments.cifar100.probe import fit_probe
from residual_memory import Memory, Observations

CLASSES, DIM = 6, 8


def seen(seed: int, n: int = 400, q: int = 120) -> Seen:
    """Clusters that a base knows half of."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CLASSES, DIM))
    labels = random.integers(0, CLASSES, n + q)
    keys = (centres[labels] + 0.7 * random.normal(size=(n + q, DIM))).astype(np.float32)
    said = (0.6 * random.dirichlet(np.ones(CLASSES), n + q) + 0.4 * np.eye(CLASSES)[labels // 2 * 2]).astype(np.float32)
    memory = Memory.create(dim=DIM, n_outputs=CLASSES, metric="cosine")
    memory.append(keys[:n], labels[:n], said[:n])
    return Seen(memory, Observations(np.arange(q), keys[n:], labels[n:], said[n:]))


def test_knn_lm_is_the_mixture_of_base_and_neighbours_labels() -> None:
    searched = Searched.of(seen(1))
    options = {"n_neighbors": 5, "bandwidth": 0.2, "mix": 0.3}
    weights = np.exp(-searched.distances[:, :5] / 0.2)
    votes = np.eye(CLASSES)[searched.votes[:, :5]]
    labels = np.einsum("qk,qkc->qc", weights / weights.sum(1, keepdims=True), votes)
    np.testing.assert_allclose(label_knn(searched, options), labels, atol=1e-12)
    np.testing.assert_allclose(knn_lm(searched, options), 0.7 * searched.base + 0.3 * labels, atol=1e-6)


def test_the_cache_weighs_by_inner_products_of_unit_keys() -> None:
    one = seen(1)
    searched = Searched.of(one)
    unit = np.asarray(one.queries.keys) / np.linalg.norm(one.queries.keys, axis=1, keepdims=True)
    rows = one.memory.snapshot.keys.take(np.arange(len(one.memory)))
    products = -np.sort(-unit @ rows.T, axis=1)[:, : searched.distances.shape[1]]
    weights = np.exp(10 * products)
    votes = np.einsum("qk,qkc->qc", weights / weights.sum(1, keepdims=True), np.eye(CLASSES)[searched.votes])
    np.testing.assert_allclose(cache(searched, {"sharpness": 10.0, "mix": 1.0}), votes, rtol=1e-3, atol=1e-5)


def test_methods_that_are_switched_off_give_the_base() -> None:
    searched = Searched.of(seen(1))
    np.testing.assert_allclose(cache(searched, {"sharpness": 10.0, "mix": 0.0}), searched.base, atol=1e-12)
    np.testing.assert_allclose(tip_adapter(searched, {"sharpness": 10.0, "strength": 0.0}), searched.base, atol=1e-6)


def test_every_method_is_measured_and_none_chooses_on_the_rows_that_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comparisons, "HIDDEN", 16)
    monkeypatch.setitem(comparisons.PROBES, 16, ({"weight_decay": 0.1},))
    choosing, final = seen(1), seen(2)
    labels = np.random.default_rng(0).permutation(np.asarray(final.queries.labels))
    shuffled = Seen(final.memory, replace(final.queries, labels=labels))
    found = {name: measure() for name, measure in compare(choosing, final)}
    again = {name: measure() for name, measure in compare(choosing, shuffled)}
    assert set(found) == {
        "label-knn",
        "knn-lm",
        "cache",
        "tip-adapter",
        "temperature-scaling",
        "linear-probe",
        "mlp-probe",
        "resmem-exponential",
    }
    assert all(found[name]["chosen"] == again[name]["chosen"] for name in found)
    assert found["knn-lm"]["gain"] > 0.05
    assert found["resmem-exponential"]["gain"] > 0.05
    assert found["temperature-scaling"]["gain"] == 0
    assert all(row["gain_low"] <= row["gain"] <= row["gain_high"] for row in found.values())
    assert found["knn-lm"]["extra_multiply_adds"] == 400 * DIM


def test_a_probe_learns_what_is_linear_and_a_hidden_layer_what_is_not() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(4000, 2)).astype(np.float32)
    line, corners = (x[:, 0] > 0).astype(int), ((x[:, 0] > 0) != (x[:, 1] > 0)).astype(int)
    assert (fit_probe(x, line, 2, n_epochs=100, rate=1e-2)(x).argmax(1) == line).mean() > 0.97
    assert (fit_probe(x, corners, 2, n_epochs=100, rate=1e-2)(x).argmax(1) == corners).mean() < 0.7
    assert (fit_probe(x, corners, 2, hidden=32, n_epochs=100)(x).argmax(1) == corners).mean() > 0.9
